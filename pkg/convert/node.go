package convert

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// taintToBeDeleted is what the cluster autoscaler puts on a node that it is
// about to remove (KEP-3836).
const taintToBeDeleted = "ToBeDeletedByClusterAutoscaler"

// Node converts a Node, and returns what could not be used of it.
func (c *Converter) Node(n *corev1.Node) (*model.Node, []string) {
	var p problems
	out := &model.Node{
		Name:     n.Name,
		UID:      string(n.UID),
		Zone:     c.names.get(n.Labels[corev1.LabelTopologyZone]),
		Deleting: n.DeletionTimestamp != nil,
		Draining: slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == taintToBeDeleted }),
	}
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for i, na := range n.Status.Addresses {
			if na.Type != kind {
				continue
			}
			a, ok := parseAddr(na.Address)
			if !ok || a.IsUnspecified() || a.IsMulticast() {
				p.add("status.addresses[%d]: %q is not a usable IP address", i, na.Address)
			} else if !slices.Contains(out.Addrs, a) {
				out.Addrs = append(out.Addrs, a)
			}
		}
	}
	out.PodCIDRs = podCIDRs(&n.Spec, &p)
	return out, p.all()
}

func podCIDRs(spec *corev1.NodeSpec, p *problems) []netip.Prefix {
	list := spec.PodCIDRs
	if len(list) == 0 && spec.PodCIDR != "" {
		list = []string{spec.PodCIDR}
	}
	var out []netip.Prefix
	for i, s := range list {
		r, ok := parsePrefix(s)
		if !ok {
			p.add("spec.podCIDRs[%d]: %q is not a CIDR", i, s)
			continue
		}
		out = append(out, r)
	}
	return out
}
