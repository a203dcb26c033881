// Package aside keeps the plans that the kernel has refused: which they are, when each
// is to be tried again, and who has been told. All proxiers set Service ports aside in
// the same way.
//
// It knows plans, and neither a kernel nor why one refuses something.
package aside

import (
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// A plan that was refused is tried again, unchanged, after Retry, then after twice
// that, and so on, up to RetryMost.
const (
	Retry     = time.Minute
	RetryMost = time.Hour
)

// Plans are the plans that are set aside. They belong to one goroutine.
type Plans struct {
	refused map[model.PortKey]refusal
	told    map[model.PortKey]bool // reports that have not been taken back
	report  func(model.PortKey, error)
}

type refusal struct {
	plan   *plan.Plan
	since  time.Time
	wait   time.Duration
	trying bool
}

// New returns an empty Plans. report hears of each refusal, and, with a nil error, when
// it holds no more: proxier.Reporter's SetAside.
func New(report func(model.PortKey, error)) *Plans {
	return &Plans{refused: map[model.PortKey]refusal{}, told: map[model.PortKey]bool{}, report: report}
}

// Len is how many plans are set aside.
func (a *Plans) Len() int { return len(a.refused) }

// Has says whether a plan is set aside, also while it is tried again: it is not in the
// kernel.
func (a *Plans) Has(p *plan.Plan) bool {
	r, ok := a.refused[p.PortKey]
	return ok && r.plan == p
}

// Keep says whether a plan is to be written: it is not set aside, or it is tried again.
func (a *Plans) Keep(p *plan.Plan) bool { return !a.Has(p) || a.refused[p.PortKey].trying }

// Refuse sets a plan aside, for longer if it was already, and reports it.
func (a *Plans) Refuse(p *plan.Plan, err error, now time.Time) {
	a.refused[p.PortKey] = refusal{plan: p, since: now, wait: a.next(p)}
	a.Tell(p.PortKey, err)
}

// Again sets a plan aside for longer, without another report.
func (a *Plans) Again(p *plan.Plan, now time.Time) {
	a.refused[p.PortKey] = refusal{plan: p, since: now, wait: a.next(p)}
}

func (a *Plans) next(p *plan.Plan) time.Duration {
	if a.Has(p) {
		return min(2*a.refused[p.PortKey].wait, RetryMost)
	}
	return Retry
}

// Due says whether a plan is to be tried again.
func (a *Plans) Due(now time.Time) bool {
	for _, r := range a.refused {
		if r.due(now) {
			return true
		}
	}
	return false
}

func (r refusal) due(now time.Time) bool { return now.Sub(r.since) >= r.wait }

// Try returns the plans that are to be tried again, and has Keep keep them. Plans that a
// Set does not have any more are none.
func (a *Plans) Try(want *plan.Set, now time.Time) []*plan.Plan {
	var again []*plan.Plan
	for key, r := range a.refused {
		if r.due(now) && want.Get(key) == r.plan {
			r.trying = true
			a.refused[key] = r
			again = append(again, r.plan)
		}
	}
	return again
}

// Leave forgets the plans that a Set does not have any more.
func (a *Plans) Leave(want *plan.Set) {
	for key, r := range a.refused {
		if want.Get(key) != r.plan {
			delete(a.refused, key)
		}
	}
}

// Settle forgets the plans that were tried again and not refused since.
func (a *Plans) Settle() {
	for key, r := range a.refused {
		if r.trying {
			delete(a.refused, key)
		}
	}
}

// Accept forgets a plan: the kernel has taken it.
func (a *Plans) Accept(p *plan.Plan) { delete(a.refused, p.PortKey) }

// Tell reports something about a port that is not a refusal of its plan as a whole.
// TakeBack takes it back like one.
func (a *Plans) Tell(key model.PortKey, err error) {
	a.told[key] = true
	a.report(key, err)
}

// Told says whether there is a report about a port that was not taken back.
func (a *Plans) Told(key model.PortKey) bool { return a.told[key] }

// TakeBack reports that what was told of ports holds no more, but for those that are
// set aside, and those for which still, if not nil, says that it does.
func (a *Plans) TakeBack(still func(model.PortKey) bool) {
	for key := range a.told {
		if _, refused := a.refused[key]; !refused && (still == nil || !still(key)) {
			delete(a.told, key)
			a.report(key, nil)
		}
	}
}

// Clone returns the plans as they are now, for Has.
func (a *Plans) Clone() *Plans {
	c := New(nil)
	for key, r := range a.refused {
		c.refused[key] = r
	}
	return c
}
