package plan

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// cluster is all that a Planner is told, so that another can be told it afresh.
type cluster struct {
	services map[model.ServiceName]*model.Service
	slices   map[model.ServiceName][]*model.Slice
	facts    *Facts
}

func newCluster() *cluster {
	return &cluster{services: map[model.ServiceName]*model.Service{}, slices: map[model.ServiceName][]*model.Slice{}, facts: factsWith()}
}

func (c *cluster) names() []model.ServiceName {
	seen := map[model.ServiceName]bool{}
	for n := range c.services {
		seen[n] = true
	}
	for n := range c.slices {
		seen[n] = true
	}
	var out []model.ServiceName
	for n := range seen {
		out = append(out, n)
	}
	return out
}

// fresh is the Set of a Planner that hears the final state in random order.
func (c *cluster) fresh() *Set {
	p := NewPlanner(c.facts)
	for _, n := range c.names() { // in the order of a map: any
		p.Update(n, c.services[n], c.slices[n])
	}
	return p.Set()
}

// crowd draws Services that fight for few addresses and ports.
func (d draw) crowd(name model.ServiceName) *model.Service {
	v4 := func(a byte) netip.Addr { return netip.AddrFrom4([4]byte{a, 0, 0, byte(1 + d.IntN(3))}) }
	s := &model.Service{ServiceName: name, Created: time.Unix(int64(d.IntN(3)), 0), ClusterIPs: []netip.Addr{v4(10)},
		InternalLocal: d.chance(4), ExternalLocal: d.chance(3)}
	if d.chance(12) {
		s.ClusterIPs = addrs("fd00::1")
	}
	if d.chance(3) {
		s.Balance = &model.Balance{Scheduler: []string{"", "mh", "fo"}[d.IntN(3)],
			Weights: &model.Weights{Zones: map[string]uint16{"a": uint16(d.IntN(3))}, Default: 1}}
	}
	for range d.IntN(3) {
		s.ExternalIPs = append(s.ExternalIPs, v4(byte(20-10*d.IntN(2)))) // now and then somebody's ClusterIP
	}
	if d.chance(2) {
		s.LoadBalancerIPs = []netip.Addr{v4(20)}
		if d.chance(2) {
			s.SourceRanges = prefixes("192.168.0.0/16")
		}
	}
	for i := range 1 + d.IntN(3) {
		p := model.ServicePort{Name: fmt.Sprint("p", i), Protocol: model.TCP, Port: uint16(80 + d.IntN(2))}
		if d.chance(4) {
			p.Protocol = model.UDP
		}
		if d.chance(2) {
			p.NodePort = uint16(30000 + d.IntN(3))
		}
		s.Ports = append(s.Ports, p)
	}
	return s
}

func (d draw) crowdSlices() []*model.Slice {
	sl := slice()
	sl.Ports = []model.SlicePort{{Name: "p0", Protocol: model.TCP, Port: 8080}, {Name: "p1", Protocol: model.TCP, Port: 8081}, {Name: "p1", Protocol: model.UDP, Port: 53}}
	for i := range d.IntN(4) {
		sl.Endpoints = append(sl.Endpoints, model.Endpoint{Addr: netip.AddrFrom4([4]byte{10, 1, 0, byte(i)}), Node: []string{self, "b"}[d.IntN(2)], Ready: true, Serving: true})
		sl.Origins = append(sl.Origins, model.Origin{Zone: []string{"a", "b"}[d.IntN(2)]})
	}
	return []*model.Slice{sl}
}

func (d draw) facts() *Facts {
	return factsWith(func(f *Facts) {
		f.Zone = fmt.Sprint("z", d.IntN(2))
		f.MasqueradeAll, f.DetectLocal, f.RefuseExternalIPs = d.chance(3), !d.chance(3), d.chance(3)
		if d.chance(6) {
			f.NodePorts = NodePortAddresses{Addrs: addrs("192.168.0.1")}
		}
		if d.chance(2) {
			scheduling(f)
		}
	})
}

