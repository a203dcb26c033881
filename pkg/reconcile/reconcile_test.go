package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/state"
)

// mu guards what the loop and the test share; the bubble orders them, but the
// race detector does not know.
var mu sync.Mutex

// plane is a Dataplane that takes some time and fails when told to.
type plane struct {
	takes   time.Duration
	fail    error
	broken  error // what Check finds
	sets    []*plan.Set
	primed  []*plan.Set
	at      []time.Time
	forgets int
	checks  int
	forced  int
}

func (p *plane) Sync(ctx context.Context, want *plan.Set) error {
	mu.Lock()
	takes, fail := p.takes, p.fail
	mu.Unlock()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return ctx.Err()
	}
	if fail != nil {
		return fail
	}
	mu.Lock()
	defer mu.Unlock()
	p.sets = append(p.sets, want)
	p.at = append(p.at, time.Now())
	return nil
}

func (p *plane) Forget() {
	mu.Lock()
	defer mu.Unlock()
	p.forgets++
}

func (p *plane) Check(_ context.Context, force bool) (bool, error) {
	mu.Lock()
	defer mu.Unlock()
	p.checks++
	if force {
		p.forced++
	}
	err := p.broken
	p.broken = nil
	return force, err
}

type results struct{ synced []Result }

func (r *results) Queued(model.Family) {}

func (r *results) Synced(x Result) {
	mu.Lock()
	defer mu.Unlock()
	r.synced = append(r.synced, x)
}

type sink struct{ got []*plan.Set }

func (s *sink) Sync(_ context.Context, want *plan.Set) error {
	mu.Lock()
	defer mu.Unlock()
	s.got = append(s.got, want)
	return errors.New("a sink's error must not matter")
}

// rig is a running loop in a bubble.
type rig struct {
	store   *state.Store
	plane   *plane
	results *results
	sink    *sink
	facts   chan struct{}
	zone    string
	periods Periods
	loop    *Loop
}

func run(t *testing.T, f func(*testing.T, *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{store: state.NewStore(), plane: &plane{takes: 10 * time.Millisecond}, results: &results{}, sink: &sink{},
			facts: make(chan struct{}, 1), periods: Periods{Retry: 30 * time.Second, Check: time.Second, Resync: time.Minute}}
		r.loop = New(Options{
			Family: model.IPv4, Source: r.store, FactsChanged: r.facts, Dataplane: r.plane, Then: []Sink{r.sink},
			Facts: func(snap *state.Snapshot) *plan.Facts {
				mu.Lock()
				defer mu.Unlock()
				return &plan.Facts{Family: model.IPv4, NodeName: "n", Zone: r.zone, ServiceCIDRs: snap.ServiceCIDRs()}
			},
			Periods: func() Periods {
				mu.Lock()
				defer mu.Unlock()
				return r.periods
			},
			Observer: r.results, Log: slog.New(slog.DiscardHandler),
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.loop.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run returned %v", err)
			}
		}()
		f(t, r)
	})
}

func (r *rig) service(i int) {
	r.store.SetService(&model.Service{ServiceName: model.ServiceName{Namespace: "ns", Name: fmt.Sprint("s", i)},
		ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(i)})},
		Ports:      []model.ServicePort{{Protocol: model.TCP, Port: 80}}})
	r.store.Publish()
}

// set changes what the loop reads.
func (r *rig) set(change func()) {
	mu.Lock()
	defer mu.Unlock()
	change()
}

func wait(d time.Duration) {
	fence()
	time.Sleep(d) // the bubble's clock
	synctest.Wait()
	fence()
}

// fence orders what the test has read or will read and what the loop writes.
func fence() {
	mu.Lock()
	defer mu.Unlock()
}

func TestNothingIsWrittenBeforeTheFirstLists(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		r.service(1)
		wait(time.Hour)
		if len(r.plane.sets) != 0 {
			t.Fatal("wrote before the store was synced")
		}
		r.store.SetSynced()
		r.store.Publish()
		wait(time.Second)
		if len(r.plane.sets) != 1 || r.plane.sets[0].Len() != 1 || !r.results.synced[0].First {
			t.Fatalf("sets %v, results %+v", r.plane.sets, r.results.synced)
		}
	})
}

