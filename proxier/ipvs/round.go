package ipvs

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// round works out what must be done for some changed plans. The ledger is
// brought up to date as plans come in; what to do is seen at the end, from what
// was before and is now of each object that they touch. So the order of plans
// does not matter, and an object that moves from one to another is not taken
// away on the way.
type round struct {
	x       *Proxier
	was, is compiler

	servers  map[serverKey]*plan.Plan // who had it before
	shared   map[shared]int           // how many needed it before
	marks    map[shared]uint32        // marks of elements, as of now
	owners   map[shared]*plan.Plan    // somebody who needs it now
	freed    []model.PortKey          // marks to release at the end
	compiled map[compiledKey]ruleset
}

type compiledKey struct {
	plan *plan.Plan
	is   bool
}

func (x *Proxier) newRound(was, is compiler) *round {
	return &round{x: x, was: was, is: is,
		servers: map[serverKey]*plan.Plan{}, shared: map[shared]int{}, marks: map[shared]uint32{},
		owners: map[shared]*plan.Plan{}, compiled: map[compiledKey]ruleset{}}
}

// step replaces the plan of a port by another; nil for none. Plans that are set
// aside count as none.
func (r *round) step(old, new *plan.Plan) {
	if old != nil && r.x.aside.Keep(old) {
		r.remove(r.compile(old, false), old)
		r.x.concede(r.is, old, new)
		delete(r.x.partial, old.PortKey)
		if new == nil || !r.is.needsInside(new) {
			r.freed = append(r.freed, old.PortKey)
		}
	}
	if new != nil && r.x.aside.Keep(new) {
		r.add(r.compile(new, true), new)
	}
}

func (r *round) compile(p *plan.Plan, is bool) ruleset {
	key := compiledKey{p, is}
	rs, ok := r.compiled[key]
	if !ok {
		if is {
			rs = r.x.own(r.is.compile(p, r.x.mark(r.is, p)))
		} else {
			rs = r.x.own(r.was.compile(p, r.x.heldMark(r.was, p)))
		}
		r.compiled[key] = rs
	}
	return rs
}

// heldMark gives the packet mark that a plan was compiled with.
func (x *Proxier) heldMark(c compiler, p *plan.Plan) uint32 {
	if !c.needsInside(p) {
		return 0
	}
	return x.ledger.marks[p.PortKey] << insideShift(x.o.MasqueradeBit)
}

var errNoMark = fmt.Errorf("no packet mark is left (there are %d): this node and its pods get only the endpoints that clients outside get", insideMost)

// mark gives the packet mark that a plan compiles with, 0 if it needs none or
// none is left.
func (x *Proxier) mark(c compiler, p *plan.Plan) uint32 {
	if !c.needsInside(p) {
		return 0
	}
	m := x.ledger.markFor(p.PortKey)
	if m == 0 {
		x.partial[p.PortKey] = true
		if !x.aside.Told(p.PortKey) {
			x.aside.Tell(p.PortKey, errNoMark)
		}
	}
	return m << insideShift(x.o.MasqueradeBit)
}

func (r *round) remove(rs ruleset, p *plan.Plan) {
	l := &r.x.ledger
	for i := range rs.servers {
		r.touch(rs.servers[i].serverKey)
		l.unclaim(rs.servers[i].serverKey, p)
	}
	rs.shares(func(s shared, _ uint32) { r.count(s, -1) })
}

func (r *round) add(rs ruleset, p *plan.Plan) {
	l := &r.x.ledger
	for i := range rs.servers {
		r.touch(rs.servers[i].serverKey)
		l.claim(rs.servers[i].serverKey, p)
	}
	rs.shares(func(s shared, mark uint32) {
		r.count(s, 1)
		r.owners[s] = p
		if mark != 0 {
			r.marks[s] = mark
		}
	})
}

