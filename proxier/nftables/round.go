package nftables

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// How large transactions are made: so large that what each costs by itself does not
// matter, and so small that others, who wait for the kernel's lock meanwhile, hardly
// notice. In a start each has verdicts, and with each the kernel looks through all
// that are there.
const (
	transactionBytes = 128 << 10
	startBytes       = 2 << 20
)

// syncChanges writes the difference between the last applied Set and want.
func (x *Proxier) syncChanges(ctx context.Context, want *plan.Set) error {
	groups, next := x.changes(want)
	if err := x.prepare(ctx, want, groups); err != nil {
		return err
	}
	if _, err := x.run(ctx, slices.Values(groups), transactionBytes, believedWrong); err != nil {
		return err
	}
	if err := x.conclude(ctx, groups); err != nil {
		return err
	}
	x.settleAside(want)
	x.applied, x.written, x.census = want, true, next
	return x.forgetClients(ctx, staleOf(groups), false)
}

// changes gives a group for every plan that changes, or is tried again.
func (x *Proxier) changes(want *plan.Set) ([]*group, census) {
	again := x.aside.Try(want, x.now())
	var come, gone []model.PortKey
	plan.Changes(x.applied, want, func(old, new *plan.Plan) bool {
		switch {
		case old == nil:
			come = append(come, new.PortKey)
		case new == nil:
			gone = append(gone, old.PortKey)
		}
		return true
	})
	next, crossed := x.census.change(come, gone)
	var groups []*group
	add := func(old, new *plan.Plan) {
		g := &group{}
		if old != nil && !x.aside.Has(old) {
			g.old, g.was = old, x.compile(old, x.census)
		}
		if new != nil && x.aside.Keep(new) {
			g.new, g.is = new, x.compile(new, next)
		}
		if g.old != nil || g.new != nil {
			groups = append(groups, g)
		}
	}
	plan.Changes(x.applied, want, func(old, new *plan.Plan) bool { add(old, new); return true })
	for _, k := range crossed {
		if p := want.Get(k); p != nil && p == x.applied.Get(k) && !x.aside.Has(p) {
			add(p, p)
		}
	}
	for _, p := range again {
		add(nil, p)
	}
	x.compare(groups)
	return takersFirst(groups), next
}

// takersFirst puts whoever takes a frontend over before who gives it up, and deletes
// the endpoints that its verdict has led to. Ports that swap frontends stay as they
// are: they go in one transaction, if it is not too large.
func takersFirst(groups []*group) []*group {
	var out []*group
	done := map[*group]bool{}
	var visit func(g *group)
	visit = func(g *group) {
		if done[g] {
			return
		}
		done[g] = true
		for _, taker := range g.takers {
			visit(taker)
		}
		out = append(out, g)
	}
	for _, g := range groups {
		visit(g)
	}
	return out
}

// compare works out what groups delete and put. An element that one gives up and
// another takes in the same round is replaced by the latter, in one transaction.
func (x *Proxier) compare(groups []*group) {
	had := map[key]element{}
	owner := map[key]*group{}
	wanted := map[key]bool{}
	gone, come := make([][]element, len(groups)), make([][]element, len(groups))
	for i, g := range groups {
		gone[i], come[i] = unmatched(g.was.elements, g.is.elements)
		for _, e := range gone[i] {
			had[e.key], owner[e.key] = e, g
		}
	}
	for i, g := range groups {
		for _, e := range come[i] {
			wanted[e.key] = true
			old, there := had[e.key]
			switch from := owner[e.key]; {
			case there && old == e && from == g:
				continue
			case there:
				g.del = append(g.del, old)
				if from != g {
					g.taken = append(g.taken, old)
					from.give(e.key, g)
				}
			}
			g.put = append(g.put, e)
		}
		for _, e := range g.is.shared {
			if x.ledger.shared[e.key] == 0 {
				g.put = append(g.put, e)
			}
		}
	}
	for i, g := range groups {
		for _, e := range gone[i] {
			if !wanted[e.key] {
				g.del = append(g.del, e)
			}
		}
	}
}

// unmatched leaves out what two lists have in common, where they are in the same order:
// nearly all, if one of many endpoints changes. What is in both may be left in both.
func unmatched(was, is []element) (gone, come []element) {
	for len(was) > 0 && len(is) > 0 {
		if was[0] == is[0] {
			was, is = was[1:], is[1:]
			continue
		}
		order := was[0].compare(is[0].key)
		if order <= 0 {
			gone, was = append(gone, was[0]), was[1:]
		}
		if order >= 0 {
			come, is = append(come, is[0]), is[1:]
		}
	}
	return append(gone, was...), append(come, is...)
}

