package conntrack

import (
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Frontend is an original destination that flows are looked up by. An invalid
// Addr means a NodePort: the port on any of the node's own addresses.
type Frontend struct {
	Protocol model.Protocol
	Addr     netip.Addr
	Port     uint16
}

// Flow is what is read of one conntrack entry: where the client sent to and
// who, by the translation that the entry remembers, answers. The reply's
// destination is not here: it differs from the client by masquerading, and says
// nothing about the endpoint.
type Flow struct {
	Protocol model.Protocol
	Src, Dst netip.AddrPort // original direction
	ReplySrc netip.AddrPort // who answers

	// Zone is the conntrack zone; ZoneOfOriginal says that it is set for the
	// original direction only (xt_CT --zone-orig).
	Zone           uint16
	ZoneOfOriginal bool

	// ID is the kernel's number of the entry, 0 if not known. It tells an entry
	// from a younger one with the same addresses.
	ID uint32
}

// translated says that the flow is answered by another address than the one it
// was sent to.
func (f *Flow) translated() bool { return f.ReplySrc != f.Dst }

// Reason is why a flow is stale, or Keep.
type Reason uint8

// Reasons.
const (
	Keep             Reason = iota // not ours, or in order
	EndpointGone                   // translated to what is no serving endpoint of the frontend
	NeverTranslated                // sent to a frontend before it had rules or endpoints
	FrontendGone                   // translated for a frontend that no Service has any more
	AddressNotServed               // translated for a NodePort on an address where none is served now
)

func (r Reason) String() string {
	return [...]string{
		"in order",
		"its endpoint no longer serves",
		"it was never translated to an endpoint",
		"no Service has its frontend any more",
		"NodePorts are no longer served on its address",
	}[r]
}

// tracked says whether stale flows of a protocol are removed. A TCP client
// notices that its peer is gone; UDP and SCTP ones need not.
func tracked(p model.Protocol) bool { return p == model.UDP || p == model.SCTP }

// Index knows who owns each UDP and SCTP frontend of a Set. It is moved from
// one Set to the next at a cost proportional to the change, and always equals
// an Index made from nothing for the last Set. One goroutine owns it.
type Index struct {
	set    *plan.Set
	owners map[Frontend]*plan.Plan
}

// NewIndex returns the Index of no Set.
func NewIndex() *Index { return &Index{owners: map[Frontend]*plan.Plan{}} }

// Set returns the Set that the Index stands for, nil before the first Move.
func (x *Index) Set() *plan.Set { return x.set }

// Len returns how many frontends there are.
func (x *Index) Len() int { return len(x.owners) }

// All yields every frontend.
func (x *Index) All(yield func(Frontend) bool) {
	for f := range x.owners {
		if !yield(f) {
			return
		}
	}
}

// Owns says whether a Service has the frontend.
func (x *Index) Owns(f Frontend) bool { return x.owners[f] != nil }

// Move makes the Index that of want, and yields the frontends whose flows may
// have become stale by it, some perhaps twice. Frontends that no Service has
// any more are among them. From no Set at all, every frontend is.
func (x *Index) Move(want *plan.Set, suspect func(Frontend)) {
	old := x.set
	var changed [][2]*plan.Plan
	plan.Changes(old, want, func(a, b *plan.Plan) bool {
		if (a != nil && tracked(a.Protocol)) || (b != nil && tracked(b.Protocol)) {
			changed = append(changed, [2]*plan.Plan{a, b})
		}
		return true
	})
	// A frontend can pass from one plan to another: all removals come first.
	for _, c := range changed {
		each(c[0], func(f Frontend) { delete(x.owners, f) })
	}
	for _, c := range changed {
		each(c[1], func(f Frontend) { x.owners[f] = c[1] })
		suspects(c[0], c[1], suspect)
	}
	x.set = want
	if old != nil && !sameNodePorts(old.Facts, want.Facts) {
		for f := range x.owners {
			if !f.Addr.IsValid() {
				suspect(f)
			}
		}
	}
}

// each yields a plan's frontends. A nil plan has none.
func each(p *plan.Plan, yield func(Frontend)) {
	if p == nil {
		return
	}
	for i := range p.Frontends {
		yield(Frontend{p.Protocol, p.Frontends[i].Addr, p.Frontends[i].Port})
	}
}

// suspects yields the frontends of two versions of a plan whose flows may have
// become stale. Only three things can do that: a frontend that the plan lost, a
// frontend that it got (older flows were meant for another owner, or for nobody),
// and an endpoint that stopped serving. Getting the first endpoint is like
// getting a frontend: until then nothing was translated.
func suspects(old, new *plan.Plan, yield func(Frontend)) {
	had := map[Frontend]bool{}
	each(old, func(f Frontend) { had[f] = true })
	every := old == nil || new == nil ||
		len(old.Serving) == 0 && len(new.Serving) > 0 || lostEndpoint(old.Serving, new.Serving)
	each(new, func(f Frontend) {
		if every || !had[f] {
			yield(f)
		}
		delete(had, f)
	})
	for f := range had {
		yield(f)
	}
}

// lostEndpoint says whether an address of old is not in new. Both are sorted.
func lostEndpoint(old, new []plan.Endpoint) bool {
	for _, o := range old {
		for len(new) > 0 && new[0].AddrPort.Compare(o.AddrPort) < 0 {
			new = new[1:]
		}
		if len(new) == 0 || new[0].AddrPort != o.AddrPort {
			return true
		}
	}
	return false
}

// sameNodePorts says whether NodePorts are served on the same addresses.
func sameNodePorts(a, b *plan.Facts) bool {
	return a == b || (a.NodePorts.All == b.NodePorts.All && a.LocalhostNodePorts == b.LocalhostNodePorts &&
		slices.Equal(a.NodePorts.Addrs, b.NodePorts.Addrs))
}

// Scope is what one look at the table is about.
type Scope struct {
	// Asked are the frontends whose flows are looked at. A frontend in it that
	// the Index does not own was ours once.
	Asked map[Frontend]struct{}
	// Locals are the node's own addresses. Without them no flow is taken for a
	// NodePort's, if NodePorts are served on all addresses.
	Locals map[netip.Addr]bool
	// Before, if not nil, are the facts by which NodePorts were served on other
	// addresses than now.
	Before *plan.Facts
}

// Judge says whether a flow contradicts the Set. A flow that matches nothing
// in the Scope, or whose original destination is not ours, is kept.
func (x *Index) Judge(f *Flow, s *Scope) Reason {
	if !tracked(f.Protocol) || x.set == nil {
		return Keep
	}
	exact := Frontend{f.Protocol, f.Dst.Addr(), f.Dst.Port()}
	if p := x.owners[exact]; p != nil {
		return judgeOwned(f, p)
	}
	// An address of its own goes before a NodePort, as in every proxier.
	port := Frontend{Protocol: f.Protocol, Port: f.Dst.Port()}
	served := servesNodePorts(x.set.Facts, f.Dst.Addr(), s.Locals)
	owner := x.owners[port]
	if owner != nil && served {
		return judgeOwned(f, owner)
	}
	// Nobody's now. Untranslated, it is a flow like any other; translated, it
	// was so by rules that are gone.
	if !f.translated() {
		return Keep
	}
	if _, ok := s.Asked[exact]; ok {
		return FrontendGone
	}
	before := s.Before != nil && servesNodePorts(s.Before, f.Dst.Addr(), s.Locals)
	if _, ok := s.Asked[port]; ok && (served || before) {
		if owner != nil {
			return AddressNotServed
		}
		return FrontendGone
	}
	return Keep
}

// judgeOwned judges a flow to a frontend of a plan.
func judgeOwned(f *Flow, p *plan.Plan) Reason {
	_, ok := slices.BinarySearchFunc(p.Serving, f.ReplySrc, func(e plan.Endpoint, a netip.AddrPort) int {
		return e.AddrPort.Compare(a)
	})
	switch {
	case ok:
		return Keep
	case f.translated():
		return EndpointGone
	case f.Zone != 0:
		// A virtual switch tracks flows in zones of its own, before or after the
		// host translates them in zone 0. There it is right that nothing is translated.
		return Keep
	}
	return NeverTranslated
}

// servesNodePorts says whether NodePorts are served on an address.
func servesNodePorts(facts *plan.Facts, a netip.Addr, locals map[netip.Addr]bool) bool {
	if a.IsLoopback() {
		if !a.Is4() || !facts.LocalhostNodePorts {
			return false
		}
		if facts.NodePorts.All {
			return true // all of 127.0.0.0/8 is local, not just what lo lists
		}
	}
	if facts.NodePorts.All {
		return locals[a]
	}
	return slices.Contains(facts.NodePorts.Addrs, a)
}
