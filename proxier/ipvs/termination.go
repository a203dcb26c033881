package ipvs

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// drains are destinations that are not wanted any more and keep their
// connections for a while: they have weight 0, so that no new ones come.
type drains struct {
	mu      sync.Mutex // Draining may be called by any goroutine; the rest by one
	servers map[serverKey]map[netip.AddrPort]drain
}

// drain is since when a destination leaves, and how it was at the last look.
type drain struct {
	since, until     time.Time
	active, inactive int
}

func newDrains() *drains { return &drains{servers: map[serverKey]map[netip.AddrPort]drain{}} }

// add begins to drain a destination, or goes on.
func (d *drains) add(k serverKey, at netip.AddrPort, now time.Time) {
	if _, ok := d.servers[k][at]; !ok {
		d.set(k, at, drain{since: now})
	}
}

func (d *drains) set(k serverKey, at netip.AddrPort, as drain) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.servers[k] == nil {
		d.servers[k] = map[netip.AddrPort]drain{}
	}
	d.servers[k][at] = as
}

// drop ends it: the destination is wanted again, or gone.
func (d *drains) drop(k serverKey, at netip.AddrPort) {
	if len(d.servers) == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.servers[k], at)
	if len(d.servers[k]) == 0 {
		delete(d.servers, k)
	}
}

func (d *drains) dropServer(k serverKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.servers, k)
}

func (d *drains) keys() []serverKey {
	out := make([]serverKey, 0, len(d.servers))
	for k := range d.servers {
		out = append(out, k)
	}
	return out
}

// Draining is a removed endpoint that still has connections.
type Draining struct {
	Server   string // as ipvsadm names it: "TCP 10.96.0.1:80"
	Endpoint netip.AddrPort
	// Since is when it was removed, or, if that is later, when it ceased to exist or
	// this process found it.
	Since time.Time
	// Until is when it is cut off; zero: when its connections end.
	Until            time.Time
	Active, Inactive int // connections at the last look
}

// Draining lists the removed endpoints that still have connections, as of the
// last look. It may be called by any goroutine.
func (x *Proxier) Draining() []Draining {
	x.drains.mu.Lock()
	defer x.drains.mu.Unlock()
	list := []Draining{}
	for k, destinations := range x.drains.servers {
		for at, d := range destinations {
			list = append(list, Draining{Server: k.String(), Endpoint: at, Since: d.since, Until: d.until, Active: d.active, Inactive: d.inactive})
		}
	}
	slices.SortFunc(list, func(a, b Draining) int {
		return cmp.Or(cmp.Compare(a.Server, b.Server), a.Endpoint.Compare(b.Endpoint))
	})
	return list
}

// next works out a draining destination's state from how the kernel has it. It
// goes (due) if it has no connections, or its time is up. As long as its endpoint
// exists, not ready or terminating, it has all the time that the pod has: its own
// begins when that is over.
func (d drain) next(live liveDest, exists bool, limit time.Duration, now time.Time) (next drain, due bool) {
	next = drain{since: d.since, active: int(live.active), inactive: int(live.inactive)}
	if exists {
		next.since = now
	}
	if limit > 0 && !exists {
		next.until = next.since.Add(limit)
	}
	return next, next.active+next.inactive == 0 || !next.until.IsZero() && !now.Before(next.until)
}

// exists says whether an endpoint is still there, if only to end its work, or
// until it is ready again.
func exists(p *plan.Plan, at netip.AddrPort) bool {
	return p != nil && (slices.Contains(p.Unready, at) ||
		slices.ContainsFunc(p.Serving, func(e plan.Endpoint) bool { return e.AddrPort == at }))
}

// drain looks after the destinations that are drained, and removes those that
// are due. The kernel does not tell when connections end, so it is asked; only
// virtual servers with such destinations are.
func (x *Proxier) drain(ctx context.Context) error {
	if len(x.drains.servers) == 0 {
		return nil
	}
	live, err := x.kernel.lookup(ctx, x.drains.keys())
	if err != nil {
		return err
	}
	var ops []op
	now, limit := x.now(), x.o.Drain()
	for k, destinations := range x.drains.servers {
		for at, d := range destinations {
			var have liveDest
			if s := live[k]; s != nil {
				have = s.destinations[at]
			}
			next, due := d.next(have, exists(x.ledger.winner(k), at), limit, now)
			x.drains.set(k, at, next)
			if due {
				ops = append(ops, op{kind: delDest, key: k, dest: destination{at: at}})
			}
		}
	}
	failures, err := x.kernel.apply(ctx, ops)
	if err != nil {
		return err
	}
	failed := map[destinationKey]bool{}
	for _, f := range failures {
		failed[destinationKey{f.op.key, f.op.dest.at}] = true // it is tried again
	}
	for _, o := range ops {
		if !failed[destinationKey{o.key, o.dest.at}] {
			x.drains.drop(o.key, o.dest.at)
		}
	}
	return nil
}

type destinationKey struct {
	server serverKey
	at     netip.AddrPort
}
