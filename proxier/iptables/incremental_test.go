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
	"github.com/sluice-proxy/sluice/proxier/internal/aside"
	"github.com/sluice-proxy/sluice/test/history"
)

func options(w *history.World) Options {
	o := Options{Family: w.Family, MasqueradeBit: 14, RandomFully: true}
	o.Detector.CIDR = netip.PrefixFrom(w.Addr(10, 0), 8)
	return o
}

// fresh is what a start from nothing writes for a Set.
func fresh(t *testing.T, w *history.World, set *plan.Set, refuse func(string) bool) string {
	t.Helper()
	k := newFake(w.Rand)
	k.refuse = refuse
	x := newProxier(options(w), k)
	// One Sync looks for culprits for a while; the next goes on.
	for tries := 0; ; tries++ {
		err := x.Sync(context.Background(), set)
		if err == nil {
			return k.text()
		}
		if tries > 5 {
			t.Fatalf("start from nothing: %v", err)
		}
	}
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
			w := history.New(r, family, []int{3, 30, 150}[seed%3])
			k := newFake(r)
			flaky := seed%4 == 0
			o := options(w)
			report := history.NewReports()
			o.Report = report
			x := newProxier(o, k)
			for range 8 {
				for range 1 + r.IntN(w.Names) {
					w.Step()
				}
				if flaky {
					k.fail = func() bool { return r.IntN(10) == 0 }
				}
				set := w.Set()
				history.Insist(t, x, set)
				if want := fresh(t, w, set, nil); !sameButFirewall(k.text(), want) {
					t.Fatalf("incremental differs from full (-full +incremental):\n%s", cmp.Diff(want, k.text()))
				}
				writes := k.writes
				k.fail = nil
				if err := x.Sync(context.Background(), set); err != nil || k.writes != writes {
					t.Fatalf("a second Sync of the same Set wrote %d times, error %v", k.writes-writes, err)
				}
			}
			if !flaky && len(report.Aside) > 0 {
				t.Fatalf("set aside without a refusal: %v", report.Aside)
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
	w := history.New(r, model.IPv4, 200)
	for range 600 {
		w.Step()
	}
	k := newFake(r)
	bad := map[string]bool{}
	k.refuse = func(rule string) bool {
		return strings.Contains(rule, "-p sctp -m comment") && strings.Contains(rule, "svc-1")
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
		for tries := 0; x.Sync(context.Background(), set) != nil; tries++ {
			if tries > 5 {
				t.Fatal("refused Services keep the others from being programmed")
			}
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
		for key := range report.Aside {
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
			w.Step()
		}
		check()
	}
	// What is still refused is tried again alone: nothing else is read or written.
	clock = clock.Add(2 * aside.Retry)
	reads, writes := k.lists, len(k.changes)
	check()
	if k.lists != reads || len(k.changes) != writes {
		t.Errorf("%d reads, %d writes for Services that are still refused", k.lists-reads, len(k.changes)-writes)
	}
	// What was refused comes back when the kernel takes it.
	k.refuse = func(string) bool { return false }
	clock = clock.Add(4 * aside.Retry)
	check()
}

// TestDrift: what somebody else changes is found and put right, and only that.
func TestDrift(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	w := history.New(r, model.IPv4, 200)
	for range 600 {
		w.Step()
	}
	k := newFake(r)
	o := options(w)
	report := history.NewReports()
	o.Report = report
	x := newProxier(o, k)
	set := w.Set()
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
		if report.Drift["chain"] != i+1 || report.Drift["jump"] != 4*(i+1) {
			t.Errorf("drift %d reported as %v", i, report.Drift)
		}
	}
}

// TestDriftBesideASync: a change by others is found also if a Sync writes between
// it and the next Check.
func TestDriftBesideASync(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 5))
	w := history.New(r, model.IPv4, 40)
	for range 100 {
		w.Step()
	}
	k := newFake(r)
	x := newProxier(options(w), k)
	ctx := context.Background()
	if err := x.Sync(ctx, w.Set()); err != nil {
		t.Fatal(err)
	}
	k.tables[tableFilter]["FORWARD"] = nil
	k.writes++
	for range 5 {
		w.Step()
	}
	set := w.Set()
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
	w := history.New(rand.New(rand.NewPCG(11, 12)), model.IPv4, 100)
	for range 400 {
		w.Step()
	}
	set := w.Set()
	ctx := context.Background()
	k := newFake(w.Rand)
	if wrote, err := newProxier(options(w), k).Prime(ctx, set); !wrote || err != nil {
		t.Fatalf("wrote %v, error %v", wrote, err)
	}
	if got := k.text(); !strings.Contains(got, "kube-system/") || strings.Contains(got, " ns/") || strings.Contains(got, "\"ns/") {
		t.Fatalf("not the important Services, or not only:\n%s", got)
	}
	x := newProxier(options(w), k)
	if err := x.Sync(ctx, set); err != nil {
		t.Fatal(err)
	}
	want := fresh(t, w, set, nil)
	if k.text() != want {
		t.Fatalf("after the full Sync:\n%s", cmp.Diff(want, k.text()))
	}
	if wrote, err := newProxier(options(w), k).Prime(ctx, plan.EmptySet(set.Facts)); wrote || err != nil || k.text() != want {
		t.Fatalf("a node with rules was primed: wrote %v, error %v", wrote, err)
	}
	if wrote, err := newProxier(options(w), k).Prime(ctx, set); wrote || err != nil || k.text() != want {
		t.Fatalf("a node with rules was primed: wrote %v, error %v", wrote, err)
	}
}
