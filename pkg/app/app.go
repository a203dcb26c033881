// Package app wires a Config to the parts of the agent and runs them. Nobody but
// cmd/sluice imports it.
package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	runtimedebug "runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/component-base/version"

	"github.com/sluice-proxy/sluice/conntrack"
	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/debug"
	"github.com/sluice-proxy/sluice/pkg/health"
	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/reconcile"
	"github.com/sluice-proxy/sluice/pkg/state"
	"github.com/sluice-proxy/sluice/pkg/watch"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/nftables"
)

// agent is everything that runs. Its fields are set before the first task
// starts; what changes later is behind an atomic or a mutex.
type agent struct {
	cfg    atomic.Pointer[config.Config]
	log    *slog.Logger
	store  *state.Store
	stats  watch.Stats
	events *eventWriter // nil without an API server
	chosen config.Mode  // what the configuration asks for

	ipvs ipvsKernel
	// probeNFTables is nftables.Probe.
	probeNFTables func(context.Context, model.Family) (nftables.Host, error)
	mode          mode         // in force
	fellBack      *unavailable // why it is not the chosen one; else nil

	problems *problemReporter

	health *health.Server
	loops  []*family

	detectors map[model.Family]proxier.Detector
	podCIDRs  []netip.Prefix // those of the Node at the start, in NodeCIDR mode

	addresses atomic.Pointer[map[model.Family][]netip.Addr] // the node's own
}

// family is what exists once for each IP family.
type family struct {
	family model.Family
	loop   *reconcile.Loop
	facts  chan struct{} // capacity 1: the node's facts changed
	plane  *dataplane
	clean  *conntrack.Cleaner
	ports  *health.ServiceServers
}

// task is a part of the agent that runs until the context ends.
type task func(ctx context.Context) error

