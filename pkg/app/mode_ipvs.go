package app

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/debug"
	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/proxier/ipvs"
	"github.com/sluice-proxy/sluice/proxier/nftables"
)

// ipvsMode forwards by IPVS virtual servers.
type ipvsMode struct {
	a         *agent
	cfg       *config.Config
	hosts     map[model.Family]ipvs.Host
	lacking   map[model.Family]*ipvs.Unavailable // why a family has no host
	scheduler string
}

// ipvsKernel is what the agent does with IPVS; the real one is package ipvs.
type ipvsKernel struct {
	probe          func(ctx context.Context, f model.Family, variant string) (ipvs.Host, error)
	open           func(ipvs.Options) (ipvsProxier, error)
	checkScheduler func(name string, offered []string) error
	setTimeouts    func(tcp, tcpFin, udp time.Duration) error
	removeOther    func(ctx context.Context, f model.Family, exclude []netip.Prefix) (bool, error)
	cleanup        func(ctx context.Context, f model.Family, exclude []netip.Prefix) error
}

func systemIPVS() ipvsKernel {
	return ipvsKernel{
		probe:          ipvs.Probe,
		open:           func(o ipvs.Options) (ipvsProxier, error) { return ipvs.New(o) },
		checkScheduler: ipvs.CheckScheduler,
		setTimeouts:    ipvs.SetTimeouts,
		removeOther:    ipvs.RemoveOther,
		cleanup:        ipvs.CleanupHost,
	}
}

// ipvsProxier is ipvs.Proxier.
type ipvsProxier interface {
	proxier.Proxier
	Check(ctx context.Context, force bool) (bool, error)
	Prime(ctx context.Context, want *plan.Set) (bool, error)
	Draining() []ipvs.Draining
}

// newIPVSMode finds out what the kernel offers. A kernel without IPVS is an
// unavailable error; a scheduler that it does not have is a wrong configuration.
// Where a family had no answer there is another error: virtual servers that work
// must not be given up for a lock that was held too long.
func newIPVSMode(ctx context.Context, a *agent, cfg *config.Config) (*ipvsMode, error) {
	m := &ipvsMode{a: a, cfg: cfg, hosts: map[model.Family]ipvs.Host{}, lacking: map[model.Family]*ipvs.Unavailable{}, scheduler: cfg.IPVS.Scheduler}
	if m.scheduler == "" {
		m.scheduler = ipvs.DefaultScheduler
	}
	var first error
	for _, f := range a.families() {
		host, err := a.ipvs.probe(ctx, f, cfg.IPTablesVariant)
		if missing := (*ipvs.Unavailable)(nil); errors.As(err, &missing) {
			m.lacking[f] = missing
			if first == nil {
				first = err
			}
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("find out whether mode ipvs can serve %s (nothing is changed): %w", f, err)
		}
		if err := a.ipvs.checkScheduler(m.scheduler, host.Schedulers); err != nil {
			return nil, fmt.Errorf("ipvs.scheduler: %w", err)
		}
		m.hosts[f] = host
	}
	if len(m.hosts) > 0 {
		return m, nil
	}
	return nil, &unavailable{mode: config.ModeIPVS, reason: "not possible on this node", err: fmt.Errorf("%w; or choose mode iptables", first)}
}

type ipvsEngine struct {
	ipvsProxier
	options ipvs.Options
}

func (e ipvsEngine) render(set *plan.Set, name model.ServiceName) string {
	return ipvs.RenderService(set, e.options, name)
}

func (m *ipvsMode) open(_ context.Context, p *dataplane, d proxier.Detector) (engine, error) {
	host, ok := m.hosts[p.family]
	if !ok {
		return nil, &unavailable{mode: config.ModeIPVS, err: m.lacking[p.family]}
	}
	m.a.log.Info("Using IPVS", "ipFamily", p.family, "version", host.Version, "scheduler", m.scheduler,
		"schedulers", strings.Join(host.Schedulers, ","), "iptables", host.Programs.Variant, "why", host.Why)
	for _, limit := range host.Missing {
		m.a.log.Warn("ipvs mode is limited here", "ipFamily", p.family, "limit", limit)
	}
	o := ipvs.Options{Family: p.family, Programs: host.Programs, MasqueradeBit: m.cfg.MasqueradeBit, Detector: d,
		RandomFully: host.RandomFully, Scheduler: m.scheduler, Schedulers: host.Schedulers, Inside: host.Inside,
		Exclude: m.cfg.IPVS.ExcludeCIDRs, Drain: func() time.Duration { return m.a.cfg.Load().IPVS.Drain },
		Report: p, Stats: p.stats()}
	x, err := m.a.ipvs.open(o)
	if err != nil {
		return nil, fmt.Errorf("open IPVS for %s: %w", p.family, err)
	}
	return ipvsEngine{x, o}, nil
}

