package main

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// coldStart starts the program on a node without rules and waits until Services
// answer and nothing is left to do.
func (t *trial) coldStart(ctx context.Context) error {
	// The files of the program are in memory then, for both alike.
	out, err := exec.CommandContext(ctx, t.s.paths[t.program], "--version").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s --version: %w: %s", t.program, err, out)
	}
	t.Version = strings.TrimSpace(string(out))
	began, running, err := t.start(ctx)
	if err != nil {
		return err
	}
	if err := t.awaitServices(running, began); err != nil {
		if ended := t.proc.ended(); ended != nil {
			return ended
		}
		t.readUnfinished()
		return err
	}
	progress("%s, %s: every Service answers after %.2f s", t.program, t.variant, t.get("cold.all"))
	quiet := t.meter.idle(ctx, 8*time.Second, max(time.Minute, t.s.coldLimit-time.Since(began)))
	t.set("cold.idle", reading{Value: t.meter.busyUntil().Sub(began).Seconds(), Over: !quiet})
	u, err := t.readColdStart(!quiet)
	if err != nil {
		return err
	}
	t.set("rss.start", reading{Value: mebibytes(u.rss)})
	t.set("rss.startPeak", reading{Value: mebibytes(u.peak)})
	if t.s.profiles != "" {
		t.profile(ctx, "heap.pprof", "/debug/pprof/heap?gc=1")
		t.profile(ctx, "allocs.pprof", "/debug/pprof/allocs")
	}
	return nil
}

// start starts the program and what watches it. The context that it returns ends
// with the program.
func (t *trial) start(ctx context.Context) (began time.Time, running context.Context, err error) {
	path, err := t.path()
	if err != nil {
		return began, ctx, err
	}
	args, err := t.arguments()
	if err != nil {
		return began, ctx, err
	}
	began = time.Now()
	t.proc, err = start(t.node, t.logFile(), t.environment(path), t.s.paths[t.program], args...)
	if err != nil {
		return began, ctx, err
	}
	t.meter = &meter{pid: t.proc.pid()}
	running, stop := context.WithCancel(ctx)
	go t.meter.run(running)
	go func() { // the measurement ends with the program
		<-t.proc.done
		stop()
	}()
	if t.s.profiles != "" {
		go t.profile(running, "cpu-cold-start.pprof", "/debug/pprof/profile?seconds=10")
	}
	return began, running, nil
}

// awaitServices dials the important Services and, beside them, a sample of all.
func (t *trial) awaitServices(ctx context.Context, began time.Time) error {
	limit, cancel := context.WithDeadline(ctx, began.Add(t.s.coldLimit))
	defer cancel()
	important := []netip.AddrPort{netip.AddrPortFrom(kubernetesIP, 443), dns.addr()}
	var group errgroup.Group
	for id, addrs := range map[string][]netip.AddrPort{"cold.important": important, "cold.all": t.sampled(200)} {
		group.Go(func() error {
			at, err := t.from.answered(limit, addrs, briefly, 3*time.Millisecond)
			switch {
			case err == nil:
				t.set(id, reading{Value: at.Sub(began).Seconds()})
			case ctx.Err() == nil:
				t.set(id, reading{Value: t.s.coldLimit.Seconds(), Over: true})
				err = fmt.Errorf("cold start takes more than %s", t.s.coldLimit)
			}
			return err
		})
	}
	return group.Wait()
}

// sampled are the addresses of n Services in even steps.
func (t *trial) sampled(n int) (addrs []netip.AddrPort) {
	for _, i := range sample(t.s.services, n) {
		addrs = append(addrs, numbered(i).addr())
	}
	return addrs
}

// readColdStart reads what the cold start has cost so far.
func (t *trial) readColdStart(unfinished bool) (usage, error) {
	u, err := t.meter.usage()
	if err != nil {
		return u, err
	}
	r := reading{Value: u.cpu.Seconds(), Over: unfinished}
	if unfinished {
		r.Note = "not idle when the time was over"
	}
	t.set("cold.cpu", r)
	if t.c.starts != nil {
		n, programs := since(nil, t.started())
		t.set("cold.starts", reading{Value: float64(n), Over: unfinished, Note: programs})
	}
	return u, nil
}

// readUnfinished reads what can be said of a cold start that was given up: it
// will be more.
func (t *trial) readUnfinished() {
	u, err := t.readColdStart(true)
	if err != nil {
		return // the program has ended, which is noticed elsewhere
	}
	t.set("cold.idle", reading{Value: t.s.coldLimit.Seconds(), Over: true})
	t.readPeaks(u, true)
}