// Prime implements Primer.
func (p *plane) Prime(_ context.Context, want *plan.Set) (bool, error) {
	mu.Lock()
	defer mu.Unlock()
	p.primed = append(p.primed, want)
	return true, nil
}

func TestImportantServicesComeBeforeTheLists(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		r.service(1)
		wait(time.Second)
		r.store.SetEarly()
		r.store.Publish()
		wait(time.Second)
		r.service(2)
		wait(time.Second)
		if len(r.plane.primed) != 1 || r.plane.primed[0].Len() != 1 || len(r.plane.sets) != 0 {
			t.Fatalf("primed with %v, synced %v", r.plane.primed, r.plane.sets)
		}
		r.store.SetSynced()
		r.store.Publish()
		wait(time.Second)
		if len(r.plane.sets) != 1 || r.plane.sets[0].Len() != 2 {
			t.Fatalf("after the lists: %v", r.plane.sets)
		}
	})
}

func TestChangesGatherWhileASyncRuns(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		r.store.SetSynced()
		r.store.Publish()
		wait(time.Minute)
		r.set(func() { r.plane.takes = 400 * time.Millisecond })
		start := time.Now()
		for i := range 50 {
			r.service(i)
			wait(time.Millisecond)
		}
		wait(10 * time.Second)
		// The first at once, the rest together, after a rest as long as the sync.
		if n := len(r.plane.sets); n != 3 {
			t.Fatalf("%d syncs, want 3 (the empty one, the first change, the rest)", n)
		}
		if first, second := r.plane.at[1].Sub(start), r.plane.at[2].Sub(r.plane.at[1]); first != 400*time.Millisecond || second != 800*time.Millisecond {
			t.Errorf("first after %v, second %v later", first, second)
		}
		if r.loop.Set().Len() != 50 || len(r.sink.got) != 3 {
			t.Errorf("%d plans in force, sink told %d times", r.loop.Set().Len(), len(r.sink.got))
		}
		if got := r.results.synced[2].Services; got != 49 {
			t.Errorf("the last sync had %d changed Services, want 49", got)
		}
	})
}

func TestMinSyncPeriodIsHonoured(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		r.set(func() { r.periods.MinSync = 10 * time.Second })
		r.store.SetSynced()
		r.store.Publish()
		wait(time.Second)
		r.service(1)
		wait(5 * time.Second)
		if len(r.plane.sets) != 1 {
			t.Fatal("synced within minSyncPeriod")
		}
		wait(5 * time.Second)
		if len(r.plane.sets) != 2 {
			t.Fatal("not synced after minSyncPeriod")
		}
	})
}

func TestFailuresAreRetriedFromWhatTheKernelHas(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		r.store.SetSynced()
		r.store.Publish()
		wait(time.Second)
		r.set(func() { r.plane.fail = errors.New("no") })
		r.service(1)
		wait(3 * time.Second) // tried at once, after 0.5 s, and 1 s after that
		if r.plane.forgets != 3 || len(r.sink.got) != 1 {
			t.Fatalf("forgot %d times; a sink heard of %d Sets", r.plane.forgets, len(r.sink.got))
		}
		r.set(func() { r.plane.fail = nil })
		wait(time.Minute)
		if len(r.plane.sets) != 2 || len(r.sink.got) != 2 {
			t.Fatalf("%d successes after the mend, want 2", len(r.plane.sets))
		}
		last := r.results.synced[len(r.results.synced)-1]
		if last.Services != 1 || !last.First {
			t.Errorf("the success reports %+v", last)
		}
		if n := len(r.plane.sets); n != 2 {
			t.Errorf("synced again without a change: %d", n)
		}
	})
}

func TestAChangeNeedNotWaitForTheRetryOfAnother(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		r.store.SetSynced()
		r.store.Publish()
		wait(time.Second)
		r.set(func() { r.plane.fail = errors.New("no") })
		r.service(1)
		wait(20 * time.Second) // the next try of this Set is 16 s after the last
		r.set(func() { r.plane.fail = nil })
		r.service(2)
		wait(time.Second)
		if len(r.plane.sets) != 2 || r.plane.sets[1].Len() != 2 {
			t.Fatalf("%d syncs a second after another change", len(r.plane.sets))
		}
	})
}

