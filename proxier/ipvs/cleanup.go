package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// Cleanup removes what this proxier, or kube-proxy's ipvs mode, wrote: virtual
// servers, addresses, sets, chains. Virtual servers of others are not touched,
// nor are their addresses on kube-ipvs0, which then stays. Connections through
// virtual servers that go end with them.
func (x *Proxier) Cleanup(ctx context.Context) error {
	return x.remove(ctx, false)
}

// remove is Cleanup; with shared, chains stay that iptables mode has by the same
// name.
func (x *Proxier) remove(ctx context.Context, shared bool) error {
	x.Forget()
	x.ledger = newLedger()
	x.drains = drains{}
	have, err := x.kernel.read(ctx)
	if err != nil {
		return fmt.Errorf("read what is there: %w", err)
	}
	var ops []op
	for _, k := range slices.SortedFunc(maps.Keys(have.servers), serverKey.compare) {
		if x.ours(k, have) && !x.excluded(k) {
			ops = append(ops, op{kind: delServer, key: k})
		}
	}
	for _, a := range slices.SortedFunc(maps.Keys(have.addrs), netip.Addr.Compare) {
		if have.ourAddr(a) && !x.excluded(serverKey{addr: a}) {
			ops = append(ops, op{kind: delAddr, addr: a})
		}
	}
	failures, err := x.kernel.apply(ctx, ops)
	errs := []error{err}
	for _, f := range failures {
		errs = append(errs, fmt.Errorf("remove %s: %w", f.op, f.err))
	}
	return errors.Join(append(errs, x.kernel.clear(ctx, shared))...)
}
