package plan

import (
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/sharded"
)

type table = sharded.Table[model.PortKey, *Plan]

// Set is everything one node must do for one family. It is immutable, and
// shares with earlier Sets of its Planner every plan that came out equal.
type Set struct {
	Facts *Facts
	// Endpoints is the number of endpoints over all plans (the larger of a
	// plan's Cluster and Local set each).
	Endpoints int

	plans *table
}

// EmptySet asks for nothing.
func EmptySet(facts *Facts) *Set { return &Set{Facts: facts, plans: &table{}} }

// Len returns the number of plans.
func (s *Set) Len() int { return s.plans.Len() }

// Get returns a port's plan, or nil.
func (s *Set) Get(k model.PortKey) *Plan { return s.plans.Get(k) }

// All yields every plan, in an order that depends on keys only.
func (s *Set) All(yield func(*Plan) bool) { s.plans.All(yield) }

// Sorted returns every plan in the order of keys, for people to read.
func (s *Set) Sorted() []*Plan {
	return slices.SortedFunc(s.All, func(a, b *Plan) int { return a.PortKey.Compare(b.PortKey) })
}

// Changes yields the plans in which two Sets differ, nil for "none". A nil Set
// is empty. The cost is proportional to the difference. It does not compare
// Facts: who depends on them compares the pointers.
func Changes(old, new *Set, yield func(old, new *Plan) bool) {
	var before, after *table
	if old != nil {
		before = old.plans
	}
	if new != nil {
		after = new.plans
	}
	sharded.Changes(before, after, yield)
}

// Planner turns the plans of single Services into Sets. It settles clashes: of
// two Services that claim the same address, protocol and port the older one
// gets it (by creation time, then by name), and the other's plan says so in
// Lost. A Planner belongs to one goroutine.
type Planner struct {
	facts     *Facts
	plans     sharded.Builder[model.PortKey, *Plan]
	made      map[model.ServiceName][]*Plan // as Make gave them, before clashes
	claims    map[claim][]*Plan             // who wants a frontend, as Make gave them; winner first
	contested map[model.PortKey]bool        // plans to settle again
	endpoints int
	last      *Set
}

// claim is a frontend as an address: addr is invalid for NodePorts.
type claim struct {
	addr     netip.Addr
	port     uint16
	protocol model.Protocol
}

// NewPlanner returns a Planner without Services.
func NewPlanner(facts *Facts) *Planner {
	return &Planner{
		facts:     facts,
		made:      map[model.ServiceName][]*Plan{},
		claims:    map[claim][]*Plan{},
		contested: map[model.PortKey]bool{},
		last:      EmptySet(facts),
	}
}

// Facts returns the facts in force.
func (p *Planner) Facts() *Facts { return p.facts }

// SetFacts replaces the node facts. The caller then plans every Service again,
// because any of them can depend on them. It returns false, and changes
// nothing, if they are equal to those in force.
func (p *Planner) SetFacts(f *Facts) bool {
	if p.facts.Equal(f) {
		return false
	}
	p.facts = f
	return true
}

// Update plans a Service again and replaces its plans. A Service without plans
// (nil, of another family, deleted) is removed.
func (p *Planner) Update(name model.ServiceName, svc *model.Service, epSlices []*model.Slice) {
	fresh := Make(svc, epSlices, p.facts)
	old := p.made[name]
	for i, f := range fresh {
		for _, o := range old {
			if o.PortKey == f.PortKey && o.Equal(f) {
				fresh[i] = o
			}
		}
	}
	for _, o := range old {
		if !slices.Contains(fresh, o) {
			p.withdraw(o)
		}
	}
	for _, f := range fresh {
		if !slices.Contains(old, f) {
			p.enter(f)
		}
	}
	if len(fresh) == 0 {
		delete(p.made, name)
	} else {
		p.made[name] = fresh
	}
}

func (p *Planner) withdraw(o *Plan) {
	for _, f := range o.Frontends {
		c := claimOf(o, &f)
		list := p.claims[c]
		if len(list) == 1 {
			delete(p.claims, c)
			continue
		}
		list = slices.DeleteFunc(slices.Clone(list), func(x *Plan) bool { return x == o })
		p.claims[c] = list
		p.contest(list)
	}
	p.put(o.PortKey, nil)
}

func (p *Planner) enter(f *Plan) {
	for i := range f.Frontends {
		c := claimOf(f, &f.Frontends[i])
		list := append(p.claims[c], f)
		if len(list) > 1 {
			slices.SortFunc(list, older)
			p.contest(list)
		}
		p.claims[c] = list
	}
	p.put(f.PortKey, f)
}

func claimOf(p *Plan, f *Frontend) claim { return claim{f.Addr, f.Port, p.Protocol} }

func older(a, b *Plan) int {
	if c := a.created.Compare(b.created); c != 0 {
		return c
	}
	return a.PortKey.Compare(b.PortKey)
}

func (p *Planner) contest(list []*Plan) {
	for _, x := range list {
		p.contested[x.PortKey] = true
	}
}

func (p *Planner) put(k model.PortKey, plan *Plan) {
	if was := p.plans.Get(k); was != nil {
		p.endpoints -= weight(was)
	}
	if plan == nil {
		p.plans.Delete(k)
		return
	}
	p.endpoints += weight(plan)
	p.plans.Put(plan)
}

func weight(p *Plan) int { return max(len(p.Cluster), len(p.Local)) }

// Set returns the Set as of all Updates so far; the same pointer as before if
// nothing changed.
func (p *Planner) Set() *Set {
	for k := range p.contested {
		p.settle(k)
	}
	clear(p.contested)
	if p.plans.Dirty() || p.last.Facts != p.facts {
		p.last = &Set{Facts: p.facts, plans: p.plans.Build(), Endpoints: p.endpoints}
	}
	return p.last
}

// settle gives a plan those of its frontends that it is the first to claim.
func (p *Planner) settle(k model.PortKey) {
	i := slices.IndexFunc(p.made[k.Service()], func(x *Plan) bool { return x.PortKey == k })
	if i < 0 {
		return
	}
	made := p.made[k.Service()][i]
	settled := made
	var lost []Clash
	for _, f := range made.Frontends {
		if winner := p.claims[claimOf(made, &f)][0]; winner != made {
			lost = append(lost, Clash{f, winner.PortKey})
		}
	}
	if len(lost) > 0 {
		c := *made
		c.Lost = lost
		c.Frontends = slices.DeleteFunc(slices.Clone(made.Frontends), func(f Frontend) bool {
			return p.claims[claimOf(made, &f)][0] != made
		})
		settled = &c
	}
	if was := p.plans.Get(k); was != nil && was.Equal(settled) {
		return
	}
	p.put(k, settled)
}
