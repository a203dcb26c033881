package iptables

import (
	"context"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

var everyTable = []string{tableFilter, tableNAT, "mangle"}

// all is everything of this mode. KUBE-FIREWALL is the kubelet's too and stays.
// A host port plugin may use KUBE-MARK-MASQ.
var all = xtables.Scope{Tables: everyTable, Chain: removable, Entry: entrance}

func entrance(_, name string) bool { return !isObjectChain(name) && name != chainMarkMasq }

// notShared is what this mode has and ipvs mode, ours or kube-proxy's, has not.
// Chains that both have by one name hold ipvs mode's rules when that is in force.
var notShared = xtables.Scope{
	Tables: everyTable,
	Chain: func(table, name string) bool {
		switch name {
		case chainServices:
			return table == tableFilter
		case chainNodePorts, chainExternalServices, chainTrial, chainCanary:
			return removable(table, name)
		}
		return table != "mangle" && isObjectChain(name)
	},
	Entry: entrance,
	// Other chains than in ipvs mode lead there, under another comment.
	Jump: func(to, text string) bool {
		return to == chainProxyFirewall && strings.Contains(text, commentFirewall)
	},
}

// Cleanup removes the chains of this proxier and of kube-proxy's iptables mode,
// and the jumps into them, but for chains that others use.
func (x *Proxier) Cleanup(ctx context.Context) error {
	x.Forget()
	_, err := (&xtables.Runner{Programs: x.o.Programs, Stats: x.o.Stats}).Remove(ctx, all)
	return err
}

// CleanupHost removes what Cleanup removes, in every variant that is installed
// and in use.
func CleanupHost(ctx context.Context, family model.Family) error {
	_, err := RemoveAll(ctx, family)
	return err
}

// RemoveAll removes what Cleanup removes, in every variant, for a change to a mode
// that has no chains of iptables. It says whether there was anything.
func RemoveAll(ctx context.Context, family model.Family) (bool, error) {
	return xtables.RemoveHost(ctx, family, all)
}

// RemoveObjects removes, in every variant, what this mode has written and ipvs
// mode has not, for a change to that mode: the chains that both have must be the
// other's by then. It says whether there was anything.
func RemoveObjects(ctx context.Context, family model.Family) (bool, error) {
	return xtables.RemoveHost(ctx, family, notShared)
}

// removable says whether a chain is one that Cleanup may remove. The canaries
// are kube-proxy's; this proxier needs none.
func removable(table, name string) bool {
	return name == chainCanary || table != "mangle" && ours(table, name)
}
