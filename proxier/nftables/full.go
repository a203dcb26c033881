package nftables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// syncAll reads the table and writes what differs from want, the important Services
// first.
func (x *Proxier) syncAll(ctx context.Context, want *plan.Set) error {
	x.aside.Try(want, x.now())
	for {
		err := x.syncOnce(ctx, want)
		if !x.setPartlyAside(ctx, err) { // one more each time
			return err
		}
	}
}

func (x *Proxier) syncOnce(ctx context.Context, want *plan.Set) error {
	f, err := x.compareAll(ctx, want, x.aside.Keep)
	if err != nil {
		return err
	}
	if err := x.writeAll(ctx, f); err != nil {
		return err
	}
	x.settleAside(want)
	if x.written {
		f.report(x)
	}
	x.applied, x.written, x.census = want, true, f.census
	return x.forgetClients(ctx, f.clients, true)
}

// Prime programs the important Services of a Set, if there is no table of ours at
// all, and says whether it did. The next Sync reads what is there.
func (x *Proxier) Prime(ctx context.Context, want *plan.Set) (bool, error) {
	if there, err := x.kernel.there(ctx); err != nil || there || want.Len() == 0 {
		return false, err
	}
	f, err := x.compareAll(ctx, want, func(p *plan.Plan) bool { return p.Important })
	if err == nil {
		f.partial = true
		err = x.writeAll(ctx, f)
	}
	x.Forget()
	return err == nil, err
}

// full is a comparison of everything that is there with everything that is wanted.
type full struct {
	x    *Proxier
	want *plan.Set
	keep func(*plan.Plan) bool
	have *actual
	present
	chains []chainSpec
	ledger ledger
	census census
	// clients are the frontends with affinity, and who may be behind them.
	clients stale

	partial bool // not all Services are among the wanted
	// head makes the table anew, in one transaction with the first Services.
	head []message
	// missing and odd are how many elements and chains were not as they should be.
	missing, odd int
}

// compareAll reads what is there and holds it against what is wanted.
func (x *Proxier) compareAll(ctx context.Context, want *plan.Set, keep func(*plan.Plan) bool) (*full, error) {
	f := &full{x: x, want: want, keep: keep, have: &actual{}, present: newPresent(x.few), census: newCensus(x.o.Traffic, want)}
	x.kernel.disturbed() // what happened before now is seen now
	there, err := x.kernel.there(ctx)
	if err == nil && there {
		f.have, err = x.kernel.read(ctx, f.found)
	}
	if err == nil && !f.hashed {
		f.collect()
	}
	return f, err
}

// found takes an element that is there.
func (f *full) found(e element) error {
	if f.retain(e) {
		return nil
	}
	if !f.hashed {
		f.hashed = true
		f.collect()
	}
	f.judge(e)
	return nil
}

// plans yields the plans that are wanted, the important ones first.
func (f *full) plans(yield func(*plan.Plan) bool) {
	for _, important := range []bool{true, false} {
		for p := range f.want.All {
			if p.Important == important && f.keep(p) && !yield(p) {
				return
			}
		}
	}
}

// collect goes through everything that is wanted, for what plans share, and to compare
// it with what is there.
func (f *full) collect() {
	f.ledger, f.clients = newLedger(), stale{}
	if f.hashed {
		f.wanted = make([]uint64, 0, 2*f.want.Len()+f.want.Endpoints)
	}
	for p := range f.plans {
		rs := f.shared(p)
		for _, e := range rs.elements {
			f.expect(e)
		}
		for _, e := range rs.shared {
			if f.ledger.shared[e.key] == 0 {
				f.expect(e)
			}
		}
		for _, s := range rs.chains {
			if f.ledger.chains[s] == 0 {
				f.chains = append(f.chains, s)
			}
		}
		f.ledger.hold(&rs)
		if p.Affinity > 0 {
			f.clients.all(p)
		}
	}
	for _, e := range f.base(true).elements {
		f.expect(e)
	}
	f.complete()
}

// shared gives a plan's ruleset, without elements if the kernel has none of the plan's.
func (f *full) shared(p *plan.Plan) ruleset {
	if f.mayHaveSome(p) {
		return f.x.compile(p, f.census)
	}
	return f.x.c.shared(p)
}

