package nftables

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/internal/aside"
)

// Options are a proxier's settings. They do not change in its life.
type Options struct {
	Family        model.Family
	MasqueradeBit int              // bit of the packet mark, 0 to 31
	Detector      proxier.Detector // must agree with Facts.DetectLocal
	AcceptInvalid bool             // do not drop packets that conntrack calls invalid
	Traffic       int              // how many Service ports are counted at the most: see Proxier.Traffic

	Report proxier.Reporter // may be nil
	// Refused, if not nil, is told of each transaction that the kernel refused;
	// cleanup says that it was one that only removed what is not needed any more.
	Refused func(cleanup bool)
}

// Proxier is the nftables proxier of one family.
type Proxier struct {
	o      Options
	c      compiler
	kernel kernel
	now    func() time.Time
	few    int // fewMost

	// What the kernel is believed to have; nil applied means that nothing is known
	// and must be read first.
	applied *plan.Set
	ledger  ledger
	census  census
	aside   *aside.Plans

	alarm chan struct{} // capacity 1

	written bool // this process has written: what it finds changed is drift
	// spent is what repairs have cost lately, as of reckoned.
	spent    time.Duration
	reckoned time.Time
}

var _ proxier.Proxier = (*Proxier)(nil)

// New returns a proxier for the network namespace of the calling thread. It changes
// nothing until Sync. It fails if the kernel cannot be talked to.
func New(o Options) (*Proxier, error) {
	k, err := openKernel(o.Family, table)
	if err != nil {
		return nil, err
	}
	if err := k.listen(); err != nil {
		_ = k.conn.Close()
		return nil, err
	}
	return newProxier(o, k), nil
}

func newProxier(o Options, k kernel) *Proxier {
	if o.Report == nil {
		o.Report = proxier.Silent{}
	}
	if o.Refused == nil {
		o.Refused = func(bool) {}
	}
	return &Proxier{o: o, c: newCompiler(&o), kernel: k, now: time.Now, few: fewMost, ledger: newLedger(),
		aside: aside.New(o.Report.SetAside), alarm: make(chan struct{}, 1)}
}

// Follow hears what the kernel tells of changes by others, until ctx ends. It may run
// beside all other methods.
func (x *Proxier) Follow(ctx context.Context) error {
	return x.kernel.follow(ctx, func() {
		select {
		case x.alarm <- struct{}{}:
		default:
		}
	})
}

// Alarm receives when somebody else has changed our table: it is time for a Check.
func (x *Proxier) Alarm() <-chan struct{} { return x.alarm }

// compile gives a plan's ruleset, with counters if it is counted.
func (x *Proxier) compile(p *plan.Plan, c census) ruleset {
	rs := x.c.compile(p)
	if c.counts(p.PortKey) {
		rs.count(p)
	}
	return rs
}

// Forget drops what is believed about the kernel. The next Sync reads it.
func (x *Proxier) Forget() {
	x.applied = nil
	x.written = false
}

// Sync makes the table equal to want. See proxier.Proxier.
func (x *Proxier) Sync(ctx context.Context, want *plan.Set) error {
	err := x.sync(ctx, want)
	if err == nil {
		x.aside.TakeBack(nil)
	}
	return err
}

func (x *Proxier) sync(ctx context.Context, want *plan.Set) error {
	if x.applied != nil {
		err := x.syncChanges(ctx, want)
		if err == nil || ctx.Err() != nil {
			return err
		}
		x.setPartlyAside(ctx, err)
		// Part of the change may be in force: start over from what is there.
		x.applied = nil
	}
	return x.syncAll(ctx, want)
}

// setAside notes that the kernel refused a plan.
func (x *Proxier) setAside(p *plan.Plan, err error) {
	x.aside.Refuse(p, fmt.Errorf("the kernel refuses it: %w", err), x.now())
}

// settleAside drops refusals that do not hold any more after a round for want. Before
// its end, whoever compares with the applied Set must know what is not in the kernel.
func (x *Proxier) settleAside(want *plan.Set) {
	x.aside.Settle()
	x.aside.Leave(want)
}

// believedWrong says whether an error shows that the kernel does not have what we
// believe: then no Service is to blame.
func believedWrong(err error) bool {
	return errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EEXIST) || errors.Is(err, syscall.EBUSY) || passing(err)
}

// passing says whether an error says nothing about what was asked for.
func passing(err error) bool {
	return errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.EINTR) || errors.Is(err, syscall.EAGAIN) ||
		errors.Is(err, syscall.EPERM) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
