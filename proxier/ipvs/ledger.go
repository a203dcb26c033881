package ipvs

import (
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// ledger is what the plans in force share: who has a virtual server, how many
// need an address or a set's element, and which marks are given away.
type ledger struct {
	claims   map[serverKey][]*plan.Plan // winner first
	needs    map[shared]int             // how many plans need an address or an element
	elements [setCount]uint32           // elements that each set should have
	marks    map[model.PortKey]uint32   // marks without the shift
	taken    map[uint32]bool            // marks given away
}

// shared is an address on kube-ipvs0 (set is setCount) or an element of a set.
// Its mark is 0: that is not part of an element's identity.
type shared placed

func newLedger() ledger {
	return ledger{claims: map[serverKey][]*plan.Plan{}, needs: map[shared]int{},
		marks: map[model.PortKey]uint32{}, taken: map[uint32]bool{}}
}

func (l *ledger) winner(k serverKey) *plan.Plan {
	if list := l.claims[k]; len(list) > 0 {
		return list[0]
	}
	return nil
}

// claim enters a plan for a virtual server. Of two that want it, an address of
// its own wins over a NodePort; the rest is settled by the planner.
func (l *ledger) claim(k serverKey, p *plan.Plan) {
	list := l.claims[k]
	if len(list) == 0 {
		l.claims[k] = []*plan.Plan{p}
		return
	}
	list = append(slices.Clone(list), p)
	slices.SortFunc(list, func(a, b *plan.Plan) int {
		if x, y := hasAddress(a, k), hasAddress(b, k); x != y {
			if x {
				return -1
			}
			return 1
		}
		return a.PortKey.Compare(b.PortKey)
	})
	l.claims[k] = list
}

func hasAddress(p *plan.Plan, k serverKey) bool {
	return slices.ContainsFunc(p.Frontends, func(f plan.Frontend) bool { return f.Addr == k.addr && f.Port == k.port })
}

func (l *ledger) unclaim(k serverKey, p *plan.Plan) {
	list := l.claims[k]
	if len(list) <= 1 {
		delete(l.claims, k)
		return
	}
	l.claims[k] = slices.DeleteFunc(slices.Clone(list), func(x *plan.Plan) bool { return x == p })
}

// markFor gives a plan the mark that it has or a free one, 0 if none is left.
func (l *ledger) markFor(key model.PortKey) uint32 {
	if m := l.marks[key]; m != 0 {
		return m
	}
	for n := uint32(1); n <= insideMost; n++ {
		if m := insideSignature | n; !l.taken[m] {
			l.taken[m] = true
			l.marks[key] = m
			return m
		}
	}
	return 0
}

func (l *ledger) releaseMark(key model.PortKey) {
	delete(l.taken, l.marks[key])
	delete(l.marks, key)
}