// mayHaveSome says whether some of a plan's elements may be there.
func (f *full) mayHaveSome(p *plan.Plan) bool {
	return slices.ContainsFunc(p.Frontends, func(fr plan.Frontend) bool { return f.mayHave(dialledAt(p, &fr)) })
}

func (f *full) base(complete bool) static { return f.x.c.base(&f.x.o, f.want.Facts, complete) }

// writeAll writes what differs. Nothing that serves is taken away before what takes
// its place is there.
func (x *Proxier) writeAll(ctx context.Context, f *full) error {
	if err := f.structure(ctx); err != nil {
		return fmt.Errorf("write the table's chains and maps: %w", err)
	}
	rest := f.chainsToDelete()
	x.ledger = f.ledger
	refused, err := x.run(ctx, f.groups, startBytes, believedWrong)
	if err != nil {
		return err
	}
	if err := f.removeRefused(ctx, refused); err != nil {
		return err
	}
	if err := x.remove(ctx, f.leftovers); err != nil {
		return err
	}
	for _, name := range rest {
		x.ledger.idle[name], x.ledger.found[name] = x.now(), true
	}
	if err := f.removeExtra(ctx, rest); err != nil {
		return err
	}
	if f.partial {
		return nil
	}
	return x.commit(ctx, f.completion())
}

// structure writes the table itself, its sets, and chains. Where the maps are others
// than this version's, all is made anew, together with as many Services as go into one
// transaction.
func (f *full) structure(ctx context.Context) error {
	var list []message
	rebuild := false
	for _, right := range f.have.sets {
		rebuild = rebuild || !right
	}
	if rebuild {
		list = append(list, message{what: deleteTable})
		f.have = &actual{}
		f.nothing()
	}
	if !f.have.table {
		list = append(list, message{what: putTable})
	}
	for set := range setCount {
		if _, there := f.have.sets[set]; !there {
			list = append(list, message{what: putSet, set: set})
		}
	}
	for _, s := range f.chains {
		list = f.write(list, f.x.c.chain(s))
	}
	complete := f.base(true).chains
	for i, ch := range f.base(false).chains {
		// The complete one needs no replacement if it is there already; until then
		// the other one serves.
		if f.have.chains[ch.name] != complete[i].digestOf() {
			list = f.write(list, ch)
		}
	}
	slices.SortStableFunc(list, func(a, b message) int { return order(a) - order(b) })
	if rebuild && f.x.sizeOf(list) < f.x.kernel.room()/2 {
		f.head = list
		return nil
	}
	if err := f.commitInOrder(ctx, list); err != nil || !f.have.asleep {
		return err
	}
	return f.x.commit(ctx, []message{{what: putTable}}) // the kernel wants that by itself
}

// write appends a chain if it is not as it should be.
func (f *full) write(list []message, ch chain) []message {
	h, there := f.have.chains[ch.name]
	if there && h == ch.digestOf() {
		return list
	}
	f.odd++
	if there && f.have.heads[ch.name] != ch.head() {
		list = append(list, message{what: flushChain, name: string(ch.name)}, message{what: deleteChain, name: string(ch.name)})
	}
	return append(list, message{what: writeChain, chain: ch})
}

