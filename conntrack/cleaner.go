package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Table is a connection tracking table: the kernel's (Kernel), or a Fake.
type Table interface {
	// List visits every flow of a family whose original destination is one of
	// want, and may visit one twice. The Flow is the visitor's only during the
	// visit. After an error some may not have been visited.
	List(ctx context.Context, family model.Family, want []Frontend, visit func(*Flow)) error
	// Delete removes flows and returns how many it found. One that is gone, or
	// that a younger one has replaced, is no error.
	Delete(ctx context.Context, flows []Flow) (int, error)
}

// Options are a Cleaner's settings. Every function may be nil and is called
// from the goroutine that calls Run.
type Options struct {
	// Locals returns the node's own addresses of the family, as of now.
	Locals func() ([]netip.Addr, error)
	// AuditEvery is how often all frontends are checked although nothing
	// changed, because a one-way flow that was once missed lives for ever.
	// 0 means a minute, less than 0 never.
	AuditEvery time.Duration

	OnRun     func(family model.Family, took time.Duration) // the table was looked at
	OnDeleted func(family model.Family, n int)              // n > 0 flows were deleted
	OnError   func(family model.Family, err error)          // a run failed; the next one makes up for it
}

const (
	auditEvery = time.Minute
	// deleteAtOnce bounds the memory that stale flows take: a busy sender with
	// many sockets can own the whole table.
	deleteAtOnce = 4096
	// keepMost bounds what is remembered of vanished frontends while the table
	// cannot be read.
	keepMost = 1 << 16
	// restFactor times the duration of a run is how long the next one waits, so
	// that constant change costs at most a fifth of one CPU; restMost bounds it.
	restFactor = 4
	restMost   = 5 * time.Second
)

// Cleaner deletes the flows of one family that contradict the Set last given to
// Sync. It is a sink for Sets, to be called after the proxier: a flow must not
// be deleted before the rules that it is to be made anew by are in force.
type Cleaner struct {
	family model.Family
	table  Table
	opts   Options
	wake   chan struct{} // capacity 1

	mu     sync.Mutex
	newest *plan.Set

	// Owned by Run.
	index  *Index
	todo   map[Frontend]struct{} // suspects that no run has dealt with yet
	gone   map[Frontend]struct{} // vanished frontends to look at once more
	before *plan.Facts           // facts by which NodePorts were elsewhere, until dealt with
	all    bool                  // everything is suspect
}

// NewCleaner returns a Cleaner that does nothing until Run.
func NewCleaner(family model.Family, table Table, opts Options) *Cleaner {
	if opts.AuditEvery == 0 {
		opts.AuditEvery = auditEvery
	}
	return &Cleaner{
		family: family, table: table, opts: opts,
		wake:  make(chan struct{}, 1),
		index: NewIndex(),
		todo:  map[Frontend]struct{}{},
		gone:  map[Frontend]struct{}{},
	}
}

// Sync takes note of a Set whose rules are in force, and returns at once. The
// newest Set wins: what changed over several is dealt with together.
func (c *Cleaner) Sync(_ context.Context, want *plan.Set) error {
	c.mu.Lock()
	c.newest = want
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return nil
}

// Run cleans until ctx ends, and returns nil then.
func (c *Cleaner) Run(ctx context.Context) error {
	var audit <-chan time.Time
	if c.opts.AuditEvery > 0 {
		ticker := time.NewTicker(c.opts.AuditEvery)
		defer ticker.Stop()
		audit = ticker.C
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake: // a new Set
		case <-audit: // look at everything again
			c.all = true
		}
		took := c.run(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(min(restFactor*took, restMost)):
		}
	}
}

// run does what is due, reports it, and returns how long it took.
func (c *Cleaner) run(ctx context.Context) time.Duration {
	c.mu.Lock()
	want := c.newest
	c.mu.Unlock()
	if want == nil {
		return 0
	}
	c.advance(want)
	scope := c.scope()
	if len(scope.Asked) == 0 {
		c.all = false
		return 0
	}
	start := time.Now()
	deleted, err := c.clean(ctx, scope)
	took := time.Since(start)
	if c.opts.OnRun != nil {
		c.opts.OnRun(c.family, took)
	}
	if deleted > 0 && c.opts.OnDeleted != nil {
		c.opts.OnDeleted(c.family, deleted)
	}
	switch {
	case err == nil:
		c.done()
	case ctx.Err() == nil && c.opts.OnError != nil:
		c.opts.OnError(c.family, fmt.Errorf("clean %s conntrack: %w", c.family, err))
	}
	return took
}

// advance moves the index to want and adds what became suspect to what still is.
func (c *Cleaner) advance(want *plan.Set) {
	old := c.index.Set()
	if old == want {
		return
	}
	if old != nil && c.before == nil && !sameNodePorts(old.Facts, want.Facts) {
		c.before = old.Facts
	}
	c.index.Move(want, func(f Frontend) { c.todo[f] = struct{}{} })
	for f := range c.todo {
		if len(c.todo) <= keepMost {
			break
		}
		if !c.index.Owns(f) {
			delete(c.todo, f)
		}
	}
}

// scope is what the next look at the table is about.
func (c *Cleaner) scope() *Scope {
	s := &Scope{Asked: make(map[Frontend]struct{}, len(c.todo)), Before: c.before}
	for f := range c.todo {
		s.Asked[f] = struct{}{}
	}
	if c.all {
		for f := range c.gone {
			s.Asked[f] = struct{}{}
		}
		for f := range c.index.All {
			s.Asked[f] = struct{}{}
		}
	}
	return s
}

// clean looks at the table once and deletes what is stale. It does what it can
// if a part fails.
func (c *Cleaner) clean(ctx context.Context, s *Scope) (deleted int, err error) {
	var failed error
	if asksNodePorts(s) && c.opts.Locals != nil {
		list, err := c.opts.Locals()
		if err != nil {
			failed = fmt.Errorf("list the node's addresses: %w", err)
		}
		s.Locals = make(map[netip.Addr]bool, len(list))
		for _, a := range list {
			s.Locals[a] = true
		}
	}
	want := make([]Frontend, 0, len(s.Asked))
	for f := range s.Asked {
		want = append(want, f)
	}
	stale := map[Flow]struct{}{}
	flush := func() {
		list := make([]Flow, 0, len(stale))
		for f := range stale {
			list = append(list, f)
		}
		clear(stale)
		n, err := c.table.Delete(ctx, list)
		deleted += n
		failed = errors.Join(failed, err)
	}
	err = c.table.List(ctx, c.family, want, func(f *Flow) {
		if c.index.Judge(f, s) == Keep {
			return
		}
		if stale[*f] = struct{}{}; len(stale) == deleteAtOnce {
			flush()
		}
	})
	if len(stale) > 0 {
		flush()
	}
	return deleted, errors.Join(failed, err)
}

func asksNodePorts(s *Scope) bool {
	for f := range s.Asked {
		if !f.Addr.IsValid() {
			return true
		}
	}
	return false
}

// done takes note that a run dealt with its scope. Vanished frontends stay for
// one audit more: a packet that was on its way through the old rules during the
// run may enter the table after it.
func (c *Cleaner) done() {
	if c.all {
		clear(c.gone)
	}
	for f := range c.todo {
		if !c.index.Owns(f) && len(c.gone) < keepMost {
			c.gone[f] = struct{}{}
		}
	}
	clear(c.todo)
	c.before = nil
	c.all = false
}