func TestFactsReplanEverything(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		r.store.SetSynced()
		r.service(1)
		wait(time.Second)
		r.facts <- struct{}{}
		wait(time.Second)
		if len(r.plane.sets) != 1 {
			t.Fatal("equal facts caused a sync")
		}
		r.set(func() { r.zone = "z" })
		r.facts <- struct{}{}
		wait(time.Second)
		if len(r.plane.sets) != 2 || r.plane.sets[1].Facts.Zone != "z" {
			t.Fatal("changed facts caused no sync")
		}
	})
}

// TestServiceCIDRsAreFacts: they are in force as soon as a Snapshot has them, those
// that a new node begins with included, and cost no sync where they are the same.
func TestServiceCIDRsAreFacts(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		cidrs := func(name string, list ...string) {
			c := &model.ServiceCIDR{Name: name}
			for _, p := range list {
				c.Prefixes = append(c.Prefixes, netip.MustParsePrefix(p))
			}
			r.store.SetServiceCIDR(c)
			r.store.Publish()
			wait(time.Second)
		}
		r.store.SetEarly()
		cidrs("a", "10.96.0.0/16")
		if len(r.plane.primed) != 1 || len(r.plane.primed[0].Facts.ServiceCIDRs) != 1 {
			t.Errorf("primed with %v", r.plane.primed)
		}
		r.store.SetSynced()
		r.service(1)
		wait(time.Second)
		cidrs("b", "10.97.0.0/16")
		cidrs("c", "10.97.0.0/16")
		cidrs("a")
		cidrs("d", "10.97.7.0/24")
		var got []string
		for _, set := range r.plane.sets {
			got = append(got, fmt.Sprint(set.Facts.ServiceCIDRs, " ", set.Len()))
		}
		if want := []string{"[10.96.0.0/16] 1", "[10.96.0.0/16 10.97.0.0/16] 1", "[10.97.0.0/16] 1"}; !slices.Equal(got, want) {
			t.Errorf("synced %q, want %q", got, want)
		}
	})
}

func TestChecks(t *testing.T) {
	run(t, func(t *testing.T, r *rig) {
		wait(time.Minute)
		if r.plane.checks != 0 {
			t.Fatal("checked before the first sync")
		}
		r.store.SetSynced()
		r.service(1)
		wait(10*time.Minute + 30*time.Second)
		if r.plane.checks < 600 || r.plane.forced != 10 {
			t.Fatalf("%d checks, %d close ones in ten minutes", r.plane.checks, r.plane.forced)
		}
		r.set(func() { r.plane.broken = errors.New("cannot read") })
		wait(3 * time.Second)
		if r.plane.forgets != 1 || len(r.plane.sets) != 2 {
			t.Fatalf("after a failed check: forgot %d times, %d syncs", r.plane.forgets, len(r.plane.sets))
		}
	})
}

func TestTriggersOfTheFirstSyncDoNotCount(t *testing.T) {
	slice := func(name string, at time.Time) *model.Slice {
		last := byte(len(name))
		return &model.Slice{Namespace: "ns", Name: name, Service: "s1", Family: model.IPv4, Triggered: at,
			Ports:     []model.SlicePort{{Protocol: model.TCP, Port: 80}},
			Endpoints: []model.Endpoint{{Addr: netip.AddrFrom4([4]byte{10, 244, 0, last}), Ready: true, Serving: true}}}
	}
	run(t, func(t *testing.T, r *rig) {
		r.store.SetSlice(slice("a", time.Now().Add(-time.Hour)))
		r.store.SetSynced()
		r.service(1)
		wait(time.Second)
		now := time.Now()
		r.store.SetSlice(slice("bb", now))
		r.store.Publish()
		wait(time.Second)
		r.store.DeleteSlice("ns", "a")
		r.store.Publish()
		wait(time.Second)
		var got [][]time.Time
		for _, s := range r.results.synced {
			got = append(got, s.Triggered)
		}
		if len(got) != 3 || len(got[0]) != 0 || len(got[1]) != 1 || !got[1][0].Equal(now) || len(got[2]) != 0 {
			t.Errorf("triggers by sync: %v", got)
		}
	})
}
