// Package iptables forwards Service traffic by iptables chains, with
// kube-proxy's names and semantics. It knows plans; it does not know where they
// come from, nor how the iptables programs are run (proxier/internal/xtables).
//
// compile.go turns a plan into chains, dispatch.go finds a connection's chain
// among many, base.go has what does not depend on Services, kernel.go acts,
// and this file decides what must be written.
package iptables

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/internal/aside"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// Options are a proxier's settings. They do not change in its life.
type Options struct {
	Family        model.Family
	Programs      xtables.Programs
	MasqueradeBit int      // bit of the packet mark, 0 to 31
	Detector      Detector // must agree with Facts.DetectLocal
	RandomFully   bool     // MASQUERADE --random-fully; iptables >= 1.6.2
	AcceptInvalid bool     // do not drop packets that conntrack calls invalid
	NFAcct        bool     // the kernel has the two nfacct counters

	Report proxier.Reporter // may be nil
	Stats  xtables.Stats
	// Rules, if not nil, is told after each write how many rules a table has of
	// ours and how many were written.
	Rules func(table string, total, written int)
}

// Proxier is the iptables proxier of one family.
type Proxier struct {
	o      Options
	kernel kernel
	now    func() time.Time

	// What the kernel is believed to have; nil applied means that nothing is
	// known and must be read first.
	applied *plan.Set
	forest  forest
	token   string
	others  bool           // somebody else wrote meanwhile: verify at the next Check
	total   map[string]int // rules of ours, by table
	aside   *aside.Plans

	written bool // this process has written: what it finds changed is drift
	unread  bool // written in full and not read back yet
	odd     map[tableRef]oddity

	verified   time.Time
	verifyCost time.Duration
}

var _ proxier.Proxier = (*Proxier)(nil)

// New returns a proxier. It touches nothing until Sync.
func New(o Options) *Proxier {
	return newProxier(o, newXTKernel(o.Programs, o.Stats))
}

func newProxier(o Options, k kernel) *Proxier {
	if o.Report == nil {
		o.Report = proxier.Silent{}
	}
	return &Proxier{o: o, kernel: k, now: time.Now, aside: aside.New(o.Report.SetAside), odd: map[tableRef]oddity{}}
}

// Forget drops what is believed about the kernel. The next Sync reads it.
func (x *Proxier) Forget() {
	x.applied = nil
	x.written = false
}

// Sync makes the tables equal to want. See proxier.Proxier.
func (x *Proxier) Sync(ctx context.Context, want *plan.Set) error {
	err := x.sync(ctx, want)
	if err == nil {
		x.aside.TakeBack(nil)
	}
	return err
}

func (x *Proxier) sync(ctx context.Context, want *plan.Set) error {
	if x.applied != nil && newCompiler(&x.o, x.applied).localhostNodePorts() != newCompiler(&x.o, want).localhostNodePorts() {
		x.Forget() // other jumps are wanted, and which are there must be read
	}
	if x.applied != nil {
		err := x.syncChanges(ctx, want)
		if err == nil || ctx.Err() != nil {
			return err
		}
		// Part of the change may be in force: start over from what is there. If a
		// Service is to blame it is found there.
		x.Forget()
	}
	return x.syncAll(ctx, want)
}

// readmit forgets refusals whose plan is gone or different now, and those due for
// another try that the kernel accepts now. It returns the plans of the latter.
// They are tried apart from everything else: with the others, one that is still
// refused would cost a full comparison and a search each time.
func (x *Proxier) readmit(ctx context.Context, want *plan.Set) []*plan.Plan {
	var again []*plan.Plan
	x.aside.Leave(want)
	for _, p := range x.aside.Try(want, x.now()) {
		if x.retry(ctx, want, p) != nil {
			x.aside.Again(p, x.now())
			continue
		}
		x.aside.Accept(p)
		again = append(again, p)
	}
	return again
}

