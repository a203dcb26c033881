// Package reconcile is the loop between the store and the kernel, one for each
// IP family: it turns each new Snapshot into a Set, gives it to the proxier and
// to the sinks behind it, tries again after failures, and has the kernel's state
// checked from time to time.
//
// It knows Snapshots and Sets. It must not know proxiers, nor what a sink does.
package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/state"
)

// Sink wants to have every new Set. Calling it twice with the same changes
// nothing.
type Sink interface {
	Sync(ctx context.Context, want *plan.Set) error
}

// Dataplane is the sink that traffic depends on: a proxier.
type Dataplane interface {
	Sink
	// Forget makes the next Sync read the kernel's state.
	Forget()
}

// Checker is a Dataplane that can see changes made by others. Check repairs
// them, and says whether it looked closely; force makes it do so.
type Checker interface {
	Check(ctx context.Context, force bool) (bool, error)
}

// Primer is a Dataplane that can begin with a part of the Services. Prime writes
// a Set if the kernel has no rules of ours at all, and says whether it did; then
// nothing that is served is lost by what the Set lacks.
type Primer interface {
	Prime(ctx context.Context, want *plan.Set) (bool, error)
}

// Source is where Snapshots come from: state.Store.
type Source interface {
	Current() *state.Snapshot
	Subscribe() <-chan struct{}
}

// Observer hears what the loop does. It is called by the loop and must not
// block.
type Observer interface {
	// Queued: a change has been seen that is not in force yet.
	Queued(f model.Family)
	// Synced: a Set was written (or not); first says that it was the loop's first.
	Synced(r Result)
}

// Result is how one Sync went.
type Result struct {
	Family model.Family
	Took   time.Duration
	Err    error
	First  bool // nothing was known of the kernel's state: a full comparison
	Set    *plan.Set
	// Services and Slices are how many objects changed since the last success.
	Services, Slices int
	// Waited is the time since the oldest change of this Sync was seen, and
	// Triggered when the changes that the slices name as their cause happened.
	Waited    time.Duration
	Triggered []time.Time
}

// Periods are settings that can change under a running loop.
type Periods struct {
	// MinSync is the least time between the end of a Sync and the next; 0 rests
	// as long as the last one took, a second at most, so that constant change
	// costs at most half of one CPU.
	MinSync time.Duration
	Retry   time.Duration // the longest wait after failures
	Check   time.Duration // how often the Checker looks
	Resync  time.Duration // how often it looks closely
}

// Options are a Loop's parts.
type Options struct {
	Family model.Family
	Source Source
	// Facts gives the facts as of now, with what a Snapshot says of them: the Node
	// and the ServiceCIDRs. The loop asks again when FactsChanged receives, and with
	// every Snapshot.
	Facts        func(*state.Snapshot) *plan.Facts
	FactsChanged <-chan struct{}
	Dataplane    Dataplane
	// Alarm receives when it is time for the Dataplane to look for changes made by
	// others; nil if nobody tells.
	Alarm    <-chan struct{}
	Then     []Sink // told of each Set that is in force
	Periods  func() Periods
	Observer Observer
	Log      *slog.Logger
}

// Loop reconciles one family. Its Run owns everything in it but the last Set.
type Loop struct {
	o       Options
	planner *plan.Planner
	set     atomic.Pointer[plan.Set]

	seen     *state.Snapshot // planned
	inForce  *plan.Set       // nil: unknown
	primed   bool
	failures int
	refused  *plan.Set // the Set that failed last; another one need not wait
	retry    time.Time // not before, for that one
	pending  pending
	rested   time.Time // no Sync before
	looked   time.Time // last close look
}

// pending is what a Sync has to answer for.
type pending struct {
	since            time.Time
	services, slices int
	triggered        []time.Time
}

// New returns a Loop. Run runs it.
func New(o Options) *Loop { return &Loop{o: o} }

// Set returns the last Set given to the dataplane, nil before the first.
func (l *Loop) Set() *plan.Set { return l.set.Load() }

// Run reconciles until ctx ends. It leaves the dataplane as it is.
func (l *Loop) Run(ctx context.Context) error {
	changed := l.o.Source.Subscribe()
	check := time.NewTimer(l.o.Periods().Check)
	defer check.Stop()
	again := time.NewTimer(0) // first look at what is there already; later: retries and rests
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed: // a new Snapshot
		case <-l.o.FactsChanged: // the node or the settings
		case <-again.C: // time to try again, or the rest is over
		case <-l.o.Alarm: // somebody else changed something
			if l.check(ctx) {
				continue
			}
		case <-check.C: // look whether somebody else changed something
			check.Reset(l.o.Periods().Check)
			if l.check(ctx) {
				continue
			}
		}
		if wait := l.step(ctx); wait > 0 {
			again.Reset(wait)
		}
	}
}

// step plans what is new and syncs it. It returns when to be called again, 0 if
// not before something happens.
func (l *Loop) step(ctx context.Context) time.Duration {
	snap := l.o.Source.Current()
	if !snap.Synced() {
		if snap.Early() && !l.primed {
			l.prime(ctx, snap)
		}
		return 0
	}
	want := l.plan(snap)
	if want == l.inForce {
		l.pending = pending{}
		return 0
	}
	if l.pending.since.IsZero() {
		l.pending.since = time.Now()
	}
	l.o.Observer.Queued(l.o.Family)
	ready := l.rested
	if want == l.refused && l.retry.After(ready) {
		ready = l.retry
	}
	if wait := time.Until(ready); wait > 0 {
		return wait
	}
	return l.sync(ctx, want)
}

