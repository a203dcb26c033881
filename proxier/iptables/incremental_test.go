package iptables

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// world makes random Services and slices, few enough that names meet again and
// many enough that dispatch trees and endpoint groups split and merge.
type world struct {
	r       *rand.Rand
	family  model.Family
	names   int
	planner *plan.Planner
	svcs    map[string]*model.Service
	slices  map[string]*model.Slice
	facts   plan.Facts
}

func newWorld(r *rand.Rand, family model.Family, names int) *world {
	w := &world{r: r, family: family, names: names, svcs: map[string]*model.Service{}, slices: map[string]*model.Slice{}}
	w.facts = plan.Facts{Family: family, NodeName: "node-0", Zone: "z0", NodeIP: w.addr(192, 0),
		DetectLocal: true, NodePorts: plan.NodePortAddresses{All: true}, LocalhostNodePorts: family == model.IPv4}
	f := w.facts
	w.planner = plan.NewPlanner(&f)
	return w
}

func (w *world) addr(net byte, n int) netip.Addr {
	if w.family == model.IPv6 {
		return netip.AddrFrom16([16]byte{0xfd, net, 12: byte(n >> 24), 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
	}
	return netip.AddrFrom4([4]byte{net, byte(n >> 16), byte(n >> 8), byte(n)})
}

func (w *world) chance(n int) bool { return w.r.IntN(n) == 0 }

func (w *world) service(name string) *model.Service {
	id := int(sum(name) % 5000)
	s := &model.Service{ServiceName: model.ServiceName{Namespace: "ns", Name: name}, Created: time.Unix(int64(id%7), 0),
		ClusterIPs: []netip.Addr{w.addr(10, id)}}
	if w.chance(12) {
		s.Namespace = "kube-system"
	}
	if w.chance(4) {
		s.Affinity = time.Duration(1+w.r.IntN(3)) * time.Hour
	}
	s.InternalLocal, s.ExternalLocal = w.chance(5), w.chance(3)
	protocols := []model.Protocol{model.TCP, model.UDP, model.SCTP}
	for i := range 1 + w.r.IntN(3) {
		p := model.ServicePort{Name: fmt.Sprintf("p%d", i), Protocol: protocols[w.r.IntN(3)], Port: uint16(80 + w.r.IntN(4))}
		if w.chance(2) {
			p.NodePort = uint16(30000 + w.r.IntN(2000))
		}
		s.Ports = append(s.Ports, p)
	}
	if w.chance(3) {
		s.LoadBalancerIPs = []netip.Addr{w.addr(172, w.r.IntN(60))}
		if w.chance(2) {
			s.SourceRanges = []netip.Prefix{netip.PrefixFrom(w.addr(11, w.r.IntN(3)), 24).Masked()}
		}
		if s.ExternalLocal {
			s.HealthCheckNodePort = uint16(32000 + w.r.IntN(500))
		}
	}
	if w.chance(6) {
		s.ExternalIPs = []netip.Addr{w.addr(172, w.r.IntN(60))}
	}
	return s
}

func (w *world) slice(svc string, i int) *model.Slice {
	sl := &model.Slice{Namespace: "ns", Name: fmt.Sprintf("%s-%d", svc, i), Service: svc, Family: w.family}
	for i := range 3 {
		for _, p := range []model.Protocol{model.TCP, model.UDP, model.SCTP} {
			sl.Ports = append(sl.Ports, model.SlicePort{Name: fmt.Sprintf("p%d", i), Protocol: p, Port: uint16(8080 + i)})
		}
	}
	n := w.r.IntN(5)
	if w.chance(25) {
		n = w.r.IntN(200)
	}
	for range n {
		ready := !w.chance(4)
		sl.Endpoints = append(sl.Endpoints, model.Endpoint{Addr: w.addr(10, 1<<20+w.r.IntN(400)), Node: fmt.Sprintf("node-%d", w.r.IntN(4)),
			Ready: ready, Serving: ready || w.chance(2), Terminating: !ready})
	}
	return sl
}

func sum(s string) uint32 {
	h := uint32(17)
	for _, c := range s {
		h = h*2654435761 + uint32(c)
	}
	return h >> 7
}

// step makes one random event.
func (w *world) step() {
	name := fmt.Sprintf("svc-%d", w.r.IntN(w.names))
	switch w.r.IntN(10) {
	case 0:
		delete(w.svcs, name)
	case 1, 2, 3:
		w.svcs[name] = w.service(name)
	case 4:
		delete(w.slices, fmt.Sprintf("%s-%d", name, w.r.IntN(2)))
	case 5:
		if w.chance(40) {
			w.facts.MasqueradeAll = !w.facts.MasqueradeAll
			w.facts.LocalhostNodePorts = w.family == model.IPv4 && w.chance(2)
			f := w.facts
			if w.planner.SetFacts(&f) {
				for n := range w.names {
					w.update(fmt.Sprintf("svc-%d", n))
				}
			}
		}
	default:
		sl := w.slice(name, w.r.IntN(2))
		w.slices[sl.Name] = sl
	}
	w.update(name)
}

func (w *world) update(name string) {
	var list []*model.Slice
	for i := range 2 {
		if sl := w.slices[fmt.Sprintf("%s-%d", name, i)]; sl != nil {
			list = append(list, sl)
		}
	}
	w.planner.Update(model.ServiceName{Namespace: "ns", Name: name}, w.svcs[name], list)
}

func (w *world) options() Options {
	o := Options{Family: w.family, MasqueradeBit: 14, RandomFully: true}
	o.Detector.CIDR = netip.PrefixFrom(w.addr(10, 0), 8)
	return o
}

// log collects what a proxier reports.
type reportLog struct {
	aside map[model.PortKey]error
	drift map[string]int
}

func (l *reportLog) SetAside(k model.PortKey, err error) {
	if err == nil {
		delete(l.aside, k)
	} else {
		l.aside[k] = err
	}
}
func (l *reportLog) DriftRepaired(object string, n int) { l.drift[object] += n }

func newReport() *reportLog {
	return &reportLog{aside: map[model.PortKey]error{}, drift: map[string]int{}}
}

// fresh is what a start from nothing writes for a Set.
func fresh(t *testing.T, w *world, set *plan.Set, refuse func(string) bool) string {
	t.Helper()
	k := newFake(w.r)
	k.refuse = refuse
	x := newProxier(w.options(), k)
	if err := x.Sync(context.Background(), set); err != nil {
		t.Fatalf("start from nothing: %v", err)
	}
	return k.text()
}

// TestIncrementalEqualsFull is law 4: any order of events leaves the same state
// as a start from nothing, also when the kernel fails now and then.
func TestIncrementalEqualsFull(t *testing.T) {
	sequences := 1000
	if testing.Short() {
		sequences = 100
	}
	for seed := range sequences {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 1))
			family := []model.Family{model.IPv4, model.IPv6}[seed%2]
			w := newWorld(r, family, []int{3, 30, 150}[seed%3])
			k := newFake(r)
			flaky := seed%4 == 0
			o := w.options()
			report := newReport()
			o.Report = report
			x := newProxier(o, k)
			for range 8 {
				for range 1 + r.IntN(w.names) {
					w.step()
				}
				if flaky {
					k.fail = func() bool { return r.IntN(10) == 0 }
				}
				set := w.planner.Set()
				err := x.Sync(context.Background(), set)
				for tries := 0; err != nil; tries++ {
					if strings.Contains(err.Error(), "BUG") || tries > 100 {
						t.Fatal(err)
					}
					x.Forget()
					err = x.Sync(context.Background(), set)
				}
				if want := fresh(t, w, set, nil); !sameButFirewall(k.text(), want) {
					t.Fatalf("incremental differs from full (-full +incremental):\n%s", cmp.Diff(want, k.text()))
				}
				writes := k.writes
				k.fail = nil
				if err := x.Sync(context.Background(), set); err != nil || k.writes != writes {
					t.Fatalf("a second Sync of the same Set wrote %d times, error %v", k.writes-writes, err)
				}
			}
			if !flaky && len(report.aside) > 0 {
				t.Fatalf("set aside without a refusal: %v", report.aside)
			}
		})
	}
}

