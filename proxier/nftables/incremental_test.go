package nftables

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier/internal/aside"
	"github.com/sluice-proxy/sluice/test/history"
)

func newWorld(r *rand.Rand, family model.Family, names int) *history.World {
	return history.New(r, family, names, func(f *plan.Facts) {
		f.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("fd0a::/112")}
		f.ServiceCIDRs = slices.DeleteFunc(f.ServiceCIDRs, func(p netip.Prefix) bool { return model.FamilyOf(p.Addr()) != family })
		if r.IntN(3) == 0 {
			f.NodePorts = plan.NodePortAddresses{Addrs: []netip.Addr{f.NodeIP}}
		}
	})
}

func options(w *history.World) Options {
	o := Options{Family: w.Family, MasqueradeBit: 14}
	if w.Names == 30 || w.Names == 40 {
		o.Traffic = 25 // some are counted
	}
	o.Detector.CIDR = netip.PrefixFrom(firstAddr(w), 8).Masked()
	return o
}

func firstAddr(w *history.World) netip.Addr { return w.Addr(10, 0) }

// clocked gives a proxier a clock that stands still until it is moved.
func clocked(o Options, k kernel) (*Proxier, *time.Time) {
	x := newProxier(o, k)
	now := time.Unix(1e9, 0)
	x.now = func() time.Time { return now }
	return x, &now
}

// fresh is what a start from nothing writes for a Set.
func fresh(t *testing.T, o Options, set *plan.Set, refuse func(element) error) string {
	t.Helper()
	k := newFake()
	k.refuse = refuse
	x, now := clocked(o, k)
	if err := x.Sync(context.Background(), set); err != nil {
		t.Fatalf("start from nothing: %v", err)
	}
	sweep(t, x, now)
	return k.text()
}

// sweep lets the time pass after which chains that nobody needs are deleted.
func sweep(t *testing.T, x *Proxier, now *time.Time) {
	t.Helper()
	for tries := 0; tries == 0 || len(x.ledger.idle) > 0; tries++ {
		if tries == 5 { // one may try again what was refused, which leaves chains
			t.Fatalf("never deleted: %v", x.ledger.idle)
		}
		*now = now.Add(sweepAfter)
		if full, err := x.Check(context.Background(), false); full || err != nil {
			t.Fatalf("a check without a change by others verified (%v) or failed: %v", full, err)
		}
	}
}

// TestIncrementalEqualsFull is law 4: any order of events leaves the same table as a
// start from nothing, also when the kernel fails in one call of ten, when the agent
// is started anew, and when transactions have to be small.
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
			if seed%7 == 0 {
				k.most = 4000
			}
			flaky := seed%4 == 0
			few := []int{0, 100, fewMost}[seed%11%3]
			o := options(w)
			report := history.NewReports()
			o.Report = report
			x, now := clocked(o, k)
			x.few = few
			for range 8 {
				for range 1 + r.IntN(w.Names) {
					w.Step()
				}
				if seed%5 == 0 && r.IntN(3) == 0 {
					x, now = clocked(o, k)
					x.few = few
				}
				if flaky {
					k.fail = func() bool { return r.IntN(10) == 0 }
				}
				set := w.Set()
				history.Insist(t, x, set)
				k.fail = nil
				sweep(t, x, now)
				if d := cmp.Diff(fresh(t, options(w), set, nil), k.text()); d != "" {
					t.Fatalf("incremental differs from full (-full +incremental):\n%s", d)
				}
				commits := k.commits
				if err := x.Sync(context.Background(), set); err != nil || k.commits != commits {
					t.Fatalf("a second Sync of the same Set wrote %d times, error %v", k.commits-commits, err)
				}
			}
			if !flaky && len(report.Aside)+len(report.Drift) > 0 {
				t.Fatalf("set aside %v, drift %v without a refusal or a change by others", report.Aside, report.Drift)
			}
		})
	}
}

// TestMomentsAreSafe: whatever a transaction leaves, each frontend's verdict leads to
// as many endpoints as there are, also where one Service needs several transactions.
func TestMomentsAreSafe(t *testing.T) {
	for seed := range 40 {
		r := rand.New(rand.NewPCG(uint64(seed), 3))
		w := newWorld(r, model.IPv4, 60)
		k := newFake()
		k.most = 2500 // some thirty elements
		moments := 0
		k.seen = func(table *fakeTable) {
			moments++
			if err := table.broken(); err != "" {
				t.Errorf("seed %d: %s", seed, err)
			}
		}
		x, _ := clocked(options(w), k)
		for range 20 {
			for range 10 {
				w.Step()
			}
			history.Insist(t, x, w.Set())
		}
		if moments < 20 {
			t.Fatalf("only %d transactions", moments)
		}
	}
}

// broken says which frontend's chain could choose an endpoint that is not there.
func (t *fakeTable) broken() string {
	for _, set := range []setID{setServices, setNodePorts} {
		for k, v := range t.sets[set] {
			if why := t.brokenChain(k, v.then, map[chainName]bool{}); why != "" {
				return fmt.Sprintf("%s: %s", element{k, v}, why)
			}
		}
	}
	return ""
}

