package convert

import (
	"slices"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// ServiceCIDR converts a ServiceCIDR, and returns what could not be used of it.
// Its condition Ready does not matter: one that is being deleted stays until no
// ClusterIP needs it any more, and its other addresses are nobody's until then.
func (c *Converter) ServiceCIDR(s *networkingv1.ServiceCIDR) (*model.ServiceCIDR, []string) {
	var p problems
	out := &model.ServiceCIDR{Name: c.names.get(s.Name)}
	for i, text := range s.Spec.CIDRs {
		r, ok := parsePrefix(text)
		switch {
		case !ok:
			p.add("spec.cidrs[%d]: %q is not a CIDR", i, text)
		case slices.Contains(out.Prefixes, r):
			p.add("spec.cidrs[%d]: %s is there twice", i, r)
		default:
			out.Prefixes = append(out.Prefixes, r)
		}
	}
	return out, p.all()
}