// prepare sets what all families share, and says once what is different from
// iptables mode and cannot be helped.
func (m *ipvsMode) prepare() {
	c := m.cfg.IPVS
	if c.TCPTimeout > 0 || c.TCPFinTimeout > 0 || c.UDPTimeout > 0 {
		if err := m.a.ipvs.setTimeouts(c.TCPTimeout, c.TCPFinTimeout, c.UDPTimeout); err != nil {
			m.a.log.Warn("Could not set the IPVS timeouts; going on with the kernel's", "err", err)
		} else {
			m.a.log.Info("IPVS forgets idle connections after these times; 0 is the kernel's own",
				"tcp", c.TCPTimeout, "tcpFin", c.TCPFinTimeout, "udp", c.UDPTimeout)
		}
	}
	m.a.log.Info("ipvs mode does not serve NodePorts on 127.0.0.1: the kernel does not send packets with a loopback source to another host, " +
		"and IPVS keeps the client's source; dial the node's own address instead")
}

func (m *ipvsMode) adjust(facts *plan.Facts, own []netip.Addr) {
	facts.LocalhostNodePorts = false
	facts.Schedulers = m.hosts[facts.Family].Schedulers
	if facts.Schedulers == nil {
		facts.Schedulers = []string{} // nil is for modes that have none
	}
	facts.DefaultScheduler = m.scheduler
	facts.OwnAddrs = slices.DeleteFunc(slices.Clone(own), func(a netip.Addr) bool {
		return a.IsLoopback() || a.Is6() && a.IsLinkLocalUnicast()
	})
}

// refusesUnallocated: as in kube-proxy, which does so in nftables mode alone.
func (m *ipvsMode) refusesUnallocated() bool { return false }

// objects are the words that package ipvs reports repairs by.
func (m *ipvsMode) objects() []string {
	return []string{"virtual server", "destination", "ipset", "ipset entry", "device", "address", "chain", "jump"}
}

func (m *ipvsMode) removeOthers(ctx context.Context, f model.Family) (string, error) {
	return removeAll(
		removal{"the iptables mode's chains (established connections keep their translation and go on)",
			func() (bool, error) { return iptables.RemoveObjects(ctx, f) }},
		removal{"the nftables mode's table (established connections keep their translation and go on)",
			func() (bool, error) { return nftables.RemoveObjects(f) }},
		removal{"the table of kube-proxy's nftables mode", func() (bool, error) { return nftables.RemoveKubeProxy(f) }})
}

// draining lists the endpoints that only finish their connections, by family.
func (a *agent) draining() map[model.Family][]ipvs.Draining {
	out := map[model.Family][]ipvs.Draining{}
	for _, l := range a.loops {
		if e, ok := l.plane.engine.(ipvsEngine); ok {
			out[l.family] = e.Draining()
		}
	}
	return out
}

// countDraining is what the metric says.
func (a *agent) countDraining() []metrics.Draining {
	var out []metrics.Draining
	for f, list := range a.draining() {
		out = append(out, metrics.Draining{Family: f, Endpoints: len(list)})
	}
	return out
}

// ipvsPage returns what the page of IPVS shows, nil in other modes.
func (a *agent) ipvsPage() func() debug.IPVS {
	m, ok := a.mode.(*ipvsMode)
	if !ok {
		return nil
	}
	return func() debug.IPVS {
		v := debug.IPVS{Scheduler: m.scheduler}
		draining := a.draining()
		for _, l := range a.loops {
			if v.Schedulers == nil {
				v.Schedulers = m.hosts[l.family].Schedulers
			}
			for _, d := range draining[l.family] {
				out := debug.Draining{Family: l.family, Server: d.Server, Endpoint: d.Endpoint, Since: d.Since, Active: d.Active, Inactive: d.Inactive}
				if !d.Until.IsZero() {
					out.Until = &d.Until
				}
				v.Draining = append(v.Draining, out)
			}
		}
		return v
	}
}
