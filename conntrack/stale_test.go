package conntrack

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

var (
	nodeIP  = netip.MustParseAddr("192.168.1.10")
	nodeIP6 = netip.MustParseAddr("fd00:1::10")
)

// testService is a Service with the slice of its endpoints.
type testService struct {
	model.Service
	endpoints []model.Endpoint
	family    model.Family
}

// udp returns a Service at 10.96.0.1:53 whose endpoints are 10.244.0.n:5353.
func udp(name string, endpoints ...int) *testService {
	return newService(model.IPv4, "10.96.0.1", "10.244.0.%d", name, endpoints)
}

// udp6 returns a Service at [fd00:96::1]:53 with endpoints [fd00:244::n]:5353.
func udp6(name string, endpoints ...int) *testService {
	return newService(model.IPv6, "fd00:96::1", "fd00:244::%d", name, endpoints)
}

func newService(family model.Family, vip, format, name string, endpoints []int) *testService {
	s := &testService{family: family, Service: model.Service{
		ServiceName: model.ServiceName{Namespace: "default", Name: name},
		Created:     time.Unix(int64(name[0]), 0),
		ClusterIPs:  []netip.Addr{netip.MustParseAddr(vip)},
		Ports:       []model.ServicePort{{Protocol: model.UDP, Port: 53}},
	}}
	for _, n := range endpoints {
		s.endpoints = append(s.endpoints, model.Endpoint{Addr: netip.MustParseAddr(fmt.Sprintf(format, n)), Ready: true, Serving: true})
	}
	return s
}

func (s *testService) port(n uint16) *testService { s.Ports[0].Port = n; return s }
func (s *testService) node(n uint16) *testService { s.Ports[0].NodePort = n; return s }
func (s *testService) proto(p model.Protocol) *testService {
	s.Ports[0].Protocol = p
	return s
}
func (s *testService) at(a string) *testService {
	s.ClusterIPs = []netip.Addr{netip.MustParseAddr(a)}
	return s
}
func (s *testService) external(a string) *testService {
	s.ExternalIPs = []netip.Addr{netip.MustParseAddr(a)}
	return s
}
func (s *testService) balancer(a string) *testService {
	s.LoadBalancerIPs = []netip.Addr{netip.MustParseAddr(a)}
	return s
}
func (s *testService) localPolicy() *testService {
	s.InternalLocal, s.ExternalLocal = true, true
	return s
}

// drain makes the last endpoint terminate, still serving or not.
func (s *testService) drain(serving bool) *testService {
	e := &s.endpoints[len(s.endpoints)-1]
	e.Ready, e.Serving, e.Terminating = false, serving, true
	return s
}

func svcs(list ...*testService) []*testService { return list }

// testPlanner makes the Set of whole lists of Services.
type testPlanner struct {
	*plan.Planner
	family model.Family
	have   map[model.ServiceName]bool
}

func planner(family model.Family) *testPlanner {
	return &testPlanner{plan.NewPlanner(facts(family)), family, map[model.ServiceName]bool{}}
}

func facts(family model.Family) *plan.Facts {
	return &plan.Facts{Family: family, NodeName: "here", DetectLocal: true,
		NodePorts: plan.NodePortAddresses{All: true}, LocalhostNodePorts: family == model.IPv4}
}

func (p *testPlanner) set(list ...*testService) *plan.Set {
	for name := range p.have {
		if !slices.ContainsFunc(list, func(s *testService) bool { return s.ServiceName == name }) {
			p.Update(name, nil, nil)
			delete(p.have, name)
		}
	}
	for _, s := range list {
		p.have[s.ServiceName] = true
		p.Update(s.ServiceName, &s.Service, []*model.Slice{{
			Namespace: s.Namespace, Name: s.Name + "-1", Service: s.Name, Family: s.family,
			Ports:     []model.SlicePort{{Protocol: s.Ports[0].Protocol, Port: 5353}},
			Endpoints: s.endpoints,
		}})
	}
	return p.Planner.Set()
}

func flow(src, dst, replySrc string) Flow {
	return Flow{Protocol: model.UDP, Src: netip.MustParseAddrPort(src),
		Dst: netip.MustParseAddrPort(dst), ReplySrc: netip.MustParseAddrPort(replySrc)}
}

