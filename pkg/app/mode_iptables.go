package app

import (
	"context"
	"errors"
	"net/netip"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/proxier/nftables"
)

// iptablesMode forwards by iptables rules.
type iptablesMode struct {
	a      *agent
	cfg    *config.Config
	nfacct bool // two counters that metrics read
}

func newIPTablesMode(a *agent, cfg *config.Config) *iptablesMode {
	return &iptablesMode{a: a, cfg: cfg}
}

type iptablesEngine struct {
	*iptables.Proxier
	options iptables.Options
}

func (e iptablesEngine) render(set *plan.Set, name model.ServiceName) string {
	return iptables.RenderService(set, e.options, name)
}

func (m *iptablesMode) open(ctx context.Context, p *dataplane, d proxier.Detector) (engine, error) {
	host, err := iptables.Probe(ctx, p.family, m.cfg.IPTablesVariant)
	if err != nil {
		return nil, &unavailable{mode: config.ModeIPTables, err: err}
	}
	m.a.log.Info("Using iptables", "ipFamily", p.family, "variant", host.Programs.Variant, "why", host.Why)
	m.ensureCounters()
	o := iptables.Options{Family: p.family, Programs: host.Programs, MasqueradeBit: m.cfg.MasqueradeBit, Detector: d,
		RandomFully: host.RandomFully, NFAcct: m.nfacct, Report: p, Stats: p.stats(),
		AcceptInvalid: m.cfg.Conntrack.TCPBeLiberal || conntrackIsLiberal(),
		Rules: func(table string, total, written int) {
			metrics.IPTablesRules(table, p.family).Set(float64(total))
			metrics.IPTablesRulesLast(table, p.family).Set(float64(written))
		}}
	return iptablesEngine{iptables.New(o), o}, nil
}

// ensureCounters creates the two counters that some rules count with. Both
// families have the same.
func (m *iptablesMode) ensureCounters() {
	if m.nfacct {
		return
	}
	if err := metrics.EnsureNFAcct(metrics.NFAcctCTStateInvalid, metrics.NFAcctLocalhostNodePorts); err != nil {
		m.a.log.Info("Two counters will be missing from the metrics", "err", err)
		return
	}
	m.nfacct = true
}

// conntrackIsLiberal says whether the node lets packets outside the TCP window
// pass as valid; kube-proxy then has no rule against invalid ones either.
func conntrackIsLiberal() bool {
	v, err := (node.System{}).ReadInt("proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
	return err == nil && v != 0
}

func (m *iptablesMode) prepare() {}

func (m *iptablesMode) adjust(*plan.Facts, []netip.Addr) {}

// refusesUnallocated: as in kube-proxy, which does so in nftables mode alone.
func (m *iptablesMode) refusesUnallocated() bool { return false }

func (m *iptablesMode) objects() []string { return []string{"chain", "jump"} }

func (m *iptablesMode) removeOthers(ctx context.Context, f model.Family) (string, error) {
	return removeAll(
		removal{"the ipvs mode's virtual servers, addresses, sets and chains (connections through the virtual servers end with them)",
			func() (bool, error) { return m.a.ipvs.removeOther(ctx, f, m.cfg.IPVS.ExcludeCIDRs) }},
		removal{"the nftables mode's table (established connections keep their translation and go on)",
			func() (bool, error) { return nftables.RemoveObjects(f) }},
		removal{"the table of kube-proxy's nftables mode", func() (bool, error) { return nftables.RemoveKubeProxy(f) }})
}

// removal is a step of removeOthers: what goes, in words, and how.
type removal struct {
	what string
	run  func() (bool, error)
}

// removeAll goes on after errors.
func removeAll(list ...removal) (string, error) {
	var removed []string
	var errs []error
	for _, r := range list {
		did, err := r.run()
		if did {
			removed = append(removed, r.what)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return strings.Join(removed, "; "), errors.Join(errs...)
}
