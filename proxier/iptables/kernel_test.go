package iptables

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
	"github.com/sluice-proxy/sluice/test/history"
)

// inNamespace runs the test's goroutine in a network namespace of its own, for
// good: the thread is never given back.
func inNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		t.Skipf("SKIPPED: no network namespace of our own (run as root, or under unshare -Urn): %v", err)
	}
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
}

func programs(t *testing.T, v xtables.Variant, f model.Family) xtables.Programs {
	t.Helper()
	p, err := xtables.Find(v, f)
	if err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	return p
}

// inKernel reads both tables back as text, sorted by chain.
func inKernel(t *testing.T, p xtables.Programs) string {
	t.Helper()
	run := xtables.Runner{Programs: p}
	w := wanted{}
	for _, table := range []string{tableFilter, tableNAT} {
		w[table] = map[string][]string{}
		err := run.Save(context.Background(), table, func(c xtables.Chain) {
			w[table][c.Name] = nil
		}, func(name, text []byte) {
			w[table][string(name)] = append(w[table][string(name)], string(bytes.Clone(text)))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return w.sorted()
}

func (w wanted) sorted() string {
	var b strings.Builder
	for _, table := range []string{tableFilter, tableNAT} {
		for _, name := range slices.Sorted(maps.Keys(w[table])) {
			fmt.Fprintf(&b, "%s %s\n", table, name)
			for _, r := range w[table][name] {
				fmt.Fprintf(&b, "\t%s\n", r)
			}
		}
	}
	return b.String()
}

// rendered is Render's text in the form of inKernel.
func rendered(set *plan.Set, o Options) string {
	w := wanted{}
	table := ""
	for line := range strings.Lines(Render(set, o)) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case line == "COMMIT":
		case line[0] == '*':
			table = line[1:]
			w[table] = map[string][]string{}
		case line[0] == ':':
			name, _, _ := strings.Cut(line[1:], " ")
			w[table][name] = nil
		default:
			name, text, _ := strings.Cut(strings.TrimPrefix(line, "-A "), " ")
			w[table][name] = append(w[table][name], text)
		}
	}
	return w.sorted()
}

var kernels = []struct {
	variant xtables.Variant
	family  model.Family
}{
	{xtables.NFT, model.IPv4}, {xtables.NFT, model.IPv6},
	{xtables.Legacy, model.IPv4}, {xtables.Legacy, model.IPv6},
}

// TestKernelIncrementalEqualsFull is law 4 on the real kernel: after every step
// of a random history the tables read back, to the letter, as what a Set asks
// for. 112 histories: 28 for each variant and family.
func TestKernelIncrementalEqualsFull(t *testing.T) {
	histories := 28
	if testing.Short() {
		histories = 3
	}
	for _, k := range kernels {
		t.Run(fmt.Sprintf("%s-%s", k.variant, k.family), func(t *testing.T) {
			for seed := range histories {
				t.Run(fmt.Sprint(seed), func(t *testing.T) { kernelHistory(t, k.variant, k.family, uint64(seed)) })
			}
		})
	}
}

func kernelHistory(t *testing.T, v xtables.Variant, f model.Family, seed uint64) {
	inNamespace(t)
	r := rand.New(rand.NewPCG(seed, 9))
	w := history.New(r, f, []int{3, 40, 120}[seed%3])
	o := options(w)
	o.Programs = programs(t, v, f)
	report := history.NewReports()
	o.Report = report
	x := New(o)
	ctx := context.Background()
	for step := range 6 {
		for range 1 + r.IntN(w.Names) {
			w.Step()
		}
		set := w.Set()
		if step == 4 {
			x = New(o) // a restart: adopt what is there
		}
		if err := x.Sync(ctx, set); err != nil {
			t.Fatal(err)
		}
		if got, want := inKernel(t, o.Programs), rendered(set, o); !sameButFirewall(got, want) {
			t.Fatalf("step %d: the kernel differs (-full +incremental):\n%s", step, cmp.Diff(want, got))
		}
	}
	if len(report.Aside) > 0 || len(report.Drift) > 0 {
		t.Fatalf("set aside %v, drift %v", report.Aside, report.Drift)
	}
	x.verified = time.Time{}
	for range 2 { // the first look learns, the second must find nothing
		if _, err := x.Check(ctx, false); err != nil {
			t.Fatal(err)
		}
	}
	if len(x.odd) > 0 {
		t.Errorf("chains read back differently than written: %v", x.odd)
	}
}

func shell(t *testing.T, p xtables.Programs, args ...string) {
	t.Helper()
	out, err := exec.Command(p.Command[0], append(slices.Clone(p.Command[1:]), args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
}

// TestKernelDrift: what others do to our rules is undone, what they do to theirs
// is left alone, and Cleanup removes ours only.
func TestKernelDrift(t *testing.T) {
	for _, k := range kernels {
		t.Run(fmt.Sprintf("%s-%s", k.variant, k.family), func(t *testing.T) {
			inNamespace(t)
			w := history.New(rand.New(rand.NewPCG(5, 6)), k.family, 100)
			for range 300 {
				w.Step()
			}
			o := options(w)
			o.Programs = programs(t, k.variant, k.family)
			report := history.NewReports()
			o.Report = report
			before := inKernel(t, o.Programs)
			x := New(o)
			ctx := context.Background()
			set := w.Set()
			if err := x.Sync(ctx, set); err != nil {
				t.Fatal(err)
			}
			if _, err := x.Check(ctx, false); err != nil {
				t.Fatal(err)
			}
			want := inKernel(t, o.Programs)
			for i := range 3 {
				shell(t, o.Programs, "-t", "nat", "-F", chainServices)
				shell(t, o.Programs, "-F", "FORWARD")
				x.verified = time.Time{}
				looked, err := x.Check(ctx, false)
				if !looked || err != nil {
					t.Fatalf("looked %v, error %v", looked, err)
				}
				if got := inKernel(t, o.Programs); got != want {
					t.Fatalf("not repaired:\n%s", cmp.Diff(want, got))
				}
				if report.Drift["chain"] != i+1 || report.Drift["jump"] != 4*(i+1) {
					t.Fatalf("after %d: reported as %v", i+1, report.Drift)
				}
				if looked, _ = x.Check(ctx, false); looked {
					t.Fatal("its own repair was taken for a change by others")
				}
			}
			cleanupLeavesTheirs(t, x, o, before)
		})
	}
}

func cleanupLeavesTheirs(t *testing.T, x *Proxier, o Options, before string) {
	t.Helper()
	shell(t, o.Programs, "-N", "THEIRS")
	shell(t, o.Programs, "-A", "THEIRS", "-p", "tcp", "-j", "ACCEPT")
	shell(t, o.Programs, "-A", "FORWARD", "-j", "THEIRS")
	if err := x.Cleanup(context.Background()); err != nil {
		t.Fatal(err)
	}
	shell(t, o.Programs, "-C", "FORWARD", "-j", "THEIRS")
	shell(t, o.Programs, "-F", "FORWARD")
	shell(t, o.Programs, "-F", "THEIRS")
	shell(t, o.Programs, "-X", "THEIRS")
	if got := inKernel(t, o.Programs); !sameButFirewall(got, before) {
		t.Fatalf("left behind:\n%s", cmp.Diff(before, got))
	}
}

// TestKernelRefusal: a Service that the programs refuse is found and set aside.
func TestKernelRefusal(t *testing.T) {
	for _, k := range kernels {
		t.Run(fmt.Sprintf("%s-%s", k.variant, k.family), func(t *testing.T) {
			inNamespace(t)
			w := history.New(rand.New(rand.NewPCG(7, 8)), k.family, 60)
			for range 300 {
				w.Step()
			}
			// No kernel takes a timeout of more than 32 bits.
			bad := &model.Service{ServiceName: model.ServiceName{Namespace: "ns", Name: "svc-7"}, ClusterIPs: []netip.Addr{w.Addr(10, 9999)},
				Affinity: 1 << 33 * time.Second, Ports: []model.ServicePort{{Name: "p0", Protocol: model.TCP, Port: 80}}}
			w.Services["svc-7"] = bad
			w.Slices["svc-7-0"] = w.Slice("svc-7", 0)
			w.Slices["svc-7-0"].Endpoints = []model.Endpoint{{Addr: w.Addr(10, 77), Ready: true, Serving: true}}
			w.Update("svc-7")
			o := options(w)
			o.Programs = programs(t, k.variant, k.family)
			report := history.NewReports()
			o.Report = report
			x := New(o)
			set := w.Set()
			if err := x.Sync(context.Background(), set); err != nil {
				t.Fatal(err)
			}
			if len(report.Aside) != 1 || report.Aside[model.PortKey{Namespace: "ns", Name: "svc-7", Port: "p0", Protocol: model.TCP}] == nil {
				t.Fatalf("set aside: %v", report.Aside)
			}
			delete(w.Services, "svc-7")
			w.Update("svc-7")
			if got, want := inKernel(t, o.Programs), rendered(w.Set(), o); got != want {
				t.Fatalf("the others are not in force, or a trial was left behind:\n%s", cmp.Diff(want, got))
			}
			bad.Affinity = time.Hour
			fixed := *bad
			w.Services["svc-7"] = &fixed
			w.Update("svc-7")
			set = w.Set()
			if err := x.Sync(context.Background(), set); err != nil || len(report.Aside) != 0 {
				t.Fatalf("after the mend: error %v, set aside %v", err, report.Aside)
			}
			if got, want := inKernel(t, o.Programs), rendered(set, o); got != want {
				t.Fatalf("after the mend:\n%s", cmp.Diff(want, got))
			}
		})
	}
}
