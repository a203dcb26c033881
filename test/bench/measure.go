package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

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

func newTrial(c *cluster, s *settings, program, variant string) *trial {
	name := nodeName(program, variant)
	return &trial{c: c, s: s, program: program, variant: variant, node: c.lab.Host(name), from: client{c.lab.Host(podName(name))},
		result: &result{Program: program, Variant: variant, Services: s.services, Readings: map[string]reading{}}}
}

// phase is a part of a trial that takes some of its figures.
type phase struct {
	name string
	run  func(context.Context) error
}

// phases are those after the cold start, in order.
func (t *trial) phases() []phase {
	all := []phase{
		{"new connections", t.newConnections},
		{"endpoint changes, one by one", t.oneByOne},
		{"endpoint changes, many", t.many},
		{"memory", t.memoryAtTheEnd},
		{"at rest", t.atRest},
	}
	if t.s.mode != modeIPVS {
		all = append(all, phase{"repair after a flush", t.repair})
	}
	if t.s.strace {
		all = append(all, phase{"system calls", t.systemCalls})
	}
	return all
}

// run takes the program from its cold start through the phases to its end. A phase
// that fails does not keep the next from being tried, unless the program has
// ended or has not served anything. What was read before an error is in the
// result.
func (t *trial) run(ctx context.Context, phases []phase) (errs []error) {
	rest := func(err error) []error { return append(errs, fmt.Errorf("the rest of its figures: %w", err)) }
	t.LoadBefore = load()
	progress("%s, %s: cold start (load average %s)", t.program, t.variant, t.LoadBefore)
	defer t.end()
	if err := t.coldStart(ctx); err != nil {
		return rest(err)
	}
	for _, p := range phases {
		progress("%s, %s: %s", t.program, t.variant, p.name)
		if err := p.run(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
		}
		if err := ctx.Err(); err != nil {
			return rest(err)
		}
		if err := t.proc.ended(); err != nil {
			return rest(err)
		}
	}
	return errs
}

// end stops the program and frees the kernel's memory of its ruleset at once.
func (t *trial) end() {
	if t.proc != nil {
		t.proc.stop(syscall.SIGTERM, 30*time.Second)
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushLimit)
	defer cancel()
	if err := errors.Join(t.flush(ctx), t.forgetFlows()); err != nil {
		progress("%s, %s: clear the node: %v", t.program, t.variant, err)
	}
	t.LoadAfter = load()
}

const flushLimit = 2 * time.Minute

// forgetFlows empties the node's conntrack table. Who dialled a Service while its
// rules were not there has left flows that are not translated, and later
// connections from the same port fall into them for two minutes, whatever the
// program does.
func (t *trial) forgetFlows() error {
	if err := t.node.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
		return fmt.Errorf("forget flows of before the rules: %w", err)
	}
	return nil
}

// path is the PATH of the program under test.
func (t *trial) path() (string, error) {
	if t.s.mode == modeNFTables {
		_, err := exec.LookPath("nft")
		return os.Getenv("PATH"), err
	}
	return t.iptablesPath()
}

// name is the mode or, in iptables mode, the variant.
func (t *trial) name() string {
	if t.s.mode == modeIPTables {
		return t.variant
	}
	return t.s.mode
}

// prepareBare makes a node track and translate connections without any rule.
func (t *trial) prepareBare(ctx context.Context, ns *netlab.Namespace) error {
	if t.s.mode == modeNFTables {
		return bareNFTables(ctx, ns)
	}
	return t.bareIPTables(ctx, ns)
}

// flush takes away the program's rules.
func (t *trial) flush(ctx context.Context) error {
	if t.s.mode == modeIPVS {
		t.flushIPVS(ctx)
	}
	if t.variant == "legacy" {
		return t.flushLegacy(ctx)
	}
	return flushRuleset(ctx, t.node)
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
	if t.program == ours && t.s.mode == modeIPTables {
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

// started are the processes that the program has started so far.
func (t *trial) started() map[string]ran {
	if t.c.starts == nil {
		return nil
	}
	return t.c.starts.of(t.proc.pid())
}

func (t *trial) memoryAtTheEnd(ctx context.Context) error {
	t.meter.idle(ctx, 5*time.Second, 20*time.Second)
	u, err := t.meter.usage()
	if err != nil {
		return err
	}
	t.set("rss.steady", reading{Value: mebibytes(u.rss)})
	t.readPeaks(u, false)
	if t.s.profiles != "" {
		t.profile(ctx, "heap-end.pprof", "/debug/pprof/heap?gc=1")
		t.profile(ctx, "metrics", "/metrics")
	}
	return nil
}

// readPeaks reads what memory was needed so far.
func (t *trial) readPeaks(u usage, unfinished bool) {
	child, together := t.meter.peaks()
	for id, n := range map[string]int64{"rss.peak": u.peak, "rss.children": child, "rss.together": max(together, u.peak)} {
		t.set(id, reading{Value: mebibytes(n), Over: unfinished})
	}
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
