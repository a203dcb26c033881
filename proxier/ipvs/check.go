package ipvs

import (
	"context"
	"maps"
	"slices"
	"time"
)

// patrol goes round the virtual servers and compares them with what they should
// be, a few at each check: the kernel has no notion of "something changed". Each
// round begins with the addresses.
type patrol struct {
	left []serverKey
}

const (
	// patrolChecks is in how many checks every virtual server is looked at, if the
	// kernel is fast enough.
	patrolChecks = 60
	patrolStep   = 10
	// patrolTime is after what time a check goes home: changes wait for it.
	patrolTime = 5 * time.Millisecond
)

// Check ends what is drained, and looks for changes made by others: at the sizes
// of the sets, at the tables' token, and at a part of the virtual servers each
// time. It also tries again what the kernel refused, when that is due. If
// something is not as it was left, everything is read and repaired. With force it
// is in any case. It says whether it looked at everything. It does nothing before
// the first Sync.
func (x *Proxier) Check(ctx context.Context, force bool) (bool, error) {
	if x.applied == nil {
		return false, nil
	}
	if err := x.drain(ctx); err != nil {
		return false, err
	}
	if x.aside.Due(x.now()) {
		if err := x.syncChanges(ctx, x.applied); err != nil {
			return false, err
		}
		x.takeBack()
	}
	if !force {
		right, err := x.looksRight(ctx)
		if err != nil || right {
			return false, err
		}
	}
	return true, x.syncAll(ctx, x.applied)
}

func (x *Proxier) looksRight(ctx context.Context) (bool, error) {
	now, err := x.kernel.token(ctx)
	if err != nil {
		return false, err
	}
	if now.elements != x.ledger.elements || !now.device {
		return false, nil
	}
	if now.tables != x.token.tables && x.now().After(x.rulesDue) {
		if err := x.verifyRules(ctx); err != nil {
			return false, err
		}
	}
	return x.patrolRight(ctx)
}

// rulesShare bounds what it costs that others write to the tables all the time,
// mostly to their own part of them: one part in rulesShare of the time.
const rulesShare = 20

func (x *Proxier) verifyRules(ctx context.Context) error {
	start := x.now()
	fixed, err := x.kernel.prepare(ctx, base(&x.o, x.applied.Facts))
	if err != nil {
		return err
	}
	x.reportRepairs(tally{}, fixed)
	x.token, err = x.kernel.token(ctx)
	x.rulesDue = x.now().Add(rulesShare * x.now().Sub(start))
	return err
}

func (x *Proxier) patrolRight(ctx context.Context) (bool, error) {
	if len(x.patrol.left) == 0 {
		x.patrol.left = slices.Collect(maps.Keys(x.ledger.claims))
		if right, err := x.addressesRight(ctx); err != nil || !right {
			return right, err
		}
	}
	start := x.now()
	for todo := len(x.ledger.claims)/patrolChecks + 1; todo > 0 && len(x.patrol.left) > 0; todo -= patrolStep {
		n := min(len(x.patrol.left), patrolStep)
		keys := x.patrol.left[:n]
		x.patrol.left = x.patrol.left[n:]
		if right, err := x.serversRight(ctx, keys); err != nil || !right {
			return right, err
		}
		if x.now().Sub(start) > patrolTime {
			break
		}
	}
	return true, nil
}

func (x *Proxier) serversRight(ctx context.Context, keys []serverKey) (bool, error) {
	keys = slices.DeleteFunc(slices.Clone(keys), func(k serverKey) bool { return x.ledger.winner(k) == nil })
	live, err := x.kernel.lookup(ctx, keys)
	if err != nil {
		return false, err
	}
	c := x.compiler(x.applied.Facts)
	for _, k := range keys {
		p := x.ledger.winner(k)
		if want := x.own(c.compile(p, x.heldMark(c, p))).server(k); want == nil || !x.matches(live[k], want) {
			return false, nil
		}
	}
	return true, nil
}

// addressesRight says whether kube-ipvs0 has every address that it should have.
func (x *Proxier) addressesRight(ctx context.Context) (bool, error) {
	have, err := x.kernel.addresses(ctx)
	if err != nil {
		return false, err
	}
	for s := range x.ledger.needs {
		if s.set == setCount && !have[s.addr] {
			return false, nil
		}
	}
	return true, nil
}

// matches says whether a live virtual server is as it should be, with nothing
// but what is drained besides.
func (x *Proxier) matches(live *liveServer, want *server) bool {
	if live == nil || live.settings != want.settings {
		return false
	}
	for _, d := range want.destinations {
		if have, ok := live.destinations[d.at]; !ok || have.weight != d.weight || have.foreign {
			return false
		}
	}
	leaving := 0
	for at := range x.drains.servers[want.serverKey] {
		if have, ok := live.destinations[at]; ok && have.weight == 0 {
			leaving++
		}
	}
	return len(live.destinations) == len(want.destinations)+leaving
}
