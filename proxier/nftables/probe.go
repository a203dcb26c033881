package nftables

import (
	"errors"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Host is what a node offers to this proxier.
type Host struct {
	// Limits are sentences about what will not work as one may expect.
	Limits []string
}

// Unavailable is Probe's error where the kernel answered that it does not have what
// nftables mode takes: asking again would give the same.
type Unavailable struct {
	Missing []string // a sentence for each
}

func (u *Unavailable) Error() string { return strings.Join(u.Missing, "; ") }

// probeTable is made and deleted in one transaction, so that nobody ever meets it.
const probeTable = "sluice-probe"

// feature is something that the rules need, with a transaction that needs it too.
type feature struct {
	what string
	try  []message
}

// features are what the kernel is asked for, each with what has it.
func features(f model.Family) []feature {
	v := "ipv4"
	if f == model.IPv6 {
		v = "ipv6"
	}
	o := Options{Family: f, MasqueradeBit: 14}
	c := newCompiler(&o)
	facts := &plan.Facts{Family: f, NodePorts: plan.NodePortAddresses{All: true}}
	base := func(h *hook, rules ...rule) message {
		return message{what: writeChain, chain: chain{name: "probe", hook: h, rules: rules}}
	}
	set := func(s setID) message { return message{what: putSet, set: s} }
	n := 2
	return []feature{
		{"connection tracking in rules (module nft_ct)", []message{base(hookForward, newRule(ctInvalid(), drop()))}},
		{"chains that translate (module nft_chain_nat)", []message{base(hookPrerouting)}},
		{"refusing before translation (Linux 5.9, module nft_reject_" + v + ")", []message{base(hookPrerouting, newRule(c.reject()))}},
		{"masquerading (module nft_masq)", []message{base(hookPostrouting, newRule(masquerade()))}},
		{"the type of an address (module nft_fib_" + v + ")", []message{base(hookPrerouting, newRule(isLocal("daddr")))}},
		{"random numbers (module nft_numgen) in maps of several fields, and translation by them (module nft_nat)",
			[]message{set(setEndpoints), base(hookPrerouting, c.dnat(setEndpoints, append(c.frontend(), random(n))...))}},
		{"maps that rules write, for affinity (module nft_set_hash)",
			[]message{set(setAffinity), base(hookEndOut, c.update(time.Second))}},
		{"ranges in sets of several fields, for loadBalancerSourceRanges (Linux 5.6)",
			[]message{set(setSources), base(hookPrerouting, newRule(in(setSources, append(c.frontend(), c.saddr())...), drop()))}},
		{"maps of verdicts", append([]message{set(setServices), set(setNodePorts), set(setClusterIPs),
			{what: writeChain, chain: chain{name: chainReject}}}, base(hookPrerouting, c.services(facts, true)...))},
	}
}

// lacking says whether an error is the kernel's word that it does not have what it
// was asked for.
func lacking(err error) bool {
	for _, no := range []error{syscall.ENOENT, syscall.EOPNOTSUPP, syscall.EINVAL, syscall.EAFNOSUPPORT, syscall.EPROTONOSUPPORT} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}
