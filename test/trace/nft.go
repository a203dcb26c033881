package trace

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// NFTables are tables of nftables. They are immutable.
type NFTables struct {
	base []*nftChain // entered by hooks, in the order of their priorities
}

type nftTable struct {
	family, name string
	sets         map[string]*nftSet
	chains       map[string]*nftChain
}

// nftSet is a set or a map. One that the text does not have, but a rule names, is
// empty.
type nftSet struct {
	name     string
	declared bool
	key      []string // kinds of the fields
	value    []string // of a map; one field "verdict" in a map of verdicts
	interval bool     // the last field is a range
	counts   bool     // each element counts what is looked up
	size     int      // how many elements rules may add; 0: no limit
	elements map[string]nftElement
	ranges   []nftRange
	// numbered are the elements whose key ends in a number, in order, by the rest of
	// the key.
	numbered map[string][]nftElement
}

type nftElement struct {
	text   string
	number int         // at the key's end, if there is one
	value  string      // fields as nft writes them
	then   *nftVerdict // in a map of verdicts
}

// nftRange is an element of a set of ranges.
type nftRange struct {
	first string // all fields but the last
	last  netip.Prefix
	text  string
}

type nftChain struct {
	table    *nftTable
	name     string
	kind     string // of a base chain: "nat", "filter"
	hook     string
	priority int
	policy   verdictKind
	rules    []*nftRule
}

// nftRule is a list of statements, carried out one after the other until one does
// not apply or says what happens to the packet.
type nftRule struct {
	text       string
	statements []nftStatement
}

type nftStatement func(w *walk) (nftVerdict, error)

// nftVerdict is what a statement says.
type nftVerdict struct {
	kind  verdictKind // next: the rule's next statement, unless one of the following is set
	miss  bool        // the rule ends: what it asks for does not hold
	to    string      // the chain that is entered
	jump  bool        // and left again; else goto
	found string      // the element that says so
}

var (
	nftNext = nftVerdict{kind: next}
	nftMiss = nftVerdict{miss: true}
)

func nftIf(holds bool) nftVerdict { return nftVerdict{miss: !holds} }

// nftField is something of a packet that can be looked up, or a random number.
type nftField struct {
	kind  string
	of    func(w *walk) string
	below int // numbers: each below this has the same chance
}

// Outcomes returns every way in which the packet can pass. Their probabilities add
// up to one.
func (t *NFTables) Outcomes(h *Host, p Packet, memory Memory) ([]Outcome, error) {
	return outcomes(func(choose func(int) int) (Outcome, error) { return t.Trace(h, p, memory, choose) })
}

// Trace returns one way in which the packet can pass; choose gives the random numbers,
// each below its argument.
func (t *NFTables) Trace(h *Host, p Packet, memory Memory, choose func(int) int) (Outcome, error) {
	w := newWalk(h, p, memory)
	w.traverse, w.choose = t.traverse, choose
	return w.run()
}

// traverse takes the packet through the base chains at a hook, by their priorities.
// When one of type nat has translated it, the others of that type are not asked.
func (t *NFTables) traverse(w *walk, hook string) (verdictKind, error) {
	family := "ip"
	if w.packet.Dst.Addr().Is6() {
		family = "ip6"
	}
	translated := false
	for _, c := range t.base {
		if c.hook != strings.ToLower(hook) || c.table.family != family || !w.asks(c.kind) || c.kind == "nat" && translated {
			continue
		}
		v, err := c.enter(w)
		if err != nil || v != accept && v != next {
			return v, err
		}
		translated = translated || v == accept && c.kind == "nat"
		w.rerouted()
	}
	return accept, nil
}

// enter takes the packet through a base chain. It returns next if no rule has decided
// and the policy is to accept.
func (c *nftChain) enter(w *walk) (verdictKind, error) {
	v, err := c.pass(w)
	if err == nil && v == next && c.policy != accept {
		w.step(c.table.name, c.name, "policy")
		return c.policy, nil
	}
	return v, err
}