// prime serves the important Services of a new node while the complete lists are
// still under way.
func (l *Loop) prime(ctx context.Context, snap *state.Snapshot) {
	l.primed = true
	primer, ok := l.o.Dataplane.(Primer)
	if !ok {
		return
	}
	planner := plan.NewPlanner(l.o.Facts(snap))
	for e := range snap.All {
		planner.Update(e.Name, e.Service, e.Slices)
	}
	set := planner.Set()
	switch wrote, err := primer.Prime(ctx, set); {
	case err != nil && ctx.Err() == nil:
		l.o.Log.Warn("Could not serve the important Services ahead of the others", "ipFamily", l.o.Family, "err", err)
	case wrote:
		l.o.Log.Info("The important Services are served; the others follow", "ipFamily", l.o.Family, "ports", set.Len())
	}
}

func (l *Loop) sync(ctx context.Context, want *plan.Set) time.Duration {
	l.set.Store(want)
	start := time.Now()
	err := l.o.Dataplane.Sync(ctx, want)
	took := time.Since(start)
	if ctx.Err() != nil {
		return 0
	}
	result := Result{Family: l.o.Family, Took: took, Err: err, First: l.inForce == nil, Set: want,
		Services: l.pending.services, Slices: l.pending.slices,
		Waited: time.Since(l.pending.since), Triggered: l.pending.triggered}
	periods := l.o.Periods()
	if err != nil {
		l.failures++
		l.inForce = nil
		l.o.Dataplane.Forget()
		wait := backoff(l.failures, periods.Retry)
		l.refused, l.retry = want, time.Now().Add(wait)
		l.rested = time.Now().Add(restAfter(took, periods))
		l.o.Log.Error("Could not bring the rules into force; the last ones stay", "ipFamily", l.o.Family, "err", err, "retryIn", wait)
		l.o.Observer.Synced(result)
		return wait
	}
	l.failures, l.refused = 0, nil
	l.rested = time.Now().Add(restAfter(took, periods))
	l.inForce = want
	l.pending = pending{}
	l.o.Observer.Synced(result)
	l.tell(ctx, want)
	return 0
}

// tell gives the sinks behind the dataplane a Set that is in force. They must
// not be what keeps traffic from working, so their errors are logged only.
func (l *Loop) tell(ctx context.Context, want *plan.Set) {
	var errs []error
	for _, s := range l.o.Then {
		errs = append(errs, s.Sync(ctx, want))
	}
	if err := errors.Join(errs...); err != nil {
		l.o.Log.Error("Could not follow up on new rules", "ipFamily", l.o.Family, "err", err)
	}
}

// restAfter is the least time between a Sync that took some time and the next.
func restAfter(took time.Duration, p Periods) time.Duration {
	if p.MinSync > 0 {
		return p.MinSync
	}
	return min(took, time.Second)
}

// backoff doubles from half a second.
func backoff(failures int, most time.Duration) time.Duration {
	wait := 500 * time.Millisecond << min(failures-1, 10)
	if most > 0 && wait > most {
		wait = most
	}
	return wait
}

// plan brings the planner up to a Snapshot and returns its Set.
func (l *Loop) plan(snap *state.Snapshot) *plan.Set {
	facts := l.o.Facts(snap)
	first := l.planner == nil
	if first {
		l.planner = plan.NewPlanner(facts)
	}
	if l.planner.SetFacts(facts) && !first {
		for e := range snap.All {
			l.planner.Update(e.Name, e.Service, e.Slices)
		}
	}
	if snap != l.seen {
		state.Changes(l.seen, snap, func(old, new *state.Entry) bool {
			l.replan(old, new, first)
			return true
		})
		l.seen = snap
	}
	return l.planner.Set()
}

func (l *Loop) replan(old, new *state.Entry, first bool) {
	if new == nil {
		new = &state.Entry{Name: old.Name}
	}
	if old == nil {
		old = &state.Entry{}
	}
	l.planner.Update(new.Name, new.Service, new.Slices)
	if old.Service != new.Service {
		l.pending.services++
	}
	known := make(map[*model.Slice]bool, len(old.Slices))
	for _, s := range old.Slices {
		known[s] = true
	}
	for _, s := range new.Slices {
		if known[s] {
			delete(known, s)
			continue
		}
		l.pending.slices++
		// What a start finds happened long ago and says nothing about us.
		if !first && !s.Triggered.IsZero() {
			l.pending.triggered = append(l.pending.triggered, s.Triggered)
		}
	}
	for range known {
		l.pending.slices++ // gone, or replaced by a version counted above
	}
}

// check has the dataplane look for changes made by others. It returns false if
// the kernel's state is unknown now, so that everything must be synced again.
func (l *Loop) check(ctx context.Context) bool {
	checker, ok := l.o.Dataplane.(Checker)
	if !ok || l.inForce == nil {
		return true
	}
	now := time.Now()
	if l.looked.IsZero() {
		l.looked = now
	}
	force := now.Sub(l.looked) >= l.o.Periods().Resync
	looked, err := checker.Check(ctx, force)
	if looked && force {
		l.looked = now
	}
	if err == nil || ctx.Err() != nil {
		return true
	}
	l.inForce = nil
	l.o.Dataplane.Forget()
	l.o.Log.Error("Could not verify the rules", "ipFamily", l.o.Family, "err", err)
	return false
}