func (g *group) give(k key, to *group) {
	if g.given == nil {
		g.given = map[key]bool{}
	}
	g.given[k] = true
	if !slices.Contains(g.takers, to) {
		g.takers = append(g.takers, to)
	}
}

// prepare writes what groups lead to: chains that are not there yet, and what facts
// have changed of the static part.
func (x *Proxier) prepare(ctx context.Context, want *plan.Set, groups []*group) error {
	var list []message
	var fresh []chainSpec
	for _, g := range groups {
		for _, s := range g.is.chains {
			if !x.ledger.has(s) && !slices.Contains(fresh, s) {
				fresh = append(fresh, s)
				list = append(list, message{what: writeChain, chain: x.c.chain(s)})
			}
		}
	}
	if want.Facts != x.applied.Facts {
		list = append(list, differ(x.c.base(&x.o, x.applied.Facts, true), x.c.base(&x.o, want.Facts, true))...)
	}
	if err := x.commit(ctx, list); err != nil {
		return fmt.Errorf("write chains: %w", err)
	}
	for _, s := range fresh {
		x.ledger.idle[s.name()] = x.now()
		delete(x.ledger.found, s.name())
	}
	return nil
}

// differ gives what leads from one static part to another.
func differ(was, is static) []message {
	var list []message
	for _, ch := range is.chains {
		i := slices.IndexFunc(was.chains, func(o chain) bool { return o.name == ch.name })
		if i < 0 || !sameRules(was.chains[i].rules, ch.rules) {
			list = append(list, message{what: writeChain, chain: ch})
		}
	}
	gone := slices.DeleteFunc(slices.Clone(was.chains), func(o chain) bool {
		return slices.ContainsFunc(is.chains, func(ch chain) bool { return ch.name == o.name })
	})
	for _, what := range []verb{flushChain, deleteChain} {
		for _, ch := range gone {
			list = append(list, message{what: what, name: string(ch.name)})
		}
	}
	without := func(list, other []element) []element {
		return slices.DeleteFunc(slices.Clone(list), func(e element) bool { return slices.Contains(other, e) })
	}
	list = append(list, pack(deleteElements, without(was.elements, is.elements))...)
	return append(list, pack(putElements, without(is.elements, was.elements))...)
}

func sameRules(a, b []rule) bool {
	return slices.EqualFunc(a, b, func(x, y rule) bool { return x.text == y.text })
}

// conclude brings the ledger up to date with what a round has done, takes back what
// is left of refused plans, and deletes what nobody needs any more.
func (x *Proxier) conclude(ctx context.Context, groups []*group) error {
	var back []*group
	for _, g := range groups {
		if g.refused == nil {
			x.ledger.hold(&g.is)
			continue
		}
		x.setAside(g.new, g.refused)
		b := &group{del: slices.Clone(g.taken)}
		for _, e := range g.was.elements {
			if !g.given[e.key] {
				b.del = append(b.del, e)
			}
		}
		back = append(back, b)
	}
	var unneeded []element
	for _, g := range groups {
		unneeded = append(unneeded, x.ledger.release(&g.was, x.now())...)
	}
	back = append(back, &group{del: unneeded})
	return x.remove(ctx, slices.Values(back))
}

// remove commits groups that only delete: no refusal is to be expected.
func (x *Proxier) remove(ctx context.Context, groups iter.Seq[*group]) error {
	if _, err := x.run(ctx, groups, startBytes, func(error) bool { return true }); err != nil {
		return fmt.Errorf("delete what is not needed any more: %w", err)
	}
	return nil
}

// run commits groups, as many in a transaction as most bytes hold, and returns those
// that the kernel refused. fatal says which refusals are nobody's fault, but a sign that
// something else is wrong: those end the round. It holds no more groups than two
// transactions': while the kernel is at one, the next is prepared.
func (x *Proxier) run(ctx context.Context, groups iter.Seq[*group], most int, fatal func(error) bool) (refused []*group, err error) {
	var batch []*group
	size := 0
	wait := func() error { return nil }
	collect := func(batch []*group, err error) error {
		for _, g := range batch {
			if g.refused != nil {
				refused = append(refused, g)
			}
		}
		return err
	}
	for g := range groups {
		n := x.sizeOf(g.messages())
		if size > 0 && size+n > min(most, x.kernel.room()) {
			if err := wait(); err != nil {
				return refused, err
			}
			full, done := batch, make(chan error, 1)
			go func() { done <- x.commitGroups(ctx, full, fatal) }()
			wait = func() error { return collect(full, <-done) }
			batch, size = nil, 0
		}
		batch, size = append(batch, g), size+n
	}
	if err := wait(); err != nil {
		return refused, err
	}
	return refused, collect(batch, x.commitGroups(ctx, batch, fatal))
}