// Run runs the agent until ctx ends, and leaves the dataplane in place. It
// returns an error if the agent cannot start, or must be started anew.
func Run(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	a := newAgent(cfg, log)
	if err := a.refuseBesideAnother(ctx, cfg); err != nil {
		return err
	}
	boundMemory(false)
	a.prepareProcess(cfg)
	api, err := a.connect(cfg)
	if err != nil {
		return err
	}
	if cfg, err = a.enterMode(ctx, cfg); err != nil {
		return err
	}
	prepareHost(cfg, log, true)
	tasks, ctx := errgroup.WithContext(ctx)
	start := func(name string, t task) {
		tasks.Go(func() error {
			if err := t(ctx); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	start("source", a.source(cfg, api))
	start("agent", func(ctx context.Context) error { return a.serve(ctx, cfg, start) })
	err = tasks.Wait()
	for _, f := range a.loops {
		f.ports.Close()
	}
	if err == nil {
		log.Info("Stopped. The rules stay in force: traffic goes on by the last state, until the agent runs again or --cleanup removes them")
	}
	return err
}

func newAgent(cfg *config.Config, log *slog.Logger) *agent {
	a := &agent{log: log, store: state.NewStore(), detectors: map[model.Family]proxier.Detector{}, chosen: cfg.Mode, ipvs: systemIPVS(), probeNFTables: nftables.Probe}
	a.problems = &problemReporter{a: a, told: map[model.ServiceName]string{}}
	a.cfg.Store(cfg)
	return a
}

// enterMode decides for the mode that this agent runs in, and returns the
// configuration for it.
func (a *agent) enterMode(ctx context.Context, cfg *config.Config) (*config.Config, error) {
	m, cfg, err := a.chooseMode(ctx, cfg)
	if err != nil {
		return nil, err
	}
	a.mode = m
	a.cfg.Store(cfg)
	return cfg, nil
}

// boundMemory trades CPU for memory: an agent on every node should not keep room for as
// much garbage as it has use for memory. Before everything is served (started), time is
// worth more: nodes wait for it. GOGC in the environment wins.
func boundMemory(started bool) {
	switch {
	case os.Getenv("GOGC") != "":
	case started:
		runtimedebug.SetGCPercent(50)
	default:
		runtimedebug.SetGCPercent(100)
	}
}

// serve builds what needs the Node or the kernel, and starts it.
func (a *agent) serve(ctx context.Context, cfg *config.Config, start func(string, task)) error {
	if err := a.waitForNodeCIDR(ctx, cfg); err != nil || ctx.Err() != nil {
		return err
	}
	a.mode.prepare()
	planes, err := a.dataplanes(ctx, cfg, a.mode)
	if err != nil {
		return err
	}
	if err := a.registerMetrics(cfg, planes); err != nil {
		return err
	}
	a.health = health.NewServer(health.Options{Addr: cfg.HealthzAddr, SyncPeriod: cfg.SyncPeriod, HardFail: cfg.KubeProxy.BindAddressHardFail, Log: a.log,
		BindFailed: func(err error) {
			a.events.node("Warning", "FailedToStartProxierHealthcheck", "StartKubeProxy", err.Error())
		}})
	a.readAddresses()
	for _, p := range planes {
		a.addFamily(p)
	}
	for _, f := range a.loops { // all are there before the first runs
		start("dataplane "+f.family.String(), f.loop.Run)
		if e, ok := f.plane.engine.(follower); ok {
			start("changes by others "+f.family.String(), e.Follow)
		}
		if cfg.Conntrack.Cleanup {
			start("conntrack "+f.family.String(), f.clean.Run)
		}
	}
	start("node addresses", func(ctx context.Context) error { return node.Watch(ctx, a.factsChanged) })
	start("node object", a.followNode)
	start("health server", a.health.Run)
	start("metrics server", a.debugServer(cfg).Run)
	start("configuration", a.followConfig)
	if a.events != nil {
		start("events", a.events.run)
	}
	a.events.node("Normal", "Starting", "StartKubeProxy", "")
	if cfg.ModeDefaulted {
		a.log.Info("No mode is configured: iptables it is, as in kube-proxy up to 1.39", "mode", cfg.Mode)
	}
	a.log.Info("Sluice is running", "version", version.Get().GitVersion, "mode", cfg.Mode, "node", cfg.NodeName)
	return nil
}

// refuseBesideAnother keeps two service proxies from running on one node. An old
// instance of ours, in a rolling update, is waited for.
func (a *agent) refuseBesideAnother(ctx context.Context, cfg *config.Config) error {
	for deadline := time.Now().Add(30 * time.Second); ; {
		peer, ok := health.PeerProxy(ctx, cfg.HealthzAddr, cfg.MetricsAddr)
		if !ok {
			return nil
		}
		if !peer.Sluice || time.Now().After(deadline) {
			return errors.New(peer.String())
		}
		a.log.Info("Another Sluice is still running here; waiting for it to stop", "address", peer.Addr)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// connect prepares what talks to the API server; nil if there is none. It checks
// what can be checked without it.
func (a *agent) connect(cfg *config.Config) (*rest.Config, error) {
	if cfg.Manifests != "" {
		if info, err := os.Stat(cfg.Manifests); err != nil || !info.IsDir() {
			return nil, fmt.Errorf("--manifests: %s is not a folder that can be read", cfg.Manifests)
		}
		return nil, nil
	}
	client := cfg.KubeProxy.ClientConnection
	rc, err := watch.RESTConfig(watch.ClientOptions{Kubeconfig: client.Kubeconfig, Master: cfg.Master,
		ContentType: client.ContentType, AcceptContentTypes: client.AcceptContentTypes,
		QPS: client.QPS, Burst: int(client.Burst), UserAgent: "sluice/" + version.Get().GitVersion})
	if err != nil {
		return nil, fmt.Errorf("%w (for use without a cluster give a folder by --manifests)", err)
	}
	a.events, err = newEventWriter(rc, cfg.NodeName, a.log)
	return rc, err
}

// source returns the task that feeds the store. Names and zones of endpoints are
// worth their memory only where endpoints are weighed, and ServiceCIDRs a watch
// on every node only where they are used.
func (a *agent) source(cfg *config.Config, rc *rest.Config) task {
	_, weighs := a.mode.(*ipvsMode)
	if rc == nil {
		return (&watch.Manifests{Dir: cfg.Manifests, Store: a.store, NodeName: cfg.NodeName, KeepOrigins: weighs, Log: a.log, Stats: &a.stats}).Run
	}
	return (&watch.API{Config: rc, Store: a.store, NodeName: cfg.NodeName, KeepOrigins: weighs,
		ServiceCIDRs: a.mode.refusesUnallocated(), Log: a.log, Stats: &a.stats}).Run
}

func (a *agent) registerMetrics(cfg *config.Config, planes []*dataplane) error {
	if cfg.KubeProxy.ShowHiddenMetricsForVersion != "" {
		metrics.ShowHidden()
	}
	var families []model.Family
	for _, p := range planes {
		families = append(families, p.family)
	}
	if err := metrics.Register(string(cfg.Mode), families...); err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	v := version.Get()
	metrics.SetBuild(v.GitVersion, v.GitCommit)
	a.publishMode(cfg)
	if cfg.Mode == config.ModeIPVS {
		if err := metrics.RegisterDraining(a.countDraining); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	if cfg.Mode == config.ModeNFTables && cfg.ServiceTraffic > 0 {
		if err := metrics.RegisterServiceTraffic(a.serviceTraffic); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	for gate, on := range cfg.FeatureGates {
		metrics.SetFeature(gate, "", on)
	}
	for _, f := range families {
		for _, object := range a.mode.objects() {
			metrics.DriftRepaired(object, f) // a counter that is there can be alerted on
		}
	}
	return nil
}

// addFamily builds one family's loop and what follows it.
func (a *agent) addFamily(p *dataplane) {
	f := &family{family: p.family, facts: make(chan struct{}, 1), plane: p}
	f.ports = health.NewServiceServers(health.ServicesOptions{Healthy: a.health.Healthy, Log: a.log,
		BindFailed: func(b health.BindFailure) {
			a.events.service(b.Service, b.UID, "Warning", "FailedToStartServiceHealthcheck", "StartHealthcheckServer",
				fmt.Sprintf("node %s failed to start healthcheck on port %d: %v", a.cfg.Load().NodeName, b.Port, b.Err))
		}})
	f.clean = conntrack.NewCleaner(p.family, &conntrack.Kernel{}, conntrack.Options{
		Locals:    func() ([]netip.Addr, error) { return node.Addresses(p.family) },
		OnRun:     func(fam model.Family, d time.Duration) { metrics.ConntrackDuration(fam).Observe(d.Seconds()) },
		OnDeleted: func(fam model.Family, n int) { metrics.ConntrackDeleted(fam).Add(float64(n)) },
		OnError: func(fam model.Family, err error) {
			a.log.Warn("Could not clean conntrack entries; will try again", "ipFamily", fam, "err", err)
		},
	})
	then := []reconcile.Sink{f.ports, metrics.NewPlans(p.family), &clashReporter{a: a}, a.problems.of()}
	if a.cfg.Load().Conntrack.Cleanup {
		then = append(then, f.clean)
	}
	f.loop = reconcile.New(reconcile.Options{
		Family: p.family, Source: a.store, Dataplane: p, Then: then,
		Facts:        func(snap *state.Snapshot) *plan.Facts { return a.factsOf(p.family, snap) },
		FactsChanged: f.facts,
		Alarm:        p.alarm(),
		Periods:      a.periods,
		Observer:     &observer{a: a, first: p.family == a.firstFamily(p)},
		Log:          a.log,
	})
	a.loops = append(a.loops, f)
}

// firstFamily is the family that counts what both see.
func (a *agent) firstFamily(p *dataplane) model.Family {
	if len(a.loops) > 0 {
		return a.loops[0].family
	}
	return p.family
}

func (a *agent) periods() reconcile.Periods {
	cfg := a.cfg.Load()
	p := reconcile.Periods{Retry: cfg.SyncPeriod, Check: cfg.CheckPeriod, Resync: cfg.ResyncPeriod}
	if cfg.MinSyncExplicit {
		p.MinSync = cfg.MinSyncPeriod
	}
	return p
}

// followNode tells the health server of the own Node. Without an API server
// there may be no Node object; the machine that we run on then stands for it.
func (a *agent) followNode(ctx context.Context) error {
	changed := a.store.Subscribe()
	for {
		n := a.store.Current().Node()
		if n == nil && a.cfg.Load().Manifests != "" {
			n = &model.Node{Name: a.cfg.Load().NodeName}
		}
		a.health.SyncNode(n)
		if err := a.nodeCIDRKept(n); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// followConfig applies what can be applied of a changed file, and ends the agent
// for the rest: whoever runs it starts it again, and the rules stay meanwhile.
func (a *agent) followConfig(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := config.Watch(ctx, a.cfg.Load(), a.log, func(next *config.Config, hot, restart []string) {
		restart = append(restart, fixedAtStart(hot)...)
		if len(restart) > 0 {
			cancel(fmt.Errorf("the configuration file changed in %s, which needs a restart", strings.Join(restart, ", ")))
			return
		}
		a.cfg.Store(next)
		if err := config.ApplyVerbosity(next); err != nil {
			a.log.Error("Could not change the verbosity", "err", err)
		}
		prepareHost(next, a.log, false)
		a.factsChanged()
		a.log.Info("The configuration file changed; applied without a restart", "fields", hot)
	})
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// fixedAtStart returns the changed fields that could be applied to a running
// agent, but have decided here how its parts were built.
func fixedAtStart(changed []string) []string {
	var out []string
	for _, f := range changed {
		if f == "clusterCIDR" || strings.HasPrefix(f, "detectLocal") || // the detector
			f == "conntrack.tcpBeLiberal" || // the rule against invalid packets
			strings.HasPrefix(f, config.SluiceKind+".conntrack") { // whether conntrack is cleaned
			out = append(out, f)
		}
	}
	return out
}

func (a *agent) debugServer(cfg *config.Config) *debug.Server {
	sets := map[model.Family]func() *plan.Set{}
	for _, f := range a.loops {
		sets[f.family] = f.loop.Set
	}
	return debug.NewServer(debug.Options{
		Addr: cfg.MetricsAddr, HardFail: cfg.KubeProxy.BindAddressHardFail, Log: a.log,
		BindFailed: func(err error) {
			a.events.node("Warning", "FailedToStartMetricServer", "StartKubeProxy", err.Error())
		},
		Version: version.Get().GitVersion,
		Mode:    func() string { return string(a.cfg.Load().Mode) },
		Configz: func() map[string]any {
			c := a.cfg.Load()
			return map[string]any{"kubeproxy.config.k8s.io": c.KubeProxy, "sluice.io": c.Sluice}
		},
		Profiling:    cfg.KubeProxy.EnableProfiling,
		SetVerbosity: setVerbosity,
		Snapshot:     a.store.Current,
		Sets:         sets,
		SetAside:     a.setAside,
		Ruleset:      a.ruleset,
		Health:       a.health.Health,
		IPVS:         a.ipvsPage(),
	})
}

// plane returns the dataplane of a family, or nil.
func (a *agent) plane(f model.Family) *dataplane {
	for _, l := range a.loops {
		if l.family == f {
			return l.plane
		}
	}
	return nil
}

func (a *agent) setAside(f model.Family, key model.PortKey) error {
	if p := a.plane(f); p != nil {
		return p.refusal(key)
	}
	return nil
}

func (a *agent) ruleset(_ context.Context, name model.ServiceName) (string, error) {
	var b strings.Builder
	for _, l := range a.loops {
		if set := l.loop.Set(); set != nil {
			b.WriteString(l.plane.render(set, name))
		}
	}
	return b.String(), nil
}