// retry asks the kernel whether it accepts the rules of one plan.
func (x *Proxier) retry(ctx context.Context, want *plan.Set, p *plan.Plan) error {
	x.noticeOthers()
	err := x.kernel.try(ctx, newCompiler(&x.o, want).trial([]*plan.Plan{p}))
	x.token, _ = x.kernel.token()
	return err
}

// syncChanges writes the difference between the last applied Set and want.
func (x *Proxier) syncChanges(ctx context.Context, want *plan.Set) error {
	was, is := newCompiler(&x.o, x.applied), newCompiler(&x.o, want)
	had := x.aside.Clone()
	again := x.readmit(ctx, want)
	d := newDifference()
	step := func(old, new *plan.Plan) {
		var a, b ruleset
		if old != nil && !had.Has(old) {
			a = was.compile(old)
		}
		if new != nil && x.aside.Keep(new) {
			b = is.compile(new)
		}
		d.replace(a, b)
	}
	if was != is {
		// Facts or form changed: every plan may compile to something else.
		for p := range x.applied.All {
			if want.Get(p.PortKey) == nil {
				step(p, nil)
			}
		}
		for p := range want.All {
			step(x.applied.Get(p.PortKey), p)
		}
	} else {
		plan.Changes(x.applied, want, func(old, new *plan.Plan) bool { step(old, new); return true })
		for _, p := range again {
			d.replace(ruleset{}, is.compile(p))
		}
	}
	next := d.plant(x.forest)
	if was != is {
		d.compare(x.forest, next, was, is, nil)
		d.compareBase(was.base(&x.o), is.base(&x.o))
	} else {
		d.compare(x.forest, next, was, is, &d.keys)
	}
	ch := d.change()
	x.noticeOthers()
	if err := x.kernel.apply(ctx, ch); err != nil {
		return err
	}
	x.believe(want, next, !ch.nothing())
	if !ch.nothing() {
		for table, n := range d.grown {
			x.total[table] += n
		}
		x.countRules(x.total, d.wrote)
	}
	return nil
}

// noticeOthers is called before the tables are written: the new token that this
// gives them would hide that somebody else had written, too. A cluster in which
// something changes all the time would never see it.
func (x *Proxier) noticeOthers() {
	if now, ok := x.kernel.token(); ok && now != x.token {
		x.others = true
	}
}

// believe records what is in force now.
func (x *Proxier) believe(want *plan.Set, f forest, wrote bool) {
	if wrote || x.token == "" {
		x.token, _ = x.kernel.token()
	}
	x.applied, x.forest, x.written = want, f, true
}

// syncAll reads the tables and writes what differs from want.
func (x *Proxier) syncAll(ctx context.Context, want *plan.Set) error {
	x.readmit(ctx, want)
	have, err := x.read(ctx)
	if err != nil {
		return err
	}
	if len(have.chains) == 0 && want.Len() > 0 {
		// A new node: what everything else needs comes first.
		if have, err = x.serveImportant(ctx, want, have); err != nil {
			return err
		}
	}
	err = x.applyAll(ctx, want, have, x.aside.Keep)
	if refused(err) && ctx.Err() == nil {
		err = x.applyWithoutCulprits(ctx, want, err)
	}
	return err
}

// refused says whether an error tells that rules are to blame, not a lock that
// somebody holds or a program that was killed.
func refused(err error) bool {
	var r *xtables.RestoreError
	return errors.As(err, &r) && r.Refused()
}

// read reads the tables, and remembers what that cost and which state it saw:
// a change by somebody else from now on is noticed.
func (x *Proxier) read(ctx context.Context) (*actual, error) {
	start := x.now()
	x.token, _ = x.kernel.token()
	x.others = false
	have, err := x.kernel.read(ctx)
	x.verified = x.now()
	x.verifyCost = x.verified.Sub(start)
	return have, err
}

// Prime programs the important Services of a Set, if the kernel has no rules of
// ours at all, and says whether it did. The next Sync reads what is there.
func (x *Proxier) Prime(ctx context.Context, want *plan.Set) (bool, error) {
	have, err := x.read(ctx)
	if err != nil || len(have.chains) > 0 || want.Len() == 0 {
		return false, err
	}
	_, err = x.serveImportant(ctx, want, have)
	return err == nil, err
}

