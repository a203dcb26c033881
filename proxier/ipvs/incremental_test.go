package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier/internal/aside"
	"github.com/sluice-proxy/sluice/test/history"
)

var offered = []string{"lc", "mh", "rr", "sh", "wrr"}

func newWorld(r *rand.Rand, family model.Family, names int) *history.World {
	return history.New(r, family, names, func(f *plan.Facts) {
		f.Schedulers, f.DefaultScheduler = offered, "rr"
		f.LocalhostNodePorts = false
		f.OwnAddrs = []netip.Addr{f.NodeIP}
	})
}

func options(w *history.World) Options {
	o := Options{Family: w.Family, MasqueradeBit: 14, RandomFully: true, Inside: true, Schedulers: offered}
	o.Detector.CIDR = netip.PrefixFrom(w.Addr(10, 0), 8)
	return o
}

// fresh is what a start from nothing writes for a Set.
func fresh(t *testing.T, w *history.World, set *plan.Set, refuse func(op) error) string {
	t.Helper()
	return freshKernel(t, w, set, refuse).text(false)
}

func freshKernel(t *testing.T, w *history.World, set *plan.Set, refuse func(op) error) *fakeKernel {
	t.Helper()
	k := newFake()
	k.refuse = refuse
	if err := newProxier(options(w), k).Sync(context.Background(), set); err != nil {
		t.Fatalf("start from nothing: %v", err)
	}
	return k
}

// TestIncrementalEqualsFull is law 4: any order of events leaves the same state
// as a start from nothing, also when the kernel fails now and then and when the
// agent is started anew.
func TestIncrementalEqualsFull(t *testing.T) {
	sequences := 1000
	if testing.Short() {
		sequences = 100
	}
	for seed := range sequences {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(uint64(seed), 1))
			family := []model.Family{model.IPv4, model.IPv6}[seed%2]
			w := newWorld(r, family, []int{3, 30, 150}[seed%3])
			k := newFake()
			flaky := seed%4 == 0
			o := options(w)
			report := history.NewReports()
			o.Report = report
			x := newProxier(o, k)
			for range 8 {
				for range 1 + r.IntN(w.Names) {
					w.Step()
				}
				if seed%5 == 0 && r.IntN(3) == 0 {
					x = newProxier(o, k)
				}
				if flaky {
					// One call in ten fails, and one op in some hundred.
					k.fail = func() bool { return r.IntN(300) == 0 }
				}
				set := w.Set()
				history.Insist(t, x, set)
				if d := cmp.Diff(fresh(t, w, set, nil), k.text(false)); d != "" {
					t.Fatalf("incremental differs from full (-full +incremental):\n%s", d)
				}
				ops := k.ops
				k.fail = nil
				if err := x.Sync(context.Background(), set); err != nil || k.ops != ops {
					t.Fatalf("a second Sync of the same Set wrote %d times, error %v", k.ops-ops, err)
				}
				if full, err := x.Check(context.Background(), false); full || err != nil {
					t.Fatalf("a check without a change by others verified (%v) or failed: %v", full, err)
				}
			}
			if !flaky && len(report.Aside)+len(report.Drift) > 0 {
				t.Fatalf("set aside %v, drift %v without a refusal or a change by others", report.Aside, report.Drift)
			}
		})
	}
}

// TestMomentsAreSafe: what masquerades and filters is there before traffic flows
// and goes after it, so that also a start after a kill knows what is ours.
func TestMomentsAreSafe(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 1))
	w := newWorld(r, model.IPv4, 60)
	k := newFake()
	check := newProxier(options(w), k)
	k.order = func(ops []op) {
		shadow := newFake()
		shadow.addrs, shadow.sets = map[netip.Addr]bool{}, [setCount]map[entry]bool{}
		have, _ := k.read(context.Background())
		for _, o := range ops {
			mirror := &fakeKernel{servers: have.servers, sets: have.sets, addrs: have.addrs}
			if err := mirror.do(o); err != nil {
				t.Fatal(err)
			}
			for key := range have.servers {
				if !check.ours(key, have) {
					t.Fatalf("after %v nobody knows whose %s is", o, key)
				}
			}
		}
	}
	x := newProxier(options(w), k)
	for range 40 {
		for range 10 {
			w.Step()
		}
		history.Insist(t, x, w.Set())
	}
}

