package app

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/proxier/nftables"
)

// nftablesMode forwards by maps of nf_tables.
type nftablesMode struct {
	a       *agent
	cfg     *config.Config
	hosts   map[model.Family]nftables.Host
	lacking map[model.Family]*nftables.Unavailable // why a family has no host
}

// oldestTested is the first kernel that kube-proxy's nftables mode accepts.
var oldestTested = node.KernelVersion{Major: 5, Minor: 13}

// newNFTablesMode finds out what the kernel offers. A kernel that lacks something is
// an unavailable error. Where a family had no answer there is another error: maps
// that work must not be given up for that.
func newNFTablesMode(ctx context.Context, a *agent, cfg *config.Config) (*nftablesMode, error) {
	m := &nftablesMode{a: a, cfg: cfg, hosts: map[model.Family]nftables.Host{}, lacking: map[model.Family]*nftables.Unavailable{}}
	var first error
	for _, f := range a.families() {
		host, err := a.probeNFTables(ctx, f)
		if missing := (*nftables.Unavailable)(nil); errors.As(err, &missing) {
			m.lacking[f] = missing
			for _, line := range missing.Missing {
				a.log.Warn("nftables mode needs more than this kernel has", "ipFamily", f, "missing", line)
			}
			if first == nil {
				first = err
			}
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("find out whether mode nftables can serve %s (nothing is changed): %w", f, err)
		}
		m.hosts[f] = host
	}
	if len(m.hosts) > 0 {
		return m, nil
	}
	return nil, &unavailable{mode: config.ModeNFTables, reason: "not possible on this node", err: fmt.Errorf("%w; or choose mode iptables", first)}
}

type nftablesEngine struct {
	*nftables.Proxier
	options nftables.Options
}

func (e nftablesEngine) render(set *plan.Set, name model.ServiceName) string {
	return nftables.RenderService(set, e.options, name)
}

func (m *nftablesMode) open(_ context.Context, p *dataplane, d proxier.Detector) (engine, error) {
	host, ok := m.hosts[p.family]
	if !ok {
		return nil, &unavailable{mode: config.ModeNFTables, err: m.lacking[p.family]}
	}
	for _, limit := range host.Limits {
		m.a.log.Warn("nftables mode is limited here", "ipFamily", p.family, "limit", limit)
	}
	o := nftables.Options{Family: p.family, MasqueradeBit: m.cfg.MasqueradeBit, Detector: d, Report: p,
		Traffic:       m.cfg.ServiceTraffic,
		AcceptInvalid: m.cfg.Conntrack.TCPBeLiberal || conntrackIsLiberal(),
		Refused: func(cleanup bool) {
			if cleanup {
				metrics.NFTablesCleanupFailures(p.family).Inc()
			} else {
				metrics.NFTablesSyncFailures(p.family).Inc()
			}
		}}
	x, err := nftables.New(o)
	if err != nil {
		return nil, fmt.Errorf("open nf_tables for %s: %w", p.family, err)
	}
	return nftablesEngine{x, o}, nil
}

func (m *nftablesMode) prepare() {
	if v := kernelVersion(); v != (node.KernelVersion{}) && !v.AtLeast(oldestTested.Major, oldestTested.Minor) {
		m.a.log.Warn("This kernel is older than those that nftables mode is tested with, and that kube-proxy's accepts; it has all that the rules need",
			"kernel", v, "oldestTested", oldestTested)
	}
}

// serviceTraffic reads the counters of all families' Service ports, for the metrics.
func (a *agent) serviceTraffic() metrics.ServiceTraffic {
	var out metrics.ServiceTraffic
	for _, l := range a.loops {
		e, ok := l.plane.engine.(nftablesEngine)
		set := l.loop.Set()
		if !ok || set == nil {
			continue
		}
		list, leftOut, err := e.Traffic(context.Background(), set)
		if err != nil {
			a.log.Warn("Could not read the Services' counters", "ipFamily", l.family, "err", err)
			continue
		}
		for _, t := range list {
			out.Ports = append(out.Ports, metrics.PortTraffic{Family: l.family, Port: t.Port,
				Requests: metrics.Count(t.Requests), Replies: metrics.Count(t.Replies)})
		}
		out.LeftOut = max(out.LeftOut, leftOut)
	}
	return out
}

func (m *nftablesMode) adjust(*plan.Facts, []netip.Addr) {}

func (m *nftablesMode) refusesUnallocated() bool { return true }

func (m *nftablesMode) objects() []string { return []string{"table", "chain", "element"} }

func (m *nftablesMode) removeOthers(ctx context.Context, f model.Family) (string, error) {
	return removeAll(
		removal{"the iptables mode's chains (established connections keep their translation and go on)",
			func() (bool, error) { return iptables.RemoveAll(ctx, f) }},
		removal{"the ipvs mode's virtual servers, addresses, sets and chains (connections through the virtual servers end with them)",
			func() (bool, error) { return m.a.ipvs.removeOther(ctx, f, m.cfg.IPVS.ExcludeCIDRs) }},
		removal{"the table of kube-proxy's nftables mode", func() (bool, error) { return nftables.RemoveKubeProxy(f) }})
}
