package nftables

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/test/history"
)

var families = []model.Family{model.IPv4, model.IPv6}

// inNamespace gives the test a network namespace of its own. The thread is never
// given back.
func inNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		t.Skipf("SKIPPED: no network namespace of our own (run as root, or under unshare -Urn): %v", err)
	}
}

// kernelIn gives the kernel of a new namespace.
func kernelIn(t *testing.T, f model.Family) *nfKernel {
	t.Helper()
	inNamespace(t)
	if _, err := Probe(t.Context(), f); err != nil {
		t.Skipf("SKIPPED, nf_tables not tested: %v", err)
	}
	k, err := openKernel(f, table)
	if err == nil {
		err = k.listen()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.conn.Close() })
	return k
}

// nft runs nft, another program's view of the kernel, in the test's namespace.
func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("SKIPPED: nft is not installed")
	}
	if err != nil {
		t.Fatalf("nft %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// kernelText prints what the kernel has in the words of the fake. Rules are read by
// their signatures, so that a chain is as it should be or is not.
func kernelText(t *testing.T, k *nfKernel, set *plan.Set, o Options) string {
	t.Helper()
	f := newFake()
	f.table = &fakeTable{map[setID]map[key]value{}, map[chainName]chain{}}
	for id := range setCount {
		f.table.sets[id] = map[key]value{}
	}
	have, err := k.read(t.Context(), func(e element) error {
		f.table.sets[e.set][e.key] = e.value
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !have.table || have.asleep {
		return "no table\n"
	}
	c := newCompiler(&o)
	wanted := map[chainName]chain{}
	for _, ch := range c.base(&o, set.Facts, true).chains {
		wanted[ch.name] = ch
	}
	for p := range set.All {
		for _, s := range c.compile(p).chains {
			wanted[s.name()] = c.chain(s)
		}
	}
	for name, h := range have.chains {
		ch := wanted[name]
		if h != ch.digestOf() {
			ch = chain{name: name, rules: []rule{{text: "is not as it should be"}}}
		}
		f.table.chains[name] = ch
	}
	return f.text()
}

// TestKernelHistories is law 4 on the real kernel: after any history it holds what a
// start from nothing makes of a fake. Some histories change the process, and some
// have somebody else at work.
func TestKernelHistories(t *testing.T) {
	for seed := range 40 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { testKernelHistory(t, seed) })
	}
}

func testKernelHistory(t *testing.T, seed int) {
	ctx := t.Context()
	r := rand.New(rand.NewPCG(uint64(seed), 2))
	k := kernelIn(t, families[seed%2])
	if seed%5 == 0 {
		k.most = 20_000
	}
	w := newWorld(r, k.family, []int{3, 40, 150}[seed%3])
	o := options(w)
	report := history.NewReports()
	o.Report = report
	x, now := clocked(o, k)
	others := 0
	for range 6 {
		for range 1 + r.IntN(w.Names) {
			w.Step()
		}
		if r.IntN(4) == 0 {
			x, now = clocked(o, k)
		}
		set := w.Set()
		if err := x.Sync(ctx, set); err != nil {
			t.Fatal(err)
		}
		sweep(t, x, now)
		want := fresh(t, options(w), set, nil)
		if d := cmp.Diff(want, kernelText(t, k, set, o)); d != "" {
			t.Fatalf("the kernel differs from a start from nothing (-want +got):\n%s", d)
		}
		if seed%4 == 3 {
			n := disturb(t, r, k)
			others += n
			if _, err := x.Check(ctx, true); err != nil {
				t.Fatal(err)
			}
			sweep(t, x, now)
			if d := cmp.Diff(want, kernelText(t, k, set, o)); d != "" {
				t.Fatalf("not repaired after %d changes (-want +got):\n%s", n, d)
			}
		}
	}
	if len(report.Aside) > 0 {
		t.Errorf("set aside: %v", report.Aside)
	}
	if (others > 0) != (len(report.Drift) > 0) {
		t.Errorf("%d objects were changed by others, reported %v", others, report.Drift)
	}
	if err := x.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if there, err := k.there(ctx); there || err != nil {
		t.Errorf("cleanup left the table (%v), error %v", there, err)
	}
}

// disturb takes away some elements and the rules of a chain, as somebody else would,
// and returns how many things it changed.
func disturb(t *testing.T, r *rand.Rand, k *nfKernel) (n int) {
	t.Helper()
	var gone []element
	have, err := k.read(t.Context(), func(e element) error {
		if r.IntN(20) == 0 {
			gone = append(gone, e)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var list []message
	for _, e := range gone {
		list = append(list, message{what: deleteElements, set: e.set, elements: []element{e}})
	}
	for name := range have.chains {
		if r.IntN(20) == 0 && len(have.chains) > 0 && string(name) != chainReject {
			list = append(list, message{what: flushChain, name: string(name)})
		}
	}
	other, err := openKernel(k.family, table)
	if err != nil {
		t.Fatal(err)
	}
	defer other.conn.Close()
	if err := other.commit(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// web is a Service with n endpoints, the first of them here.
func web(t *testing.T, f model.Family, n int, change func(*model.Service)) *plan.Set {
	t.Helper()
	w := history.New(rand.New(rand.NewPCG(1, 1)), f, 1)
	svc := &model.Service{ServiceName: model.ServiceName{Namespace: "ns", Name: "web"}, ClusterIPs: []netip.Addr{w.Addr(10, 80)},
		Ports: []model.ServicePort{{Protocol: model.TCP, Port: 80, NodePort: 30080}}}
	if change != nil {
		change(svc)
	}
	sl := &model.Slice{Namespace: "ns", Name: "web", Service: "web", Family: f, Ports: []model.SlicePort{{Protocol: model.TCP, Port: 8080}}}
	for i := range n {
		sl.Endpoints = append(sl.Endpoints, model.Endpoint{Addr: w.Addr(10, 1<<20+i), Node: fmt.Sprintf("node-%d", i), Ready: true, Serving: true})
	}
	w.Planner.Update(svc.ServiceName, svc, []*model.Slice{sl})
	return w.Set()
}

// counting counts transactions.
type counting struct {
	*nfKernel
	commits int
}

func (c *counting) commit(ctx context.Context, t []message) error {
	c.commits++
	return c.nfKernel.commit(ctx, t)
}

// TestAdopt: a new process writes nothing where all is as it should be, and only the
// difference where it is not.
func TestAdopt(t *testing.T) {
	for _, f := range families {
		t.Run(f.String(), func(t *testing.T) {
			k := kernelIn(t, f)
			set := web(t, f, 50, nil)
			o := Options{Family: f, MasqueradeBit: 14}
			if err := newProxier(o, k).Sync(t.Context(), set); err != nil {
				t.Fatal(err)
			}
			again := &counting{nfKernel: k}
			if err := newProxier(o, again).Sync(t.Context(), set); err != nil || again.commits > 0 {
				t.Errorf("%d transactions, error %v", again.commits, err)
			}
			before := nft(t, "-a", "list", "ruleset")
			if err := newProxier(o, again).Sync(t.Context(), web(t, f, 49, nil)); err != nil || again.commits != 1 {
				t.Errorf("%d transactions for one endpoint less, error %v; want 1", again.commits, err)
			}
			for _, line := range strings.Split(before, "\n") {
				if strings.Contains(line, "hook ") && !strings.Contains(nft(t, "-a", "list", "ruleset"), line) {
					t.Errorf("written anew: %s", line)
				}
			}
		})
	}
}

// TestAnotherLayout: a table whose maps are others than ours is made anew, in one
// transaction, and what is not ours stays.
func TestAnotherLayout(t *testing.T) {
	for what, cmds := range map[string][]string{
		"another map":    {"add map ip sluice old { type ipv4_addr : verdict; }"},
		"another type":   {"delete table ip sluice", "add table ip sluice", "add map ip sluice services { type ipv4_addr : verdict; }"},
		"another's all":  {"delete table ip sluice", "add table ip sluice", "add chain ip sluice c { type nat hook prerouting priority 0; }", "add set ip sluice hairpin { type ipv4_addr; }"},
		"an odd element": {"add element ip sluice services { 10.9.9.9 . tcp . 1 : accept }"},
	} {
		t.Run(what, func(t *testing.T) {
			k := kernelIn(t, model.IPv4)
			o := Options{Family: k.family, MasqueradeBit: 14}
			set := web(t, k.family, 30, nil)
			if err := newProxier(o, k).Sync(t.Context(), set); err != nil {
				t.Fatal(err)
			}
			want := kernelText(t, k, set, o)
			nft(t, "add table ip theirs")
			for _, cmd := range cmds {
				nft(t, cmd)
			}
			again := &counting{nfKernel: k}
			x, now := clocked(o, again)
			if err := x.Sync(t.Context(), set); err != nil {
				t.Fatal(err)
			}
			if again.commits > 2 {
				t.Errorf("%d transactions, want one, and the chain that waits until all is there", again.commits)
			}
			sweep(t, x, now)
			if d := cmp.Diff(want, kernelText(t, k, set, o)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			if !strings.Contains(nft(t, "list tables"), "theirs") {
				t.Error("another table was touched")
			}
		})
	}
}

// TestLargeService: what does not fit into one transaction goes in several.
func TestLargeService(t *testing.T) {
	k := kernelIn(t, model.IPv6)
	k.most = 64 << 10 // as without the right to a larger buffer
	o := Options{Family: k.family, MasqueradeBit: 14}
	x := newProxier(o, k)
	for _, n := range []int{20_000, 19_000, 1, 5_000, 0} {
		set := web(t, k.family, n, nil)
		if err := x.Sync(t.Context(), set); err != nil {
			t.Fatal(err)
		}
		elements := 0
		if _, err := k.read(t.Context(), func(e element) error {
			if e.set == setEndpoints {
				elements++
			}
			return nil
		}); err != nil || elements != n {
			t.Fatalf("%d elements of %d, error %v", elements, n, err)
		}
	}
}

// TestDrift: whatever somebody else does to the table, the kernel tells of it, and it
// is put right.
func TestDrift(t *testing.T) {
	for _, f := range families {
		fam := word(f)
		frontend := map[model.Family]string{model.IPv4: "10.0.0.80 . tcp . 80", model.IPv6: "fd0a::50 . tcp . 80"}[f]
		for what, cmd := range map[string]string{
			"flushed":         "flush ruleset",
			"table":           "delete table " + fam + " sluice",
			"element":         "delete element " + fam + " sluice services { " + frontend + " }",
			"endpoint":        "delete element " + fam + " sluice endpoints { " + frontend + " . 1 }",
			"foreign element": "add element " + fam + " sluice cluster-ips { " + strings.Replace(strings.Split(frontend, " ")[0], "0", "9", 1) + " }",
			"all elements":    "flush map " + fam + " sluice services",
			"rules":           "flush chain " + fam + " sluice services",
			"foreign rule":    "insert rule " + fam + " sluice nat-prerouting accept",
			"foreign chain":   "add chain " + fam + " sluice mine",
			"base chain":      "delete chain " + fam + " sluice nat-output",
			"asleep":          "add table " + fam + " sluice { flags dormant; }",
		} {
			t.Run(fam+"/"+what, func(t *testing.T) { testDrift(t, f, cmd) })
		}
	}
}

func testDrift(t *testing.T, f model.Family, cmd string) {
	k := kernelIn(t, f)
	set := web(t, f, 3, nil)
	report := history.NewReports()
	o := Options{Family: f, MasqueradeBit: 14, Report: report}
	x, now := clocked(o, k)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- x.Follow(ctx) }()
	if err := x.Sync(ctx, set); err != nil {
		t.Fatal(err)
	}
	want := kernelText(t, k, set, o)
	// What others do elsewhere, and what we do ourselves, is no alarm.
	nft(t, "add table "+word(f)+" theirs")
	nft(t, "add chain "+word(f)+" theirs c { type nat hook prerouting priority 0; }")
	if err := x.Sync(ctx, web(t, f, 4, nil)); err != nil {
		t.Fatal(err)
	}
	if err := x.Sync(ctx, set); err != nil {
		t.Fatal(err)
	}
	sweep(t, x, now)
	select {
	case <-x.Alarm():
		t.Error("an alarm before anybody has changed our table")
	case <-time.After(50 * time.Millisecond):
	}
	if strings.HasPrefix(cmd, "delete chain") { // only what is empty can be deleted
		nft(t, strings.Replace(cmd, "delete", "flush", 1))
	}
	nft(t, cmd)
	select {
	case <-x.Alarm():
	case <-time.After(10 * time.Second):
		t.Fatal("nobody tells of it")
	}
	if full, err := x.Check(ctx, false); !full || err != nil {
		t.Fatalf("the check looked (%v), error %v", full, err)
	}
	sweep(t, x, now)
	if d := cmp.Diff(want, kernelText(t, k, set, o)); d != "" {
		t.Errorf("not repaired (-want +got):\n%s", d)
	}
	if len(report.Drift) == 0 && !strings.Contains(cmd, "mine") {
		t.Error("no repair was reported")
	}
	if !strings.Contains(cmd, "ruleset") && !strings.Contains(nft(t, "list tables"), "theirs") {
		t.Error("another table was touched")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestAffinityForgets: clients of an endpoint that is gone are forgotten, the others
// are not, and what is remembered outlives the process.
func TestAffinityForgets(t *testing.T) {
	for _, f := range families {
		t.Run(f.String(), func(t *testing.T) { testAffinityForgets(t, f) })
	}
}

func testAffinityForgets(t *testing.T, f model.Family) {
	k := kernelIn(t, f)
	o := Options{Family: f, MasqueradeBit: 14}
	sticky := func(s *model.Service) { s.Affinity = 3 * time.Hour }
	x := newProxier(o, k)
	if err := x.Sync(t.Context(), web(t, f, 3, sticky)); err != nil {
		t.Fatal(err)
	}
	w := history.New(rand.New(rand.NewPCG(1, 1)), f, 1)
	for i := range 30 {
		endpoint := w.Addr(10, 1<<20+i%3)
		nft(t, fmt.Sprintf("add element %s sluice affinity { %s . %s . tcp . 80 timeout 1h : %s . 8080 }", word(f), w.Addr(11, i), w.Addr(10, 80), endpoint))
		nft(t, fmt.Sprintf("add element %s sluice affinity { %s . %s . tcp . 30080 timeout 1h : %s . 8080 }", word(f), w.Addr(11, i), w.Addr(192, 1), endpoint))
	}
	remembered := func() string {
		count := map[string]int{}
		if err := k.clients(t.Context(), func(c client) { count[c.to.Addr().String()]++ }); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(count)
	}
	want := func(n int) string {
		count := map[string]int{}
		for i := range n {
			count[w.Addr(10, 1<<20+i).String()] = 20
		}
		return fmt.Sprint(count)
	}
	for _, step := range []struct {
		n     int
		fresh bool
		left  int
	}{{3, true, 3}, {2, false, 2}, {3, false, 2}, {1, true, 1}, {0, false, 0}} {
		if step.fresh {
			x = newProxier(o, k)
		}
		if err := x.Sync(t.Context(), web(t, f, step.n, sticky)); err != nil {
			t.Fatal(err)
		}
		if got := remembered(); got != want(step.left) {
			t.Fatalf("with %d endpoints %s are remembered, want %s", step.n, got, want(step.left))
		}
	}
}

// TestRemoveKubeProxy: the table of one family goes, everything else stays.
func TestRemoveKubeProxy(t *testing.T) {
	inNamespace(t)
	for _, table := range []string{"ip kube-proxy", "ip6 kube-proxy", "ip theirs", "inet kube-proxy"} {
		nft(t, "add table "+table)
	}
	nft(t, "add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100; }")
	for i := range 2 {
		if removed, err := RemoveKubeProxy(model.IPv4); err != nil || removed != (i == 0) {
			t.Fatal(removed, err)
		}
	}
	got := strings.Fields(strings.ReplaceAll(nft(t, "list tables"), "table ", ""))
	if strings.Join(got, " ") != "ip6 kube-proxy ip theirs inet kube-proxy" {
		t.Errorf("left: %v", got)
	}
	if removed, err := RemoveKubeProxy(model.IPv6); !removed || err != nil {
		t.Errorf("IPv6: removed %v, error %v", removed, err)
	}
}

// TestProbe: a kernel that has all is not changed by the question, and is told from
// one in which others drop what is forwarded.
func TestProbe(t *testing.T) {
	for _, f := range families {
		kernelIn(t, f)
		before := nft(t, "list ruleset")
		host, err := Probe(t.Context(), f)
		if err != nil || len(host.Limits) > 0 {
			t.Errorf("%s: %v, %v", f, host, err)
		}
		if after := nft(t, "list ruleset"); after != before {
			t.Errorf("left behind: %s", after)
		}
		nft(t, "add table "+word(f)+" filter")
		nft(t, "add chain "+word(f)+" filter FORWARD { type filter hook forward priority 0; policy drop; }")
		host, err = Probe(t.Context(), f)
		if err != nil || len(host.Limits) != 1 || !strings.Contains(host.Limits[0], "chain FORWARD of table filter") {
			t.Errorf("%s: %v, %v", f, host, err)
		}
	}
}

// TestProbeLacking: what is missing is said by name, one thing at a time.
func TestProbeLacking(t *testing.T) {
	k := kernelIn(t, model.IPv4)
	for _, ft := range features(model.IPv4) {
		if err := k.try(t.Context(), ft.try...); err != nil {
			t.Errorf("%s: %v", ft.what, err)
		}
	}
	wrong := message{what: writeChain, chain: chain{name: "probe", rules: []rule{newRule(vmap(setServices, l4proto()))}}}
	if err := k.try(t.Context(), wrong); !lacking(err) {
		t.Errorf("a rule whose map is not there: %v", err)
	}
}