// TestRefusedServiceIsSetAside is law 7.
func TestRefusedServiceIsSetAside(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	w := newWorld(r, model.IPv4, 200)
	for range 600 {
		w.Step()
	}
	k := newFake()
	k.refuse = func(o op) error {
		if o.kind == putServer && o.settings.scheduler == "wrr" {
			return errors.New("no such scheduler")
		}
		return nil
	}
	report := history.NewReports()
	o := options(w)
	o.Report = report
	x := newProxier(o, k)
	clock := time.Unix(0, 0)
	x.now = func() time.Time { return clock }
	check := func() {
		t.Helper()
		set := w.Set()
		history.Insist(t, x, set)
		bad := map[string]bool{}
		for p := range set.All {
			if p.Balance.Scheduler == "wrr" && len(x.compiler(set.Facts).compile(p, 0).servers) > 0 {
				bad[p.PortKey.String()+p.Protocol.String()] = true
			}
		}
		got := map[string]bool{}
		for key := range report.Aside {
			got[key.String()+key.Protocol.String()] = true
		}
		if d := cmp.Diff(bad, got); d != "" {
			t.Fatalf("set aside (-want +got):\n%s", d)
		}
		if d := cmp.Diff(fresh(t, w, set, k.refuse), k.text(false)); d != "" {
			t.Fatalf("the others are not all in force:\n%s", d)
		}
	}
	check()
	if len(report.Aside) == 0 {
		t.Fatal("no Service was refused: the test shows nothing")
	}
	for range 30 {
		for range 20 {
			w.Step()
		}
		check()
	}
	clock = clock.Add(2 * aside.Retry)
	check()
	k.refuse = func(op) error { return nil }
	clock = clock.Add(8 * aside.Retry)
	w.Step()
	history.Insist(t, x, w.Set())
	if len(report.Aside) > 0 {
		t.Errorf("still set aside: %v", report.Aside)
	}
	if d := cmp.Diff(fresh(t, w, w.Set(), nil), k.text(false)); d != "" {
		t.Fatalf("what was refused is not all in force:\n%s", d)
	}
}

// TestARefusedPartIsLeftOut: a destination that the kernel does not take costs
// its port nothing else, and is tried again.
func TestARefusedPartIsLeftOut(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 3))
	w := newWorld(r, model.IPv4, 60)
	for range 300 {
		w.Step()
	}
	k := newFake()
	bad := map[netip.Addr]bool{}
	k.refuse = func(o op) error {
		if (o.kind == putDest && bad[o.dest.at.Addr()]) || (o.kind == addEntry && o.set == setLoopBack && bad[o.entry.addr]) {
			return errors.New("not this one")
		}
		return nil
	}
	set := w.Set()
	for p := range set.All {
		if len(p.Cluster) > 2 && len(bad) < 3 {
			bad[p.Cluster[0].Addr()] = true
		}
	}
	report := history.NewReports()
	o := options(w)
	o.Report = report
	x := newProxier(o, k)
	history.Insist(t, x, set)
	whole := newFake()
	history.Insist(t, newProxier(options(w), whole), set)
	if len(k.servers) != len(whole.servers) {
		t.Errorf("%d virtual servers, want %d", len(k.servers), len(whole.servers))
	}
	if len(bad) != 3 || len(report.Aside) < 3 {
		t.Fatalf("told of %v for %v", report.Aside, bad)
	}
	k.refuse = nil
	for range patrolChecks + 1 {
		if _, err := x.Check(context.Background(), false); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff(fresh(t, w, set, nil), k.text(false)); d != "" {
		t.Errorf("not tried again (-want +got):\n%s", d)
	}
	if len(report.Aside) > 0 {
		t.Errorf("still told: %v", report.Aside)
	}
}