// sameButFirewall compares states. KUBE-FIREWALL and its jumps are never taken
// back, so history may leave them.
func sameButFirewall(a, b string) bool {
	strip := func(s string) string {
		var out []string
		for line := range strings.Lines(s) {
			if !strings.Contains(line, chainFirewall) && !strings.Contains(line, "localnet") {
				out = append(out, line)
			}
		}
		return strings.Join(out, "")
	}
	return strip(a) == strip(b)
}

// TestRefusedServiceIsSetAside is law 7.
func TestRefusedServiceIsSetAside(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	w := newWorld(r, model.IPv4, 200)
	for range 600 {
		w.step()
	}
	k := newFake(r)
	bad := map[string]bool{}
	k.refuse = func(rule string) bool {
		return strings.Contains(rule, "-p sctp -m comment") && strings.Contains(rule, "svc-1")
	}
	report := newReport()
	o := w.options()
	o.Report = report
	x := newProxier(o, k)
	clock := time.Unix(0, 0)
	x.now = func() time.Time { return clock }
	check := func() {
		t.Helper()
		set := w.planner.Set()
		if err := x.Sync(context.Background(), set); err != nil {
			t.Fatal(err)
		}
		clear(bad)
		for p := range set.All {
			for _, e := range newCompiler(&o, set).trial([]*plan.Plan{p}) {
				for _, rule := range e.rules {
					if k.refuse(rule) {
						bad[p.PortKey.String()+p.Protocol.String()] = true
					}
				}
			}
		}
		got := map[string]bool{}
		for key := range report.aside {
			got[key.String()+key.Protocol.String()] = true
		}
		if d := cmp.Diff(bad, got); d != "" {
			t.Fatalf("set aside (-want +got):\n%s", d)
		}
		if want := fresh(t, w, set, k.refuse); k.text() != want {
			t.Fatalf("the others are not all in force:\n%s", cmp.Diff(want, k.text()))
		}
	}
	check()
	if len(bad) == 0 {
		t.Fatal("no Service was refused: the test shows nothing")
	}
	for range 30 {
		for range 20 {
			w.step()
		}
		check()
	}
	// What is still refused is tried again alone: nothing else is read or written.
	clock = clock.Add(2 * retryAside)
	reads, writes := k.lists, len(k.changes)
	check()
	if k.lists != reads || len(k.changes) != writes {
		t.Errorf("%d reads, %d writes for Services that are still refused", k.lists-reads, len(k.changes)-writes)
	}
	// What was refused comes back when the kernel takes it.
	k.refuse = func(string) bool { return false }
	clock = clock.Add(4 * retryAside)
	check()
}