// pass returns next when the packet falls out of the chain's end or meets a return.
// A goto does not come back, so its verdict is the chain's own.
func (c *nftChain) pass(w *walk) (verdictKind, error) {
	if w.depth++; w.depth > maxDepth {
		return drop, fmt.Errorf("%s %s: jumps nested deeper than %d: a loop", c.table.name, c.name, maxDepth)
	}
	defer func() { w.depth-- }()
	for _, r := range c.rules {
		if w.steps++; w.steps > maxSteps {
			return drop, fmt.Errorf("%s %s: more than %d rules for one packet", c.table.name, c.name, maxSteps)
		}
		v, err := r.run(w)
		if err != nil {
			return drop, fmt.Errorf("%s %s: %q: %w", c.table.name, c.name, r.text, err)
		}
		if v.miss {
			continue
		}
		w.step(c.table.name, c.name, r.text+v.found)
		kind := v.kind
		if v.to != "" {
			if kind, err = c.table.chains[v.to].pass(w); err != nil || kind == next && !v.jump {
				return kind, err
			}
		}
		switch kind {
		case next:
		case leave:
			return next, nil
		default:
			return kind, nil
		}
	}
	return next, nil
}

// run returns what the statements say, and which element of a map says so.
func (r *nftRule) run(w *walk) (nftVerdict, error) {
	found := ""
	for _, s := range r.statements {
		v, err := s(w)
		if v.found != "" {
			found += " { " + v.found + " }"
		}
		if err == nil {
			err = w.fault
		}
		if err != nil || v.miss || v.to != "" || v.kind != next {
			v.found = found
			return v, err
		}
	}
	return nftVerdict{kind: next, found: found}, nil
}

// keyOf writes fields as an element has them, in its key or its value.
func keyOf(w *walk, fields []nftField) string {
	var parts []string
	for _, f := range fields {
		parts = append(parts, f.of(w))
	}
	return strings.Join(parts, " . ")
}

// ask looks fields up.
func (s *nftSet) ask(w *walk, fields []nftField) (nftElement, bool) {
	last := len(fields) - 1
	if fields[last].kind != "number" {
		return s.find(w, keyOf(w, fields))
	}
	return s.draw(w, keyOf(w, fields[:last]), fields[last].below)
}

// draw looks a key up that ends in a random number. All numbers that have no element
// are one way: rules can draw often, until they find one.
func (s *nftSet) draw(w *walk, key string, below int) (nftElement, bool) {
	list := s.numbered[key]
	n, _ := slices.BinarySearchFunc(list, below, func(e nftElement, n int) int { return e.number - n })
	ways := n
	if n < below {
		ways++
	}
	way := 0
	if ways > 1 {
		way = w.choose(ways)
	}
	if way < n {
		w.result.Probability /= float64(below)
		return list[way], true
	}
	w.result.Probability *= float64(below-n) / float64(below)
	return nftElement{}, false
}

// find looks a key up, among what the table has and what rules have added.
func (s *nftSet) find(w *walk, key string) (nftElement, bool) {
	if s.interval {
		return s.findRange(key)
	}
	if e, ok := s.elements[key]; ok {
		return e, true
	}
	e, ok := w.result.Memory[s.name][key]
	if !ok || !e.alive(w.packet.At) {
		return nftElement{}, false
	}
	return nftElement{text: key + " : " + e.Value, value: e.Value}, true
}

func (s *nftSet) findRange(key string) (nftElement, bool) {
	cut := strings.LastIndex(key, " . ")
	addr, err := netip.ParseAddr(key[cut+len(" . "):])
	if err != nil {
		return nftElement{}, false
	}
	i := slices.IndexFunc(s.ranges, func(r nftRange) bool { return r.first == key[:cut] && r.last.Contains(addr) })
	if i < 0 {
		return nftElement{}, false
	}
	return nftElement{text: s.ranges[i].text}, true
}

// alive says whether an element is there still: at the moment when its time is up
// it is not (nft_set_elem_expired).
func (e Entry) alive(at time.Duration) bool { return at < e.Seen+e.Keep }

// note adds an element or, where there is one, prolongs it, which leaves its value
// as it is (nft_dynset.c). It says whether there was room.
func (s *nftSet) note(w *walk, key, value string, keep time.Duration) bool {
	list := w.result.Memory.list(s.name)
	for k, e := range list {
		if !e.alive(w.packet.At) {
			delete(list, k)
		}
	}
	if e, ok := list[key]; ok {
		value = e.Value
	} else if s.size > 0 && len(list) >= s.size {
		return false
	}
	list[key] = Entry{Seen: w.packet.At, Keep: keep, Value: value}
	return true
}