// judge moves from one Set to another and judges a flow by what became suspect.
// A flow that nobody would look at is kept.
func judge(old, new *plan.Set, f Flow) Reason {
	x := NewIndex()
	scope := &Scope{Asked: map[Frontend]struct{}{}, Locals: map[netip.Addr]bool{nodeIP: true, nodeIP6: true}}
	if old != nil {
		x.Move(old, func(Frontend) {})
		if !sameNodePorts(old.Facts, new.Facts) {
			scope.Before = old.Facts
		}
	}
	x.Move(new, func(f Frontend) { scope.Asked[f] = struct{}{} })
	if !matches(&f, slices.Collect(maps.Keys(scope.Asked))) {
		return Keep
	}
	return x.Judge(&f, scope)
}

func TestJudge(t *testing.T) {
	const (
		vip = "10.96.0.1:53"
		one = "10.244.0.1:5353"
		two = "10.244.0.2:5353"
	)
	np := nodeIP.String() + ":30053"
	tests := []struct {
		name        string
		old, new    []*testService
		dst, answer string
		want        Reason
	}{
		{"endpoint removed", svcs(udp("a", 1, 2)), svcs(udp("a", 2)), vip, one, EndpointGone},
		{"other endpoint removed", svcs(udp("a", 1, 2)), svcs(udp("a", 2)), vip, two, Keep},
		{"endpoint replaced", svcs(udp("a", 1)), svcs(udp("a", 2)), vip, one, EndpointGone},
		{"endpoint's port differs", svcs(udp("a", 1)), svcs(udp("a", 2)), vip, "10.244.0.2:99", EndpointGone},
		{"endpoint added", svcs(udp("a", 1)), svcs(udp("a", 1, 2)), vip, one, Keep},
		{"endpoint terminates and serves", svcs(udp("a", 1, 2)), svcs(udp("a", 2, 1).drain(true)), vip, one, Keep},
		{"endpoint terminates and does not serve", svcs(udp("a", 1, 2)), svcs(udp("a", 2, 1).drain(false)), vip, one, EndpointGone},
		{"policy local, endpoint elsewhere", svcs(udp("a", 1, 2)), svcs(udp("a", 1).localPolicy()), vip, one, Keep},
		{"to zero", svcs(udp("a", 1)), svcs(udp("a")), vip, one, EndpointGone},
		{"from zero", svcs(udp("a")), svcs(udp("a", 1)), vip, vip, NeverTranslated},
		{"new service", nil, svcs(udp("a", 1)), vip, vip, NeverTranslated},
		{"new service, translated before", nil, svcs(udp("a", 1)), vip, "10.9.9.9:9", EndpointGone},
		{"new service, translated rightly", nil, svcs(udp("a", 1)), vip, one, Keep},
		{"deleted", svcs(udp("a", 1)), nil, vip, one, FrontendGone},
		{"deleted, never translated", svcs(udp("a", 1)), nil, vip, vip, Keep},
		{"port changed", svcs(udp("a", 1)), svcs(udp("a", 1).port(54)), vip, one, FrontendGone},
		{"port changed, new one", svcs(udp("a", 1)), svcs(udp("a", 1).port(54)), "10.96.0.1:54", "10.96.0.1:54", NeverTranslated},
		{"IP changed", svcs(udp("a", 1)), svcs(udp("a", 1).at("10.96.0.2")), vip, one, FrontendGone},
		{"protocol changed", svcs(udp("a", 1)), svcs(udp("a", 1).proto(model.TCP)), vip, one, FrontendGone},
		{"externalIP removed", svcs(udp("a", 1).external("203.0.113.1")), svcs(udp("a", 1)), "203.0.113.1:53", one, FrontendGone},
		{"externalIP's endpoint", svcs(udp("a", 1, 2).external("203.0.113.1")), svcs(udp("a", 1).external("203.0.113.1")), "203.0.113.1:53", two, EndpointGone},
		{"load balancer removed", svcs(udp("a", 1).balancer("203.0.113.1")), svcs(udp("a", 1)), "203.0.113.1:53", one, FrontendGone},
		{"load balancer's endpoint", svcs(udp("a", 1, 2).balancer("203.0.113.1")), svcs(udp("a", 1).balancer("203.0.113.1")), "203.0.113.1:53", two, EndpointGone},
		{"node port's endpoint", svcs(udp("a", 1, 2).node(30053)), svcs(udp("a", 2).node(30053)), np, one, EndpointGone},
		{"node port, serving", svcs(udp("a", 1, 2).node(30053)), svcs(udp("a", 2).node(30053)), np, two, Keep},
		{"node port on localhost", svcs(udp("a", 1, 2).node(30053)), svcs(udp("a", 2).node(30053)), "127.0.0.9:30053", one, EndpointGone},
		{"node port to zero", svcs(udp("a", 1).node(30053)), svcs(udp("a").node(30053)), np, one, EndpointGone},
		{"node port from zero", svcs(udp("a").node(30053)), svcs(udp("a", 1).node(30053)), np, np, NeverTranslated},
		{"node port changed", svcs(udp("a", 1).node(30053)), svcs(udp("a", 1).node(30054)), np, one, FrontendGone},
		{"node port removed", svcs(udp("a", 1).node(30053)), svcs(udp("a", 1)), np, one, FrontendGone},
		{"node port removed, a local server's", svcs(udp("a", 1).node(30053)), svcs(udp("a", 1)), np, np, Keep},
		{"node port's service deleted", svcs(udp("a", 1).node(30053)), nil, np, one, FrontendGone},
		{"node port's number elsewhere", svcs(udp("a", 1).node(30053)), nil, "8.8.8.8:30053", "10.9.9.9:53", Keep},
		{"node port's number elsewhere, in force", svcs(udp("a", 1).node(30053)), svcs(udp("a").node(30053)), "8.8.8.8:30053", "8.8.8.8:30053", Keep},
		{"taken over with the endpoint", svcs(udp("a", 1)), svcs(udp("b", 1)), vip, one, Keep},
		{"taken over without it", svcs(udp("a", 1)), svcs(udp("b", 2)), vip, one, EndpointGone},
		{"clash: loser takes over", svcs(udp("a", 1), udp("b", 2)), svcs(udp("b", 2)), vip, two, Keep},
		{"clash: loser takes over, winner's flow", svcs(udp("a", 1), udp("b", 2)), svcs(udp("b", 2)), vip, one, EndpointGone},
		{"clash: loser deleted", svcs(udp("a", 1), udp("b", 2)), svcs(udp("a", 1)), vip, one, Keep},
		{"externalIP becomes another's node port", svcs(udp("a", 1).external(nodeIP.String()).port(30053), udp("b", 2).at("10.96.0.2").node(30053)),
			svcs(udp("a", 1).port(30053), udp("b", 2).at("10.96.0.2").node(30053)), np, two, Keep},
		{"node port gone under an unchanged externalIP", svcs(udp("a", 1).external(nodeIP.String()).port(30053), udp("b", 2).at("10.96.0.2").node(30053)),
			svcs(udp("a", 1).external(nodeIP.String()).port(30053)), np, one, Keep},
		{"foreign", svcs(udp("a", 1)), nil, "10.97.0.1:53", one, Keep},
		{"tcp is left alone", svcs(udp("a", 1).proto(model.TCP)), nil, vip, one, Keep},
		{"IPv6", svcs(udp6("a", 1, 2)), svcs(udp6("a", 2)), "[fd00:96::1]:53", "[fd00:244::1]:5353", EndpointGone},
		{"IPv6 has no node port on localhost", svcs(udp6("a", 1).node(30053)), svcs(udp6("a", 2).node(30053)), "[::1]:30053", "[::1]:30053", Keep},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dst := netip.MustParseAddrPort(test.dst)
			p := planner(model.FamilyOf(dst.Addr()))
			old, new := p.set(test.old...), p.set(test.new...)
			f := flow(test.dst, test.dst, test.answer)
			if got := judge(old, new, f); got != test.want {
				t.Errorf("flow to %s answered by %s: %v; want: %v", test.dst, test.answer, got, test.want)
			}
			// SCTP is judged like UDP; a UDP flow to an SCTP port is not ours.
			for _, s := range append(slices.Clone(test.old), test.new...) {
				if s.Ports[0].Protocol == model.UDP {
					s.proto(model.SCTP)
				}
			}
			p = planner(model.FamilyOf(dst.Addr()))
			old, new = p.set(test.old...), p.set(test.new...)
			if got := judge(old, new, f); got != Keep {
				t.Errorf("a UDP flow to an SCTP port: %v", got)
			}
			f.Protocol = model.SCTP
			if got := judge(old, new, f); got != test.want {
				t.Errorf("as SCTP: %v; want: %v", got, test.want)
			}
		})
	}
}

