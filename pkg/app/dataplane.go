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
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/iptables"
)

// dataplane is the proxier of one family, with what its reports turn into:
// metrics, Events, and the refusals that the debug pages show.
type dataplane struct {
	engine
	family model.Family
	mode   mode
	a      *agent

	others others

	mu       sync.Mutex
	refusals map[model.PortKey]error
}

// others is how far the removal of what other modes left has come. Only Sync
// looks at it.
type others struct {
	gone bool
	told bool      // that it failed
	next time.Time // of the next try
}

// alarm is nil where nobody tells of changes by others.
func (p *dataplane) alarm() <-chan struct{} {
	if e, ok := p.engine.(follower); ok {
		return e.Alarm()
	}
	return nil
}

// othersPause is between tries to remove what others left.
const othersPause = time.Minute

// Sync implements reconcile.Dataplane. When our rules are in force for the first
// time, and not before, it removes what other modes have left: until then that
// serves.
func (p *dataplane) Sync(ctx context.Context, want *plan.Set) error {
	if err := p.engine.Sync(ctx, want); err != nil {
		return err
	}
	if !p.others.gone && !time.Now().Before(p.others.next) {
		p.removeOthers(ctx)
	}
	return nil
}

// removeOthers fails without consequences but that it is tried again.
func (p *dataplane) removeOthers(ctx context.Context) {
	removed, err := p.mode.removeOthers(ctx, p.family)
	if removed != "" {
		p.a.log.Info("Removed what another mode had left", "ipFamily", p.family, "removed", removed)
	}
	p.others.gone, p.others.next = err == nil, time.Now().Add(othersPause)
	if err != nil && !p.others.told && ctx.Err() == nil {
		p.others.told = true
		p.a.log.Warn("What another mode had left may still be there and serve by an old state; it is tried again now and then. "+
			"sluice --cleanup, while Sluice does not run, removes it, too",
			"ipFamily", p.family, "err", err)
	}
}

// dataplanes makes the proxiers of the families that this machine can do.
func (a *agent) dataplanes(ctx context.Context, cfg *config.Config, m mode) ([]*dataplane, error) {
	var planes []*dataplane
	var errs []error
	for _, f := range a.families() {
		p := &dataplane{family: f, mode: m, a: a, refusals: map[model.PortKey]error{}}
		d := a.detectorFor(cfg, f)
		var err error
		if p.engine, err = m.open(ctx, p, d); err != nil {
			if missing := (*unavailable)(nil); !errors.As(err, &missing) {
				return nil, err
			}
			errs = append(errs, err)
			a.log.Warn("This IP family is left alone: it cannot be served here", "ipFamily", f, "mode", cfg.Mode, "err", err)
			continue
		}
		a.detectors[f] = d
		if !d.Detects() {
			a.log.Info("Pods of this node cannot be told from other clients: no traffic to a ClusterIP is masqueraded for its source",
				"ipFamily", f, "detectLocalMode", cfg.DetectLocal.Mode)
		}
		planes = append(planes, p)
	}
	if len(planes) == 0 {
		return nil, fmt.Errorf("no IP family can be served: %w", errors.Join(errs...))
	}
	return planes, nil
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
	p.a.log.Warn("Somebody changed what is ours in the kernel; repaired", "object", object, "count", n, "ipFamily", p.family)
	// No number: the same Event again and again is written now and then only.
	p.a.events.node("Warning", "DriftRepaired", "SyncRules", fmt.Sprintf("somebody changed what Sluice keeps in the kernel (%s, %s); it was put right", p.family, object))
}

func (p *dataplane) refusal(key model.PortKey) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refusals[key]
}

func (a *agent) uidOf(name model.ServiceName) string {
	if e := a.store.Current().Get(name); e != nil && e.Service != nil {
		return e.Service.UID
	}
	return ""
}

// detectorFor works out how pods of this node are told from others.
func (a *agent) detectorFor(cfg *config.Config, f model.Family) proxier.Detector {
	var d proxier.Detector
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
