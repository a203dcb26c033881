package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/uml"
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

// Endpoints and Services have addresses of their own, in their ranges, however
// many a run asks for.
func TestAddresses(t *testing.T) {
	for _, l := range []layout{{1, 1}, {10000, 10}, {5000, 50}, {40000, 5}, {20000, maxEndpoints}, {maxServices, 1}} {
		t.Run(fmt.Sprintf("%dx%d", l.services, l.endpoints), func(t *testing.T) { testAddresses(t, l) })
	}
	if l := (layout{maxServices, 21}); l.fits() {
		t.Errorf("%v fits", l)
	}
}

func testAddresses(t *testing.T, l layout) {
	if !l.fits() {
		t.Fatal("does not fit")
	}
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
	for version := range canaryEndpoints {
		add(canaryEndpoint(version), endpointRange, "canary's endpoint")
	}
	for _, a := range l.dns() {
		add(a, endpointRange, "endpoint of DNS")
	}
	for i := range l.services {
		add(numbered(i).ip, serviceRange, "service")
		for _, a := range l.of(i, 0) {
			add(a, endpointRange, "endpoint")
		}
		add(l.endpoint(i, 0, 1), endpointRange, "other endpoint")
	}
	if l.endpoint(7, 0, 2) != l.endpoint(7, 0, 0) || l.endpoint(7, 3, 1) != l.endpoint(7, 3, 0) {
		t.Error("a change must swap endpoint 0, to and fro, and no other")
	}
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string // in the error
	}{
		{[]string{"-mode", "userspace"}, "none of iptables, ipvs, nftables"},
		{[]string{"-mode", "nftables", "-variants", "nft"}, "nftables mode has none"},
		{[]string{"-variants", "nftables"}, "neither legacy nor nft"},
		{[]string{"-programs", "calico"}, "neither kube-proxy nor sluice"},
		{[]string{"-endpoints", "101"}, "-endpoints 1 to 100"},
		{[]string{"-services", "30000", "-endpoints", "100"}, "not so many addresses"},
		{[]string{"-changes", "0"}, "at least 1"},
		{[]string{"-latency", "10"}, "only in nftables mode"},
		{[]string{"-mode", "nftables", "-latency", "10", "-services", "5"}, "do not go together"},
		{[]string{"-mode", "nftables", "-latency", "10,200000"}, "-services must be"},
		{[]string{"-rest", "1ms"}, "at least 1s"},
		{[]string{"x"}, "unknown argument"},
	} {
		if _, err := parse(c.args); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: error %v, want %q", c.args, err, c.want)
		}
	}
}

func TestParseSizes(t *testing.T) {
	got, err := parseSizes("1000,10,10,40000")
	if want := (sizes{10, 1000, 40000}); err != nil || !slices.Equal(got, want) {
		t.Errorf("parseSizes = %v, %v, want %v", got, err, want)
	}
	for _, bad := range []string{"", "10,", "10,x", "0"} {
		if got, err := parseSizes(bad); err == nil {
			t.Errorf("parseSizes(%q) = %v, want an error", bad, got)
		}
	}
}

// What is known of changes when the last was given up.
func TestChangeReadings(t *testing.T) {
	const limit = 2 * time.Second
	ms := func(n int) followed { return followed{took: time.Duration(n) * time.Millisecond} }
	late := followed{took: limit, lost: 3, late: true}
	for _, c := range []struct {
		name             string
		changes          []followed
		p50, p99, failed reading
	}{
		{"all in time", []followed{ms(9), ms(2), {took: limit * 2, lost: 1}}, reading{Value: 9, N: 3}, reading{Value: 4000, N: 3}, reading{Value: 1, N: 3}},
		{"the last late", []followed{ms(9), ms(2), late}, reading{Value: 9, N: 3}, reading{Value: 2000, Over: true, N: 3}, reading{Value: 3, Over: true, N: 3}},
		{"the first late", []followed{late}, reading{Value: 2000, Over: true, N: 1}, reading{Value: 2000, Over: true, N: 1}, reading{Value: 3, Over: true, N: 1}},
	} {
		got := changeReadings(c.changes)
		for id, want := range map[string]reading{"change.p50": c.p50, "change.p99": c.p99, "change.failed": c.failed} {
			if got[id] != want {
				t.Errorf("%s: %s = %+v, want %+v", c.name, id, got[id], want)
			}
		}
	}
}

