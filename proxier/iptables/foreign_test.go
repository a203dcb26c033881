package iptables

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/test/history"
)

// TestKernelKubeletsFirewall: KUBE-FIREWALL is the kubelet's too. What it holds
// stays when our rule is added.
func TestKernelKubeletsFirewall(t *testing.T) {
	for _, k := range kernels {
		if k.family != model.IPv4 {
			continue
		}
		t.Run(string(k.variant), func(t *testing.T) {
			inNamespace(t)
			w := history.New(nil, k.family, 1)
			o := options(w)
			o.Programs = programs(t, k.variant, k.family)
			const theirs = "-m mark --mark 0x8000/0x8000 -j DROP"
			shell(t, o.Programs, "-N", chainFirewall)
			shell(t, o.Programs, append([]string{"-A", chainFirewall}, strings.Fields(theirs)...)...)
			if err := New(o).Sync(context.Background(), w.Set()); err != nil {
				t.Fatal(err)
			}
			got := inKernel(t, o.Programs)
			if !strings.Contains(got, theirs) || !strings.Contains(got, "localnet") {
				t.Errorf("KUBE-FIREWALL must have the kubelet's rule and ours:\n%s", got)
			}
		})
	}
}

// TestKernelHeldChain: a rule of somebody else leads to a Service's chain. When
// the Service goes, its chain cannot, and everything else must go on.
func TestKernelHeldChain(t *testing.T) {
	for _, k := range kernels {
		t.Run(fmt.Sprintf("%s-%s", k.variant, k.family), func(t *testing.T) {
			inNamespace(t)
			w := history.New(rand.New(rand.NewPCG(11, 12)), k.family, 30)
			for range 100 {
				w.Step()
			}
			o := options(w)
			o.Programs = programs(t, k.variant, k.family)
			report := history.NewReports()
			o.Report = report
			x := New(o)
			ctx := context.Background()
			set := w.Set()
			if err := x.Sync(ctx, set); err != nil {
				t.Fatal(err)
			}
			held := ""
			for p := range set.All {
				if usesOf(p).cluster {
					held = namesOf(p).cluster()
					delete(w.Services, p.PortKey.Name)
					w.Update(p.PortKey.Name)
					break
				}
			}
			shell(t, o.Programs, "-t", "nat", "-A", "PREROUTING", "-d", w.Addr(9, 9).String(), "-j", held)
			for range 2 {
				set = w.Set()
				if err := x.Sync(ctx, set); err != nil {
					t.Fatal(err)
				}
				if looked, err := x.Check(ctx, true); !looked || err != nil {
					t.Fatalf("looked %v, error %v", looked, err)
				}
				without := func(text string) string {
					var out []string
					for line := range strings.Lines(text) {
						if !strings.Contains(line, held) {
							out = append(out, line)
						}
					}
					return strings.Join(out, "")
				}
				if got, want := without(inKernel(t, o.Programs)), without(rendered(set, o)); got != want {
					t.Fatalf("the others:\n%s", cmp.Diff(want, got))
				}
				for range 10 {
					w.Step()
				}
			}
			if len(report.Drift) > 0 || len(report.Aside) > 0 {
				t.Errorf("reported drift %v, set aside %v", report.Drift, report.Aside)
			}
		})
	}
}

// TestKernelCleanupOfHeldChains: Cleanup leaves what rules of others lead to, and
// removes the rest.
func TestKernelCleanupOfHeldChains(t *testing.T) {
	for _, k := range kernels {
		t.Run(fmt.Sprintf("%s-%s", k.variant, k.family), func(t *testing.T) {
			inNamespace(t)
			w := history.New(rand.New(rand.NewPCG(11, 12)), k.family, 30)
			for range 100 {
				w.Step()
			}
			o := options(w)
			o.Programs = programs(t, k.variant, k.family)
			x := New(o)
			set := w.Set()
			if err := x.Sync(context.Background(), set); err != nil {
				t.Fatal(err)
			}
			held := ""
			for p := range set.All {
				if usesOf(p).cluster && p.Affinity > 0 {
					held = namesOf(p).cluster() // it leads to KUBE-SEP chains
					break
				}
			}
			if held == "" {
				t.Fatal("no Service with affinity: the test shows nothing")
			}
			shell(t, o.Programs, "-t", "nat", "-A", "PREROUTING", "-d", w.Addr(9, 9).String(), "-j", held)
			before := inKernel(t, o.Programs)
			if err := x.Cleanup(context.Background()); err != nil {
				t.Fatal(err)
			}
			rules := func(text string) string { // of the held chain
				_, rest, _ := strings.Cut(text, "nat "+held+"\n")
				var b strings.Builder
				for line := range strings.Lines(rest) {
					if !strings.HasPrefix(line, "\t") {
						break
					}
					b.WriteString(line)
				}
				return b.String()
			}
			after := inKernel(t, o.Programs)
			if got, want := rules(after), rules(before); got != want || want == "" {
				t.Errorf("the chain that somebody uses:\n%s", cmp.Diff(want, got))
			}
			if strings.Contains(after, chainServices) || strings.Contains(after, prefixExternal) || strings.Count(after, "-j "+held) != 1 {
				t.Errorf("left behind, or taken away:\n%s", after)
			}
		})
	}
}

// TestKernelTrialLeftBehind: a kill in the middle of a trial leaves a chain that
// holds others. The next start removes it.
func TestKernelTrialLeftBehind(t *testing.T) {
	for _, k := range kernels {
		t.Run(fmt.Sprintf("%s-%s", k.variant, k.family), func(t *testing.T) {
			inNamespace(t)
			w := history.New(nil, k.family, 1)
			o := options(w)
			o.Programs = programs(t, k.variant, k.family)
			for _, chain := range []string{chainTrial, prefixCluster + "STUB"} {
				shell(t, o.Programs, "-t", "nat", "-N", chain)
			}
			shell(t, o.Programs, "-t", "nat", "-A", chainTrial, "-j", prefixCluster+"STUB")
			set := w.Set()
			if err := New(o).Sync(context.Background(), set); err != nil {
				t.Fatal(err)
			}
			if got, want := inKernel(t, o.Programs), rendered(set, o); got != want {
				t.Errorf("%s", cmp.Diff(want, got))
			}
		})
	}
}
