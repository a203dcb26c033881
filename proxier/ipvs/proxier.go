package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
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
	MasqueradeBit int              // bit of the packet mark, 0 to 31
	Detector      proxier.Detector // must agree with Facts.DetectLocal
	RandomFully   bool             // MASQUERADE --random-fully; iptables >= 1.6.2
	Scheduler     string           // of Services that name none; "": rr
	Schedulers    []string         // what the kernel offers
	// Inside says that the kernel can map a frontend to a packet mark (ipset
	// skbinfo, xtables SET --map-mark; Linux >= 3.18). Without it node and pods
	// get only this node's endpoints of a Service with externalTrafficPolicy Local.
	Inside bool
	// Exclude are addresses of virtual servers that are never taken for ones that
	// kube-proxy wrote for a NodePort (ipvs.excludeCIDRs).
	Exclude []netip.Prefix
	// Drain gives how long a removed endpoint may keep its connections, once it
	// does not exist any more. 0: until they end.
	Drain func() time.Duration

	Report proxier.Reporter // may be nil
	Stats  xtables.Stats
}

// DefaultScheduler is the scheduler if none is configured, as in kube-proxy.
const DefaultScheduler = "rr"

// Proxier is the ipvs proxier of one family.
type Proxier struct {
	o      Options
	kernel kernel
	now    func() time.Time

	// What the kernel is believed to have; nil applied means that nothing is
	// known and must be read first.
	applied *plan.Set
	ledger  ledger
	drains  *drains
	token   token

	aside   *aside.Plans
	partial map[model.PortKey]bool      // ports of which a part is left out
	foreign map[serverKey]model.PortKey // virtual servers that somebody else has, and the port that wants them

	written bool // this process has written: what it finds changed is drift
	patrol  patrol
	// rulesDue is when the tables may be read again because others wrote to them.
	rulesDue time.Time
}

var _ proxier.Proxier = (*Proxier)(nil)

// New returns a proxier. It touches nothing until Sync. It fails if the family's
// kernel interfaces cannot be opened.
func New(o Options) (*Proxier, error) {
	k, err := newKernel(o.Family, o.Programs, o.Stats)
	if err != nil {
		return nil, err
	}
	return newProxier(o, k), nil
}

func newProxier(o Options, k kernel) *Proxier {
	if o.Report == nil {
		o.Report = proxier.Silent{}
	}
	if o.Drain == nil {
		o.Drain = func() time.Duration { return 0 }
	}
	if o.Scheduler == "" {
		o.Scheduler = DefaultScheduler
	}
	return &Proxier{o: o, kernel: k, now: time.Now, ledger: newLedger(), drains: newDrains(),
		aside: aside.New(o.Report.SetAside), partial: map[model.PortKey]bool{}, foreign: map[serverKey]model.PortKey{}}
}

func (x *Proxier) compiler(facts *plan.Facts) compiler {
	return compiler{facts: facts, scheduler: x.o.Scheduler, maglev: slices.Contains(x.o.Schedulers, "mh"), inside: x.o.Inside}
}

// Forget drops what is believed about the kernel. The next Sync reads it.
func (x *Proxier) Forget() {
	x.applied = nil
	x.written = false
}

// Sync makes the kernel's state equal to want. See proxier.Proxier.
func (x *Proxier) Sync(ctx context.Context, want *plan.Set) error {
	err := x.sync(ctx, want)
	if err == nil {
		x.takeBack()
	}
	return err
}

func (x *Proxier) sync(ctx context.Context, want *plan.Set) error {
	if x.applied != nil {
		err := x.syncChanges(ctx, want)
		if err == nil || ctx.Err() != nil {
			return err
		}
		// Part of the change may be in force: start over from what is there.
		x.Forget()
	}
	return x.syncAll(ctx, want)
}

// takeBack reports refusals that do not hold any more.
func (x *Proxier) takeBack() {
	held := map[model.PortKey]bool{}
	for _, key := range x.foreign {
		held[key] = true
	}
	x.aside.TakeBack(func(key model.PortKey) bool { return held[key] || x.partial[key] })
}

