package ipvs

import (
	"context"
	"maps"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// chunk is how many plans are written at a time in a full comparison: what all
// of a large cluster's ops would need at once is more than the rest of the agent.
const chunk = 500

// syncAll reads the kernel's state and writes what differs from want.
func (x *Proxier) syncAll(ctx context.Context, want *plan.Set) error {
	have, before, err := x.read(ctx)
	if err != nil {
		return err
	}
	return x.syncFrom(ctx, have, before, want, nil)
}

// read reads the kernel's state, and the token from before.
func (x *Proxier) read(ctx context.Context) (*actual, token, error) {
	before, err := x.kernel.token(ctx)
	if err != nil {
		return nil, before, err
	}
	have, err := x.kernel.read(ctx)
	return have, before, err
}

// syncFrom writes what differs from want of what was read. With only, it adds what
// the plans need for which only is true, and removes nothing.
func (x *Proxier) syncFrom(ctx context.Context, have *actual, before token, want *plan.Set, only func(*plan.Plan) bool) error {
	rules := base(&x.o, want.Facts)
	first := rules
	if have.othersServe {
		first = static{family: rules.family} // theirs serve until everything else is there
	}
	fixed, err := x.kernel.prepare(ctx, first)
	if err != nil {
		return err
	}
	plans := x.start(want, have, only)
	count := tally{}
	var failures []failure
	c := x.compiler(want.Facts)
	for list := range slices.Chunk(plans, chunk) {
		ops := x.missing(c, list, have)
		count.add(ops)
		failed, err := x.kernel.apply(ctx, ops)
		if err != nil {
			return err
		}
		failures = append(failures, failed...)
	}
	if have.othersServe {
		if fixed, err = x.kernel.prepare(ctx, rules); err != nil {
			return err
		}
	}
	if only == nil {
		ops := x.surplus(have)
		count.add(ops)
		failed, err := x.kernel.apply(ctx, ops)
		if err != nil {
			return err
		}
		failures = append(failures, failed...)
	}
	if x.written {
		x.reportRepairs(count, fixed)
	}
	x.applied = want
	if err := x.withdraw(ctx, c, failures); err != nil {
		x.Forget()
		return err
	}
	if x.token, err = x.kernel.token(ctx); err != nil {
		return err
	}
	if fixed.chains+fixed.jumps == 0 {
		x.token.tables = before.tables // what others wrote since is for Check to see
	}
	x.written = true
	x.takeBack()
	return nil
}

// start fills the ledger anew from a Set, and returns its plans, important ones
// first. It also finds the virtual servers that others have.
func (x *Proxier) start(want *plan.Set, have *actual, only func(*plan.Plan) bool) []*plan.Plan {
	var mine map[serverKey][]*plan.Plan
	if x.applied != nil {
		mine = x.ledger.claims // whatever somebody did to the sets
	}
	x.ledger = newLedger()
	x.patrol = patrol{}
	x.foreign = map[serverKey]model.PortKey{}
	clear(x.partial)
	x.aside.Leave(want)
	x.aside.Try(want, x.now())
	plans := make([]*plan.Plan, 0, want.Len())
	for p := range want.All {
		if x.aside.Keep(p) && (only == nil || only(p)) {
			plans = append(plans, p)
		}
	}
	slices.SortFunc(plans, func(a, b *plan.Plan) int {
		switch {
		case a.Important == b.Important:
			return a.PortKey.Compare(b.PortKey)
		case a.Important:
			return -1
		}
		return 1
	})
	c := x.compiler(want.Facts)
	x.adoptMarks(c, plans, have)
	r := x.newRound(c, c)
	for _, p := range plans {
		rs := c.compile(p, x.mark(c, p))
		for i := range rs.servers {
			s := &rs.servers[i]
			if live := have.servers[s.serverKey]; live != nil && mine[s.serverKey] == nil && !x.ours(s.serverKey, have) && !have.alike(live, s) {
				x.avoid(s.serverKey, p)
			}
		}
		r.add(x.own(rs), p)
	}
	return plans
}

// adoptMarks keeps the marks that an earlier process gave away.
func (x *Proxier) adoptMarks(c compiler, plans []*plan.Plan, have *actual) {
	marks := map[entry]uint32{}
	shift := insideShift(x.o.MasqueradeBit)
	for e := range have.sets[setInside] {
		if signed(e.mark, shift) {
			m := e.mark >> shift
			e.mark = 0
			marks[e] = m
		}
	}
	l := &x.ledger
	for _, p := range plans {
		if len(marks) == 0 || !c.needsInside(p) {
			continue
		}
		for i := range p.Frontends {
			f := &p.Frontends[i]
			for _, a := range c.addresses(f) {
				m := marks[entry{addr: a, protocol: p.Protocol, port: f.Port}]
				if m != 0 && !l.taken[m] && l.marks[p.PortKey] == 0 {
					l.taken[m] = true
					l.marks[p.PortKey] = m
				}
			}
		}
	}
}

func ourMark(m uint32) bool { return m&insideSigMask == insideSignature && m&insideMost != 0 }

// missing gives the ops that bring what the kernel has up to what some plans
// need.
func (x *Proxier) missing(c compiler, plans []*plan.Plan, have *actual) []op {
	var o opList
	for _, p := range plans {
		rs := x.own(c.compile(p, x.mark(c, p)))
		rs.shares(func(s shared, mark uint32) {
			e := s.entry
			e.mark = mark
			if !have.has(s, e) {
				o.add(s.op(e, true, &p.PortKey))
			}
		})
		for i := range rs.servers {
			s := &rs.servers[i]
			if x.ledger.winner(s.serverKey) != p {
				continue
			}
			x.amend(&o, s, have.servers[s.serverKey], p)
		}
	}
	return o.ordered()
}

// has says whether the kernel has an address or an element.
func (a *actual) has(s shared, e entry) bool {
	if s.set == setCount {
		return a.addrs[s.addr]
	}
	return a.sets[s.set][e]
}

// amend gives the ops that turn a live virtual server, or none, into the one
// that is wanted.
func (x *Proxier) amend(o *opList, s *server, live *liveServer, p *plan.Plan) {
	if live == nil {
		x.replace(o, s.serverKey, nil, s, p)
		return
	}
	old := &server{serverKey: s.serverKey, settings: live.settings}
	for at, d := range live.destinations {
		switch {
		case d.foreign:
			// It is not reached by NAT, and what is wanted in its place has the same key.
			o.add(op{kind: delDest, key: s.serverKey, dest: destination{at: at}})
		case !s.wants(at) && d.weight == 0:
			x.stillLeaving(o, s, at, d, p)
		default:
			old.destinations = append(old.destinations, destination{at, d.weight})
		}
	}
	x.replace(o, s.serverKey, old, s, p)
}

// stillLeaving is a destination that is drained already, by us or by an earlier
// process.
func (x *Proxier) stillLeaving(o *opList, s *server, at netip.AddrPort, d liveDest, p *plan.Plan) {
	if !drained(p, s) || d.active+d.inactive == 0 {
		x.drains.drop(s.serverKey, at)
		o.leave(op{kind: delDest, key: s.serverKey, dest: destination{at: at}})
		return
	}
	x.drains.add(s.serverKey, at, x.now())
}

// surplus gives the ops that remove what is ours and nobody wants.
func (x *Proxier) surplus(have *actual) []op {
	var o opList
	for _, k := range slices.SortedFunc(maps.Keys(have.servers), serverKey.compare) {
		if x.ledger.winner(k) == nil && x.ours(k, have) {
			x.drains.dropServer(k)
			o.add(op{kind: delServer, key: k})
		}
	}
	for _, a := range slices.SortedFunc(maps.Keys(have.addrs), netip.Addr.Compare) {
		s := shared{setCount, entry{addr: a}}
		if x.ledger.needs[s] == 0 && have.ourAddr(a) {
			o.add(s.op(s.entry, false, nil))
		}
	}
	for id, set := range have.sets {
		for _, e := range slices.SortedFunc(maps.Keys(set), entry.compare) {
			s := shared{setID(id), e}
			s.mark = 0
			if x.ledger.needs[s] == 0 {
				o.add(s.op(s.entry, false, nil))
			}
		}
	}
	return o.ordered()
}

// anyOurs says whether the kernel has any virtual server of ours.
func (x *Proxier) anyOurs(have *actual) bool {
	for k := range have.servers {
		if x.ours(k, have) {
			return true
		}
	}
	return false
}

// tally counts what had to be put right, by kind of object.
type tally map[string]int

func (t tally) add(ops []op) {
	for _, o := range ops {
		switch o.kind {
		case addEntry, delEntry:
			t["ipset entry"]++
		case addAddr, delAddr:
			t["address"]++
		case putServer, delServer:
			t["virtual server"]++
		case putDest, delDest:
			t["destination"]++
		}
	}
}

func (x *Proxier) reportRepairs(count tally, fixed repairs) {
	count["chain"] += fixed.chains
	count["jump"] += fixed.jumps
	count["ipset"] += fixed.sets
	count["device"] += fixed.devices
	for _, object := range slices.Sorted(maps.Keys(count)) {
		if n := count[object]; n > 0 {
			x.o.Report.DriftRepaired(object, n)
		}
	}
}
