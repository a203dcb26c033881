package main

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

func TestParseStat(t *testing.T) {
	const line = "42 (a ) b) S 1 42 42 0 -1 4194560 9000 8 0 0 100 20 3 4 20 0 9 0 5000 0 0"
	got, err := parseStat(line)
	if want := 1270 * time.Millisecond; err != nil || got != want {
		t.Errorf("parseStat = %v, %v, want %v", got, err, want)
	}
	for _, bad := range []string{"", "42 (x) S 1", strings.Replace(line, "100 20", "100 x", 1)} {
		if got, err := parseStat(bad); err == nil {
			t.Errorf("parseStat(%q) = %v, want an error", bad, got)
		}
	}
}

func TestParseStatus(t *testing.T) {
	now, peak := parseStatus("Name:\tsluice\nVmPeak:\t  900000 kB\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\nThreads:\t9\n")
	if now != 1<<20 || peak != 2<<20 {
		t.Errorf("parseStatus = %d, %d, want 1 MiB and 2 MiB", now, peak)
	}
}

func TestQuantile(t *testing.T) {
	list := func(n int) (out []time.Duration) {
		for i := range n {
			out = append(out, time.Duration(i+1))
		}
		return out
	}
	for _, c := range []struct {
		n    int
		q    float64
		want time.Duration
	}{{0, 0.5, 0}, {1, 0.99, 1}, {2, 0.5, 1}, {3, 0.5, 2}, {20, 0.99, 20}, {100, 0.99, 99}, {1000, 0.99, 990}, {10, 0, 1}} {
		if got := quantile(list(c.n), c.q); got != c.want {
			t.Errorf("quantile of 1..%d at %v = %d, want %d", c.n, c.q, got, c.want)
		}
	}
}

func TestSample(t *testing.T) {
	for _, c := range []struct {
		services, n int
		want        []int
	}{{1, 200, []int{0}}, {5, 2, []int{0, 4}}, {5, 1, []int{0}}, {3, 20, []int{0, 1, 2}}, {10, 4, []int{0, 3, 6, 9}}} {
		if got := sample(c.services, c.n); !slices.Equal(got, c.want) {
			t.Errorf("sample(%d, %d) = %v, want %v", c.services, c.n, got, c.want)
		}
	}
}

// Noise that lasts longer than a turn is in both targets, and in no difference.
func TestDifferences(t *testing.T) {
	base := &target{turns: []time.Duration{10, 10, 90, 90, 90, 10}}
	service := &target{to: make([]netip.AddrPort, 2), turns: []time.Duration{15, 30, 95, 110, 95, 30}}
	if got := service.above(base); got != 5 {
		t.Errorf("above = %d, want 5", got)
	}
	if got := service.slowestAbove(base); got != 20 {
		t.Errorf("slowestAbove = %d, want 20", got)
	}
	if got := base.median(); got != 10 {
		t.Errorf("median = %d, want 10", got)
	}
}

// Endpoints and Services have addresses of their own, in their ranges.
func TestAddresses(t *testing.T) {
	seen := map[netip.Addr]string{}
	add := func(a netip.Addr, in netip.Prefix, what string) {
		t.Helper()
		if !in.Contains(a) {
			t.Fatalf("%s has %s, not in %s", what, a, in)
		}
		if other, ok := seen[a]; ok {
			t.Fatalf("%s and %s both have %s", what, other, a)
		}
		seen[a] = what
	}
	add(kubernetesIP, serviceRange, "kubernetes")
	add(dnsIP, serviceRange, "dns")
	add(canaryIP, serviceRange, "canary")
	add(canaryEndpoint(0), endpointRange, "canary's endpoint")
	add(canaryEndpoint(1), endpointRange, "canary's other endpoint")
	for _, i := range []int{0, 1, 2, maxServices / 2, maxServices - 2, maxServices - 1, maxServices} { // the last stands for DNS
		add(numbered(i).ip, serviceRange, "service")
		for j := range maxEndpoints {
			add(endpointOf(i, j, 0), endpointRange, "endpoint")
		}
		add(endpointOf(i, 0, 1), endpointRange, "other endpoint")
	}
	if endpointOf(7, 0, 2) != endpointOf(7, 0, 0) || endpointOf(7, 3, 1) != endpointOf(7, 3, 0) {
		t.Error("a change must swap endpoint 0, to and fro, and no other")
	}
}