// Any history of events leaves the Set that a Planner makes which hears the last
// state only, and every plan in which nothing changed keeps its pointer.
func TestIncrementalEqualsFresh(t *testing.T) {
	clashes := 0
	for seed := range uint64(300) {
		d := draw{rand.New(rand.NewPCG(seed, 2))}
		c := newCluster()
		p := NewPlanner(c.facts)
		last := p.Set()
		for step := range 60 {
			for range 1 + d.IntN(3) {
				d.event(c, p)
			}
			set := p.Set()
			if again := p.Set(); again != set {
				t.Fatalf("seed %d, step %d: Set() twice gives two", seed, step)
			}
			fresh := c.fresh()
			if diff := difference(fresh, set); diff != "" {
				t.Fatalf("seed %d, step %d (-fresh +incremental):\n%s", seed, step, diff)
			}
			checkChanges(t, last, set, seed)
			clashes += checkClashes(t, c, set, seed)
			last = set
		}
	}
	if clashes < 1000 {
		t.Errorf("%d clashes happened: too few to prove anything", clashes)
	}
}

func (d draw) event(c *cluster, p *Planner) {
	name := model.ServiceName{Namespace: "ns", Name: string(rune('a' + d.IntN(8)))}
	switch d.IntN(10) {
	case 0, 1:
		delete(c.services, name)
	case 2, 3, 4, 5:
		c.services[name] = d.crowd(name)
	case 6, 7:
		c.slices[name] = d.crowdSlices()
	case 8:
		delete(c.slices, name)
	case 9:
		f := d.facts()
		equal := f.Equal(c.facts)
		if p.SetFacts(f) == equal {
			panic("SetFacts does not say whether the facts changed")
		}
		if !equal {
			c.facts = f
		}
		for _, n := range c.names() {
			p.Update(n, c.services[n], c.slices[n])
		}
	}
	p.Update(name, c.services[name], c.slices[name])
}

// difference compares the content of two Sets.
func difference(a, b *Set) string {
	if !a.Facts.Equal(b.Facts) {
		return "other facts"
	}
	if a.Len() != b.Len() || a.Endpoints != b.Endpoints {
		return fmt.Sprintf("%d plans with %d endpoints, and %d with %d", a.Len(), a.Endpoints, b.Len(), b.Endpoints)
	}
	for p := range a.All {
		if o := b.Get(p.PortKey); o == nil || !p.Equal(o) || !o.Equal(p) {
			return cmp.Diff(p, o, cmp.AllowUnexported(Plan{}), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
				cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }))
		}
	}
	return ""
}

// checkChanges checks that what two Sets do not share is what Changes yields, in
// which no plan has the content that it had before, and that Endpoints counts.
func checkChanges(t *testing.T, old, new *Set, seed uint64) {
	t.Helper()
	yielded := map[model.PortKey]bool{}
	Changes(old, new, func(o, n *Plan) bool {
		switch {
		case o == nil && n == nil:
			t.Fatalf("seed %d: a change from nothing to nothing", seed)
		case o == nil:
			yielded[n.PortKey] = true
		case n == nil:
			yielded[o.PortKey] = true
		default:
			if o.PortKey != n.PortKey {
				t.Fatalf("seed %d: %s changed into %s", seed, o.PortKey, n.PortKey)
			}
			yielded[n.PortKey] = true
		}
		return true
	})
	endpoints := 0
	for n := range new.All {
		endpoints += max(len(n.Cluster), len(n.Local))
		if o := old.Get(n.PortKey); (o != n) != yielded[n.PortKey] {
			t.Fatalf("seed %d: %s is another pointer: %v; Changes says %v", seed, n.PortKey, o != n, yielded[n.PortKey])
		}
	}
	for o := range old.All {
		if new.Get(o.PortKey) == nil && !yielded[o.PortKey] {
			t.Fatalf("seed %d: %s is gone and Changes does not say so", seed, o.PortKey)
		}
	}
	if endpoints != new.Endpoints {
		t.Fatalf("seed %d: Endpoints is %d, and there are %d", seed, new.Endpoints, endpoints)
	}
}

