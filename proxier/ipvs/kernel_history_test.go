package ipvs

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/test/history"
)

// TestGuestKernelHistories is law 4 on the real kernel: after any history it holds
// what a start from nothing makes of a fake. Some histories change the process,
// and some have somebody else at work.
func TestGuestKernelHistories(t *testing.T) {
	for seed := range 20 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			testKernelHistory(t, seed)
		})
	}
}

func testKernelHistory(t *testing.T, seed int) {
	ctx := context.Background()
	r := rand.New(rand.NewPCG(uint64(seed), 2))
	f := families[seed%2]
	k := guestKernel(t, f)
	w := newWorld(r, f, []int{3, 40, 100}[seed%3])
	o := options(w)
	report := history.NewReports()
	o.Report = report
	x := newProxier(o, k)
	others := 0
	for range 6 {
		for range 1 + r.IntN(w.Names) {
			w.Step()
		}
		if r.IntN(4) == 0 {
			x = newProxier(o, k)
		}
		set := w.Set()
		if err := x.Sync(ctx, set); err != nil {
			t.Fatal(err)
		}
		start := freshKernel(t, w, set, nil)
		start.static = nil // compared next
		want := start.text(false)
		if d := cmp.Diff(want, kernelText(t, k)); d != "" {
			t.Fatalf("the kernel differs from a start from nothing (-want +got):\n%s", d)
		}
		if fixed, err := k.prepare(ctx, base(&o, set.Facts)); fixed != (repairs{}) || err != nil {
			t.Fatalf("the rules are not as they should be: %+v, %v", fixed, err)
		}
		if full, err := x.Check(ctx, false); full || err != nil {
			t.Fatalf("a check without a change by others verified (%v) or failed: %v", full, err)
		}
		if seed%4 == 3 {
			others += disturb(t, r, k)
			if _, err := x.Check(ctx, true); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, kernelText(t, k)); d != "" {
				t.Fatalf("not repaired (-want +got):\n%s", d)
			}
		}
	}
	if len(report.Aside) > 0 {
		t.Errorf("set aside: %v", report.Aside)
	}
	if (others > 0) != (len(report.Drift) > 0) {
		t.Errorf("%d objects were changed by others, reported %v", others, report.Drift)
	}
	if _, err := x.remove(ctx, all); err != nil {
		t.Fatal(err)
	}
	if left := kernelText(t, k); left != "0 marks" {
		t.Errorf("cleanup left\n%s", left)
	}
}

// disturb takes away some objects, as somebody else would.
func disturb(t *testing.T, r *rand.Rand, k *nlKernel) (n int) {
	t.Helper()
	have, err := k.read(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var ops []op
	for key, s := range have.servers {
		if r.IntN(5) == 0 {
			ops = append(ops, op{kind: delServer, key: key})
			continue
		}
		for at, d := range s.destinations {
			if d.weight > 0 && r.IntN(20) == 0 {
				ops = append(ops, op{kind: delDest, key: key, dest: destination{at: at}})
			}
		}
	}
	for a := range have.addrs {
		if r.IntN(5) == 0 {
			ops = append(ops, op{kind: delAddr, addr: a})
		}
	}
	for id, set := range have.sets {
		for e := range set {
			if r.IntN(20) == 0 {
				ops = append(ops, op{kind: delEntry, set: setID(id), entry: e})
			}
		}
	}
	if failed, err := k.apply(context.Background(), ops); err != nil || len(failed) > 0 {
		t.Fatal(failed, err)
	}
	return len(ops)
}

// kernelText prints the kernel's state in the words of the fake.
func kernelText(t *testing.T, k *nlKernel) string {
	t.Helper()
	have, err := k.read(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return (&fakeKernel{servers: have.servers, sets: have.sets, addrs: have.addrs}).text(false)
}