// serveImportant programs the important Services on a node that has no rules of
// ours yet. A refusal is left to the full load, which finds the culprit.
func (x *Proxier) serveImportant(ctx context.Context, want *plan.Set, have *actual) (*actual, error) {
	err := x.applyAll(ctx, want, have, func(p *plan.Plan) bool { return p.Important })
	x.Forget()
	if ctx.Err() != nil {
		return nil, err
	}
	return x.read(ctx)
}

func (x *Proxier) applyWithoutCulprits(ctx context.Context, want *plan.Set, refusal error) error {
	culprits := x.culprits(ctx, want)
	if len(culprits) == 0 {
		return refusal
	}
	for p, why := range culprits {
		x.aside.Refuse(p, why, x.now())
	}
	have, err := x.read(ctx)
	if err != nil {
		return err
	}
	return x.applyAll(ctx, want, have, x.aside.Keep)
}

// applyAll writes every chain of the plans that keep keeps which the kernel does
// not have as it should be, and removes chains of ours that nothing wants.
func (x *Proxier) applyAll(ctx context.Context, want *plan.Set, have *actual, keep func(*plan.Plan) bool) error {
	c := newCompiler(&x.o, want)
	var f forest
	var total, differs map[string]int
	seen := make(map[tableRef]bool, len(have.chains))
	diff := func(emit func(tableChain)) {
		total, differs = map[string]int{}, map[string]int{}
		f = c.everything(want, &x.o, keep, func(ch tableChain) {
			ref := tableRef{ch.table, ch.name}
			seen[ref] = true
			total[ch.table] += len(ch.rules)
			if h, ok := have.chains[ref]; !ok || !x.reads(ref, h, ch.rules) {
				differs[ch.table] += len(ch.rules) + 1
				emit(ch)
			}
		})
	}
	// Compiling twice costs less than holding everything: the first pass counts.
	var changed []tableRef
	diff(func(ch tableChain) { changed = append(changed, tableRef{ch.table, ch.name}) })
	ch := x.changeAll(c, have, seen)
	if len(changed) > 0 {
		ch.stream = diff
	}
	x.noticeOthers()
	if err := x.kernel.apply(ctx, ch); err != nil {
		return err
	}
	if x.written {
		x.report("chain", len(changed)+len(ch.del)+len(ch.empty))
		x.report("jump", len(ch.jumps)+len(ch.append))
	}
	x.unread = x.unread || !ch.nothing()
	x.believe(want, f, !ch.nothing())
	x.total = total
	x.countRules(total, differs)
	return nil
}

// changeAll is what a full comparison finds besides chains to write.
func (x *Proxier) changeAll(c compiler, have *actual, wanted map[tableRef]bool) *change {
	ch := &change{}
	for ref, h := range have.chains {
		switch {
		case wanted[ref]:
		case !have.held[ref]:
			ch.del = append(ch.del, ref)
		case h != hashRules(nil):
			// The kernel does not delete a chain that somebody's rule leads to, and
			// would refuse the rest of the change with it.
			ch.empty = append(ch.empty, ref)
		}
	}
	sortRefs(ch.del)
	sortRefs(ch.empty)
	for _, j := range c.jumps() {
		if !have.rules[tableRef{j.table, j.from}][j.text] {
			ch.jumps = append(ch.jumps, j)
		}
	}
	firewall := tableRef{tableFilter, chainFirewall}
	if martian, ok := c.martianRule(); ok && !have.rules[firewall][martian] {
		if have.rules[firewall] == nil {
			ch.empty = append(ch.empty, firewall) // naming it would empty the kubelet's
		}
		ch.append = append(ch.append, tableChain{firewall.table, chain{firewall.name, []string{martian}}})
	}
	return ch
}

func (x *Proxier) countRules(total, last map[string]int) {
	if x.o.Rules == nil {
		return
	}
	for _, table := range []string{tableFilter, tableNAT} {
		x.o.Rules(table, total[table], last[table])
	}
}