// TestJudgeZone: a switch's own view of a flow is not translated, rightly.
func TestJudgeZone(t *testing.T) {
	p := planner(model.IPv4)
	f := flow("10.1.1.1:9", "10.96.0.1:53", "10.96.0.1:53")
	f.Zone = 65520
	if got := judge(nil, p.set(udp("a", 1)), f); got != Keep {
		t.Errorf("untranslated flow of another zone: %v", got)
	}
	f.ReplySrc = netip.MustParseAddrPort("10.244.0.9:5353")
	if got := judge(nil, p.set(udp("a", 1)), f); got != EndpointGone {
		t.Errorf("translated flow of another zone: %v", got)
	}
}

// TestJudgeNodePortAddresses: what happens when NodePorts move to other
// addresses of the node.
func TestJudgeNodePortAddresses(t *testing.T) {
	other := netip.MustParseAddr("192.168.2.10")
	narrow := func(list ...netip.Addr) *plan.Facts {
		f := facts(model.IPv4)
		f.NodePorts = plan.NodePortAddresses{Addrs: list}
		return f
	}
	noLocalhost := facts(model.IPv4)
	noLocalhost.LocalhostNodePorts = false
	at := func(a netip.Addr) string { return netip.AddrPortFrom(a, 30053).String() }
	tests := []struct {
		name        string
		old, new    *plan.Facts
		dst, answer string
		want        Reason
	}{
		{"address dropped", narrow(nodeIP, other), narrow(nodeIP), at(other), "10.244.0.1:5353", AddressNotServed},
		{"address dropped, a local server's", narrow(nodeIP, other), narrow(nodeIP), at(other), at(other), Keep},
		{"address kept", narrow(nodeIP, other), narrow(nodeIP), at(nodeIP), "10.244.0.1:5353", Keep},
		{"address added", narrow(other), narrow(nodeIP, other), at(nodeIP), at(nodeIP), NeverTranslated},
		{"all narrowed", facts(model.IPv4), narrow(other), at(nodeIP), "10.244.0.1:5353", AddressNotServed},
		{"never served", narrow(nodeIP), narrow(nodeIP), at(other), at(other), Keep},
		{"localhost switched off", facts(model.IPv4), noLocalhost, "127.0.0.1:30053", "10.244.0.1:5353", AddressNotServed},
		{"localhost off, a local server's", noLocalhost, noLocalhost, "127.0.0.1:30053", "127.0.0.1:30053", Keep},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := &testPlanner{plan.NewPlanner(test.old), model.IPv4, map[model.ServiceName]bool{}}
			s := udp("a", 1).node(30053)
			old := p.set(s)
			p.SetFacts(test.new)
			if got := judge(old, p.set(s), flow("10.1.1.1:9", test.dst, test.answer)); got != test.want {
				t.Errorf("%v; want: %v", got, test.want)
			}
		})
	}
}