// When Services are back is told by attempts that began after the flush.
func TestOutage(t *testing.T) {
	epoch := time.Unix(0, 0)
	at := func(ms int) time.Time { return epoch.Add(time.Duration(ms) * time.Millisecond) }
	good := func(ms int) attempt { return attempt{at(ms), at(ms + 1), true} }
	bad := func(ms int) attempt { return attempt{at(ms), at(ms + 5), false} }
	for _, c := range []struct {
		name     string
		attempts []attempt // of a flush from 10 to 20
		until    time.Time
		failed   int
	}{
		{"an outage", []attempt{bad(5), good(11), bad(15), bad(22), good(30), bad(40)}, at(31), 2},
		{"back before the flush has ended", []attempt{good(9), bad(12), good(18), good(20)}, at(21), 1},
		{"nothing was lost", []attempt{good(9), good(19), good(21)}, at(22), 0},
		{"not back", []attempt{good(9), bad(12), bad(24)}, time.Time{}, 2},
	} {
		o := outage{flushing: at(10)}
		for _, a := range c.attempts {
			if !a.began.Before(at(20)) {
				o.flushed = at(20)
			}
			o.note(a)
		}
		if !o.until.Equal(c.until) || o.failed != c.failed {
			t.Errorf("%s: until %v, %d failed, want %v, %d", c.name, o.until.Sub(epoch), o.failed, c.until.Sub(epoch), c.failed)
		}
	}
}

