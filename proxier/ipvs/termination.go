package ipvs

import (
	"cmp"
	"context"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// drains are destinations that are not wanted any more and keep their
// connections for a while: they have weight 0, so that no new ones come. The
// value is since when.
type drains map[serverKey]map[netip.AddrPort]time.Time

// add begins to drain a destination, or goes on.
func (d drains) add(k serverKey, at netip.AddrPort, now time.Time) {
	if d[k] == nil {
		d[k] = map[netip.AddrPort]time.Time{}
	}
	if _, ok := d[k][at]; !ok {
		d[k][at] = now
	}
}

// drop ends it: the destination is wanted again, or gone.
func (d drains) drop(k serverKey, at netip.AddrPort) {
	delete(d[k], at)
	if len(d[k]) == 0 {
		delete(d, k)
	}
}

func (d drains) dropServer(k serverKey) { delete(d, k) }

func (d drains) keepOnly(keep func(serverKey, netip.AddrPort) bool) {
	for k, list := range d {
		for at := range list {
			if !keep(k, at) {
				d.drop(k, at)
			}
		}
	}
}

// Draining is a removed endpoint that still has connections.
type Draining struct {
	Server           string // as ipvsadm names it: "TCP 10.96.0.1:80"
	Endpoint         netip.AddrPort
	Since            time.Time // when it was removed, or this process found it
	Until            time.Time // when it is cut off; zero: when its connections end, or it is still terminating
	Active, Inactive int       // connections at the last look
}

// Draining lists the removed endpoints that still have connections, as of the
// last look. It may be called by any goroutine.
func (x *Proxier) Draining() []Draining {
	if list := x.draining.Load(); list != nil {
		return *list
	}
	return nil
}

// due says whether a draining destination can go: it has no connections, or its
// time is up. As long as its endpoint is only terminating, it has all the time
// that the pod is given.
func due(d liveDest, since time.Time, terminating bool, limit time.Duration, now time.Time) bool {
	if d.active+d.inactive == 0 {
		return true
	}
	return limit > 0 && !terminating && now.Sub(since) >= limit
}

// terminating says whether an endpoint is still there, if only to end its work.
func terminating(p *plan.Plan, at netip.AddrPort) bool {
	return p != nil && slices.ContainsFunc(p.Serving, func(e plan.Endpoint) bool { return e.AddrPort == at })
}

// drain looks after the destinations that are drained, and removes those that
// are due. The kernel does not tell when connections end, so it is asked; only
// virtual servers with such destinations are.
func (x *Proxier) drain(ctx context.Context) error {
	if len(x.drains) == 0 {
		return nil
	}
	live, err := x.kernel.lookup(ctx, slices.Collect(maps.Keys(x.drains)))
	if err != nil {
		return err
	}
	var o opList
	list := []Draining{}
	now, limit := x.now(), x.o.Drain()
	for k, destinations := range x.drains {
		for at, since := range destinations {
			d, there := liveDest{}, false
			if s := live[k]; s != nil {
				d, there = s.destinations[at]
			}
			still := terminating(x.ledger.winner(k), at)
			if still {
				since = now // its time begins when it is gone
				x.drains[k][at] = now
			}
			if !there || due(d, since, still, limit, now) {
				o.late = append(o.late, op{kind: delDest, key: k, dest: destination{at: at}})
				continue
			}
			entry := Draining{Server: k.String(), Endpoint: at, Since: since, Active: int(d.active), Inactive: int(d.inactive)}
			if limit > 0 && !still {
				entry.Until = since.Add(limit)
			}
			list = append(list, entry)
		}
	}
	failures, err := x.kernel.apply(ctx, o.ordered())
	if err != nil {
		return err
	}
	failed := map[serverKey]bool{}
	for _, f := range failures {
		failed[f.op.key] = true // it is tried again
	}
	for _, op := range o.late {
		if !failed[op.key] {
			x.drains.drop(op.key, op.dest.at)
		}
	}
	slices.SortFunc(list, func(a, b Draining) int {
		return cmp.Or(cmp.Compare(a.Server, b.Server), a.Endpoint.Compare(b.Endpoint))
	})
	x.draining.Store(&list)
	return nil
}

// publishDraining brings the published list up to what is drained now, without
// asking the kernel: connections of those that are new in it are not known yet.
func (x *Proxier) publishDraining() {
	known := map[string]Draining{}
	for _, d := range x.Draining() {
		known[d.Server+d.Endpoint.String()] = d
	}
	list := []Draining{}
	for k, destinations := range x.drains {
		for at, since := range destinations {
			d, ok := known[k.String()+at.String()]
			if !ok {
				d = Draining{Server: k.String(), Endpoint: at, Since: since}
			}
			list = append(list, d)
		}
	}
	slices.SortFunc(list, func(a, b Draining) int {
		return cmp.Or(cmp.Compare(a.Server, b.Server), a.Endpoint.Compare(b.Endpoint))
	})
	x.draining.Store(&list)
}