// checkClashes checks that every frontend belongs to exactly one plan, the
// oldest that wants it, that who lost knows to whom, and returns how many lost.
func checkClashes(t *testing.T, c *cluster, set *Set, seed uint64) int {
	t.Helper()
	type age struct {
		created time.Time
		key     model.PortKey
	}
	want := map[claim]age{}
	for _, n := range c.names() {
		for _, p := range Make(c.services[n], c.slices[n], c.facts) {
			for _, f := range p.Frontends {
				at := claim{f.Addr, f.Port, p.Protocol}
				was, there := want[at]
				created := c.services[n].Created
				if !there || created.Before(was.created) || created.Equal(was.created) && p.PortKey.Compare(was.key) < 0 {
					want[at] = age{created, p.PortKey}
				}
			}
		}
	}
	got := map[claim]model.PortKey{}
	lost := 0
	for p := range set.All {
		for _, f := range p.Frontends {
			at := claim{f.Addr, f.Port, p.Protocol}
			if other, taken := got[at]; taken {
				t.Fatalf("seed %d: %v belongs to %s and %s", seed, at, other, p.PortKey)
			}
			got[at] = p.PortKey
		}
		for _, l := range p.Lost {
			lost++
			if winner := want[claim{l.Frontend.Addr, l.Frontend.Port, p.Protocol}].key; winner != l.Winner || winner == p.PortKey {
				t.Fatalf("seed %d: %s lost %+v, the oldest is %s", seed, p.PortKey, l, winner)
			}
		}
	}
	for at, w := range want {
		if got[at] != w.key {
			t.Fatalf("seed %d: %v belongs to %s, the oldest is %s", seed, at, got[at], w.key)
		}
	}
	return lost
}

// An Update that changes nothing changes no pointer, whether values are the same
// or equal copies, also of plans in a clash.
func TestUnchangedPlansKeepTheirPointers(t *testing.T) {
	for seed := range uint64(100) {
		d := draw{rand.New(rand.NewPCG(seed, 3))}
		c := newCluster()
		p := NewPlanner(c.facts)
		for range 20 {
			d.event(c, p)
		}
		set := p.Set()
		for _, n := range c.names() {
			var copied *model.Service
			if s := c.services[n]; s != nil {
				v := *s
				copied = &v
			}
			p.Update(n, copied, slices.Clone(c.slices[n]))
		}
		p.Update(model.ServiceName{Namespace: "ns", Name: "unknown"}, nil, nil)
		f := *c.facts
		if p.SetFacts(&f) {
			t.Fatalf("seed %d: equal facts count as a change", seed)
		}
		if p.Set() != set {
			t.Fatalf("seed %d: nothing changed, and the Set did", seed)
		}
		// Facts that no plan depends on make a new Set of the same plans.
		f.NodePorts = NodePortAddresses{All: !f.NodePorts.All}
		p.SetFacts(&f)
		for _, n := range c.names() {
			p.Update(n, c.services[n], c.slices[n])
		}
		next := p.Set()
		if next == set || next.Facts != &f {
			t.Fatalf("seed %d: changed facts make no new Set", seed)
		}
		Changes(set, next, func(old, new *Plan) bool {
			t.Errorf("seed %d: facts that no plan depends on changed %v into %v", seed, old, new)
			return true
		})
	}
}

func claimant(name string, created int64) *model.Service {
	return &model.Service{ServiceName: model.ServiceName{Namespace: "ns", Name: name}, Created: time.Unix(created, 0),
		ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, name[0]})}, ExternalIPs: addrs("203.0.113.1"),
		Ports: []model.ServicePort{{Protocol: model.TCP, Port: 80, NodePort: 30080}}}
}

func TestAddressGoesBackToTheLoser(t *testing.T) {
	old, young, youngest := claimant("z", 1), claimant("a", 2), claimant("b", 2)
	p := NewPlanner(factsWith())
	for _, s := range []*model.Service{youngest, young, old} {
		p.Update(s.ServiceName, s, nil)
	}
	key := func(s *model.Service) model.PortKey {
		return model.PortKey{Namespace: s.Namespace, Name: s.Name, Protocol: model.TCP}
	}
	check := func(what string, winner *model.Service, losers ...*model.Service) *Set {
		t.Helper()
		set := p.Set()
		w := set.Get(key(winner))
		if want := []string{fmt.Sprintf("clusterIP %s 80", winner.ClusterIPs[0]), "externalIP 203.0.113.1 80", "nodePort any 30080"}; !slices.Equal(frontends(w), want) || w.Lost != nil {
			t.Errorf("%s: %s has %q, lost %v", what, winner.Name, frontends(w), w.Lost)
		}
		for _, s := range losers {
			l := set.Get(key(s))
			if want := []string{fmt.Sprintf("clusterIP %s 80", s.ClusterIPs[0])}; !slices.Equal(frontends(l), want) ||
				len(l.Lost) != 2 || l.Lost[0].Winner != key(winner) || l.Lost[1].Winner != key(winner) {
				t.Errorf("%s: %s has %q, lost %+v", what, s.Name, frontends(l), l.Lost)
			}
		}
		return set
	}
	before := check("at first", old, young, youngest)
	p.Update(old.ServiceName, nil, nil)
	check("the oldest is gone", young, youngest)
	p.Update(old.ServiceName, old, nil)
	after := check("it is back", old, young, youngest)
	if diff := difference(before, after); diff != "" {
		t.Error(diff)
	}

	moved := claimant("z", 1)
	moved.ExternalIPs, moved.Ports = nil, []model.ServicePort{{Protocol: model.TCP, Port: 80}}
	p.Update(old.ServiceName, moved, nil)
	check("the oldest wants them no more", young, youngest)
	p.Update(young.ServiceName, nil, nil)
	check("one is left", youngest)
	if got := p.Set().Get(key(moved)); len(got.Frontends) != 1 || got.Lost != nil {
		t.Errorf("it has %q", frontends(got))
	}
}