func (x *Proxier) sizeOf(list []message) int {
	n := 0
	for _, m := range list {
		n += x.kernel.size(m)
	}
	return n
}

// commitGroups commits groups in one transaction. If the kernel refuses some, the
// others are tried again without them; if it does not say which, in halves.
func (x *Proxier) commitGroups(ctx context.Context, batch []*group, fatal func(error) bool) error {
	var list []message
	var of []*group
	for _, g := range batch {
		for _, m := range g.messages() {
			list, of = append(list, m), append(of, g)
		}
	}
	if len(batch) == 1 && x.sizeOf(list) > x.kernel.room() {
		return x.commitStages(ctx, batch[0], fatal)
	}
	err := x.commit(ctx, list)
	var back *rolledBack
	if err == nil || !errors.As(err, &back) || ctx.Err() != nil {
		return err
	}
	culprits := map[*group]error{}
	for i, err := range back.refused {
		if fatal(err) {
			return err
		}
		culprits[of[i]] = err
	}
	switch {
	case len(culprits) > 0:
	case errors.Is(err, nlbatch.ErrTooLarge) && len(batch) == 1:
		return x.commitStages(ctx, batch[0], fatal)
	case len(batch) > 1:
		half := len(batch) / 2
		if err := x.commitGroups(ctx, batch[:half], fatal); err != nil {
			return err
		}
		return x.commitGroups(ctx, batch[half:], fatal)
	case fatal(err):
		return err
	default:
		culprits[batch[0]] = err
	}
	return x.withoutCulprits(ctx, batch, culprits, fatal)
}

func (x *Proxier) withoutCulprits(ctx context.Context, batch []*group, culprits map[*group]error, fatal func(error) bool) error {
	var rest []*group
	for _, g := range batch {
		switch err := culprits[g]; {
		case err == nil:
			rest = append(rest, g)
		case g.new == nil: // what goes cannot be set aside
			return err
		default:
			g.refused = err
		}
	}
	if len(rest) == 0 {
		return nil
	}
	return x.commitGroups(ctx, rest, fatal)
}

// refusedPartly is a plan that is to be set aside when a part of it is in force already.
// Only a comparison of everything finds what is left of it.
type refusedPartly struct {
	plan *plan.Plan
	err  error
}

func (r *refusedPartly) Error() string {
	return "a part of what is too large for one transaction: " + r.err.Error()
}
func (r *refusedPartly) Unwrap() error { return r.err }

// commitStages commits a group that is too large for one transaction.
func (x *Proxier) commitStages(ctx context.Context, g *group, fatal func(error) bool) error {
	var batch []message
	size := 0
	for _, stage := range append(g.stages(), nil) {
		n := x.sizeOf(stage)
		if size > 0 && (stage == nil || size+n > x.kernel.room()) {
			if err := x.commit(ctx, batch); err != nil {
				return x.stageFailed(ctx, g, err, fatal)
			}
			batch, size = nil, 0
		}
		batch, size = append(batch, stage...), size+n
	}
	return nil
}

func (x *Proxier) stageFailed(ctx context.Context, g *group, err error, fatal func(error) bool) error {
	var back *rolledBack
	if !errors.As(err, &back) || ctx.Err() != nil || g.new == nil || back.is(fatal) {
		return fmt.Errorf("a part of what is too large for one transaction: %w", err)
	}
	return &refusedPartly{g.new, err}
}

// setPartlyAside sets the plan of an error aside, if it is one of a part of a plan.
func (x *Proxier) setPartlyAside(ctx context.Context, err error) bool {
	var partly *refusedPartly
	if !errors.As(err, &partly) || ctx.Err() != nil {
		return false
	}
	x.setAside(partly.plan, partly.err)
	return true
}

func (x *Proxier) commit(ctx context.Context, list []message) error {
	if len(list) == 0 {
		return nil
	}
	err := x.kernel.commit(ctx, list)
	if err != nil && ctx.Err() == nil {
		x.o.Refused(false)
	}
	return err
}