// shares yields the addresses and elements of a ruleset.
func (rs *ruleset) shares(yield func(s shared, mark uint32)) {
	for _, a := range rs.addrs {
		yield(shared{setCount, entry{addr: a}}, 0)
	}
	for _, e := range rs.entries {
		s := shared(e)
		s.mark = 0
		yield(s, e.mark)
	}
}

func (r *round) touch(k serverKey) {
	if _, ok := r.servers[k]; !ok {
		r.servers[k] = r.x.ledger.winner(k)
	}
}

func (r *round) count(s shared, n int) {
	l := &r.x.ledger
	was := l.needs[s]
	if _, ok := r.shared[s]; !ok {
		r.shared[s] = was
	}
	now := was + n
	if s.set < setCount {
		l.elements[s.set] += uint32(min(now, 1) - min(was, 1))
	}
	if now == 0 {
		delete(l.needs, s)
	} else {
		l.needs[s] = now
	}
}

// findForeign looks whether virtual servers that are wanted newly are there
// already. They are somebody else's then, and left alone.
func (r *round) findForeign(ctx context.Context) error {
	var fresh []serverKey
	for k, before := range r.servers {
		if before == nil && r.x.ledger.winner(k) != nil {
			fresh = append(fresh, k)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	there, err := r.x.kernel.lookup(ctx, fresh)
	if err != nil {
		return err
	}
	for k := range there {
		claimants := slices.Clone(r.x.ledger.claims[k]) // also those who lose it to the first
		for _, p := range claimants {
			r.remove(r.compile(p, true), p)
			delete(r.compiled, compiledKey{p, true})
		}
		r.x.avoid(k, claimants[0])
		for _, p := range claimants {
			r.add(r.compile(p, true), p)
		}
	}
	return nil
}

// ops gives what must be done, in an order in which every moment is safe: what
// masquerades and filters is there before traffic flows, and goes after it.
func (r *round) ops() []op {
	var o opList
	for _, s := range slices.SortedFunc(maps.Keys(r.shared), shared.compare) {
		r.shareOps(&o, s)
	}
	for _, k := range slices.SortedFunc(maps.Keys(r.servers), serverKey.compare) {
		r.serverOps(&o, k)
	}
	for _, key := range r.freed {
		r.x.ledger.releaseMark(key)
	}
	return o.ordered()
}

func (r *round) shareOps(o *opList, s shared) {
	before, now := r.shared[s], r.x.ledger.needs[s]
	e := s.entry
	e.mark = r.marks[s]
	switch {
	case now > 0 && (before == 0 || e.mark != 0):
		o.add(s.op(e, true, &r.owners[s].PortKey))
	case now == 0 && before > 0:
		o.add(s.op(e, false, nil))
	}
}

func (s shared) op(e entry, put bool, owner *model.PortKey) op {
	o := op{kind: delEntry, set: s.set, entry: e, owner: owner}
	switch {
	case s.set == setCount && put:
		o = op{kind: addAddr, addr: s.addr, owner: owner}
	case s.set == setCount:
		o = op{kind: delAddr, addr: s.addr}
	case put:
		o.kind = addEntry
	}
	return o
}

func (r *round) serverOps(o *opList, k serverKey) {
	before, now := r.servers[k], r.x.ledger.winner(k)
	var old, new *server
	if before != nil {
		old = r.compile(before, false).server(k)
	}
	if now != nil {
		new = r.compile(now, true).server(k)
	}
	r.x.replace(o, k, old, new, now)
}

func (rs ruleset) server(k serverKey) *server {
	for i := range rs.servers {
		if rs.servers[i].serverKey == k {
			return &rs.servers[i]
		}
	}
	return nil
}

// replace gives the ops that turn a virtual server into another. Destinations
// that go are drained.
func (x *Proxier) replace(o *opList, k serverKey, old, new *server, owner *plan.Plan) {
	if new == nil {
		if old != nil {
			x.drains.dropServer(k)
			o.add(op{kind: delServer, key: k})
		}
		return
	}
	if old == nil || old.settings != new.settings {
		o.add(op{kind: putServer, key: k, settings: new.settings, owner: &owner.PortKey})
	}
	had := map[netip.AddrPort]uint32{}
	if old != nil {
		for _, d := range old.destinations {
			had[d.at] = d.weight
		}
	}
	for _, d := range new.destinations {
		if weight, ok := had[d.at]; !ok || weight != d.weight {
			o.add(op{kind: putDest, key: k, dest: d, owner: &owner.PortKey})
			x.drains.drop(k, d.at)
		}
		delete(had, d.at)
	}
	for _, at := range slices.SortedFunc(maps.Keys(had), netip.AddrPort.Compare) {
		x.leave(o, new, at, owner)
	}
}

// leave removes a destination that is not wanted any more: at once if it has no
// connections to speak of, else when they have ended.
func (x *Proxier) leave(o *opList, s *server, at netip.AddrPort, owner *plan.Plan) {
	if !drained(owner, s) {
		o.leave(op{kind: delDest, key: s.serverKey, dest: destination{at: at}})
		return
	}
	x.drains.add(s.serverKey, at, x.now())
	o.leave(op{kind: putDest, key: s.serverKey, dest: destination{at: at}})
}

// drained says whether destinations that leave a virtual server may finish their
// connections. UDP has none. dh goes on choosing a destination of weight 0, and
// then refuses the client.
func drained(p *plan.Plan, s *server) bool {
	return p.Protocol != model.UDP && s.scheduler != "dh"
}

// opList collects ops in the order in which they may be done: what comes, from
// the sets to the destinations, then destinations that go, then the rest that
// goes, from the virtual servers to the sets.
type opList [leaving + 1][]op

// leaving is the place of destinations that go, by a weight of 0 or at once.
// delDest's own is for those that make room for one that comes.
const leaving = delDest + 1

var places = [...]opKind{addEntry, addAddr, putServer, delDest, putDest, leaving, delServer, delAddr, delEntry}

func (l *opList) add(o op) { l[o.kind] = append(l[o.kind], o) }

// leave adds an op on a destination that goes.
func (l *opList) leave(o op) { l[leaving] = append(l[leaving], o) }

func (l *opList) ordered() []op {
	n := 0
	for _, list := range l {
		n += len(list)
	}
	out := make([]op, 0, n)
	for _, place := range places {
		out = append(out, l[place]...)
	}
	return out
}

func (k serverKey) compare(o serverKey) int {
	return cmp.Or(cmp.Compare(k.mark, o.mark), k.addr.Compare(o.addr), cmp.Compare(k.port, o.port), cmp.Compare(k.protocol, o.protocol))
}

func (s shared) compare(o shared) int {
	return cmp.Or(cmp.Compare(s.set, o.set), s.entry.compare(o.entry))
}

func (e entry) compare(o entry) int {
	return cmp.Or(e.addr.Compare(o.addr), cmp.Compare(e.port, o.port), cmp.Compare(e.protocol, o.protocol), e.with.Compare(o.with))
}

// String describes an op for an error.
func (o op) String() string {
	switch o.kind {
	case addEntry, delEntry:
		return fmt.Sprintf("element %s of set %s", o.entry, setSpecs[o.set].name)
	case addAddr, delAddr:
		return fmt.Sprintf("address %s on %s", o.addr, device)
	case putServer, delServer:
		return fmt.Sprintf("virtual server %s (scheduler %s)", o.key, o.settings.scheduler)
	}
	return fmt.Sprintf("destination %s of virtual server %s", o.dest.at, o.key)
}

// String prints an element as ipset does.
func (e entry) String() string {
	if !e.addr.IsValid() {
		return fmt.Sprint(e.port)
	}
	s := e.addr.String()
	if e.port != 0 {
		s += fmt.Sprintf(",%s:%d", e.protocol, e.port)
	}
	if e.with.IsValid() {
		s += "," + e.with.String()
	}
	return s
}
