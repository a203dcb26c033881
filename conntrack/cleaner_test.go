package conntrack

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// running starts a Cleaner over a Fake inside a synctest bubble, and stops it
// at the end of the test. Errors and numbers of deleted flows are recorded.
type running struct {
	*Cleaner
	table   *Fake
	runs    int
	deleted int
	errs    []error
}

func start(t *testing.T, opts Options, flows ...Flow) *running {
	t.Helper()
	r := &running{table: NewFake(flows...)}
	opts.OnRun = func(model.Family, time.Duration) { r.runs++ }
	opts.OnDeleted = func(_ model.Family, n int) { r.deleted += n }
	opts.OnError = func(_ model.Family, err error) { r.errs = append(r.errs, err) }
	r.Cleaner = NewCleaner(model.IPv4, r.table, opts)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

// after gives the Cleaner a Set and all the time it needs.
func (r *running) after(t *testing.T, set *plan.Set) []Flow {
	t.Helper()
	if err := r.Sync(t.Context(), set); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return r.table.Flows()
}

var (
	toOne = flow("10.1.1.1:1000", "10.96.0.1:53", "10.244.0.1:5353")
	toTwo = flow("10.1.1.1:1001", "10.96.0.1:53", "10.244.0.2:5353")
	alien = flow("10.1.1.1:1002", "10.97.0.1:53", "10.244.0.1:5353")
	toNP  = flow("10.1.1.1:1003", "192.168.1.10:30053", "10.244.0.1:5353")
)

func expect(t *testing.T, what string, got []Flow, want ...Flow) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: flows %v, want %v", what, got, want)
	}
}

func TestCleanerFollowsSets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, Options{Locals: locals(nodeIP)}, toOne, toTwo, alien)
		p := planner(model.IPv4)
		expect(t, "first Set", r.after(t, p.set(udp("a", 1, 2))), toOne, toTwo, alien)
		expect(t, "endpoint removed", r.after(t, p.set(udp("a", 2))), toTwo, alien)
		lists := len(r.table.Lists())
		expect(t, "endpoint added", r.after(t, p.set(udp("a", 2, 3))), toTwo, alien)
		if n := len(r.table.Lists()); n != lists {
			t.Errorf("an added endpoint made the table be listed")
		}
		expect(t, "deleted", r.after(t, p.set()), alien)
		if r.deleted != 2 || len(r.errs) != 0 {
			t.Errorf("deleted %d, errors %v; want 2 and none", r.deleted, r.errs)
		}
	})
}

func TestCleanerFirstSetChecksAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, Options{Locals: locals(nodeIP)}, toOne, toTwo, alien, toNP)
		expect(t, "first Set", r.after(t, planner(model.IPv4).set(udp("a", 2).node(30053))), toTwo, alien)
	})
}

// TestCleanerMergesSets: a frontend that was there only in a Set between is of
// no interest, one that vanished over several is dealt with once.
func TestCleanerMergesSets(t *testing.T) {
	runs := 0
	table := NewFake()
	c := NewCleaner(model.IPv4, table, Options{OnRun: func(model.Family, time.Duration) { runs++ }})
	p := planner(model.IPv4)
	settle(t, c, p.set(udp("a", 1)))
	table.Add(toOne, alien)
	for _, s := range [][]*testService{svcs(udp("a", 1, 2)), svcs(udp("b", 3).at("10.96.0.7")), nil} {
		if err := c.Sync(t.Context(), p.set(s...)); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.wake) != 1 {
		t.Errorf("woken %d times by Sets that came together, want 1", len(c.wake))
	}
	runs = 0
	c.run(t.Context())
	expect(t, "after three Sets at once", table.Flows(), alien)
	if lists := table.Lists(); runs != 1 || len(lists[len(lists)-1]) != 1 {
		t.Errorf("%d runs, the last of which asked for %v; want 1 for one frontend", runs, lists)
	}
}

func TestCleanerRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, Options{}, toOne, alien)
		p := planner(model.IPv4)
		r.after(t, p.set(udp("a", 1)))
		broken := errors.New("broken")
		r.table.Fail(broken, broken)
		// The flow is seen, though the listing ends in an error; its deletion fails, too.
		expect(t, "failing", r.after(t, p.set()), toOne, alien)
		if len(r.errs) != 1 || !errors.Is(r.errs[0], broken) {
			t.Errorf("reported %v, want one that is %v", r.errs, broken)
		}
		expect(t, "next Set, same again", r.after(t, p.set(udp("b", 3).at("10.96.0.9"))), alien)
	})
}

