package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// followed is how traffic followed a change of the canary's endpoint.
type followed struct {
	took time.Duration // from the write until the new endpoint answered
	lost int           // attempts without an answer on the way
	late bool          // it was given up: took is how long it was waited for
}

// change changes the canary's endpoint and waits until traffic follows.
func (t *trial) change(ctx context.Context) (followed, error) {
	limit, cancel := context.WithTimeout(ctx, t.s.followLimit)
	defer cancel()
	began := time.Now()
	want, written := t.c.changeCanary(limit)
	at, lost, err := t.from.follow(limit, canary.addr(), want)
	if werr := <-written; werr != nil {
		return followed{}, werr
	}
	switch {
	case err == nil:
		return followed{took: at.Sub(began), lost: lost}, nil
	case ctx.Err() == nil:
		return followed{took: t.s.followLimit, lost: lost, late: true}, nil
	}
	return followed{}, err
}

// oneByOne changes the endpoint of one Service again and again, each time when
// the program is idle, and sees when traffic follows. One that traffic does not
// follow in time is the last.
func (t *trial) oneByOne(ctx context.Context) error {
	if t.s.profiles != "" {
		go t.profile(ctx, "cpu-one-by-one.pprof", "/debug/pprof/profile?seconds=20")
	}
	var changes []followed
	var starts []int // processes, for each change
	var what string
	for began := time.Now(); len(changes) < t.s.changes && time.Since(began) < t.s.changeLimit; {
		t.meter.idle(ctx, 1200*time.Millisecond, time.Minute)
		before := t.started()
		x, err := t.change(ctx)
		if err != nil {
			return err
		}
		changes = append(changes, x)
		if x.late {
			break
		}
		t.meter.idle(ctx, 0, time.Minute)
		n, programs := since(before, t.started())
		starts, what = append(starts, n), programs
	}
	for id, r := range changeReadings(changes) {
		t.set(id, r)
	}
	if t.c.starts != nil && len(starts) > 0 {
		slices.Sort(starts)
		t.set("change.starts", reading{Value: float64(starts[len(starts)/2]), N: len(starts), Note: what})
	}
	return nil
}

// changeReadings says what is known of changes one by one, of which the last may
// be late.
func changeReadings(changes []followed) map[string]reading {
	var took []time.Duration
	var lost int
	var late time.Duration // at least as long as all others
	for _, x := range changes {
		took, lost = append(took, x.took), lost+x.lost
		if x.late {
			late = x.took
		}
	}
	slices.Sort(took)
	of := func(q float64) reading {
		v := quantile(took, q)
		return reading{Value: milli(v), Over: late > 0 && v >= late, N: len(took)}
	}
	return map[string]reading{
		"change.p50": of(0.5), "change.p99": of(0.99),
		"change.failed": {Value: float64(lost), Over: late > 0 && lost > 0, N: len(took)},
	}
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
	writing, cancel := context.WithTimeout(ctx, 2*time.Minute+time.Duration(t.s.burst)*time.Second/time.Duration(t.s.burstRate))
	defer cancel()
	for k := range t.s.burst {
		<-tick.C
		if k > 0 && k%len(picked) == 0 {
			_ = writes.Wait() // a Service is not changed twice at the same time
		}
		writes.Go(func() error { return t.c.changeOne(writing, picked[k%len(picked)]) })
	}
	if err := writes.Wait(); err != nil {
		return err
	}
	lasted := time.Since(began)
	last, err := t.change(ctx)
	if err != nil {
		return err
	}
	quiet := t.meter.idle(ctx, time.Second, time.Minute)
	after, err := t.meter.usage()
	if err != nil {
		return err
	}
	n := t.s.burst + 1
	r := reading{Value: (after.cpu - before.cpu).Seconds() * 1000 / float64(n), N: n, Over: !quiet}
	if rate := float64(t.s.burst) / lasted.Seconds(); rate < 0.9*float64(t.s.burstRate) {
		r.Note = fmt.Sprintf("%.1f changes a second, not %d", rate, t.s.burstRate)
	}
	if !quiet {
		r.Note = strings.TrimSpace(r.Note + " not idle a minute later")
	}
	t.set("change.cpu", r)
	t.set("change.behind", reading{Value: last.took.Seconds(), Over: last.late})
	return nil
}