func TestLatencyTable(t *testing.T) {
	conn := func(base, through, added float64) map[string]reading {
		return map[string]reading{"conn.base": {Value: base}, "conn.through": {Value: through}, "conn.service": {Value: added}, "conn.slowest": {Value: added + 1}}
	}
	r := &report{Date: "today", Kernel: "6.18", CPU: "Some CPU", CPUs: 2, Tool: "nftables v1.0.6", Mode: modeNFTables, Endpoints: 2, Results: []*result{
		{Program: peer, Version: "v1", Services: 10, LoadBefore: "1", Readings: conn(30, 34, 4)},
		{Program: ours, Version: "v2", Services: 10, LoadBefore: "1", Readings: conn(30, 29, -1)},
		{Program: peer, Version: "v1", Services: 40000, LoadBefore: "2", Readings: map[string]reading{"cold.all": {Value: 600, Over: true}}},
		{Program: ours, Version: "v2", Services: 40000, LoadBefore: "2", Readings: conn(31, 36, 5)},
	}}
	var out bytes.Buffer
	r.printLatency(&out, []string{peer, ours})
	for _, want := range []string{
		"### kube-proxy, v1\n",
		"| 10       |  30.0 us |           34.0 us | +4.0 us |       +5.0 us | 1.00x | 1            |\n",
		"| 40000    |        - |      not in 600 s |       - |             - |       | 2            |\n",
		"| 40000    |  31.0 us |           36.0 us | +5.0 us |       +6.0 us |       | 2            |\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	both := []string{peer, ours}
	if !r.completeLatency(both, sizes{10, 40000}) || !r.completeLatency([]string{peer}, sizes{10, 40000, 50000}) {
		t.Error("a program that did not make it in time is a result")
	}
	if r.completeLatency(both, sizes{10, 40000, 50000}) || r.completeLatency([]string{"other"}, sizes{10}) {
		t.Error("a report with holes calls itself complete")
	}
}

func TestTable(t *testing.T) {
	r := &report{Date: "today", Kernel: "6.18", CPU: "Some CPU", CPUs: 2, Tool: "iptables v1.8.9", Mode: "iptables", Services: 10000, Endpoints: 10,
		variants: []string{"nft"}, Skipped: []string{"kube-proxy, nft: the rest of its figures: cold start takes more than 10m0s"},
		Results: []*result{
			{Program: peer, Version: "v1", Variant: "nft", LoadBefore: "1", LoadAfter: "2", Readings: map[string]reading{
				"cold.important": {Value: 600, Over: true}, "rss.steady": {Value: 300}, "conn.other": {Value: 196}, "change.failed": {Value: 0}, "repair.one": {Value: 60000, Over: true}}},
			{Program: ours, Version: "v2", Variant: "nft", LoadBefore: "3", LoadAfter: "4", Readings: map[string]reading{
				"conn.base": {Value: 16.2}, "cold.important": {Value: 0.25}, "rss.steady": {Value: 100, Note: "not idle"}, "conn.other": {Value: -0.4}, "change.failed": {Value: 0}}},
		}}
	var out bytes.Buffer
	r.print(&out)
	r.printSkipped(&out)
	for _, want := range []string{
		"| cold start until kubernetes.default and DNS answer |    > 600 s |  0.25 s | > 2400.0x |  <= 0.30 s | met    |\n",
		"| memory after all changes                           |    300 MiB | 100 MiB |      3.0x |  <= 90 MiB | missed |\n",
		"| new connection to no Service, added latency        |    +196 us |   -0 us |           |   <= 15 us | met    |\n",
		"| CPU time per 1,000 endpoint changes                |          - |       - |           |            |        |\n",
		"| rules flushed, until a Service answers again       |     > 60 s |       - |           |            |        |\n",
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
	ipvs := &report{Mode: modeIPVS, variants: []string{"legacy"}}
	var other bytes.Buffer
	ipvs.print(&other)
	if strings.Contains(other.String(), "rules flushed") {
		t.Errorf("a row that the mode has not:\n%s", other.String())
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
		t.Skip("takes a minute")
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
	t.Run("iptables", func(t *testing.T) { testRun(t, "nft", "-sluice", agent, "-variants", "nft") })
	t.Run("nftables", func(t *testing.T) { testRun(t, modeNFTables, "-sluice", agent, "-mode", modeNFTables) })
}

func testRun(t *testing.T, name string, args ...string) {
	t.Parallel()
	profiles := t.TempDir()
	s, err := parse(append(args, "-programs", ours, "-services", "12", "-endpoints", "2",
		"-changes", "2", "-burst", "6", "-connections", "40", "-rest", "1s", "-profiles", profiles))
	if err != nil {
		t.Skipf("%v: run hack/tools.sh etcd kube-apiserver", err)
	}
	var out bytes.Buffer
	if err := run(t.Context(), s, &out); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if strings.Contains(out.String(), "Not measured") {
		t.Errorf("not everything was measured:\n%s", out.String())
	}
	for _, file := range []string{"heap.pprof", "heap-end.pprof", "allocs.pprof", "metrics"} {
		file = name + "-sluice-" + file
		if info, err := os.Stat(filepath.Join(profiles, file)); err != nil || info.Size() == 0 {
			t.Errorf("no profile %s: %v", file, err)
		}
	}
	if _, err := os.Stat(filepath.Join(profiles, name+"-sluice.log")); err != nil {
		t.Error(err)
	}
}

func TestParseStrace(t *testing.T) {
	const table = `% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.006000          24       250         3 recvmsg
 40.00    0.004000          47        85           sendto
------ ----------- ----------- --------- --------- ----------------
100.00    0.010000          29       335         3 total
`
	calls, most, err := parseStrace(table)
	if err != nil || calls != 335 || most != "recvmsg 250, sendto 85" {
		t.Errorf("parseStrace = %d, %q, %v", calls, most, err)
	}
	if _, _, err := parseStrace("strace: attach: Operation not permitted\n"); err == nil {
		t.Error("no error without a total")
	}
}

func TestSince(t *testing.T) {
	before := map[string]ran{"ipset": {2, time.Second}, "iptables": {1, time.Second}}
	now := map[string]ran{"ipset": {5, 4 * time.Second}, "iptables": {1, time.Second}, "modprobe": {1, 0}}
	n, what := since(before, now)
	if want := "ipset 3 (3.0 s), modprobe 1 (0.0 s)"; n != 4 || what != want {
		t.Errorf("since = %d, %q, want 4, %q", n, what, want)
	}
}

// A program is seen with its name and how long it ran, and its threads are not.
func TestStarts(t *testing.T) {
	s, err := newStarts()
	if err != nil {
		t.Skip("SKIPPED, processes are not counted here: ", err)
	}
	defer s.socket.Close()
	before := s.of(os.Getpid())
	for range 3 {
		if err := exec.Command("sleep", "0.01").Run(); err != nil {
			t.Fatal(err)
		}
	}
	err = await(t.Context(), 10*time.Second, "three programs are seen", func() error {
		if n, what := since(before, s.of(os.Getpid())); n != 3 || !strings.HasPrefix(what, "sleep 3 ") {
			return fmt.Errorf("saw %d: %s", n, what)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestParseTaskstats(t *testing.T) {
	encode := func(change func(*unix.Taskstats)) []byte {
		x := unix.Taskstats{Version: 13, Ac_pid: 7, Ac_tgid: 7, Ac_ppid: 3, Ac_etime: 2500}
		copy(x.Ac_comm[:], []int8{'i', 'p', 's', 'e', 't'})
		change(&x)
		return slices.Clone(unsafe.Slice((*byte)(unsafe.Pointer(&x)), unsafe.Sizeof(x)))
	}
	data := encode(func(*unix.Taskstats) {})
	for what, data := range map[string][]byte{"as long as ours": data, "longer": append(slices.Clone(data), 1, 2, 3), "shorter": data[:unsafe.Offsetof(unix.Taskstats{}.Irq_count)]} {
		parent, program, lasted, ok := parseTaskstats(data)
		if !ok || parent != 3 || program != "ipset" || lasted != 2500*time.Microsecond {
			t.Errorf("%s: %d, %q, %v, %v", what, parent, program, lasted, ok)
		}
	}
	for what, change := range map[string]func(*unix.Taskstats){
		"thread":     func(x *unix.Taskstats) { x.Ac_pid = 8 },
		"old kernel": func(x *unix.Taskstats) { x.Version = 11 },
	} {
		if _, _, _, ok := parseTaskstats(encode(change)); ok {
			t.Errorf("%s is taken for a process", what)
		}
	}
	if _, _, _, ok := parseTaskstats(nil); ok {
		t.Error("nothing is taken for a process")
	}
}

// What the guest asks to be written reaches the writer outside, and so do errors.
func TestRemote(t *testing.T) {
	inside, outside := net.Pipe()
	fake := &fakeWriter{}
	server := rpc.NewServer()
	if err := server.RegisterName("Writer", &Writer{t.Context(), fake}); err != nil {
		t.Fatal(err)
	}
	go server.ServeConn(outside)
	r := remote{rpc.NewClient(inside)}
	defer r.client.Close()
	if err := errors.Join(r.setCanary(t.Context(), 3), r.setEndpoints(t.Context(), 7, 1)); err != nil {
		t.Error(err)
	}
	if want := []string{"canary 3", "service 7 version 1"}; !slices.Equal(fake.calls, want) {
		t.Errorf("written: %v, want %v", fake.calls, want)
	}
	fake.err = errors.New("conflict")
	if err := r.setCanary(t.Context(), 4); err == nil || !strings.Contains(err.Error(), "conflict") {
		t.Errorf("error %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	fake.err = nil
	if err := (remote{rpc.NewClient(stuck{})}).setCanary(ended, 5); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v after the end", err)
	}
}

type fakeWriter struct {
	calls []string
	err   error
}

func (w *fakeWriter) setCanary(_ context.Context, version int) error {
	w.calls = append(w.calls, fmt.Sprint("canary ", version))
	return w.err
}

func (w *fakeWriter) setEndpoints(_ context.Context, i, version int) error {
	w.calls = append(w.calls, fmt.Sprint("service ", i, " version ", version))
	return w.err
}

// stuck is a connection on which nothing ever comes.
type stuck struct{}

func (stuck) Read([]byte) (int, error)    { select {} }
func (stuck) Write(p []byte) (int, error) { return len(p), nil }
func (stuck) Close() error                { return nil }

// TestRunLatency times connections with a few Services, and a few more.
func TestRunLatency(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	t.Parallel()
	if err := netlab.Supported(); err != nil {
		t.Skip(err)
	}
	agent := filepath.Join(t.TempDir(), "sluice")
	if out, err := exec.Command("go", "build", "-o", agent, "../../cmd/sluice").CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	file := filepath.Join(t.TempDir(), "json")
	s, err := parse([]string{"-mode", modeNFTables, "-sluice", agent, "-programs", ours, "-latency", "12,2", "-connections", "40", "-json", file})
	if err != nil {
		t.Skipf("%v: run hack/tools.sh etcd kube-apiserver", err)
	}
	var out bytes.Buffer
	if err := run(t.Context(), s, &out); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"### sluice, Sluice ", "\n| 2        | ", "\n| 12       | "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if _, err := os.Stat(file); err != nil || strings.Contains(out.String(), "Not measured") {
		t.Errorf("not everything was measured: %v\n%s", err, out.String())
	}
}

// TestRunIPVS measures a tiny cluster in ipvs mode, in a virtual machine where the
// kernel has no IPVS.
func TestRunIPVS(t *testing.T) {
	if testing.Short() {
		t.Skip("takes two minutes")
	}
	if err := netlab.Supported(); err != nil {
		t.Skip(err)
	}
	if err := uml.Supported(); err != nil && !uml.Native() {
		t.Skip("SKIPPED, the benchmark of ipvs mode: ", err)
	}
	agent, self := filepath.Join(t.TempDir(), "sluice"), filepath.Join(t.TempDir(), "bench")
	for to, from := range map[string]string{agent: "../../cmd/sluice", self: "."} {
		if out, err := exec.Command("go", "build", "-race=false", "-o", to, from).CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", from, err, out)
		}
	}
	s, err := parse([]string{"-mode", "ipvs", "-sluice", agent, "-programs", ours, "-services", "12", "-endpoints", "2",
		"-changes", "2", "-burst", "6", "-connections", "40", "-rest", "1s", "-cold-limit", "1m"})
	if err != nil {
		t.Skipf("%v: run hack/tools.sh etcd kube-apiserver", err)
	}
	s.self = self
	var out bytes.Buffer
	if err := run(t.Context(), s, &out); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"### ipvs\n", "| processes started per change "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "Not measured") {
		t.Errorf("not everything was measured:\n%s", out.String())
	}
}