func TestCleanerRetriesAtAudit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, Options{AuditEvery: time.Minute}, toOne, alien)
		p := planner(model.IPv4)
		r.after(t, p.set(udp("a", 1)))
		r.table.Fail(errors.New("broken list"), errors.New("broken delete"))
		expect(t, "failing", r.after(t, p.set()), toOne, alien)
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		expect(t, "after an audit", r.table.Flows(), alien)
	})
}

// TestCleanerAudits: what no change explains is found within a minute, also
// for a frontend that vanished since the last audit; and nothing is listed
// without UDP frontends.
func TestCleanerAudits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, Options{AuditEvery: time.Minute})
		p := planner(model.IPv4)
		r.after(t, p.set(udp("a", 2)))
		r.table.Add(toOne, toTwo, alien)
		time.Sleep(61 * time.Second)
		synctest.Wait()
		expect(t, "late flow", r.table.Flows(), toTwo, alien)
		r.after(t, p.set())
		time.Sleep(restMost)
		r.after(t, p.set(udp("b", 3).at("10.96.0.9"))) // a run that is no audit
		time.Sleep(restMost)
		r.after(t, p.set())
		r.table.Add(toOne)
		time.Sleep(61 * time.Second)
		synctest.Wait()
		expect(t, "late flow of a deleted Service", r.table.Flows(), alien)
		lists := len(r.table.Lists())
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(r.table.Lists()) - lists; n != 0 {
			t.Errorf("the table was listed %d times for nothing", n)
		}
	})
}

// TestCleanerWithoutAddresses: if the node's addresses are not to be had, what
// needs none is done, nothing foreign is touched, and the rest is tried again.
func TestCleanerWithoutAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failing := true
		r := start(t, Options{Locals: func() ([]netip.Addr, error) {
			if failing {
				return nil, errors.New("no addresses")
			}
			return []netip.Addr{nodeIP}, nil
		}}, toOne, toNP, alien)
		p := planner(model.IPv4)
		expect(t, "without", r.after(t, p.set(udp("a", 2).node(30053))), toNP, alien)
		if len(r.errs) != 1 {
			t.Errorf("errors %v, want one", r.errs)
		}
		failing = false
		expect(t, "with", r.after(t, p.set(udp("a", 2, 3).node(30053))), alien)
	})
}

// TestCleanerForgetsSlowly: while the table cannot be read, what is remembered
// stays bounded.
func TestCleanerForgetsSlowly(t *testing.T) {
	c := NewCleaner(model.IPv4, NewFake(), Options{})
	p := planner(model.IPv4)
	c.advance(p.set(udp("a", 1)))
	for i := range keepMost + 100 {
		c.todo[Frontend{model.UDP, netip.AddrFrom4([4]byte{10, 99, byte(i >> 8), byte(i)}), uint16(i>>16 + 1)}] = struct{}{}
	}
	c.advance(p.set(udp("a", 2)))
	if len(c.todo) > keepMost {
		t.Errorf("%d frontends remembered, want at most %d", len(c.todo), keepMost)
	}
	if _, ok := c.todo[Frontend{model.UDP, netip.MustParseAddr("10.96.0.1"), 53}]; !ok {
		t.Error("a frontend in force was forgotten")
	}
}

// batches notes how many flows are deleted at once.
type batches struct {
	*Fake
	sizes []int
}

func (b *batches) Delete(ctx context.Context, flows []Flow) (int, error) {
	b.sizes = append(b.sizes, len(flows))
	return b.Fake.Delete(ctx, flows)
}

// TestCleanerDeletesInBatches: the flows of a busy sender are not all held in
// memory.
func TestCleanerDeletesInBatches(t *testing.T) {
	table := &batches{Fake: NewFake(spread(deleteAtOnce+10, "10.96.0.1:53", "10.244.0.1:5353")...)}
	settle(t, NewCleaner(model.IPv4, table, Options{}), planner(model.IPv4).set(udp("a", 2)))
	if !slices.Equal(table.sizes, []int{deleteAtOnce, 10}) || len(table.Flows()) != 0 {
		t.Errorf("deleted %v at a time and left %d, want %d and 10, and none", table.sizes, len(table.Flows()), deleteAtOnce)
	}
}
