package node

import (
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Spec is nodePortAddresses: keywords and CIDRs, which may be mixed. Prefixes
// can be of both families; each family looks at its own. The zero Spec is the
// option left empty.
type Spec struct {
	All       bool           // keyword all
	Primary   bool           // keyword primary: the node's own IP of each family
	Localhost bool           // keyword localhost
	Prefixes  []netip.Prefix // the CIDRs
}

var loopback = map[model.Family]netip.Prefix{
	model.IPv4: netip.MustParsePrefix("127.0.0.0/8"),
	model.IPv6: netip.MustParsePrefix("::1/128"),
}

// prefixes turns the keywords into CIDRs of one family, as kube-proxy does. all
// is true if every address is meant: by keyword, by a CIDR of length 0, or
// because nothing at all is given for this family, though it may be for the
// other. A primary IP that is not known or a loopback address gives nothing.
func (s Spec) prefixes(family model.Family, primary netip.Addr) (list []netip.Prefix, all bool) {
	for _, p := range s.Prefixes {
		if p.IsValid() && model.FamilyOf(p.Addr()) == family {
			list = append(list, p.Masked())
		}
	}
	if s.Primary && primary.IsValid() && model.FamilyOf(primary) == family && !primary.IsLoopback() {
		list = append(list, netip.PrefixFrom(primary, primary.BitLen()))
	}
	if s.Localhost {
		list = append(list, loopback[family])
	}
	all = s.All || len(list) == 0 ||
		slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Bits() == 0 })
	if all {
		return nil, true
	}
	return list, false
}

// Select says on which of the node's addresses NodePorts are served. addrs are
// the node's own, of any family; primary is this family's primary IP, invalid
// if there is none.
func Select(spec Spec, family model.Family, addrs []netip.Addr, primary netip.Addr) plan.NodePortAddresses {
	list, all := spec.prefixes(family, primary)
	if all {
		return plan.NodePortAddresses{All: true}
	}
	out := []netip.Addr{}
	for _, a := range addrs {
		a = a.WithZone("")
		if slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) }) {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return plan.NodePortAddresses{Addrs: slices.Compact(out)}
}

// IncludesLocalhost says whether NodePorts are asked for on 127.0.0.1 by a Spec.
// Whether they are served there depends on the mode and on
// --iptables-localhost-nodeports, too. Other loopback addresses do not count: the
// node has them, but on no interface, and so nothing is ever served there.
func IncludesLocalhost(spec Spec, primary netip.Addr) bool {
	list, all := spec.prefixes(model.IPv4, primary)
	localhost := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	return all || slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(localhost) })
}

// PrimaryIP returns the node's primary IP of a family: the bind address if it is
// a specific one, else the first of the Node's status addresses, else an invalid
// Addr. node may be nil: not known yet.
func PrimaryIP(bind netip.Addr, node *model.Node, family model.Family) netip.Addr {
	if bind = bind.Unmap().WithZone(""); bind.IsValid() && !bind.IsUnspecified() && model.FamilyOf(bind) == family {
		return bind
	}
	if node != nil {
		for _, a := range node.Addrs {
			if a = a.Unmap(); a.IsValid() && model.FamilyOf(a) == family {
				return a
			}
		}
	}
	return netip.Addr{}
}