func TestTable(t *testing.T) {
	r := &report{Date: "today", Kernel: "6.18", CPU: "Some CPU", CPUs: 2, IPTables: "iptables v1.8.9", Mode: "iptables", Services: 10000, Endpoints: 10,
		variants: []string{"nft"}, Skipped: []string{"kube-proxy, nft: the rest of its figures: cold start takes more than 10m0s"},
		Results: []*result{
			{Program: peer, Version: "v1", Variant: "nft", LoadBefore: "1", LoadAfter: "2", Readings: map[string]reading{
				"cold.important": {Value: 600, Over: true}, "rss.steady": {Value: 300}, "conn.other": {Value: 196}, "change.failed": {Value: 0}}},
			{Program: ours, Version: "v2", Variant: "nft", LoadBefore: "3", LoadAfter: "4", Readings: map[string]reading{
				"conn.base": {Value: 16.2}, "cold.important": {Value: 0.25}, "rss.steady": {Value: 100, Note: "not idle"}, "conn.other": {Value: -0.4}, "change.failed": {Value: 0}}},
		}}
	var out bytes.Buffer
	r.print(&out)
	for _, want := range []string{
		"| cold start until kubernetes.default and DNS answer |    > 600 s |  0.25 s | > 2400.0x |  <= 0.30 s | met    |\n",
		"| memory after all changes                           |    300 MiB | 100 MiB |      3.0x |  <= 90 MiB | missed |\n",
		"| new connection to no Service, added latency        |    +196 us |   -0 us |           |   <= 15 us | met    |\n",
		"| CPU time per 1,000 endpoint changes                |          - |       - |           |            |        |\n",
		"Note: sluice, memory after all changes: not idle\n",
		"Beside sluice, a connection took 16 us where there are no rules.\n",
		"Not measured: kube-proxy, nft: the rest of its figures: cold start takes more than 10m0s\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if r.complete([]string{ours}) {
		t.Error("a report with holes calls itself complete")
	}
	if !r.complete([]string{peer}) {
		t.Error("a program that did not make it in time is a result")
	}
	r.Services = 500 // targets are for 10,000
	out.Reset()
	r.print(&out)
	if strings.Contains(out.String(), "missed") || strings.Contains(out.String(), "met") {
		t.Errorf("a verdict at 500 Services:\n%s", out.String())
	}
}

// TestRun measures a small cluster, to see that every figure is taken. It judges
// none of them.
func TestRun(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	if err := netlab.Supported(); err != nil {
		t.Skip(err)
	}
	if _, err := exec.LookPath("xtables-nft-multi"); err != nil {
		t.Skip(err)
	}
	agent := filepath.Join(t.TempDir(), "sluice")
	if out, err := exec.Command("go", "build", "-o", agent, "../../cmd/sluice").CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	profiles := t.TempDir()
	s, err := parse([]string{"-sluice", agent, "-programs", ours, "-variants", "nft", "-services", "12", "-endpoints", "2",
		"-changes", "2", "-burst", "6", "-connections", "40", "-profiles", profiles})
	if err != nil {
		t.Skipf("%v: run hack/tools.sh etcd kube-apiserver", err)
	}
	var out bytes.Buffer
	if err := run(context.Background(), s, &out); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if strings.Contains(out.String(), "Not measured") {
		t.Errorf("not everything was measured:\n%s", out.String())
	}
	for _, name := range []string{"nft-sluice-heap.pprof", "nft-sluice-heap-end.pprof", "nft-sluice-allocs.pprof", "nft-sluice-metrics", "nft-sluice.log"} {
		if info, err := os.Stat(filepath.Join(profiles, name)); err != nil || info.Size() == 0 {
			t.Errorf("no profile %s: %v", name, err)
		}
	}
}