// TestSuspects: what is looked at after a change is no more than needed.
func TestSuspects(t *testing.T) {
	base := func() *testService { return udp("a", 1, 2).external("203.0.113.1").node(30053) }
	v := func(port uint16, addr string) Frontend {
		f := Frontend{Protocol: model.UDP, Port: port}
		if addr != "" {
			f.Addr = netip.MustParseAddr(addr)
		}
		return f
	}
	every := []Frontend{v(53, "10.96.0.1"), v(53, "203.0.113.1"), v(30053, "")}
	tests := []struct {
		name string
		new  []*testService
		want []Frontend
	}{
		{"nothing", svcs(base()), nil},
		{"policy", svcs(base().localPolicy()), nil},
		{"endpoint added", svcs(udp("a", 1, 2, 3).external("203.0.113.1").node(30053)), nil},
		{"endpoint removed", svcs(udp("a", 1).external("203.0.113.1").node(30053)), every},
		{"deleted", nil, every},
		{"externalIP changed", svcs(base().external("203.0.113.2")), []Frontend{v(53, "203.0.113.1"), v(53, "203.0.113.2")}},
		{"node port removed", svcs(base().node(0)), []Frontend{v(30053, "")}},
		{"another service", svcs(base(), udp("b", 3).at("10.96.0.9")), []Frontend{v(53, "10.96.0.9")}},
		{"a TCP service", svcs(base(), udp("b", 3).at("10.96.0.9").proto(model.TCP)), nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := planner(model.IPv4)
			x := NewIndex()
			x.Move(p.set(base()), func(Frontend) {})
			got := map[Frontend]bool{}
			x.Move(p.set(test.new...), func(f Frontend) { got[f] = true })
			want := map[Frontend]bool{}
			for _, f := range test.want {
				want[f] = true
			}
			if !maps.Equal(got, want) {
				t.Errorf("suspects %v, want %v", got, want)
			}
		})
	}
}

