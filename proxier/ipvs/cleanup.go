package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// ownChains are those that ipvs mode alone has, kube-proxy's included; the
// others exist by the same name in iptables mode, too.
var ownChains = map[string][]string{
	tableNAT:    {chainLoadBalancer, chainNodePort, chainInside},
	tableFilter: {chainNodePort, chainSourceRanges, chainIPVSFilter, chainIPVSOut, chainProbe},
	tableMangle: {chainSourceRanges, chainIPVSOut, chainInside, chainProbe},
}

var sharedChains = map[string][]string{
	tableNAT:    {chainServices, chainPostrouting, chainMarkMasq},
	tableFilter: {chainForward, chainProxyFirewall},
}

// all is every static rule of this mode.
var all = xtables.Scope{Tables: tables, Entry: entrance, Chain: func(table, name string) bool {
	return slices.Contains(ownChains[table], name) || slices.Contains(sharedChains[table], name)
}}

// notShared is what this mode has and iptables mode has not. The chains that both
// have hold iptables mode's rules when that is in force.
var notShared = xtables.Scope{Tables: tables, Entry: entrance,
	Chain: func(table, name string) bool { return slices.Contains(ownChains[table], name) },
	// Other chains than in iptables mode lead there, under another comment.
	Jump: func(to, text string) bool {
		return to == chainProxyFirewall && strings.Contains(text, commentFirewall)
	},
}

// entrance says whether a jump from a built-in chain to one of ours is ours. A
// host port plugin may use KUBE-MARK-MASQ.
func entrance(_, name string) bool { return name != chainMarkMasq }

// Cleanup removes what this proxier, or kube-proxy's ipvs mode, wrote: virtual
// servers, addresses, rules, sets. Virtual servers of others are not touched,
// nor are their addresses on kube-ipvs0, which then stays. Connections through
// virtual servers that go end with them.
func (x *Proxier) Cleanup(ctx context.Context) error {
	_, err := x.remove(ctx, all)
	return err
}

// CleanupHost removes what Cleanup removes, with the rules of every variant of
// iptables that is installed and in use, and what a Probe left that was killed.
// exclude is Options.Exclude. It needs no IPVS and no ipset in the kernel, and
// loads neither.
func CleanupHost(ctx context.Context, family model.Family, exclude []netip.Prefix) error {
	_, err := removeHost(ctx, family, exclude, all)
	return err
}

// RemoveOther removes what CleanupHost removes, but for the rules that iptables
// mode has by the same name: those must be iptables mode's by then. It says
// whether there was anything.
func RemoveOther(ctx context.Context, family model.Family, exclude []netip.Prefix) (bool, error) {
	return removeHost(ctx, family, exclude, notShared)
}

func removeHost(ctx context.Context, family model.Family, exclude []netip.Prefix, what xtables.Scope) (bool, error) {
	k, err := newKernel(family, xtables.Programs{Family: family}, xtables.Stats{})
	if err != nil {
		return false, err
	}
	defer k.close()
	k.everywhere = true
	return newProxier(Options{Family: family, Exclude: exclude}, k).remove(ctx, what)
}

func (x *Proxier) remove(ctx context.Context, what xtables.Scope) (bool, error) {
	x.Forget()
	x.ledger = newLedger()
	for _, k := range x.drains.keys() {
		x.drains.dropServer(k)
	}
	have, err := x.kernel.read(ctx)
	if err != nil {
		return false, fmt.Errorf("read what is there: %w", err)
	}
	var ops []op
	for _, k := range slices.SortedFunc(maps.Keys(have.servers), serverKey.compare) {
		if x.ours(k, have) {
			ops = append(ops, op{kind: delServer, key: k})
		}
	}
	for _, a := range slices.SortedFunc(maps.Keys(have.addrs), netip.Addr.Compare) {
		if have.ourAddr(a) {
			ops = append(ops, op{kind: delAddr, addr: a})
		}
	}
	failures, err := x.kernel.apply(ctx, ops)
	errs := []error{err}
	for _, f := range failures {
		errs = append(errs, fmt.Errorf("remove %s: %w", f.op, f.err))
	}
	had, err := x.kernel.unrule(ctx, what)
	errs = append(errs, err, x.kernel.clear(ctx))
	return had || len(ops) > 0, errors.Join(errs...)
}