// TestAsideBacksOff: what is refused is tried again on a quiet node, too, and
// less and less often.
func TestAsideBacksOff(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(1, 2)), model.IPv4, 40)
	for range 200 {
		w.Step()
	}
	k := newFake()
	tries := 0
	k.refuse = func(o op) error {
		if o.kind == putServer && o.settings.scheduler == "wrr" {
			tries++
			return errors.New("no such scheduler")
		}
		return nil
	}
	x := newProxier(options(w), k)
	clock := epoch
	x.now = func() time.Time { return clock }
	history.Insist(t, x, w.Set())
	var at []time.Duration
	for range 5 * 60 {
		before := tries
		clock = clock.Add(time.Minute)
		if _, err := x.Check(context.Background(), false); err != nil {
			t.Fatal(err)
		}
		if tries > before {
			at = append(at, clock.Sub(epoch))
		}
	}
	want := []time.Duration{1, 3, 7, 15, 31, 63, 123, 183, 243}
	for i := range want {
		want[i] *= time.Minute
	}
	if !slices.Equal(at, want) {
		t.Errorf("tried again after %v, want %v", at, want)
	}
	k.refuse = nil
	clock = clock.Add(time.Hour)
	if _, err := x.Check(context.Background(), false); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(fresh(t, w, w.Set(), nil), k.text(false)); d != "" {
		t.Errorf("not in force though the kernel takes it:\n%s", d)
	}
}

// TestEndpointsDoNotMoveServers: whatever endpoints come and go, a Service keeps
// its virtual servers: one that goes takes its connections with it.
func TestEndpointsDoNotMoveServers(t *testing.T) {
	for _, policy := range []string{"external", "internal"} {
		t.Run(policy, func(t *testing.T) {
			w := newWorld(rand.New(rand.NewPCG(1, 1)), model.IPv4, 1)
			w.Services["svc-0"] = &model.Service{ServiceName: model.ServiceName{Namespace: "ns", Name: "svc-0"}, ClusterIPs: []netip.Addr{w.Addr(10, 1)},
				LoadBalancerIPs: []netip.Addr{w.Addr(172, 1)}, ExternalLocal: policy == "external", InternalLocal: policy == "internal",
				Ports: []model.ServicePort{{Name: "p0", Protocol: model.TCP, Port: 80, NodePort: 30000}}}
			k := newFake()
			x := newProxier(options(w), k)
			var keys string
			for range 4 {
				for _, nodes := range [][]string{{"node-0", "node-1"}, {"node-1"}, {"node-0"}, {}, {"node-1"}} {
					sl := &model.Slice{Namespace: "ns", Name: "svc-0-0", Service: "svc-0", Family: model.IPv4,
						Ports: []model.SlicePort{{Name: "p0", Protocol: model.TCP, Port: 8080}}}
					for i, n := range nodes {
						sl.Endpoints = append(sl.Endpoints, model.Endpoint{Addr: w.Addr(10, 100+i), Node: n, Ready: true, Serving: true})
					}
					w.Slices["svc-0-0"] = sl
					w.Update("svc-0")
					history.Insist(t, x, w.Set())
					now := fmt.Sprint(slices.SortedFunc(maps.Keys(k.servers), serverKey.compare))
					if keys != "" && now != keys {
						t.Fatalf("with endpoints on %v: %s, before %s", nodes, now, keys)
					}
					keys = now
				}
			}
		})
	}
}