// TestIncrementalEqualsFull: after random changes the Index equals one made
// from nothing, and looking only at suspects finds every flow that a look at
// everything finds.
func TestIncrementalEqualsFull(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		p := planner(model.IPv4)
		x := NewIndex()
		locals := map[netip.Addr]bool{nodeIP: true}
		table := map[Flow]bool{}
		x.Move(p.set(randomServices(r)...), func(Frontend) {})
		for step := range 20 {
			set := x.Set()
			full := NewIndex()
			full.Move(set, func(Frontend) {})
			if !maps.Equal(x.owners, full.owners) {
				t.Fatalf("seed %d step %d: index differs from one made from nothing", seed, step)
			}
			for pl := range set.All {
				if !slices.IsSortedFunc(pl.Serving, func(a, b plan.Endpoint) int { return a.AddrPort.Compare(b.AddrPort) }) {
					t.Fatalf("seed %d: Serving is not sorted: %v", seed, pl.Serving)
				}
			}
			// Clients send to everything; the rules of now translate them.
			for fe, owner := range x.owners {
				dst := netip.AddrPortFrom(fe.Addr, fe.Port)
				if !fe.Addr.IsValid() {
					dst = netip.AddrPortFrom(nodeIP, fe.Port)
					if x.Owns(Frontend{fe.Protocol, nodeIP, fe.Port}) {
						continue
					}
				}
				f := Flow{Protocol: fe.Protocol, Src: netip.MustParseAddrPort("10.1.1.1:1"), Dst: dst, ReplySrc: dst}
				if n := len(owner.Serving); n > 0 {
					f.ReplySrc = owner.Serving[r.IntN(n)].AddrPort
				}
				table[f] = true
			}
			next := p.set(randomServices(r)...)
			scope := &Scope{Asked: map[Frontend]struct{}{}, Locals: locals}
			x.Move(next, func(f Frontend) { scope.Asked[f] = struct{}{} })
			everything := &Scope{Asked: maps.Clone(scope.Asked), Locals: locals}
			for f := range x.All {
				everything.Asked[f] = struct{}{}
			}
			asked := slices.Collect(maps.Keys(scope.Asked))
			for f := range table {
				quick := matches(&f, asked) && x.Judge(&f, scope) != Keep
				if thorough := x.Judge(&f, everything) != Keep; quick != thorough && f.translated() {
					t.Fatalf("seed %d step %d: flow %v: stale by suspects %v, by a full look %v", seed, step, f, quick, thorough)
				}
				if quick || !f.translated() {
					delete(table, f)
				}
			}
		}
	}
}

func randomServices(r *rand.Rand) []*testService {
	var list []*testService
	for _, name := range []string{"a", "b", "c", "d"} {
		if r.IntN(4) == 0 {
			continue
		}
		s := udp(name, r.Perm(4)[:r.IntN(4)]...).at(fmt.Sprintf("10.96.0.%d", r.IntN(3))).port(uint16(53 + r.IntN(2)))
		if r.IntN(2) == 0 {
			s.node(uint16(30053 + r.IntN(2)))
		}
		if r.IntN(3) == 0 {
			s.external(nodeIP.String()).port(uint16(30053 + r.IntN(2)))
		}
		if r.IntN(4) == 0 {
			s.proto(model.TCP)
		}
		list = append(list, s)
	}
	return list
}