func (x *Proxier) report(object string, n int) {
	if n > 0 {
		x.o.Report.DriftRepaired(object, n)
	}
}

// oddity is a chain that reads back differently than it was written.
type oddity struct{ reads, written uint64 }

// learnOdd reads back what was written in full. Another version of iptables may
// print a rule differently than we write it; without this such a chain would be
// taken for changed by somebody, and repaired for ever.
func (x *Proxier) learnOdd(ctx context.Context) error {
	token := x.token
	have, err := x.kernel.read(ctx)
	if err != nil {
		return err
	}
	if now, ok := x.kernel.token(); !ok || now != token {
		return nil // somebody else wrote: nothing can be learnt now
	}
	x.unread = false
	newCompiler(&x.o, x.applied).everything(x.applied, &x.o, x.aside.Keep, func(ch tableChain) {
		ref := tableRef{ch.table, ch.name}
		if h, ok := have.chains[ref]; ok && h != hashRules(ch.rules) {
			x.odd[ref] = oddity{h, hashRules(ch.rules)}
		}
	})
	return nil
}

// reads says whether a chain that reads back with hash h holds rules.
func (x *Proxier) reads(ref tableRef, h uint64, rules []string) bool {
	w := hashRules(rules)
	return h == w || x.odd[ref] == oddity{h, w}
}

// mostTries bounds one search for culprits. What it has found is set aside, and
// the next Sync, which fails again, goes on from there.
const mostTries = 300

// culprits finds the plans whose rules the kernel refuses, by trying halves. It
// finds none if not even rules that belong to no Service are accepted.
func (x *Proxier) culprits(ctx context.Context, want *plan.Set) map[*plan.Plan]error {
	c := newCompiler(&x.o, want)
	var all []*plan.Plan
	for p := range want.All {
		if x.aside.Keep(p) {
			all = append(all, p)
		}
	}
	bad := map[*plan.Plan]error{}
	if x.kernel.try(ctx, c.base(&x.o)) != nil {
		return nil
	}
	tries, innocent := 0, false
	var search func([]*plan.Plan)
	search = func(list []*plan.Plan) {
		if len(list) == 0 || ctx.Err() != nil || tries == mostTries || innocent {
			return
		}
		tries++
		err := x.kernel.try(ctx, c.trial(list))
		switch {
		case err == nil:
		case !refused(err):
			innocent = true // nothing can be learnt now; the next Sync tries again
		case len(list) == 1:
			bad[list[0]] = fmt.Errorf("the kernel refuses its rules: %w", err)
		default:
			search(list[:len(list)/2])
			search(list[len(list)/2:])
		}
	}
	search(all)
	if len(bad) == len(all) {
		return nil // everything is refused: no Service is to blame
	}
	return bad
}

// trial gives all rules of some plans as if they stood in one chain.
func (c compiler) trial(list []*plan.Plan) []tableChain {
	var out []tableChain
	for _, p := range list {
		rs := c.compile(p)
		for _, ch := range rs.chains {
			out = append(out, tableChain{tableNAT, ch})
		}
		for _, e := range rs.entries {
			out = append(out, tableChain{treeSpecs[e.tree].table, chain{rules: []string{e.text}}})
		}
	}
	return out
}

// checkShare bounds what verification may cost: one part in checkShare of the
// time. Other users of the tables cause a verification with every change.
const checkShare = 20

// Check looks, at next to no cost, whether somebody changed the tables since the
// last Sync; if so it verifies them and repairs what is ours. With force it
// verifies in any case. It says whether it verified. It does nothing before the
// first Sync.
func (x *Proxier) Check(ctx context.Context, force bool) (bool, error) {
	if x.applied == nil {
		return false, nil
	}
	if !force {
		token, ok := x.kernel.token()
		same := token == x.token && !x.others
		if ok && same && x.unread {
			return false, x.learnOdd(ctx)
		}
		if !ok || same || x.now().Sub(x.verified) < checkShare*x.verifyCost {
			return false, nil
		}
	}
	return true, x.syncAll(ctx, x.applied)
}