// TestMarksRunOut: who gets no mark is served as clients outside are, and told.
func TestMarksRunOut(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(1, 2)), model.IPv4, 1)
	add := func(i int) {
		w.Planner.Update(model.ServiceName{Namespace: "ns", Name: fmt.Sprint("s", i)}, &model.Service{
			ServiceName: model.ServiceName{Namespace: "ns", Name: fmt.Sprint("s", i)}, ExternalLocal: true,
			ClusterIPs: []netip.Addr{w.Addr(10, i)}, LoadBalancerIPs: []netip.Addr{w.Addr(172, i)},
			Ports: []model.ServicePort{{Protocol: model.TCP, Port: 80}}}, nil)
	}
	for i := range insideMost + 2 {
		add(1 + i)
	}
	k := newFake()
	report := history.NewReports()
	o := options(w)
	o.Report = report
	x := newProxier(o, k)
	history.Insist(t, x, w.Set())
	if len(report.Aside) != 2 || len(k.sets[setInside]) != insideMost {
		t.Fatalf("told of %d ports, %d have marks", len(report.Aside), len(k.sets[setInside]))
	}
	if len(k.servers) != 2*(insideMost+2)+insideMost {
		t.Errorf("%d virtual servers", len(k.servers))
	}
	for key, err := range report.Aside {
		if !errors.Is(err, errNoMark) || k.servers[serverKey{addr: w.Set().Get(key).Frontends[1].Addr, port: 80, protocol: model.TCP}] == nil {
			t.Errorf("%v: %v", key, err)
		}
	}
}

// TestDrift: what somebody else changes is found and put right.
func TestDrift(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(3, 4)), model.IPv4, 100)
	for range 600 {
		w.Step()
	}
	anyKey := func(k *fakeKernel, with bool) serverKey {
		for key, s := range k.servers {
			if !with || len(s.destinations) > 0 {
				return key
			}
		}
		t.Fatal("no virtual server")
		return serverKey{}
	}
	for name, change := range map[string]func(*fakeKernel){
		"flush":       func(k *fakeKernel) { clear(k.servers) },
		"server":      func(k *fakeKernel) { delete(k.servers, anyKey(k, false)) },
		"scheduler":   func(k *fakeKernel) { k.servers[anyKey(k, false)].scheduler = "nq" },
		"destination": func(k *fakeKernel) { clear(k.servers[anyKey(k, true)].destinations) },
		"added": func(k *fakeKernel) {
			k.servers[anyKey(k, false)].destinations[netip.MustParseAddrPort("9.9.9.9:9")] = liveDest{weight: 1}
		},
		"set":    func(k *fakeKernel) { clear(k.sets[setClusterIP]) },
		"no set": func(k *fakeKernel) { k.sets[setLoopBack] = nil },
		"address": func(k *fakeKernel) {
			delete(k.addrs, slices.MinFunc(slices.Collect(maps.Keys(k.addrs)), netip.Addr.Compare))
		},
		"device":        func(k *fakeKernel) { k.addrs = nil },
		"rules":         func(k *fakeKernel) { k.static = nil; k.tables++ },
		"others' rules": func(k *fakeKernel) { k.tables++ },
	} {
		t.Run(name, func(t *testing.T) {
			k := newFake()
			o := options(w)
			report := history.NewReports()
			o.Report = report
			x := newProxier(o, k)
			history.Insist(t, x, w.Set())
			want := k.text(true)
			change(k)
			drift := k.text(true) != want
			for range 2*patrolChecks + 1 {
				if _, err := x.Check(context.Background(), false); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 { // an added destination is drained, and has no connections
				if _, err := x.Check(context.Background(), false); err != nil {
					t.Fatal(err)
				}
			}
			if d := cmp.Diff(want, k.text(true)); d != "" {
				t.Errorf("not repaired (-want +got):\n%s", d)
			}
			if drift != (len(report.Drift) > 0) {
				t.Errorf("drift %v, reported %v", drift, report.Drift)
			}
		})
	}
}

// TestAFlushIsFoundAtOnce: the first check after it sees it.
func TestAFlushIsFoundAtOnce(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(3, 4)), model.IPv4, 1000)
	for range 3000 {
		w.Step()
	}
	k := newFake()
	x := newProxier(options(w), k)
	history.Insist(t, x, w.Set())
	for range 10 {
		want := k.text(true)
		clear(k.servers)
		if looked, err := x.Check(context.Background(), false); !looked || err != nil || k.text(true) != want {
			t.Fatalf("looked %v, error %v", looked, err)
		}
	}
}

