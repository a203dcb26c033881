package nftables

import (
	"context"
	"errors"
	"slices"
	"time"
)

const (
	// checkShare and checkCredit bound what it costs that somebody changes our table all
	// the time: one part in checkShare of the time, but for so much at once.
	checkShare  = 10
	checkCredit = 3 * time.Second
	// sweepAfter is how long a chain that nobody needs is kept. Numbers of endpoints
	// come and go; and before Linux 6.2 a chain counted as needed for a moment after
	// the last verdict that led to it.
	sweepAfter = 10 * time.Second
)

// Check looks whether the kernel has told of changes by others, and repairs them;
// with force it looks at everything in any case. It also deletes chains that are not
// needed any more, and tries again what the kernel refused, when that is due. It
// says whether it looked at everything. It does nothing before the first Sync.
func (x *Proxier) Check(ctx context.Context, force bool) (bool, error) {
	if x.applied == nil {
		return false, nil
	}
	if x.aside.Due(x.now()) {
		if err := x.sync(ctx, x.applied); err != nil {
			return false, err
		}
		x.aside.TakeBack(nil)
	}
	if err := x.sweep(ctx); err != nil {
		return false, err
	}
	if !force && (!x.affords() || !x.kernel.disturbed()) {
		return false, nil
	}
	start := x.now()
	err := x.syncAll(ctx, x.applied)
	if !force {
		x.spent += x.now().Sub(start)
	}
	return true, err
}

// affords says whether the table may be compared again. What was spent on it is
// forgotten in time.
func (x *Proxier) affords() bool {
	now := x.now()
	x.spent = max(0, x.spent-now.Sub(x.reckoned)/checkShare)
	x.reckoned = now
	return x.spent < checkCredit
}

// sweep deletes chains that nobody has needed for some time. A kernel that says that
// one is needed is asked again later.
func (x *Proxier) sweep(ctx context.Context) error {
	var names []chainName
	for name, since := range x.ledger.idle {
		if x.now().Sub(since) >= sweepAfter {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	var list []message
	for _, what := range []verb{flushChain, deleteChain} {
		for _, name := range names {
			list = append(list, message{what: what, name: string(name)})
		}
	}
	err := x.kernel.commit(ctx, list)
	var back *rolledBack
	switch {
	case err == nil:
		for _, name := range names {
			delete(x.ledger.idle, name)
			delete(x.ledger.found, name)
		}
	case errors.As(err, &back) && ctx.Err() == nil:
		x.o.Refused(true)
		for _, name := range names {
			x.ledger.idle[name] = x.now()
		}
	default:
		return err
	}
	return nil
}