// commitInOrder commits messages in as many transactions as they need. They are sorted:
// the base chains are the last, so that nothing is entered before it is there; a chain
// that a rule or verdict leads to stands before it.
func (f *full) commitInOrder(ctx context.Context, list []message) error {
	for len(list) > 0 {
		n, size := 0, 0
		for n < len(list) && (n == 0 || size+f.x.kernel.size(list[n]) <= f.x.kernel.room()) {
			size += f.x.kernel.size(list[n])
			n++
		}
		if err := f.x.commit(ctx, list[:n]); err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}

func order(m message) int {
	switch {
	case m.what == writeChain && m.chain.name == chainReject:
		return 1
	case m.what == writeChain && m.chain.hook != nil:
		return 3
	case m.what == writeChain:
		return 2
	}
	return 0
}

// completion gives the chains that wait until every Service is there.
func (f *full) completion() []message {
	if f.have.chains[chainServices] == digestIn(f.base(true).chains, chainServices, f) {
		return nil
	}
	return differ(f.base(false), f.base(true))
}

func digestIn(list []chain, name chainName, f *full) uint64 {
	for _, ch := range list {
		if ch.name == name {
			return ch.digestOf()
		}
	}
	return 0
}

// groups yields what each plan lacks.
func (f *full) groups(yield func(*group) bool) {
	static := &group{head: f.head}
	f.fill(static, f.base(true).elements)
	if !yield(static) {
		return
	}
	for p := range f.plans {
		rs := f.x.compile(p, f.census)
		g := &group{new: p}
		if f.mayHaveSome(p) {
			f.fill(g, rs.elements)
		} else {
			g.put, f.missing = rs.elements, f.missing+len(rs.elements)
		}
		for _, e := range rs.shared {
			// Each plan puts it, whoever else does: that one could be refused.
			if f.lacks(e) {
				g.put = append(g.put, e)
				f.missing++
			}
		}
		if len(g.put) > 0 && !yield(g) {
			return
		}
	}
}

func (f *full) fill(g *group, list []element) {
	for _, e := range list {
		if !f.lacks(e) {
			continue
		}
		f.missing++
		f.take(g, e.key)
		if e.set == setSources {
			for _, old := range f.staleRanges[frontendOf(e.key)] {
				f.take(g, old.key)
			}
		}
		g.put = append(g.put, e)
	}
}

// take has a group delete what is stale at a key.
func (f *full) take(g *group, k key) {
	if old, ok := f.stale[k]; ok {
		g.del = append(g.del, old)
		delete(f.stale, k)
	}
}

// frontendOf is a range's key without the range.
func frontendOf(k key) key {
	k.source = netip.Prefix{}
	return k
}

// removeRefused sets refused plans aside, and takes away what they have in the kernel
// from before and what the ledger holds for them.
func (f *full) removeRefused(ctx context.Context, refused []*group) error {
	var back []*group
	for _, g := range refused {
		f.x.setAside(g.new, g.refused)
		f.clients.none(g.new)
		rs := f.x.compile(g.new, f.census)
		lost := map[key]bool{}
		for _, e := range g.put {
			lost[e.key] = true
		}
		b := &group{del: g.del}
		for _, e := range rs.elements {
			if !lost[e.key] {
				b.del = append(b.del, e)
			}
		}
		for _, e := range f.x.ledger.release(&rs, f.x.now()) {
			if !lost[e.key] {
				b.del = append(b.del, e)
			}
		}
		back = append(back, b)
	}
	return f.x.remove(ctx, slices.Values(back))
}

// leftovers yields what is there and nobody wants: verdicts first, so that nothing
// leads to endpoints that go.
func (f *full) leftovers(yield func(*group) bool) {
	keys := slices.SortedFunc(maps.Keys(f.stale), key.compare)
	for len(keys) > 0 {
		n := min(len(keys), elementsMost)
		g := &group{}
		for _, k := range keys[:n] {
			g.del = append(g.del, f.stale[k])
		}
		if !yield(g) {
			return
		}
		keys = keys[n:]
	}
}

// chainsToDelete are chains that are there and nobody wants.
func (f *full) chainsToDelete() []chainName {
	wanted := map[chainName]bool{}
	for _, s := range f.chains {
		wanted[s.name()] = true
	}
	for _, ch := range f.base(true).chains {
		wanted[ch.name] = true
	}
	var out []chainName
	for name := range f.have.chains {
		if !wanted[name] {
			out = append(out, name)
		}
	}
	return out
}

// removeExtra deletes sets that we do not use, with the rules that used them: those
// are in chains that nobody wants, since all others are as they should be by now. If
// the kernel refuses, they harm nobody until somebody compares everything again.
func (f *full) removeExtra(ctx context.Context, unwanted []chainName) error {
	if len(f.have.extra) == 0 {
		return nil
	}
	var list []message
	for _, name := range unwanted {
		list = append(list, message{what: flushChain, name: string(name)})
	}
	for _, name := range f.have.extra {
		list = append(list, message{what: deleteSet, name: name})
	}
	err := f.x.kernel.commit(ctx, list)
	if back := (*rolledBack)(nil); errors.As(err, &back) && ctx.Err() == nil {
		f.x.o.Refused(true)
		return nil
	}
	return err
}

// report tells of what somebody else had changed.
func (f *full) report(x *Proxier) {
	report := func(object string, n int) {
		if n > 0 {
			x.o.Report.DriftRepaired(object, n)
		}
	}
	switch {
	case !f.have.table, f.have.asleep:
		report("table", 1)
	default:
		report("element", f.missing+len(f.stale))
		report("chain", f.odd)
	}
}
