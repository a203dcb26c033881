package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
)

// attempt is one connection that was tried.
type attempt struct {
	began, ended time.Time
	ok           bool
}

// outage is what attempts tell of a flush. Whoever owns it passes them in the
// order in which they were made.
type outage struct {
	flushing time.Time // when the flush began
	flushed  time.Time // when it had ended; zero until then
	until    time.Time // the end of the first attempt after it that succeeded; zero until then
	failed   int       // attempts since the flush began
}

// note takes an attempt into account. One that succeeds while the flush goes on
// may have been before it took effect; one that began after its end has met new
// rules.
func (o *outage) note(a attempt) {
	switch {
	case a.began.Before(o.flushing) || !o.until.IsZero():
	case !a.ok:
		o.failed++
	case !o.flushed.IsZero() && !a.began.Before(o.flushed):
		o.until = a.ended
	}
}

// repair takes all rules from the node and sees when Services answer again: one
// that is dialled all the time, and a sample of all.
func (t *trial) repair(ctx context.Context) error {
	if err := t.forgetFlows(); err != nil {
		return err
	}
	all, prober := t.sampled(200), &prober{port: firstPort}
	before, cancel := context.WithTimeout(ctx, t.s.repairLimit)
	defer cancel()
	began := time.Now()
	at, err := t.from.answered(before, all, prober.try, lostPause)
	if err != nil {
		return fmt.Errorf("before the flush: %w", err)
	}
	undisturbed := fmt.Sprintf("%.0f ms to dial these %d where nothing is missing", milli(at.Sub(began)), len(all))

	dialling, stop := context.WithCancel(ctx)
	defer stop()
	attempts := t.from.dial(dialling, numbered(t.s.services/2).addr())
	for range 100 { // all is well, and warm
		<-attempts
	}
	o, err := t.flushUnder(ctx, attempts)
	if err != nil {
		return fmt.Errorf("take the rules away: %w", err)
	}
	limit, cancel := context.WithDeadline(ctx, o.flushed.Add(t.s.repairLimit))
	defer cancel()
	var every time.Time
	var group errgroup.Group
	group.Go(func() error {
		if at, err := t.from.answered(limit, all, prober.try, lostPause); err == nil {
			every = at
		}
		return ctx.Err()
	})
	group.Go(func() error {
		for o.until.IsZero() && limit.Err() == nil {
			select {
			case a := <-attempts:
				o.note(a)
			case <-limit.Done():
			}
		}
		return ctx.Err()
	})
	if err := group.Wait(); err != nil {
		return err
	}
	return t.readRepair(ctx, o, every, undisturbed)
}

// flushUnder takes the rules away while attempts are made.
func (t *trial) flushUnder(ctx context.Context, attempts <-chan attempt) (outage, error) {
	o := outage{flushing: time.Now()}
	ended := make(chan error, 1)
	var at time.Time
	go func() {
		limit, cancel := context.WithTimeout(ctx, flushLimit)
		defer cancel()
		err := t.flush(limit)
		at = time.Now()
		ended <- err
	}()
	for {
		select {
		case a := <-attempts:
			o.note(a)
		case err := <-ended:
			o.flushed = at
			return o, err
		}
	}
}

// readRepair sets the figures. After a repair that was given up it changes an
// endpoint, for a program that does not look after its rules but finds them missing
// when it writes the next time: what comes after needs rules.
func (t *trial) readRepair(ctx context.Context, o outage, every time.Time, undisturbed string) error {
	one, all := t.repaired(o.flushed, o.until), t.repaired(o.flushed, every)
	all.Note = undisturbed
	if o.failed == 0 {
		one.Note = "no attempt failed: the rules were back between two of them, or not taken away"
	}
	var err error
	if one.Over || all.Over {
		var x followed
		switch x, err = t.change(ctx); {
		case err == nil && x.late:
			one.Note = fmt.Sprintf("the next endpoint change had no effect in %s either", t.s.followLimit)
		case err == nil:
			one.Note = fmt.Sprintf("traffic followed the next endpoint change after %.2f s", x.took.Seconds())
		}
	}
	t.set("repair.one", one)
	t.set("repair.failed", reading{Value: float64(o.failed), Over: one.Over})
	t.set("repair.all", all)
	return err
}

// repaired is the reading of a repair that ended then; zero if it was given up.
func (t *trial) repaired(flushed, at time.Time) reading {
	if at.IsZero() {
		return reading{Value: milli(t.s.repairLimit), Over: true}
	}
	return reading{Value: milli(at.Sub(flushed))}
}

// dial makes one connection after the other to an address, until ctx ends.
func (c client) dial(ctx context.Context, to netip.AddrPort) <-chan attempt {
	attempts := make(chan attempt)
	go func() {
		defer close(attempts)
		_ = c.ns.Do(func() error { // who waits for attempts has a limit
			p := &prober{port: (firstPort + lastPort) / 2} // far from other probers' ports
			for ctx.Err() == nil {
				began := time.Now()
				err := p.try(to)
				select {
				case attempts <- attempt{began, time.Now(), err == nil}:
				case <-ctx.Done():
				}
				if err == nil {
					time.Sleep(answeredPause)
				} else {
					time.Sleep(lostPause)
				}
			}
			return nil
		})
	}()
	return attempts
}
