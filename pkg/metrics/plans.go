package metrics

import (
	"context"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Plans keeps the gauges that are properties of a Set: planned ports and
// endpoints, clashes, Local policies without a local endpoint. It looks at
// changed plans only. It belongs to one goroutine.
type Plans struct {
	family model.Family
	last   *plan.Set
	sum    tally
	// refused counts the ports of each Service whose settings cannot be followed:
	// all ports of a Service have the same.
	refused map[model.ServiceName]int
}

// NewPlans returns the gauges of one family. It publishes nothing yet.
func NewPlans(f model.Family) *Plans { return &Plans{family: f, refused: map[model.ServiceName]int{}} }

// Sync publishes what holds for want. It never fails.
func (p *Plans) Sync(_ context.Context, want *plan.Set) error {
	plan.Changes(p.last, want, func(old, new *plan.Plan) bool {
		p.sum.add(old, -1)
		p.sum.add(new, +1)
		p.refuse(old, -1)
		p.refuse(new, +1)
		return true
	})
	p.last = want
	f := p.family.String()
	plannedPorts.WithLabelValues(f).Set(float64(want.Len()))
	plannedEndpoints.WithLabelValues(f).Set(float64(want.Endpoints))
	clashes.WithLabelValues(f).Set(float64(p.sum.clashes))
	refusedSettings.WithLabelValues(f).Set(float64(len(p.refused)))
	noLocalEndpoints.WithLabelValues("internal", f).Set(float64(p.sum.internal))
	noLocalEndpoints.WithLabelValues("external", f).Set(float64(p.sum.external))
	return nil
}

func (p *Plans) refuse(of *plan.Plan, n int) {
	if of == nil || len(of.Problems) == 0 {
		return
	}
	name := of.PortKey.Service()
	if p.refused[name] += n; p.refused[name] == 0 {
		delete(p.refused, name)
	}
}

// tally counts over plans: frontends lost, and ports that drop internal or
// external traffic because their policy is Local and this node has no endpoint.
type tally struct{ clashes, internal, external int }

func (t *tally) add(p *plan.Plan, n int) {
	if p == nil {
		return
	}
	t.clashes += n * len(p.Lost)
	internal, external := false, false
	for i := range p.Frontends {
		f := &p.Frontends[i]
		if f.FromOutside.To != plan.Drop {
			continue
		}
		if f.Kind == plan.ClusterIP {
			internal = true
		} else {
			external = true
		}
	}
	if internal {
		t.internal += n
	}
	if external {
		t.external += n
	}
}
