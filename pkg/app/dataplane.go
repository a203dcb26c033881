package app

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/proxier/nftables"
)

type detector = iptables.Detector

// dataplane is the proxier of one family, with what its reports turn into:
// metrics, Events, and the refusals that the debug pages show.
type dataplane struct {
	*iptables.Proxier
	family  model.Family
	options iptables.Options
	a       *agent

	alone bool // what kube-proxy left in another mode has been removed

	mu       sync.Mutex
	refusals map[model.PortKey]error
}

// Sync implements reconcile.Dataplane. When our rules are in force for the first
// time, and not before, it removes those of kube-proxy's nftables mode: until
// then they serve.
func (p *dataplane) Sync(ctx context.Context, want *plan.Set) error {
	if err := p.Proxier.Sync(ctx, want); err != nil || p.alone {
		return err
	}
	p.alone = true
	if removed, err := nftables.RemoveKubeProxy(p.family); err != nil {
		p.a.log.Warn("The table of kube-proxy's nftables mode may still be there and serve by an old state", "ipFamily", p.family, "err", err)
	} else if removed {
		p.a.log.Info("Removed the table of kube-proxy's nftables mode", "ipFamily", p.family)
	}
	return nil
}

// dataplanes makes the proxiers of the families that this machine can do.
func (a *agent) dataplanes(ctx context.Context, cfg *config.Config) ([]*dataplane, error) {
	families := []model.Family{model.IPv4, model.IPv6}
	if ok, why := (node.System{}).IPv6(); !ok {
		a.log.Info("IPv6 is off", "why", why)
		families = families[:1]
	}
	nfacct := true
	if err := metrics.EnsureNFAcct(metrics.NFAcctCTStateInvalid, metrics.NFAcctLocalhostNodePorts); err != nil {
		a.log.Info("Two counters will be missing from the metrics", "err", err)
		nfacct = false
	}
	var planes []*dataplane
	var errs []error
	for _, f := range families {
		host, err := iptables.Probe(ctx, f, cfg.IPTablesVariant)
		if err != nil {
			errs = append(errs, err)
			a.log.Warn("This IP family is left alone: its iptables cannot be used", "ipFamily", f, "err", err)
			continue
		}
		a.log.Info("Using iptables", "ipFamily", f, "variant", host.Programs.Variant, "why", host.Why)
		d := a.detectorFor(cfg, f)
		a.detectors[f] = d
		p := &dataplane{family: f, a: a, refusals: map[model.PortKey]error{}}
		p.options = iptables.Options{Family: f, Programs: host.Programs, MasqueradeBit: cfg.MasqueradeBit, Detector: d,
			RandomFully: host.RandomFully, NFAcct: nfacct, Report: p, Stats: p.stats(),
			AcceptInvalid: cfg.Conntrack.TCPBeLiberal || conntrackIsLiberal(),
			Rules: func(table string, total, written int) {
				metrics.IPTablesRules(table, f).Set(float64(total))
				metrics.IPTablesRulesLast(table, f).Set(float64(written))
			}}
		p.Proxier = iptables.New(p.options)
		planes = append(planes, p)
	}
	if len(planes) == 0 {
		return nil, fmt.Errorf("no IP family can be served: %w", errors.Join(errs...))
	}
	return planes, nil
}

// conntrackIsLiberal says whether the node lets packets outside the TCP window
// pass as valid; kube-proxy then has no rule against invalid ones either.
func conntrackIsLiberal() bool {
	v, err := (node.System{}).ReadInt("proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
	return err == nil && v != 0
}

func (p *dataplane) stats() iptables.Stats {
	return iptables.Stats{
		Restored: func(n int64) { metrics.RestoreBytes("all", p.family).Add(float64(n)) },
		Waited:   func(d time.Duration) { metrics.RestoreLockWait(p.family).Observe(d.Seconds()) },
		Failed:   func() { metrics.RestoreFailures(p.family).Inc() },
	}
}

// SetAside implements proxier.Reporter.
func (p *dataplane) SetAside(key model.PortKey, err error) {
	p.mu.Lock()
	if err == nil {
		delete(p.refusals, key)
	} else {
		p.refusals[key] = err
	}
	n := len(p.refusals)
	p.mu.Unlock()
	metrics.ServicesSetAside(p.family).Set(float64(n))
	if err == nil {
		p.a.log.Info("A Service port that was set aside is in force now", "port", key, "protocol", key.Protocol, "ipFamily", p.family)
		return
	}
	p.a.log.Error("A Service port was set aside; the others are in force", "port", key, "protocol", key.Protocol, "ipFamily", p.family, "err", err)
	p.a.events.service(key.Service(), p.a.uidOf(key.Service()), "Warning", "ServiceSetAside", "SyncRules",
		fmt.Sprintf("node %s cannot serve port %s/%s: %v", p.a.cfg.Load().NodeName, key, key.Protocol, err))
}

// DriftRepaired implements proxier.Reporter.
func (p *dataplane) DriftRepaired(object string, n int) {
	metrics.DriftRepaired(object, p.family).Add(float64(n))
	p.a.log.Warn("Somebody changed our rules; repaired", "object", object, "count", n, "ipFamily", p.family)
	// No number: the same Event again and again is written now and then only.
	p.a.events.node("Warning", "DriftRepaired", "SyncRules", fmt.Sprintf("somebody changed %s rules (%ss); they were put right", p.family, object))
}

func (p *dataplane) refusal(key model.PortKey) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refusals[key]
}

func (p *dataplane) render(set *plan.Set, name model.ServiceName) string {
	return iptables.RenderService(set, p.options, name)
}

func (a *agent) uidOf(name model.ServiceName) string {
	if e := a.store.Current().Get(name); e != nil && e.Service != nil {
		return e.Service.UID
	}
	return ""
}

// detectorFor works out how pods of this node are told from others.
func (a *agent) detectorFor(cfg *config.Config, f model.Family) detector {
	var d detector
	switch cfg.DetectLocal.Mode {
	case config.LocalBridgeInterface:
		d.BridgeInterface = cfg.DetectLocal.BridgeInterface
	case config.LocalInterfaceNamePrefix:
		d.InterfacePrefix = cfg.DetectLocal.InterfaceNamePrefix
	case config.LocalNodeCIDR:
		d.CIDR = firstOf(a.podCIDRs, f)
	default:
		d.CIDR = firstOf(cfg.ClusterCIDRs, f)
	}
	if !d.Detects() {
		a.log.Info("Pods of this node cannot be told from other clients: no traffic to a ClusterIP is masqueraded for its source",
			"ipFamily", f, "detectLocalMode", cfg.DetectLocal.Mode)
	}
	return d
}

func firstOf(list []netip.Prefix, f model.Family) netip.Prefix {
	for _, p := range list {
		if model.FamilyOf(p.Addr()) == f {
			return p
		}
	}
	return netip.Prefix{}
}
