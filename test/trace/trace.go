// Package trace follows a packet through an iptables ruleset, given as
// iptables-save text, the way netfilter would: hooks in their order, jumps,
// gotos and returns, rules and policies, address translation, marks, random
// choices and recent lists. Tests use it to ask what a ruleset does without a
// kernel, for every outcome that chance allows.
//
// It knows netfilter and nothing of Services, plans or proxiers. A match or a
// target that it does not know is an error that names the rule, so that no
// answer is ever given by ignoring something. Of the tables, nat and filter are
// followed; the others may be there but are not looked at.
package trace

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// State is what connection tracking thinks of a packet.
type State uint8

// States. The zero State is New.
const (
	New State = iota
	Established
	Related
	Invalid
)

// Packet is a packet of one connection, usually its first.
type Packet struct {
	In       string // interface it came in by; "" if the host itself sends it
	Src, Dst netip.AddrPort
	Protocol string // "tcp", "udp", "sctp", "icmp", ...
	State    State
	Mark     uint32

	// Translated says of a packet that is not New that its connection's
	// destination was translated when it was (ctstate DNAT).
	Translated bool

	// At is when the packet passes, on any clock; only the matches of recent
	// lists look at it.
	At time.Duration
}

// Host is the machine whose ruleset is traced.
type Host struct {
	// Interfaces are the host's interfaces with their addresses. Loopback need
	// not be named: 127.0.0.0/8 and ::1 are always the host's.
	Interfaces map[string][]netip.Addr
	// Routes say by which interface a destination is reached, the longest
	// prefix first. Without a route the interface is "".
	Routes []Route
}

// Route is an entry of a Host's routing table.
type Route struct {
	To  netip.Prefix
	Out string
}

// Local says whether a is one of the host's own addresses.
func (h *Host) Local(a netip.Addr) bool { return h.localOn(a, "") }

// localOn asks the same for one interface, "" for any.
func (h *Host) localOn(a netip.Addr, iface string) bool {
	if a.IsLoopback() {
		return iface == "" || iface == "lo"
	}
	for name, addrs := range h.Interfaces {
		if (iface == "" || iface == name) && slices.Contains(addrs, a) {
			return true
		}
	}
	return false
}

func (h *Host) route(a netip.Addr) string {
	if h.Local(a) {
		return "lo"
	}
	out, bits := "", -1
	for _, r := range h.Routes {
		if r.To.Contains(a) && r.To.Bits() > bits {
			out, bits = r.Out, r.To.Bits()
		}
	}
	return out
}

// Verdict is how a packet's way through the host ends.
type Verdict uint8

// Verdicts.
const (
	Forwarded Verdict = iota // left the host by an interface
	Delivered                // given to a process of the host
	Dropped
	Rejected
)

func (v Verdict) String() string {
	return [...]string{"forwarded", "delivered", "dropped", "rejected"}[v]
}

// Recent is the content of recent lists: by list and address, when it was last
// seen. A nil Recent is empty. It is not changed by tracing.
type Recent map[string]map[netip.Addr]time.Duration

func (r Recent) clone() Recent {
	out := make(Recent, len(r))
	for k, v := range r {
		out[k] = maps.Clone(v)
	}
	return out
}

// Outcome is one way in which a packet can pass.
type Outcome struct {
	Verdict     Verdict
	Probability float64 // of this outcome among all, by the random matches on the way

	Dst        netip.AddrPort // where it goes in the end
	Translated bool           // its destination was rewritten
	// Masqueraded says that the source becomes the host's own; SNAT, if valid,
	// that it becomes this one.
	Masqueraded bool
	SNAT        netip.AddrPort
	Out         string // interface it leaves by
	Mark        uint32
	Recent      Recent // lists as the packet leaves them

	// Path are the rules that matched, in order, as "table CHAIN: rule".
	Path []string
}

// String returns a line for people.
func (o Outcome) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", o.Verdict)
	if o.Verdict <= Delivered {
		fmt.Fprintf(&b, " to %s", o.Dst)
	}
	if o.Masqueraded {
		b.WriteString(" masqueraded")
	}
	if o.SNAT.IsValid() {
		fmt.Fprintf(&b, " from %s", o.SNAT)
	}
	return b.String()
}

// Destinations sums the probabilities of outcomes by where they end, those
// that end nowhere left out.
func Destinations(list []Outcome) map[netip.AddrPort]float64 {
	out := map[netip.AddrPort]float64{}
	for _, o := range list {
		if o.Verdict <= Delivered {
			out[o.Dst] += o.Probability
		}
	}
	return out
}

// Outcomes returns every way in which the packet can pass, following both
// sides of each random match. Their probabilities add up to one.
func (rs *Ruleset) Outcomes(h *Host, p Packet, recent Recent) ([]Outcome, error) {
	var out []Outcome
	// A walk cannot be forked in the middle, but it is cheap to repeat: script
	// holds the answers of the random matches so far, and the walk answers yes
	// to those beyond it. Turning the last yes into a no gives the next walk.
	var script []bool
	for {
		w := rs.newWalk(h, p, recent)
		asked := 0
		w.chance = func(float64) bool {
			if asked == len(script) {
				script = append(script, true)
			}
			asked++
			return script[asked-1]
		}
		o, err := w.run()
		if err != nil {
			return nil, err
		}
		out = append(out, o)
		for len(script) > 0 && !script[len(script)-1] {
			script = script[:len(script)-1]
		}
		if len(script) == 0 {
			return out, nil
		}
		script[len(script)-1] = false
	}
}

