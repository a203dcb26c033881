package scenarios

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/test/trace"
)

// Rules is a ruleset that packets can be followed through.
type Rules interface {
	Outcomes(h *trace.Host, p trace.Packet, memory trace.Memory) ([]trace.Outcome, error)
}

// hostFilter is the host's own filter table with a policy that drops. For nftables
// it is one more table: what another one accepts is dropped all the same.
const hostFilter = `
table ip filter {
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
	}
}
table ip6 filter {
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
	}
}
`

// NFTables parses a table of the proxier's as nft lists it, together with the policy
// of FORWARD on the scenario's node.
func (s *Scenario) NFTables(list string) (*trace.NFTables, error) {
	if s.Settings.ForwardPolicy == "DROP" {
		list += hostFilter
	}
	return trace.ParseNFTables(list)
}

// Rules parses an iptables ruleset of the proxier's as it stands on the scenario's
// node, with the policy of FORWARD there.
func (s *Scenario) Rules(save string) (*trace.Ruleset, error) {
	if s.Settings.ForwardPolicy == "DROP" {
		save = strings.Replace(save, ":FORWARD ACCEPT", ":FORWARD DROP", 1)
	}
	return trace.Parse(save)
}

// PodLink returns the interface by which node1 reaches a pod of its own: the
// bridge if the scenario has one, and else one of its own whose name begins
// with "veth".
func (s *Scenario) PodLink(h *Host) string {
	if s.Settings.BridgeInterface != "" {
		return s.Settings.BridgeInterface
	}
	return "veth-" + h.Name
}

// machine is node1 as the tracer sees it.
func (s *Scenario) machine() *trace.Host {
	m := &trace.Host{
		Interfaces: map[string][]netip.Addr{"eth0": s.Cluster.Host(NodeName).Addrs},
		Routes: []trace.Route{
			{To: netip.MustParsePrefix("0.0.0.0/0"), Out: "eth0"},
			{To: netip.MustParsePrefix("::/0"), Out: "eth0"},
		},
	}
	for i := range s.Cluster.Hosts {
		h := &s.Cluster.Hosts[i]
		if h.On != NodeName {
			continue
		}
		for _, a := range h.Addrs {
			m.Routes = append(m.Routes, trace.Route{To: netip.PrefixFrom(a, a.BitLen()), Out: s.PodLink(h)})
		}
	}
	return m
}

// Follow traces a flow through node1's ruleset, of the flow's family, and returns
// what is not as the flow says: nil if all is well.
func (s *Scenario) Follow(f *Flow, rules Rules) error {
	p := s.packet(f)
	outs, err := rules.Outcomes(s.machine(), p, nil)
	if err != nil {
		return err
	}
	if err := f.judge(outs); err != nil {
		return err
	}
	if f.Sticky == 0 {
		return nil
	}
	return s.followSticky(f, rules, p, outs)
}

// Outcomes returns every way that a flow can take through node1's ruleset.
func (s *Scenario) Outcomes(f *Flow, rules Rules) ([]trace.Outcome, error) {
	return rules.Outcomes(s.machine(), s.packet(f), nil)
}

// Again returns every way that the flow's next connection can take, after one that went
// such a way.
func (s *Scenario) Again(f *Flow, rules Rules, first trace.Outcome) ([]trace.Outcome, error) {
	return rules.Outcomes(s.machine(), s.packet(f), first.Memory)
}

// packet is the first one of a flow, as it reaches node1.
func (s *Scenario) packet(f *Flow) trace.Packet {
	p := trace.Packet{Src: netip.AddrPortFrom(f.Source, 40000), Dst: f.To, Protocol: f.Protocol.String()}
	switch {
	case f.From.Name == NodeName:
	case f.From.On == NodeName:
		p.In = s.PodLink(f.From)
	default:
		p.In = "eth0"
	}
	return p
}

// followSticky: whichever endpoint a client had first, it has again until its time is
// up, and then any.
func (s *Scenario) followSticky(f *Flow, rules Rules, p trace.Packet, outs []trace.Outcome) error {
	for _, first := range outs {
		for _, step := range []struct {
			at  time.Duration
			any bool
		}{{f.Sticky - time.Second, false}, {f.Sticky + time.Second, true}} {
			p.At = step.at
			again, err := rules.Outcomes(s.machine(), p, first.Memory)
			if err != nil {
				return err
			}
			want := map[netip.AddrPort]float64{first.Dst: 1}
			if step.any {
				want = trace.Destinations(outs)
			}
			if got := trace.Destinations(again); !sameChances(got, want) {
				return fmt.Errorf("after %s to %s, %s later: %v", f.Text, first.Dst, step.at, got)
			}
		}
	}
	return nil
}

func sameChances(a, b map[netip.AddrPort]float64) bool {
	return maps.EqualFunc(a, b, func(x, y float64) bool { return math.Abs(x-y) < tolerance })
}

func (f *Flow) judge(outs []trace.Outcome) error {
	bad := func(o trace.Outcome, why string) error {
		return fmt.Errorf("%s: %s; its way:\n  %s", o, why, strings.Join(o.Path, "\n  "))
	}
	chances := map[netip.AddrPort]float64{}
	for _, o := range outs {
		passed := o.Verdict == trace.Forwarded || o.Verdict == trace.Delivered
		switch {
		case f.Expect == Reject && o.Verdict != trace.Rejected:
			return bad(o, "not rejected")
		case f.Expect == Drop && o.Verdict != trace.Dropped:
			return bad(o, "not dropped")
		case f.Expect == None && (!passed || o.Translated || o.Masqueraded):
			return bad(o, "not left alone")
		case f.Expect == Endpoints && (!passed || !o.Translated):
			return bad(o, "not translated")
		}
		if f.Expect != Endpoints {
			continue
		}
		masq := f.Masq
		if len(f.Target) > 0 {
			t := f.TargetAt(o.Dst)
			if t == nil {
				return bad(o, "an endpoint that is not expected")
			}
			masq = t.Masq
		}
		if o.Masqueraded != masq {
			return bad(o, fmt.Sprintf("masqueraded is %v", o.Masqueraded))
		}
		chances[o.Dst] += o.Probability
	}
	return f.judgeChances(chances)
}

// tolerance is for probabilities that the kernel keeps as numbers out of 2^31.
const tolerance = 1e-6

func (f *Flow) judgeChances(chances map[netip.AddrPort]float64) error {
	if f.Count > 0 {
		if len(chances) != f.Count {
			return fmt.Errorf("%d endpoints", len(chances))
		}
		for a, c := range chances {
			if math.Abs(c-1/float64(f.Count)) > tolerance {
				return fmt.Errorf("%s is chosen with probability %v", a, c)
			}
		}
	}
	for _, t := range f.Target {
		sum := 0.0
		for a, c := range chances {
			if t.Is(a) {
				sum += c
			}
		}
		if math.Abs(sum-t.Chance) > tolerance {
			return fmt.Errorf("%s is chosen with probability %v, want %v", t.Host.Name, sum, t.Chance)
		}
	}
	return nil
}

// TargetAt returns the expected endpoint at an address, nil if there is none.
func (f *Flow) TargetAt(a netip.AddrPort) *Target {
	for i := range f.Target {
		if f.Target[i].Is(a) {
			return &f.Target[i]
		}
	}
	return nil
}
