package nftables

import (
	"slices"
	"time"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// ledger is what plans share in the kernel: how many need an element or a chain.
type ledger struct {
	shared map[key]int
	chains map[chainSpec]int
	// idle are chains that are there and that nobody needs, since when; found are those
	// of them that this process has not written, so that who knows what they do.
	idle  map[chainName]time.Time
	found map[chainName]bool
}

func newLedger() ledger {
	return ledger{map[key]int{}, map[chainSpec]int{}, map[chainName]time.Time{}, map[chainName]bool{}}
}

// has says whether a chain is there, and as it should be.
func (l *ledger) has(s chainSpec) bool {
	_, idle := l.idle[s.name()]
	return idle && !l.found[s.name()] || l.chains[s] > 0
}

// hold counts one more that needs what a ruleset shares; release one less. Elements
// that nobody needs any more are to be deleted; chains wait for sweep.
func (l *ledger) hold(rs *ruleset) {
	for _, e := range rs.shared {
		l.shared[e.key]++
	}
	for _, s := range rs.chains {
		l.chains[s]++
		delete(l.idle, s.name())
	}
}

func (l *ledger) release(rs *ruleset, now time.Time) (unneeded []element) {
	for _, e := range rs.shared {
		if l.shared[e.key]--; l.shared[e.key] == 0 {
			delete(l.shared, e.key)
			unneeded = append(unneeded, e)
		}
	}
	for _, s := range rs.chains {
		if l.chains[s]--; l.chains[s] == 0 {
			delete(l.chains, s)
			l.idle[s.name()] = now
		}
	}
	return unneeded
}

// group is what one Service port needs, or one that changes: it goes into a
// transaction as a whole, and if the kernel refuses it the port is to blame.
type group struct {
	old, new *plan.Plan // nil: none, or none that is in force
	was, is  ruleset

	head     []message // what comes before all else
	del, put []element
	// taken are elements of del that belong to another port so far, which gives them
	// up in the same round.
	taken []element
	// given are elements of was that other groups take: the takers.
	given  map[key]bool
	takers []*group

	refused error // why new is not in force
}

// elementsMost is how many elements one message has at the most: a list is an
// attribute, and those end at 64 KiB.
const elementsMost = 400

// pack puts elements, which stand side by side by set, into messages.
func pack(what verb, list []element) []message {
	var out []message
	for len(list) > 0 {
		n := 1
		for n < len(list) && n < elementsMost && list[n].set == list[0].set {
			n++
		}
		out = append(out, message{what: what, set: list[0].set, elements: list[:n]})
		list = list[n:]
	}
	return out
}

// messages are a group's. What goes comes first: a key can have another value only
// when it is free.
func (g *group) messages() []message {
	return slices.Concat(g.head, pack(deleteElements, g.del), pack(putElements, g.put))
}

// stages cut a group that is too large for one transaction, so that each moment
// between them is safe: endpoints come before the verdict that counts them, and go
// after it. Ranges of clients change in one transaction: the kernel refuses those
// that overlap, and nobody is to be locked out meanwhile.
func (g *group) stages() [][]message {
	replaced, taken := map[key]element{}, map[key]bool{}
	for _, e := range g.del {
		replaced[e.key] = e
	}
	var fresh, verdicts, gone []element
	var out [][]message
	pair := func(list []element) {
		for len(list) > 0 {
			n := min(len(list), elementsMost)
			var old []element
			for _, e := range list[:n] {
				if o, ok := replaced[e.key]; ok {
					old, taken[e.key] = append(old, o), true
				}
			}
			out = append(out, append(pack(deleteElements, old), pack(putElements, list[:n])...))
			list = list[n:]
		}
	}
	var ranges, rangesGone []element
	for _, e := range g.put {
		switch {
		case e.then != "":
			verdicts = append(verdicts, e)
		case e.set == setSources:
			ranges = append(ranges, e)
		default:
			fresh = append(fresh, e)
		}
	}
	for _, e := range g.del {
		if e.set == setSources && len(ranges) > 0 {
			rangesGone, taken[e.key] = append(rangesGone, e), true
		}
	}
	pair(fresh)
	if len(ranges) > 0 {
		out = append(out, append(pack(deleteElements, rangesGone), pack(putElements, ranges)...))
	}
	pair(verdicts)
	for _, e := range g.del {
		if !taken[e.key] {
			gone = append(gone, e)
		}
	}
	for _, m := range pack(deleteElements, gone) {
		out = append(out, []message{m})
	}
	return out
}