// Trace returns one way in which the packet can pass; chance answers the
// random matches, given the probability of yes.
func (rs *Ruleset) Trace(h *Host, p Packet, recent Recent, chance func(float64) bool) (Outcome, error) {
	w := rs.newWalk(h, p, recent)
	w.chance = chance
	return w.run()
}

// walk is one packet on its way.
type walk struct {
	rs     *Ruleset
	host   *Host
	packet Packet // with addresses and mark as they are now
	hook   string
	out    string
	chance func(float64) bool
	result Outcome
	depth  int
	steps  int
}

func (rs *Ruleset) newWalk(h *Host, p Packet, recent Recent) *walk {
	return &walk{rs: rs, host: h, packet: p,
		result: Outcome{Probability: 1, Translated: p.Translated, Recent: recent.clone()}}
}

// run takes the packet over the hooks. A packet that the host sends to itself
// leaves and comes in again by lo; its translation is settled then, so the nat
// rules of PREROUTING and INPUT are not asked a second time.
func (w *walk) run() (Outcome, error) {
	fromHost := w.packet.In == ""
	steps := []struct{ table, hook string }{{"nat", "PREROUTING"}}
	if fromHost {
		w.out = w.host.route(w.packet.Dst.Addr())
		steps = []struct{ table, hook string }{{"nat", "OUTPUT"}, {"filter", "OUTPUT"}}
	}
	for i := 0; i < len(steps); i++ {
		verdict, err := w.traverse(steps[i].table, steps[i].hook)
		if err != nil {
			return Outcome{}, err
		}
		if verdict != accept {
			return w.finish(map[verdictKind]Verdict{drop: Dropped, reject: Rejected}[verdict]), nil
		}
		local := w.host.Local(w.packet.Dst.Addr())
		switch {
		case i == 0 && !fromHost && local:
			steps = append(steps, []struct{ table, hook string }{{"filter", "INPUT"}, {"nat", "INPUT"}}...)
		case i == 0 && !fromHost:
			w.out = w.host.route(w.packet.Dst.Addr())
			steps = append(steps, []struct{ table, hook string }{{"filter", "FORWARD"}, {"nat", "POSTROUTING"}}...)
		case i == 0:
			w.out = w.host.route(w.packet.Dst.Addr())
		case i == 1 && fromHost:
			steps = append(steps, struct{ table, hook string }{"nat", "POSTROUTING"})
		case i == 2 && fromHost && local:
			w.packet.In = "lo"
			steps = append(steps, struct{ table, hook string }{"filter", "INPUT"})
		}
	}
	if w.host.Local(w.packet.Dst.Addr()) {
		return w.finish(Delivered), nil
	}
	return w.finish(Forwarded), nil
}

func (w *walk) finish(v Verdict) Outcome {
	o := w.result
	o.Verdict, o.Dst, o.Mark, o.Out = v, w.packet.Dst, w.packet.Mark, w.out
	return o
}

// traverse takes the packet through one built-in chain. nat sees only the first
// packet of a connection.
func (w *walk) traverse(tableName, hook string) (verdictKind, error) {
	t := w.rs.tables[tableName]
	if t == nil || (tableName == "nat" && w.packet.State != New) {
		return accept, nil
	}
	c := t.chains[hook]
	if c == nil {
		return accept, nil
	}
	w.hook = hook
	v, err := w.chain(t, c)
	if err != nil {
		return v, err
	}
	if v == next {
		v = c.policy
		if v != accept {
			w.step(t, c, "policy")
		}
	}
	return v, nil
}

// maxDepth is more than the kernel's own limit of nested jumps allows; a loop
// that iptables would refuse to load is an error here.
const maxDepth = 64

// maxSteps bounds the rules that one packet is compared with: chains that each
// jump twice to the next take exponential time without any loop.
const maxSteps = 10_000_000

// chain returns next when the packet falls out of the chain's end or meets a
// RETURN. A goto does not come back, so its verdict is the chain's own.
func (w *walk) chain(t *table, c *chain) (verdictKind, error) {
	if w.depth++; w.depth > maxDepth {
		return drop, fmt.Errorf("%s %s: jumps nested deeper than %d: a loop", t.name, c.name, maxDepth)
	}
	defer func() { w.depth-- }()
	for _, r := range c.rules {
		if w.steps++; w.steps > maxSteps {
			return drop, fmt.Errorf("%s %s: more than %d rules for one packet", t.name, c.name, maxSteps)
		}
		if !w.matches(r) {
			continue
		}
		if r.act == nil && r.jump == "" {
			continue // a rule that only counts
		}
		w.step(t, c, r.text)
		if r.jump != "" {
			v, err := w.chain(t, t.chains[r.jump])
			if err != nil || v != next || r.gotoChain {
				return v, err
			}
			continue
		}
		v, err := r.act(w)
		if err != nil {
			return v, fmt.Errorf("%s %s: %q: %w", t.name, c.name, r.text, err)
		}
		switch v {
		case next:
		case leave:
			return next, nil
		default:
			return v, nil
		}
	}
	return next, nil
}

func (w *walk) matches(r *rule) bool {
	for _, m := range r.matches {
		if !m(w) {
			return false
		}
	}
	return true
}

func (w *walk) step(t *table, c *chain, text string) {
	w.result.Path = append(w.result.Path, t.name+" "+c.name+": "+text)
}
