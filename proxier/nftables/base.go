package nftables

import (
	"net/netip"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Hooks of IPv4 and IPv6 (linux/netfilter.h).
const (
	inPrerouting = iota
	inInput
	inForward
	inOutput
	inPostrouting
)

// The hooks. Translation is at nftables' own priorities, so that what others do
// before or after it keeps its place.
var (
	hookPrerouting  = &hook{"nat", "prerouting", inPrerouting, -100, "dstnat"}
	hookOutput      = &hook{"nat", "output", inOutput, -100, "-100"}
	hookPostrouting = &hook{"nat", "postrouting", inPostrouting, 100, "srcnat"}
	hookForward     = &hook{"filter", "forward", inForward, 0, "filter"}
	hookInput       = &hook{"filter", "input", inInput, 0, "filter"}

	// Once for a connection, as all chains of type nat, and before anybody translates its
	// source: who does ends the way through these chains.
	hookEndOut = &hook{"nat", "postrouting", inPostrouting, 0, "filter"}
	hookEndIn  = &hook{"nat", "input", inInput, 0, "filter"}

	// Before translation, and after it.
	hookCountIn       = &hook{"filter", "prerouting", inPrerouting, -150, "mangle"}
	hookCountOwn      = &hook{"filter", "output", inOutput, -150, "mangle"}
	hookCountOut      = &hook{"filter", "postrouting", inPostrouting, 150, "150"}
	hookCountReturned = &hook{"filter", "input", inInput, 150, "150"}
)

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.MustParsePrefix("::1/128")
)

// static is what does not depend on Services.
type static struct {
	chains   []chain // those first that others lead to
	elements []element
}

// base gives the static part. complete says that every Service is there: before that
// a port or an address of the cluster's that no Service has is no reason to refuse
// anybody. It may be among those that are still to come, and another mode serve it.
func (c compiler) base(o *Options, facts *plan.Facts, complete bool) static {
	s := static{chains: []chain{
		{name: chainReject, rules: []rule{newRule(c.reject())}},
		{name: chainServices, rules: c.services(facts, complete)},
		{name: chainPrerouting, hook: hookPrerouting, rules: []rule{newRule(jump(chainServices))}},
		{name: chainOutput, hook: hookOutput, rules: []rule{newRule(jump(chainServices))}},
		{name: chainRemember, rules: c.remember()},
		{name: chainRememberOut, hook: hookEndOut, rules: []rule{newRule(ctTranslated(), jump(chainRemember))}},
		{name: chainRememberIn, hook: hookEndIn, rules: []rule{newRule(ctTranslated(), jump(chainRemember))}},
		{name: chainPostrouting, hook: hookPostrouting, rules: c.postrouting()},
		{name: chainForward, hook: hookForward, rules: c.forward(o)},
	}}
	if localhostNodePorts(facts) {
		s.chains = append(s.chains,
			chain{name: chainMartian, rules: []rule{newRule(ctKnown(), returns()), newRule(ctTranslated(), returns()), newRule(drop())}},
			chain{name: chainInput, hook: hookInput, rules: []rule{newRule(
				c.within(c.daddr(), loopback4, false), c.within(c.saddr(), loopback4, true), jump(chainMartian))}})
	}
	if o.Traffic > 0 {
		s.chains = append(s.chains, c.counting()...)
	}
	for _, a := range nodePortAddresses(facts) {
		s.elements = append(s.elements, element{key: key{set: setNodePortAddresses, addr: a}})
	}
	return s
}

func localhostNodePorts(facts *plan.Facts) bool {
	return facts.Family == model.IPv4 && facts.LocalhostNodePorts
}

// nodePortAddresses are where node ports are served if not on all addresses.
func nodePortAddresses(facts *plan.Facts) []netip.Addr {
	var out []netip.Addr
	for _, a := range facts.NodePorts.Addrs {
		if !facts.NodePorts.All && (!a.IsLoopback() || localhostNodePorts(facts)) {
			out = append(out, a)
		}
	}
	return out
}

// services is where every new connection comes by. One lookup tells those that are
// to a Service; what is left is to no port of one, and perhaps to a node port. That
// nobody serves an address of the cluster is said before node ports: a ClusterIP can
// be the node's own address as well, in ipvs mode's wake.
func (c compiler) services(facts *plan.Facts, complete bool) []rule {
	rules := []rule{newRule(vmap(setServices, c.frontend()...))}
	if complete {
		rules = append(rules, newRule(in(setClusterIPs, c.daddr()), goTo(chainReject)))
		for _, cidr := range serviceCIDRs(facts) {
			rules = append(rules, newRule(c.within(c.daddr(), cidr, false), goTo(chainReject)))
		}
	}
	here := stmt{}
	if !facts.NodePorts.All {
		return append(rules, newRule(in(setNodePortAddresses, c.daddr()), vmap(setNodePorts, nodePort()...)))
	}
	switch {
	case c.family == model.IPv6:
		here = c.within(c.daddr(), loopback6, true)
	case !facts.LocalhostNodePorts:
		here = c.within(c.daddr(), loopback4, true)
	}
	return append(rules, newRule(isLocal("daddr"), here, vmap(setNodePorts, nodePort()...)))
}

// remember finds out whether a new connection's client is to be remembered, and for how
// long, when it is known which endpoint it goes to. Node ports are asked for by number
// alone: a ClusterIP with the same number is remembered as well, for nobody to ask.
//
// Each protocol has rules of its own, for nft's sake alone: it reads no number of a
// port from conntrack whose protocol the rule does not fix.
func (c compiler) remember() []rule {
	var rules []rule
	for _, p := range []model.Protocol{model.TCP, model.UDP, model.SCTP} {
		rules = append(rules,
			newRule(isProtocol(p), vmap(setSticky, c.dialled()...)),
			newRule(isProtocol(p), vmap(setPortSticky, l4proto(), dialledPort())))
	}
	return rules
}

// postrouting masquerades what was marked on its way in, and endpoints that reached
// themselves.
func (c compiler) postrouting() []rule {
	self := append([]operand{c.saddr()}, c.frontend()...)
	return []rule{
		newRule(unmark(c.bit), masquerade()),
		newRule(ctTranslated(), in(setHairpin, self...), masquerade()),
	}
}

// forward drops what conntrack cannot place: it would pass untranslated, and its
// receiver answer with a reset that ends the connection (kubernetes 74839).
func (c compiler) forward(o *Options) []rule {
	if o.AcceptInvalid {
		return nil
	}
	return []rule{newRule(ctInvalid(), count(), drop())}
}
