package config

import (
	"fmt"
	"net/netip"
	"slices"
)

const (
	keywordPrimary   = "primary"
	keywordLocalhost = "localhost"
	keywordAll       = "all"
)

// NodePortAddresses says on which addresses of the node NodePorts are served.
type NodePortAddresses struct {
	IPv4, IPv6 NodePortFilter
}

// NodePortFilter is nodePortAddresses for one family. The keywords that need no
// knowledge of the node are already worked out: a node.Spec of the same All,
// Primary and Prefixes, and without Localhost, means the same.
type NodePortFilter struct {
	// All serves every local address. It is set by the keyword all, by a CIDR of
	// length 0, and, as in kube-proxy, if nothing was given for the family,
	// even if something was given for the other one.
	All bool
	// Primary serves the address that the Node object names first in the family.
	Primary bool
	// Prefixes serve the node's addresses in them; localhost is among them as
	// 127.0.0.0/8 or ::1/128. Empty if All.
	Prefixes []netip.Prefix
}

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.MustParsePrefix("::1/128")
)

func parseNodePortAddresses(entries []string, ps *problems) NodePortAddresses {
	var v4, v6 NodePortFilter
	seen := map[string]bool{}
	for i, entry := range entries {
		field := fmt.Sprintf("nodePortAddresses[%d]", i)
		switch entry {
		case keywordPrimary:
			v4.Primary, v6.Primary = true, true
		case keywordLocalhost:
			v4.Prefixes, v6.Prefixes = append(v4.Prefixes, loopback4), append(v6.Prefixes, loopback6)
		case keywordAll:
			v4.All, v6.All = true, true
		default:
			cidr, ok := parseCIDR(entry)
			if !ok {
				ps.add(field, "%q is neither a CIDR nor one of primary, localhost, all", entry)
				continue
			}
			family := &v6
			if cidr.Addr().Is4() {
				family = &v4
			}
			family.All = family.All || cidr.Bits() == 0
			family.Prefixes = append(family.Prefixes, cidr)
			continue
		}
		if seen[entry] {
			ps.add(field, "%q is there twice", entry)
		}
		seen[entry] = true
	}
	return NodePortAddresses{IPv4: v4.normal(), IPv6: v6.normal()}
}

// normal makes filters that mean the same equal.
func (f NodePortFilter) normal() NodePortFilter {
	if f.All || !f.Primary && len(f.Prefixes) == 0 {
		return NodePortFilter{All: true}
	}
	slices.SortFunc(f.Prefixes, netip.Prefix.Compare)
	f.Prefixes = slices.Compact(f.Prefixes)
	return f
}