// TestDrift: what somebody else changes is found and put right, and only that.
func TestDrift(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	w := newWorld(r, model.IPv4, 200)
	for range 600 {
		w.step()
	}
	k := newFake(r)
	o := w.options()
	report := newReport()
	o.Report = report
	x := newProxier(o, k)
	set := w.planner.Set()
	ctx := context.Background()
	if err := x.Sync(ctx, set); err != nil {
		t.Fatal(err)
	}
	want := k.text()
	if checked, err := x.Check(ctx, false); checked || err != nil {
		t.Fatalf("a check without a change verified (%v) or failed: %v", checked, err)
	}
	for i := range 3 { // the same drift three times: it must not be taken for the form in which it reads back
		k.tables[tableNAT][chainServices] = nil
		k.tables[tableFilter]["FORWARD"] = nil
		k.writes++
		before := len(k.changes)
		x.verified = time.Time{}
		if checked, err := x.Check(ctx, false); !checked || err != nil {
			t.Fatalf("drift %d: verified %v, error %v", i, checked, err)
		}
		if k.text() != want {
			t.Fatalf("drift %d was not repaired:\n%s", i, cmp.Diff(want, k.text()))
		}
		if n := len(k.changes) - before; n != 1 {
			t.Errorf("drift %d: %d writes, want 1", i, n)
		}
		if report.drift["chain"] != i+1 || report.drift["jump"] != 4*(i+1) {
			t.Errorf("drift %d reported as %v", i, report.drift)
		}
	}
}

// TestDriftBesideASync: a change by others is found also if a Sync writes between
// it and the next Check.
func TestDriftBesideASync(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 5))
	w := newWorld(r, model.IPv4, 40)
	for range 100 {
		w.step()
	}
	k := newFake(r)
	x := newProxier(w.options(), k)
	ctx := context.Background()
	if err := x.Sync(ctx, w.planner.Set()); err != nil {
		t.Fatal(err)
	}
	k.tables[tableFilter]["FORWARD"] = nil
	k.writes++
	for range 5 {
		w.step()
	}
	set := w.planner.Set()
	if err := x.Sync(ctx, set); err != nil {
		t.Fatal(err)
	}
	x.verified = time.Time{}
	if looked, err := x.Check(ctx, false); !looked || err != nil {
		t.Fatalf("looked %v, error %v", looked, err)
	}
	if want := fresh(t, w, set, nil); k.text() != want {
		t.Fatalf("not repaired:\n%s", cmp.Diff(want, k.text()))
	}
	if looked, err := x.Check(ctx, false); looked || err != nil {
		t.Fatalf("its own repair was taken for a change by others: looked %v, error %v", looked, err)
	}
}

// TestPrime: a node without rules gets the important Services first; one that
// has rules keeps them all.
func TestPrime(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(11, 12)), model.IPv4, 100)
	for range 400 {
		w.step()
	}
	set := w.planner.Set()
	ctx := context.Background()
	k := newFake(w.r)
	if wrote, err := newProxier(w.options(), k).Prime(ctx, set); !wrote || err != nil {
		t.Fatalf("wrote %v, error %v", wrote, err)
	}
	if got := k.text(); !strings.Contains(got, "kube-system/") || strings.Contains(got, " ns/") || strings.Contains(got, "\"ns/") {
		t.Fatalf("not the important Services, or not only:\n%s", got)
	}
	x := newProxier(w.options(), k)
	if err := x.Sync(ctx, set); err != nil {
		t.Fatal(err)
	}
	want := fresh(t, w, set, nil)
	if k.text() != want {
		t.Fatalf("after the full Sync:\n%s", cmp.Diff(want, k.text()))
	}
	if wrote, err := newProxier(w.options(), k).Prime(ctx, plan.EmptySet(set.Facts)); wrote || err != nil || k.text() != want {
		t.Fatalf("a node with rules was primed: wrote %v, error %v", wrote, err)
	}
	if wrote, err := newProxier(w.options(), k).Prime(ctx, set); wrote || err != nil || k.text() != want {
		t.Fatalf("a node with rules was primed: wrote %v, error %v", wrote, err)
	}
}
