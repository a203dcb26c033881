package nftables

import (
	"context"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// dialled is what a client calls a frontend with affinity by; the address is invalid for
// node ports.
type dialled struct {
	addr     netip.Addr
	protocol model.Protocol
	port     uint16
}

func dialledAt(p *plan.Plan, f *plan.Frontend) dialled { return dialled{f.Addr, p.Protocol, f.Port} }

// stale is who may be behind frontends with affinity; nobody where a map is nil.
// Clients that are remembered for anybody else are to be forgotten.
type stale map[dialled]map[netip.AddrPort]bool

// staleOf collects the frontends that clients are to be forgotten for: those that have
// lost endpoints, lead elsewhere now, or are gone.
func staleOf(groups []*group) stale {
	s := stale{}
	for _, g := range groups {
		if g.old == nil || g.old.Affinity == 0 {
			continue
		}
		now := g.new
		if g.refused != nil || now != nil && now.Affinity == 0 {
			now = nil
		}
		for i := range g.old.Frontends {
			s.compare(g.old, now, &g.old.Frontends[i])
		}
	}
	return s
}

func (s stale) compare(old, now *plan.Plan, f *plan.Frontend) {
	at := dialledAt(old, f)
	if now == nil {
		s[at] = nil
		return
	}
	i := slices.IndexFunc(now.Frontends, func(o plan.Frontend) bool {
		return dialledAt(now, &o) == at && o.FromPod == f.FromPod && o.FromNode == f.FromNode && o.FromOutside == f.FromOutside
	})
	if i < 0 {
		s[at] = nil
		return
	}
	allowed := behind(now, &now.Frontends[i])
	for e := range behind(old, f) {
		if !allowed[e] {
			s[at] = allowed
			return
		}
	}
}

// behind are the endpoints that a frontend leads to, whoever dials.
func behind(p *plan.Plan, f *plan.Frontend) map[netip.AddrPort]bool {
	u := usesOf(f)
	out := map[netip.AddrPort]bool{}
	add := func(list []plan.Endpoint) {
		for _, e := range list {
			out[e.AddrPort] = true
		}
	}
	if u.cluster {
		add(p.Cluster)
	}
	if u.local {
		add(p.Local)
	}
	return out
}

// all notes every frontend of a plan with affinity.
func (s stale) all(p *plan.Plan) {
	for i := range p.Frontends {
		s[dialledAt(p, &p.Frontends[i])] = behind(p, &p.Frontends[i])
	}
}

// none notes that nobody is behind a plan's frontends.
func (s stale) none(p *plan.Plan) {
	for i := range p.Frontends {
		s[dialledAt(p, &p.Frontends[i])] = nil
	}
}

// keeps says whether a client goes on being remembered. everything says that s has all
// frontends, so that one that it does not have is gone.
func (s stale) keeps(c client, everything bool) bool {
	allowed, known := s[dialled{c.addr, c.protocol, c.port}]
	if !known {
		allowed, known = s[dialled{netip.Addr{}, c.protocol, c.port}]
	}
	if !known {
		return !everything
	}
	return allowed[c.to]
}

// forgetTries is how often clients are listed at the most, to forget some. A list has
// gaps when clients time out meanwhile: it goes on behind as many as it has had.
const forgetTries = 4

// forgetClients takes what the rules remember of clients whose endpoint is gone, until a
// list has none of them: they get another one with their next connection.
func (x *Proxier) forgetClients(ctx context.Context, s stale, everything bool) error {
	if len(s) == 0 && !everything {
		return nil
	}
	for range forgetTries {
		var gone []client
		err := x.kernel.clients(ctx, func(c client) {
			if !s.keeps(c, everything) {
				gone = append(gone, c)
			}
		})
		if err != nil || len(gone) == 0 {
			return err
		}
		if err := x.kernel.forget(ctx, gone); err != nil {
			return err
		}
	}
	return nil
}
