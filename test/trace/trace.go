// Package trace follows a packet through a ruleset, given as the text that
// iptables-save or "nft list" prints, the way netfilter would: hooks in their
// order, jumps, gotos and returns, rules and policies, address translation, marks,
// random choices, and what rules remember of earlier packets. Tests use it to ask
// what a ruleset does without a kernel, for every outcome that chance allows.
//
// It knows netfilter and nothing of Services, plans or proxiers. A match or a
// target that it does not know is an error that names the rule, so that no
// answer is ever given by ignoring something. Of iptables' tables, nat and filter
// are followed; the others may be there but are not looked at. Of nftables' language
// it knows what this project's rules are made of.
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

// Packet is a packet of one connection, sent by its client; usually the first.
type Packet struct {
	In       string // interface it came in by; "" if the host itself sends it
	Src, Dst netip.AddrPort
	Protocol string // "tcp", "udp", "sctp", "icmp", ...
	State    State
	Mark     uint32

	// Translated says of a packet that is not New that its connection's
	// destination was translated when it was (ctstate DNAT).
	Translated bool

	// At is when the packet passes, on any clock; only rules that remember look at
	// it.
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

// Memory is what rules have noted of earlier packets, by the list or map that it
// stands in and by key: a recent list's are addresses, a map's as nft writes them. A
// nil Memory is empty. It is not changed by tracing.
type Memory map[string]map[string]Entry

// Entry is one note.
type Entry struct {
	Seen  time.Duration // when it was made, or prolonged
	Keep  time.Duration // for how long from then; 0 in recent lists, whose matches say that
	Value string        // of a map's element
}

func (m Memory) clone() Memory {
	out := make(Memory, len(m))
	for k, v := range m {
		out[k] = maps.Clone(v)
	}
	return out
}

// list returns a list to write into.
func (m Memory) list(name string) map[string]Entry {
	if m[name] == nil {
		m[name] = map[string]Entry{}
	}
	return m[name]
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
	Memory      Memory // as the packet leaves it

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
func (rs *Ruleset) Outcomes(h *Host, p Packet, memory Memory) ([]Outcome, error) {
	return outcomes(func(choose func(int) int) (Outcome, error) {
		return rs.Trace(h, p, memory, func(float64) bool { return choose(2) == 0 })
	})
}

// outcomes takes every way of a walk, which asks choose for a number below its
// argument wherever there are several.
//
// A walk cannot be forked in the middle, but it is cheap to repeat: script holds
// the answers so far, and the walk gets 0 for what it asks beyond it. Raising the
// last answer that can be raised gives the next walk.
func outcomes(walk func(choose func(int) int) (Outcome, error)) ([]Outcome, error) {
	type answer struct{ is, of int }
	var out []Outcome
	var script []answer
	for {
		asked := 0
		o, err := walk(func(n int) int {
			if asked == len(script) {
				script = append(script, answer{0, n})
			}
			asked++
			return script[asked-1].is
		})
		if err != nil {
			return nil, err
		}
		out = append(out, o)
		for len(script) > 0 && script[len(script)-1].is == script[len(script)-1].of-1 {
			script = script[:len(script)-1]
		}
		if len(script) == 0 {
			return out, nil
		}
		script[len(script)-1].is++
	}
}

// Trace returns one way in which the packet can pass; chance answers the
// random matches, given the probability of yes.
func (rs *Ruleset) Trace(h *Host, p Packet, memory Memory, chance func(float64) bool) (Outcome, error) {
	w := newWalk(h, p, memory)
	w.traverse, w.chance = rs.traverse, chance
	return w.run()
}

// walk is one packet on its way.
type walk struct {
	host    *Host
	packet  Packet         // with addresses and mark as they are now
	dialled netip.AddrPort // where it was sent to
	hook    string
	kind    string // of the rules that are asked there: "nat", "filter"
	out     string
	result  Outcome
	depth   int
	steps   int

	// again says that a packet that the host sends to itself comes in: nat is done with
	// it.
	again bool

	// traverse takes the packet through the rules at a hook.
	traverse func(w *walk, hook string) (verdictKind, error)

	chance func(float64) bool // for iptables' rules
	choose func(int) int      // for those of nftables
	fault  error              // something of the packet that a rule asked for is not known
}

func newWalk(h *Host, p Packet, memory Memory) *walk {
	return &walk{host: h, packet: p, dialled: p.Dst,
		result: Outcome{Probability: 1, Translated: p.Translated, Memory: memory.clone()}}
}

// run takes the packet over the hooks. A packet that the host sends to itself
// leaves and comes in again by lo.
func (w *walk) run() (Outcome, error) {
	fromHost := w.packet.In == ""
	hooks := []string{"PREROUTING"}
	if fromHost {
		w.out = w.host.route(w.packet.Dst.Addr())
		hooks = []string{"OUTPUT", "POSTROUTING"}
	}
	for i := 0; i < len(hooks); i++ {
		w.hook = hooks[i]
		verdict, err := w.traverse(w, w.hook)
		if err != nil {
			return Outcome{}, err
		}
		if verdict != accept {
			return w.finish(map[verdictKind]Verdict{drop: Dropped, reject: Rejected}[verdict]), nil
		}
		local := w.host.Local(w.packet.Dst.Addr())
		switch {
		case w.hook == "PREROUTING" && local:
			hooks = append(hooks, "INPUT")
		case w.hook == "PREROUTING":
			w.out = w.host.route(w.packet.Dst.Addr())
			hooks = append(hooks, "FORWARD", "POSTROUTING")
		case w.hook == "POSTROUTING" && fromHost && local:
			w.packet.In, w.again = "lo", true
			hooks = append(hooks, "PREROUTING")
		}
	}
	if w.host.Local(w.packet.Dst.Addr()) {
		return w.finish(Delivered), nil
	}
	return w.finish(Forwarded), nil
}

// asks says whether rules of a kind are asked: nat sees only the first packet of a
// connection, and each hook of it once.
func (w *walk) asks(kind string) bool {
	w.kind = kind
	return kind != "nat" || w.packet.State == New && !w.again
}

// rerouted is for after nat rules of OUTPUT: the packet may leave elsewhere now.
func (w *walk) rerouted() {
	if w.hook == "OUTPUT" {
		w.out = w.host.route(w.packet.Dst.Addr())
	}
}

func (w *walk) finish(v Verdict) Outcome {
	o := w.result
	o.Verdict, o.Dst, o.Mark, o.Out = v, w.packet.Dst, w.packet.Mark, w.out
	return o
}

// hookTables are the tables whose built-in chains are at a hook, in order.
var hookTables = map[string][]string{"PREROUTING": {"nat"}, "INPUT": {"filter", "nat"}, "FORWARD": {"filter"},
	"OUTPUT": {"nat", "filter"}, "POSTROUTING": {"nat"}}

// traverse takes the packet through the built-in chains at a hook.
func (rs *Ruleset) traverse(w *walk, hook string) (verdictKind, error) {
	for _, name := range hookTables[hook] {
		t := rs.tables[name]
		if t == nil || t.chains[hook] == nil || !w.asks(name) {
			continue
		}
		if v, err := t.enter(w, t.chains[hook]); err != nil || v != accept {
			return v, err
		}
		w.rerouted()
	}
	return accept, nil
}

func (t *table) enter(w *walk, c *chain) (verdictKind, error) {
	v, err := w.chain(t, c)
	if err == nil && v == next {
		if v = c.policy; v != accept {
			w.step(t.name, c.name, "policy")
		}
	}
	return v, err
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
		w.step(t.name, c.name, r.text)
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

func (w *walk) step(table, chain, text string) {
	w.result.Path = append(w.result.Path, table+" "+chain+": "+text)
}
