package plan

import (
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Make plans every port of a Service, in the Service's order. slices are all
// EndpointSlices that name the Service, of any family; those of another family
// than the node facts' are ignored. A nil Service, or one without a ClusterIP
// of this family, has no plans.
func Make(svc *model.Service, epSlices []*model.Slice, facts *Facts) []*Plan {
	if svc == nil {
		return nil
	}
	addrs := addressesOf(svc, facts)
	if len(addrs.cluster) == 0 {
		return nil
	}
	plans := make([]*Plan, 0, len(svc.Ports))
	seen := make(map[model.PortKey]bool, len(svc.Ports))
	healthLocal := 0
	if svc.HealthCheckNodePort != 0 {
		healthLocal = readyLocalAddresses(svc, epSlices, facts)
	}
	balance, problems := balanceOf(svc.Balance, facts)
	for _, port := range svc.Ports {
		key := model.PortKey{Namespace: svc.Namespace, Name: svc.Name, Port: port.Name, Protocol: port.Protocol}
		if port.Port == 0 || seen[key] {
			continue
		}
		seen[key] = true
		p := makePort(svc, port, addrs, chooseFor(svc, key, epSlices, facts, addrs.external || port.NodePort != 0), facts)
		p.HealthPort, p.HealthLocal = svc.HealthCheckNodePort, healthLocal
		p.Balance, p.Problems = balance, problems
		plans = append(plans, p)
	}
	return plans
}

// addresses are a Service's frontends' addresses of one family.
type addresses struct {
	cluster, externalIPs, loadBalancers []netip.Addr
	external                            bool // reachable from outside other than by NodePort
	sources                             []netip.Prefix
}

func addressesOf(svc *model.Service, facts *Facts) addresses {
	ofFamily := func(list []netip.Addr) []netip.Addr {
		var out []netip.Addr
		for _, a := range list {
			if a.IsValid() && model.FamilyOf(a) == facts.Family && !a.IsUnspecified() {
				out = append(out, a)
			}
		}
		return out
	}
	a := addresses{cluster: ofFamily(svc.ClusterIPs), loadBalancers: ofFamily(svc.LoadBalancerIPs)}
	if !facts.RefuseExternalIPs {
		a.externalIPs = ofFamily(svc.ExternalIPs)
	}
	a.external = len(a.externalIPs)+len(a.loadBalancers) > 0
	a.sources = sourcesOf(svc, a.loadBalancers, facts)
	return a
}

// sourcesOf returns who may use the load balancer addresses; nil for anybody.
// Ranges of the other family do not count, so that a family for which none is
// given has no limit, and a range of length 0 lifts it, both as in kube-proxy.
func sourcesOf(svc *model.Service, vips []netip.Addr, facts *Facts) []netip.Prefix {
	if len(svc.SourceRanges) == 0 {
		return nil
	}
	sources := []netip.Prefix{}
	coversNode := false
	any := false
	for _, r := range svc.SourceRanges {
		if model.FamilyOf(r.Addr()) != facts.Family {
			continue
		}
		any = true
		if r.Bits() == 0 {
			return nil
		}
		sources = append(sources, r.Masked())
		coversNode = coversNode || (facts.NodeIP.IsValid() && r.Contains(facts.NodeIP))
	}
	if !any {
		return nil
	}
	if coversNode {
		// A node that dials a load balancer address that it holds itself (on lo,
		// say) has that address as its source.
		for _, v := range vips {
			sources = append(sources, netip.PrefixFrom(v, v.BitLen()))
		}
	}
	slices.SortFunc(sources, netip.Prefix.Compare)
	return slices.Compact(sources)
}

func makePort(svc *model.Service, port model.ServicePort, addrs addresses, c choice, facts *Facts) *Plan {
	p := &Plan{
		PortKey:  model.PortKey{Namespace: svc.Namespace, Name: svc.Name, Port: port.Name, Protocol: port.Protocol},
		Protocol: port.Protocol,
		Cluster:  c.cluster, Local: c.local, Serving: c.serving, Unready: c.unready,
		Affinity:  svc.Affinity,
		Why:       c.why,
		Important: important(svc.ServiceName),
		created:   svc.Created,
		uid:       svc.UID,
	}
	internal := internalRoutes(svc, c, facts)
	external := externalRoutes(svc, c, facts)
	add := func(kind Kind, addr netip.Addr, number uint16, r routes, sources []netip.Prefix) {
		p.Frontends = append(p.Frontends, Frontend{Kind: kind, Addr: addr, Port: number, Sources: sources,
			FromPod: r.pod, FromNode: r.node, FromOutside: r.outside})
	}
	for _, a := range addrs.cluster {
		add(ClusterIP, a, port.Port, internal, nil)
	}
	for _, a := range addrs.externalIPs {
		add(ExternalIP, a, port.Port, external, nil)
	}
	for _, a := range addrs.loadBalancers {
		add(LoadBalancer, a, port.Port, external, addrs.sources)
	}
	if port.NodePort != 0 {
		add(NodePort, netip.Addr{}, port.NodePort, external, nil)
	}
	p.Frontends = withoutRepeats(p.Frontends)
	return p
}

// withoutRepeats drops addresses that the same Service port already has: an
// externalIP that is also the load balancer's, say. The first kind wins.
func withoutRepeats(list []Frontend) []Frontend {
	out := list[:0]
	for _, f := range list {
		if !slices.ContainsFunc(out, func(o Frontend) bool { return o.Addr == f.Addr && o.Port == f.Port }) {
			out = append(out, f)
		}
	}
	return out
}

type routes struct{ pod, node, outside Route }

// internalRoutes: ClusterIP traffic goes to the set that
// internalTrafficPolicy names. Whoever is not a pod of this node is masqueraded
// (the node itself included: replies must come back through it), but only if a
// local detector can tell; masqueradeAll needs none.
func internalRoutes(svc *model.Service, c choice, facts *Facts) routes {
	to := c.target(svc.InternalLocal)
	pod := Route{To: to}
	other := Route{To: to}
	if to >= Cluster {
		pod.Masquerade = facts.MasqueradeAll
		other.Masquerade = facts.MasqueradeAll || facts.DetectLocal
	}
	return routes{pod, other, other}
}

// externalRoutes: with externalTrafficPolicy Cluster everybody is masqueraded
// and gets any endpoint. With Local, clients outside keep their source and get
// this node's endpoints; a pod or the node itself is treated as if its traffic
// had gone out and come back through a node that has endpoints (Cluster set).
func externalRoutes(svc *model.Service, c choice, facts *Facts) routes {
	if !svc.ExternalLocal {
		r := Route{To: c.target(false)}
		r.Masquerade = r.To >= Cluster
		return routes{r, r, r}
	}
	outside := Route{To: c.target(true)}
	node := Route{To: c.target(false)}
	pod := node
	node.Masquerade = node.To >= Cluster
	if !facts.DetectLocal {
		pod = outside
	}
	return routes{pod, node, outside}
}

// important names the Services that a new node needs before all others: the
// API server, then what serves the cluster itself (DNS, webhooks).
func important(n model.ServiceName) bool {
	return n.Namespace == "kube-system" || (n.Namespace == "default" && n.Name == "kubernetes")
}