// syncChanges writes the difference between the last applied Set and want.
func (x *Proxier) syncChanges(ctx context.Context, want *plan.Set) error {
	r := x.newRound(x.compiler(x.applied.Facts), x.compiler(want.Facts))
	if x.applied.Facts != want.Facts {
		// Facts changed: every plan may compile to something else.
		for p := range x.applied.All {
			if want.Get(p.PortKey) == nil {
				r.step(p, nil)
			}
		}
		for p := range want.All {
			r.step(x.applied.Get(p.PortKey), p)
		}
		if is := base(&x.o, want.Facts); !reflect.DeepEqual(is, base(&x.o, x.applied.Facts)) {
			if err := x.prepare(ctx, is); err != nil {
				return err
			}
		}
	} else {
		plan.Changes(x.applied, want, func(old, new *plan.Plan) bool { r.step(old, new); return true })
	}
	x.readmit(r, want)
	if err := r.findForeign(ctx); err != nil {
		return err
	}
	ops := r.ops()
	failures, err := x.kernel.apply(ctx, ops)
	if err != nil {
		return err
	}
	x.applied = want
	return x.withdraw(ctx, r.is, failures)
}

// prepare brings rules into force that facts have changed. What others wrote to
// the tables before is for Check to see.
func (x *Proxier) prepare(ctx context.Context, is static) error {
	before, err := x.kernel.token(ctx)
	if err != nil {
		return err
	}
	if _, err := x.kernel.prepare(ctx, is); err != nil || before.tables != x.token.tables {
		return err
	}
	x.token, err = x.kernel.token(ctx)
	return err
}

// readmit takes plans that were set aside and are due for another try into a
// round. What is still refused is set aside again, for longer.
func (x *Proxier) readmit(r *round, want *plan.Set) {
	x.aside.Leave(want)
	for _, p := range x.aside.Try(want, x.now()) {
		r.step(nil, p)
	}
}

// withdraw deals with what the kernel refused. A destination, or the
// masquerading of one to itself, is left out; for anything else the whole plan is
// set aside, and what was not refused of it is taken back.
func (x *Proxier) withdraw(ctx context.Context, c compiler, failures []failure) error {
	var shared []error
	blamed := map[model.PortKey]error{}
	for _, f := range failures {
		switch {
		case f.op.owner == nil || x.applied.Get(*f.op.owner) == nil:
			shared = append(shared, fmt.Errorf("%s: %w", f.op, f.err))
		case f.part():
		case blamed[*f.op.owner] == nil:
			blamed[*f.op.owner] = fmt.Errorf("the kernel refuses %s: %w", f.op, f.err)
		}
	}
	for _, f := range failures {
		if f.part() && blamed[*f.op.owner] == nil {
			x.leaveOut(f)
		}
	}
	if len(shared) > 0 {
		return fmt.Errorf("change the kernel's tables: %w", errors.Join(shared...))
	}
	if len(blamed) > 1 && len(blamed) == x.applied.Len() {
		return fmt.Errorf("everything is refused, no Service is to blame: %w", failures[0].err)
	}
	r := x.newRound(c, c)
	for key, err := range blamed {
		p := x.applied.Get(key)
		r.step(p, nil)
		x.aside.Refuse(p, err, x.now())
	}
	x.aside.Settle()
	if len(blamed) == 0 {
		return nil
	}
	again, err := x.kernel.apply(ctx, r.ops())
	if err == nil && len(again) > 0 {
		err = fmt.Errorf("take back what belongs to refused Services: %s: %w", again[0].op, again[0].err)
	}
	return err
}

// part says whether a port can be served without what was refused.
func (f failure) part() bool {
	return f.op.owner != nil && (f.op.kind == putDest || f.op.kind == addEntry && f.op.set == setLoopBack)
}

// leaveOut reports a part of a port that the kernel refuses. The patrol finds it
// missing, and has it tried again.
func (x *Proxier) leaveOut(f failure) {
	key := *f.op.owner
	x.partial[key] = true
	x.aside.Tell(key, fmt.Errorf("the kernel refuses %s, which is left out: %w", f.op, f.err))
	if f.op.kind == addEntry {
		x.ledger.elements[f.op.set]--
	}
}

// Prime programs the important Services of a Set, if the kernel has no virtual
// servers of ours at all, and says whether it did. The next Sync reads what is
// there.
func (x *Proxier) Prime(ctx context.Context, want *plan.Set) (bool, error) {
	if want.Len() == 0 {
		return false, nil
	}
	have, before, err := x.read(ctx)
	if err != nil || have.othersServe || x.anyOurs(have) {
		return false, err
	}
	err = x.syncFrom(ctx, have, before, want, func(p *plan.Plan) bool { return p.Important })
	x.Forget()
	return err == nil, err
}
