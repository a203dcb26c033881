package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// trial is one program under test, at work on its node.
type trial struct {
	c       *cluster
	s       *settings
	program string
	variant string
	node    *netlab.Namespace
	from    client // a pod of the node
	proc    *process
	meter   *meter
	*result
}

// measure runs one program with one variant from its cold start to its end. What
// was read before an error is in the result.
func measure(ctx context.Context, c *cluster, program, variant string) (*result, error) {
	name := nodeName(program, variant)
	t := &trial{c: c, s: c.s, program: program, variant: variant, node: c.lab.Host(name), from: client{c.lab.Host(podName(name))},
		result: &result{Program: program, Variant: variant, Readings: map[string]reading{}}}
	path, err := t.programs()
	if err != nil {
		return t.result, err
	}
	t.LoadBefore = load()
	defer func() { t.LoadAfter = load() }()
	progress("%s, %s: cold start (load average %s)", program, variant, t.LoadBefore)
	// The files of the program are in memory then, for both alike.
	if out, err := exec.CommandContext(ctx, c.s.paths[program], "--version").CombinedOutput(); err != nil {
		return t.result, fmt.Errorf("%s --version: %w: %s", program, err, out)
	} else {
		t.Version = strings.TrimSpace(string(out))
	}
	defer func() {
		if t.proc != nil {
			t.proc.stop(syscall.SIGTERM, 30*time.Second)
		}
		t.flush()
	}()
	for _, phase := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"", func(ctx context.Context) error { return t.coldStart(ctx, path) }},
		{"new connections", t.newConnections},
		{"endpoint changes, one by one", t.oneByOne},
		{"endpoint changes, many", t.many},
		{"memory", t.memoryAtTheEnd},
		{"at rest", t.atRest},
		{"", t.systemCalls},
	} {
		if phase.name != "" {
			progress("%s, %s: %s", program, variant, phase.name)
		}
		if err := phase.run(ctx); err != nil {
			return t.result, err
		}
		if err := t.proc.ended(); err != nil {
			return t.result, err
		}
	}
	return t.result, nil
}

// programs makes a folder in which "iptables" is the variant, and returns a PATH
// that begins with it.
func (t *trial) programs() (string, error) {
	multi, err := exec.LookPath("xtables-" + t.variant + "-multi")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(t.c.dir, t.variant)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"", "-save", "-restore"} {
			if err := os.Symlink(multi, filepath.Join(dir, family+what)); err != nil && !os.IsExist(err) {
				return "", err
			}
		}
	}
	return dir + ":" + os.Getenv("PATH"), nil
}

func (t *trial) iptables(ctx context.Context, ns *netlab.Namespace, args ...string) error {
	_, err := ns.Run(ctx, filepath.Join(t.c.dir, t.variant, "iptables"), args...)
	return err
}

// flush frees the kernel's memory of a ruleset at once.
func (t *trial) flush() {
	ctx := context.Background()
	if t.s.mode == modeIPVS {
		t.flushIPVS(ctx)
	}
	if t.variant == "nft" {
		_, _ = t.node.Run(ctx, "nft", "flush", "ruleset")
		return
	}
	for _, table := range []string{"nat", "filter", "mangle"} {
		_, _ = t.node.RunInput(ctx, "*"+table+"\nCOMMIT\n", filepath.Join(t.c.dir, t.variant, "iptables-restore"))
	}
}

// environment gives each run a lock of its own: other users of this machine's
// iptables have nothing to do with it.
func (t *trial) environment(path string) []string {
	return []string{"PATH=" + path, "XTABLES_LOCKFILE=" + filepath.Join(t.c.dir, nodeName(t.program, t.variant)+".lock")}
}