// TestForeign: virtual servers, addresses and their connections that somebody
// else has are left alone, and whoever wants one of them is told.
func TestForeign(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(3, 9)), model.IPv4, 60)
	for range 300 {
		w.Step()
	}
	set := w.Set()
	var wanted serverKey
	x := newProxier(options(w), newFake())
	for p := range set.All {
		if rs := x.compiler(set.Facts).compile(p, 0); len(rs.servers) > 0 && rs.servers[0].addr.IsValid() {
			wanted = rs.servers[0].serverKey
		}
	}
	vip := netip.MustParseAddr("192.0.2.7")
	theirs := func(k *fakeKernel) {
		for _, key := range []serverKey{{addr: vip, port: 80, protocol: model.TCP}, {mark: 7}, wanted} {
			k.servers[key] = &liveServer{settings{"wlc", 0, 0}, map[netip.AddrPort]liveDest{netip.MustParseAddrPort("192.0.2.8:80"): {weight: 5}}}
		}
		k.addrs[netip.MustParseAddr("192.0.2.9")] = true
	}
	survived := func(t *testing.T, k *fakeKernel) {
		t.Helper()
		for _, key := range []serverKey{{addr: vip, port: 80, protocol: model.TCP}, {mark: 7}, wanted} {
			if s := k.servers[key]; s == nil || s.scheduler != "wlc" || s.destinations[netip.MustParseAddrPort("192.0.2.8:80")].weight != 5 || len(s.destinations) != 1 {
				t.Fatalf("%s was touched: %+v", key, s)
			}
		}
		if !k.addrs[netip.MustParseAddr("192.0.2.9")] {
			t.Fatal("their address is gone")
		}
	}
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("late=%v", late), func(t *testing.T) {
			k := newFake()
			report := history.NewReports()
			o := options(w)
			o.Report = report
			x := newProxier(o, k)
			k.addrs = map[netip.Addr]bool{}
			if late { // they come while we run, before the Service
				history.Insist(t, x, plan.EmptySet(set.Facts))
			}
			theirs(k)
			history.Insist(t, x, set)
			survived(t, k)
			if len(report.Aside) != 1 {
				t.Fatalf("told of %v, want the one port that wants %s", report.Aside, wanted)
			}
			if _, err := x.Check(context.Background(), true); err != nil {
				t.Fatal(err)
			}
			history.Insist(t, newProxier(options(w), k), set)
			survived(t, k)
			history.Insist(t, newProxier(options(w), k), plan.EmptySet(set.Facts))
			history.Insist(t, newProxier(options(w), k), plan.EmptySet(set.Facts)) // now all sets are empty
			survived(t, k)
			if err := newProxier(options(w), k).Cleanup(context.Background()); err != nil {
				t.Fatal(err)
			}
			survived(t, k)
			if len(k.servers) != 3 || len(k.addrs) != 1 {
				t.Errorf("cleanup left %d virtual servers and %d addresses", len(k.servers), len(k.addrs))
			}
		})
	}
}

// TestPrime: a node without virtual servers of ours gets the important Services
// first.
func TestPrime(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(11, 12)), model.IPv4, 100)
	for range 400 {
		w.Step()
	}
	set := w.Set()
	k := newFake()
	if wrote, err := newProxier(options(w), k).Prime(context.Background(), set); !wrote || err != nil {
		t.Fatalf("wrote %v, error %v", wrote, err)
	}
	n := len(k.servers)
	x := newProxier(options(w), k)
	history.Insist(t, x, set)
	if n == 0 || n >= len(k.servers) {
		t.Fatalf("primed with %d of %d virtual servers", n, len(k.servers))
	}
	if d := cmp.Diff(fresh(t, w, set, nil), k.text(false)); d != "" {
		t.Fatal(d)
	}
	if wrote, err := newProxier(options(w), k).Prime(context.Background(), set); wrote || err != nil {
		t.Fatalf("a node with virtual servers was primed: %v, %v", wrote, err)
	}
}