// A Service that is deleted and made again between two Sets is another Service.
func TestServiceMadeAgain(t *testing.T) {
	p := NewPlanner(factsWith())
	a, b := claimant("a", 1), claimant("b", 2)
	p.Update(a.ServiceName, a, nil)
	p.Update(b.ServiceName, b, nil)
	p.Set()
	p.Update(a.ServiceName, nil, nil)
	again := claimant("a", 3)
	again.UID = "2"
	p.Update(a.ServiceName, again, nil)
	set := p.Set()
	if got := set.Get(model.PortKey{Namespace: "ns", Name: "b", Protocol: model.TCP}); len(got.Lost) != 0 {
		t.Errorf("b is older now, and lost %+v", got.Lost)
	}
	if got := set.Get(model.PortKey{Namespace: "ns", Name: "a", Protocol: model.TCP}); len(got.Lost) != 2 || got.UID() != "2" {
		t.Errorf("a is younger now: lost %+v, uid %q", got.Lost, got.UID())
	}
}

func TestEmptySet(t *testing.T) {
	f := factsWith()
	p := NewPlanner(f)
	if got := p.Set(); got.Len() != 0 || got.Facts != f || got.Endpoints != 0 || got.Get(model.PortKey{}) != nil {
		t.Errorf("%+v", got)
	}
	p.Update(service().ServiceName, service(), []*model.Slice{slice("10.0.0.1@b ready")})
	n := 0
	Changes(nil, p.Set(), func(old, new *Plan) bool { n++; return old == nil && new != nil })
	Changes(p.Set(), nil, func(old, new *Plan) bool { n++; return old != nil && new == nil })
	if n != 2 {
		t.Errorf("%d changes, want 2", n)
	}
	if got := p.Set().Sorted(); len(got) != 1 {
		t.Errorf("%d plans", len(got))
	}
}

// A change of the winner that has nothing to do with the address leaves the
// loser's plan as it is, and the other way round.
func TestChangeBesideAClash(t *testing.T) {
	winner, loser := claimant("a", 1), claimant("b", 2)
	plans := func(s *Set) (w, l *Plan) {
		return s.Get(model.PortKey{Namespace: "ns", Name: "a", Protocol: model.TCP}), s.Get(model.PortKey{Namespace: "ns", Name: "b", Protocol: model.TCP})
	}
	p := NewPlanner(factsWith())
	p.Update(winner.ServiceName, winner, nil)
	p.Update(loser.ServiceName, loser, nil)
	w, l := plans(p.Set())
	eps := slice("10.0.0.1@b ready")
	eps.Ports[0].Name = ""
	p.Update(winner.ServiceName, winner, []*model.Slice{eps})
	w2, l2 := plans(p.Set())
	if w2 == w || l2 != l {
		t.Errorf("the winner has endpoints now: changed %v; the loser changed %v", w2 != w, l2 != l)
	}
	p.Update(loser.ServiceName, loser, []*model.Slice{eps})
	if w3, l3 := plans(p.Set()); w3 != w2 || l3 == l2 || len(l3.Lost) != 2 {
		t.Errorf("the loser has endpoints now: changed %v; the winner changed %v", l3 != l2, w3 != w2)
	}
}