func (t *trial) arguments() ([]string, error) {
	if t.s.mode == modeIPVS {
		return t.ipvsArguments()
	}
	args := []string{"--kubeconfig=" + filepath.Join(t.c.dir, "kubeconfig"), "--hostname-override=" + nodeName(t.program, t.variant),
		"--proxy-mode=" + t.s.mode, "--cluster-cidr=" + clusterRange.String(),
		// Limits of conntrack are the machine's, and read-only in a namespace.
		"--conntrack-max-per-core=0", "--conntrack-min=0"}
	if t.program == ours {
		args = append(args, "--iptables-variant="+t.variant)
	}
	if t.s.profiles != "" {
		args = append(args, "--profiling")
	}
	return args, nil
}

// logFile is kept where profiles are wanted.
func (t *trial) logFile() string {
	if t.s.profiles != "" {
		return filepath.Join(t.s.profiles, t.name()+"-"+t.program+".log")
	}
	return filepath.Join(t.c.dir, t.name()+"-"+t.program+".log")
}

// coldStart starts the program on a node without rules and waits until Services
// answer.
func (t *trial) coldStart(ctx context.Context, path string) (err error) {
	args, err := t.arguments()
	if err != nil {
		return err
	}
	began := time.Now()
	t.proc, err = start(t.node, t.logFile(), t.environment(path), t.s.paths[t.program], args...)
	if err != nil {
		return err
	}
	t.meter = &meter{pid: t.proc.pid()}
	watching, stop := context.WithCancel(ctx)
	go t.meter.run(watching)
	go func() { // the measurement ends with the program
		<-t.proc.done
		stop()
	}()
	if t.s.profiles != "" {
		go t.profile(watching, "cpu-cold-start.pprof", "/debug/pprof/profile?seconds=10")
	}

	limit, cancel := context.WithTimeout(watching, t.s.coldLimit)
	defer cancel()
	var all []netip.AddrPort
	for _, i := range sample(t.s.services, 200) {
		all = append(all, numbered(i).addr())
	}
	important := []netip.AddrPort{netip.AddrPortFrom(kubernetesIP, 443), dns.addr()}
	var group errgroup.Group
	for id, addrs := range map[string][]netip.AddrPort{"cold.important": important, "cold.all": all} {
		group.Go(func() error {
			at, err := t.from.answered(limit, addrs, 3*time.Millisecond)
			if err != nil && t.proc.ended() == nil && ctx.Err() == nil {
				t.set(id, reading{Value: t.s.coldLimit.Seconds(), Over: true})
				return fmt.Errorf("cold start takes more than %s", t.s.coldLimit)
			}
			t.set(id, reading{Value: at.Sub(began).Seconds()})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	progress("%s, %s: every Service answers after %.2f s", t.program, t.variant, t.get("cold.all"))
	quiet := t.meter.idle(ctx, 8*time.Second, max(time.Minute, t.s.coldLimit-time.Since(began)))
	t.set("cold.idle", reading{Value: t.meter.busyUntil().Sub(began).Seconds(), Over: !quiet})
	u, err := t.meter.usage()
	if err != nil {
		return err
	}
	r := reading{Value: u.cpu.Seconds()}
	if !quiet {
		r.Note = "not idle when the time was over"
	}
	t.set("cold.cpu", r)
	if t.c.starts != nil {
		n, programs := since(nil, t.started())
		t.set("cold.starts", reading{Value: float64(n), Note: programs})
	}
	t.set("rss.start", reading{Value: mebibytes(u.rss)})
	t.set("rss.startPeak", reading{Value: mebibytes(u.peak)})
	if t.s.profiles != "" {
		t.profile(ctx, "heap.pprof", "/debug/pprof/heap?gc=1")
		t.profile(ctx, "allocs.pprof", "/debug/pprof/allocs")
	}
	return nil
}

// newConnections compares connections through Services, and beside them, with
// those of a node without rules.
func (t *trial) newConnections(ctx context.Context) error {
	name := nodeName(bare, t.variant)
	if err := t.prepareBare(ctx, t.c.lab.Host(name)); err != nil {
		return fmt.Errorf("prepare a node without rules: %w", err)
	}
	// Who dialled a Service before its rules were there has left flows in conntrack
	// that are not translated, and later connections from the same port fall into
	// them for two minutes, whatever the program does.
	if err := t.node.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
		return fmt.Errorf("forget flows of before the rules: %w", err)
	}
	direct := []netip.AddrPort{netip.AddrPortFrom(canaryEndpoint(t.c.canaryVersion), endpointPort)}
	base := &target{from: client{t.c.lab.Host(podName(name))}, to: direct}
	other := &target{from: t.from, to: direct}
	service := &target{from: t.from}
	for _, i := range sample(t.s.services, 20) {
		service.to = append(service.to, numbered(i).addr())
	}
	if err := timed(ctx, []*target{base, other, service}, t.s.connections); err != nil {
		return err
	}
	n := t.s.connections
	t.set("conn.base", reading{Value: micro(base.median()), N: n})
	t.set("conn.other", reading{Value: micro(other.above(base)), N: n})
	r := reading{Value: micro(service.above(base)), N: n}
	if lost := base.lost + other.lost + service.lost; lost > 0 {
		r.Note = fmt.Sprintf("%d connections lost: %d through Services, %d to none, %d where there are no rules", lost, service.lost, other.lost, base.lost)
	}
	t.set("conn.service", r)
	t.set("conn.slowest", reading{Value: micro(service.slowestAbove(base)), N: n})
	return nil
}

// prepareBare makes a node track and translate connections as one with rules
// does, but without any rule.
func (t *trial) prepareBare(ctx context.Context, ns *netlab.Namespace) error {
	for table, chains := range map[string][]string{"nat": {"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"}, "filter": {"INPUT", "FORWARD", "OUTPUT"}} {
		for _, chain := range chains {
			for _, what := range []string{"-A", "-D"} {
				if err := t.iptables(ctx, ns, "-w", "5", "-t", table, what, chain, "-m", "comment", "--comment", "bench"); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// oneByOne changes the endpoint of one Service again and again, each time when
// the program is idle, and sees when traffic follows.
func (t *trial) oneByOne(ctx context.Context) error {
	const changeTimeout = 2 * time.Minute
	began := time.Now()
	var took []time.Duration
	failed := 0
	var starts []int // processes, for each change
	var what string
	if t.s.profiles != "" {
		go t.profile(ctx, "cpu-one-by-one.pprof", "/debug/pprof/profile?seconds=20")
	}
	for len(took) < t.s.changes && time.Since(began) < t.s.changeLimit {
		t.meter.idle(ctx, 1200*time.Millisecond, time.Minute)
		before := t.started()
		limit, cancel := context.WithTimeout(ctx, changeTimeout)
		start := time.Now()
		want, written := t.c.changeCanary(limit)
		at, lost, err := t.from.follow(limit, canary.addr(), want)
		werr := <-written
		cancel()
		if werr != nil {
			return werr
		}
		if err != nil && ctx.Err() == nil {
			t.set("change.p99", reading{Value: milli(changeTimeout), Over: true, N: len(took) + 1})
		}
		if err != nil {
			return err
		}
		took, failed = append(took, at.Sub(start)), failed+lost
		t.meter.idle(ctx, 0, time.Minute)
		n, programs := since(before, t.started())
		starts, what = append(starts, n), programs
	}
	slices.Sort(took)
	t.set("change.p50", reading{Value: milli(quantile(took, 0.5)), N: len(took)})
	t.set("change.p99", reading{Value: milli(quantile(took, 0.99)), N: len(took)})
	t.set("change.failed", reading{Value: float64(failed), N: len(took)})
	if t.c.starts != nil {
		slices.Sort(starts)
		t.set("change.starts", reading{Value: float64(starts[len(starts)/2]), N: len(starts), Note: what})
	}
	return nil
}

// started are the processes that the program has started so far.
func (t *trial) started() map[string]ran {
	if t.c.starts == nil {
		return nil
	}
	return t.c.starts.of(t.proc.pid())
}

// many changes endpoints of many Services at a steady rate and sees what CPU time
// that costs until everything is in force.
func (t *trial) many(ctx context.Context) error {
	t.meter.idle(ctx, 1500*time.Millisecond, 20*time.Second)
	before, err := t.meter.usage()
	if err != nil {
		return err
	}
	began := time.Now()
	tick := time.NewTicker(time.Second / time.Duration(t.s.burstRate))
	defer tick.Stop()
	var writes errgroup.Group
	picked := sample(t.s.services, t.s.burst)
	if t.s.profiles != "" {
		go t.profile(ctx, "cpu-changes.pprof", "/debug/pprof/profile?seconds=10")
	}
	for k := range t.s.burst {
		<-tick.C
		if k > 0 && k%len(picked) == 0 {
			_ = writes.Wait() // a Service is not changed twice at the same time
		}
		writes.Go(func() error { return t.c.changeOne(ctx, picked[k%len(picked)]) })
	}
	if err := writes.Wait(); err != nil {
		return err
	}
	lasted := time.Since(began)
	limit, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	want, written := t.c.changeCanary(limit)
	at, _, err := t.from.follow(limit, canary.addr(), want)
	if err := <-written; err != nil {
		return err
	}
	if err != nil {
		return err
	}
	quiet := t.meter.idle(ctx, time.Second, time.Minute)
	after, err := t.meter.usage()
	if err != nil {
		return err
	}
	n := t.s.burst + 1
	r := reading{Value: (after.cpu - before.cpu).Seconds() * 1000 / float64(n), N: n}
	if rate := float64(t.s.burst) / lasted.Seconds(); rate < 0.9*float64(t.s.burstRate) {
		r.Note = fmt.Sprintf("%.1f changes a second, not %d", rate, t.s.burstRate)
	}
	if !quiet {
		r.Note = strings.TrimSpace(r.Note + " not idle a minute later")
	}
	t.set("change.cpu", r)
	t.set("change.behind", reading{Value: max(0, at.Sub(began).Seconds()-lasted.Seconds())})
	return nil
}

func (t *trial) memoryAtTheEnd(ctx context.Context) error {
	t.meter.idle(ctx, 5*time.Second, 20*time.Second)
	u, err := t.meter.usage()
	if err != nil {
		return err
	}
	child, together := t.meter.peaks()
	t.set("rss.steady", reading{Value: mebibytes(u.rss)})
	t.set("rss.peak", reading{Value: mebibytes(u.peak)})
	t.set("rss.children", reading{Value: mebibytes(child)})
	t.set("rss.together", reading{Value: mebibytes(max(together, u.peak))})
	if t.s.profiles != "" {
		t.profile(ctx, "heap-end.pprof", "/debug/pprof/heap?gc=1")
		t.profile(ctx, "metrics", "/metrics")
	}
	return nil
}

// atRest sees what the program does when nothing is to be done.
func (t *trial) atRest(ctx context.Context) error {
	t.meter.idle(ctx, 0, time.Minute)
	before, err := t.meter.usage()
	if err != nil {
		return err
	}
	started := t.started()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.proc.done:
		return t.proc.ended()
	case <-time.After(t.s.rest):
	}
	after, err := t.meter.usage()
	if err != nil {
		return err
	}
	perMinute := time.Minute.Seconds() / t.s.rest.Seconds()
	t.set("rest.cpu", reading{Value: (after.cpu - before.cpu).Seconds() * perMinute})
	if t.c.starts != nil {
		n, what := since(started, t.started())
		t.set("rest.starts", reading{Value: float64(n) * perMinute, Note: what})
	}
	return nil
}

func mebibytes(n int64) float64     { return float64(n) / (1 << 20) }
func milli(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
func micro(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// quantile is the smallest value that a share q of all does not exceed; values
// are sorted.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	k := int(q*float64(len(sorted))+0.999999) - 1
	return sorted[min(max(k, 0), len(sorted)-1)]
}

func load() string {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(data))[:3], " ")
}
