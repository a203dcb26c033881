package app

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/state"
)

// factsOf gives what plans of a family depend on besides Services.
func (a *agent) factsOf(f model.Family, snap *state.Snapshot) *plan.Facts {
	cfg, n := a.cfg.Load(), snap.Node()
	facts := &plan.Facts{
		Family: f, NodeName: cfg.NodeName,
		NodeIP:            node.PrimaryIP(cfg.BindAddress, n, f),
		DetectLocal:       a.detectors[f].Detects(),
		MasqueradeAll:     cfg.MasqueradeAll,
		RefuseExternalIPs: !cfg.FeatureGates[config.GateAllowServiceExternalIPs],
	}
	if n != nil {
		facts.Zone = n.Zone
	}
	own := (*a.addresses.Load())[f]
	filter := cfg.NodePortAddresses.IPv6
	if f == model.IPv4 {
		filter = cfg.NodePortAddresses.IPv4
		facts.LocalhostNodePorts = cfg.LocalhostNodePorts && node.IncludesLocalhost(nodePorts(filter), facts.NodeIP)
	}
	facts.NodePorts = node.Select(nodePorts(filter), f, own, facts.NodeIP)
	if a.mode.refusesUnallocated() {
		facts.ServiceCIDRs = ofFamily(f, snap.ServiceCIDRs())
	}
	a.mode.adjust(facts, own)
	return facts
}

// ofFamily returns the prefixes of a family, in their order; nil if there are none.
func ofFamily(f model.Family, list []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range list {
		if model.FamilyOf(p.Addr()) == f {
			out = append(out, p)
		}
	}
	return out
}

// readAddresses reads the node's addresses. If that fails the last known stay.
func (a *agent) readAddresses() {
	next := map[model.Family][]netip.Addr{}
	if was := a.addresses.Load(); was != nil {
		for f, list := range *was {
			next[f] = list
		}
	}
	for _, f := range []model.Family{model.IPv4, model.IPv6} {
		list, err := node.Addresses(f)
		if err != nil {
			a.log.Warn("Could not read the node's addresses; the last known stay", "ipFamily", f, "err", err)
			continue
		}
		next[f] = list
	}
	a.addresses.Store(&next)
}

// factsChanged has the loops ask for the facts again.
func (a *agent) factsChanged() {
	a.readAddresses()
	for _, f := range a.loops {
		select {
		case f.facts <- struct{}{}:
		default:
		}
	}
}

// podCIDRWait is kube-proxy's patience with a Node that has no podCIDRs yet.
const podCIDRWait = 5 * time.Minute

var errPodCIDRs = errors.New("the Node's podCIDRs changed, which this detectLocalMode needs a restart for")

// waitForNodeCIDR waits, in NodeCIDR mode, for the Node and its podCIDRs, or for
// the end of ctx.
func (a *agent) waitForNodeCIDR(ctx context.Context, cfg *config.Config) error {
	if cfg.DetectLocal.Mode != config.LocalNodeCIDR {
		return nil
	}
	changed := a.store.Subscribe()
	late := time.NewTimer(podCIDRWait)
	defer late.Stop()
	a.log.Info("Waiting for the Node's podCIDRs", "node", cfg.NodeName)
	for {
		if n := a.store.Current().Node(); n != nil && len(n.PodCIDRs) > 0 {
			a.podCIDRs = n.PodCIDRs
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-late.C:
			return fmt.Errorf("detectLocalMode NodeCIDR: Node %s has had no podCIDRs for %s", cfg.NodeName, podCIDRWait)
		case <-changed:
		}
	}
}

// nodeCIDRKept ends the agent, in NodeCIDR mode, when the podCIDRs are others
// than at the start, as kube-proxy does.
func (a *agent) nodeCIDRKept(n *model.Node) error {
	if a.podCIDRs != nil && n != nil && len(n.PodCIDRs) > 0 && !slices.Equal(a.podCIDRs, n.PodCIDRs) {
		return errPodCIDRs
	}
	return nil
}