func (t *fakeTable) brokenChain(frontend key, name chainName, been map[chainName]bool) string {
	if name == dropAll || been[name] {
		return ""
	}
	been[name] = true
	ch, ok := t.chains[name]
	if !ok {
		return "no chain " + string(name)
	}
	for _, r := range ch.rules {
		for _, to := range targets(r) {
			if why := t.brokenChain(frontend, to, been); why != "" {
				return why
			}
		}
		var n int
		if _, err := fmt.Sscanf(r.text[max(0, strings.Index(r.text, "numgen")):], "numgen random mod %d", &n); err != nil {
			continue
		}
		if !strings.Contains(string(name), "-sticky-") && n > 1 {
			continue // it may have no endpoint, and is drawn again: the last rule finds one
		}
		for set := setEndpoints; set.isEndpoints(); set++ {
			if !strings.Contains(r.text, "map @"+set.String()) {
				continue
			}
			for i := range n {
				k := frontend
				k.set, k.index = set, uint32(i)
				if _, ok := t.sets[set][k]; !ok {
					return fmt.Sprintf("no endpoint %d of %d in %s", i, n, set)
				}
			}
		}
	}
	return ""
}

// TestRefusedServiceIsSetAside is law 7.
func TestRefusedServiceIsSetAside(t *testing.T) {
	for _, mute := range []bool{false, true} {
		for _, most := range []int{0, 4000} {
			for _, few := range []int{0, fewMost} {
				t.Run(fmt.Sprintf("mute=%v,room=%d,few=%d", mute, most, few), func(t *testing.T) {
					t.Parallel()
					refuseSome(t, mute, most, few)
				})
			}
		}
	}
}

// refuseSome is for a kernel that says who is to blame, or does not (mute), takes so
// many bytes in a transaction, and a proxier that keeps so few elements that it finds.
func refuseSome(t *testing.T, mute bool, most, few int) {
	r := rand.New(rand.NewPCG(1, 2))
	w := newWorld(r, model.IPv4, 200)
	for range 600 {
		w.Step()
	}
	k := newFake()
	k.mute, k.most = mute, most
	k.refuse = func(e element) error {
		if e.to.IsValid() && e.to.Addr().As4()[3]%50 == 7 {
			return unix.EINVAL
		}
		return nil
	}
	report := history.NewReports()
	o := options(w)
	o.Report = report
	x, now := clocked(o, k)
	x.few = few
	check := func() {
		t.Helper()
		set := w.Set()
		history.Insist(t, x, set)
		bad := map[string]bool{}
		for p := range set.All {
			if k.refuse != nil && slices.ContainsFunc(x.c.compile(p).elements, func(e element) bool { return k.refuse(e) != nil }) {
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
		sweep(t, x, now)
		if d := cmp.Diff(fresh(t, options(w), set, k.refuse), k.text()); d != "" {
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
	// The kernel has changed its mind: they are tried again, in time.
	k.refuse = nil
	*now = now.Add(aside.RetryMost)
	if _, err := x.Check(context.Background(), false); err != nil {
		t.Fatal(err)
	}
	if len(report.Aside) > 0 {
		t.Fatalf("still set aside: %v", report.Aside)
	}
	check()
}

// TestEverythingRefused: no Service is to blame where somebody has taken the table.
func TestEverythingRefused(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 2))
	w := newWorld(r, model.IPv6, 30)
	for range 60 {
		w.Step()
	}
	k := newFake()
	o := options(w)
	report := history.NewReports()
	o.Report = report
	x, now := clocked(o, k)
	history.Insist(t, x, w.Set())
	k.table = nil
	for range 10 {
		w.Step()
	}
	set := w.Set()
	if err := x.Sync(context.Background(), set); err != nil {
		t.Fatal(err)
	}
	if len(report.Aside) > 0 {
		t.Fatalf("set aside: %v", report.Aside)
	}
	sweep(t, x, now)
	if d := cmp.Diff(fresh(t, options(w), set, nil), k.text()); d != "" {
		t.Fatal(d)
	}
	if report.Drift["table"] != 1 {
		t.Fatalf("drift: %v", report.Drift)
	}
}

// TestRepairsAreBounded: repairs follow each other at once, but not without an end, and
// again after a rest.
func TestRepairsAreBounded(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(7, 2)), model.IPv4, 10)
	for range 30 {
		w.Step()
	}
	k := newFake()
	x, now := clocked(options(w), k)
	history.Insist(t, x, w.Set())
	repairs := func() (n int) {
		for range 20 {
			k.dirty = true
			before := k.reads
			k.onRead = func() { *now = now.Add(time.Second) } // so long it takes
			if _, err := x.Check(context.Background(), false); err != nil {
				t.Fatal(err)
			}
			k.onRead = nil
			n += k.reads - before
		}
		return n
	}
	if n := repairs(); n < 2 || n > 5 {
		t.Errorf("%d repairs at once", n)
	}
	*now = now.Add(time.Minute)
	if n := repairs(); n < 2 || n > 5 {
		t.Errorf("%d repairs after a rest", n)
	}
}
