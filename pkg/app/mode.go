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
)

// mode is a proxy mode that this machine can run: what is different from one to
// the other, besides the proxiers themselves.
type mode interface {
	// prepare sets what all families share in the kernel, and says what people
	// should know of the mode. It is called once, before open.
	prepare()
	// open makes the proxier of a family. An *unavailable error says why the family
	// cannot be served, and is left alone; any other ends the agent, since the next
	// start may succeed. It is asked once for each family.
	open(ctx context.Context, p *dataplane, d proxier.Detector) (engine, error)
	// adjust completes node facts; own are the node's addresses of the family.
	adjust(facts *plan.Facts, own []netip.Addr)
	// refusesUnallocated says that its proxiers refuse connections to addresses of
	// the ServiceCIDRs that no Service has. Only then are ServiceCIDRs followed, and
	// among the facts.
	refusesUnallocated() bool
	// removeOthers removes what other modes, ours or kube-proxy's, have left of a
	// family. It is called when the rules of this one are in force. What was
	// removed comes back in words for people, "" for nothing.
	removeOthers(ctx context.Context, f model.Family) (removed string, err error)
	// objects are the kinds of kernel objects that its proxiers repair.
	objects() []string
}

// engine is a proxier, with what loop and pages ask of it besides.
type engine interface {
	proxier.Proxier
	Check(ctx context.Context, force bool) (bool, error)
	Prime(ctx context.Context, want *plan.Set) (bool, error)
	// render gives what a Service compiles to, for people.
	render(set *plan.Set, name model.ServiceName) string
}

// follower is an engine that is told by the kernel when others change what is ours.
// Follow hears it until ctx ends, Alarm receives then.
type follower interface {
	Follow(ctx context.Context) error
	Alarm() <-chan struct{}
}

// unavailable says that a mode cannot run here, though the configuration is right.
// It is for answers that will be the same the next time: what follows from it, a
// fallback, removes what the mode has in the kernel.
type unavailable struct {
	mode   config.Mode
	reason string // a metric's label; "" for one family
	err    error  // what is missing, and what can be done
}

func (e *unavailable) Error() string {
	return fmt.Sprintf("mode %s cannot run here: %v", e.mode, e.err)
}
func (e *unavailable) Unwrap() error { return e.err }

// chooseMode finds out whether the configured mode can run here. If not, it
// returns iptables mode and the configuration for that, or an error where the
// configuration forbids it.
func (a *agent) chooseMode(ctx context.Context, cfg *config.Config) (mode, *config.Config, error) {
	m, err := a.modeOf(ctx, cfg)
	var missing *unavailable
	if !errors.As(err, &missing) || ctx.Err() != nil {
		return m, cfg, err
	}
	if !cfg.ModeFallback {
		return nil, nil, fmt.Errorf("%w (modeFallback is off, so nothing else is tried)", err)
	}
	fallback, err := cfg.WithMode(config.ModeIPTables)
	if err != nil {
		return nil, nil, fmt.Errorf("%w; iptables mode, to fall back to: %w", missing, err)
	}
	a.log.Warn("The chosen mode cannot run here; iptables mode is used instead", "chosen", cfg.Mode, "why", missing.err)
	a.events.node("Warning", "ModeFallback", "StartKubeProxy", missing.Error()+"; iptables mode is used instead")
	a.fellBack = missing
	m, err = a.modeOf(ctx, fallback)
	return m, fallback, err
}

func (a *agent) modeOf(ctx context.Context, cfg *config.Config) (mode, error) {
	switch cfg.Mode {
	case config.ModeIPTables:
		return newIPTablesMode(a, cfg), nil
	case config.ModeIPVS:
		return newIPVSMode(ctx, a, cfg)
	case config.ModeNFTables:
		return newNFTablesMode(ctx, a, cfg)
	}
	return nil, fmt.Errorf("no mode %q", cfg.Mode)
}

// families are the IP families that this machine has.
func (a *agent) families() []model.Family {
	if ok, why := (node.System{}).IPv6(); !ok {
		a.log.Debug("IPv6 is off", "why", why)
		return []model.Family{model.IPv4}
	}
	return []model.Family{model.IPv4, model.IPv6}
}

// publishMode exports which mode is in force, and why if it is not the chosen one.
func (a *agent) publishMode(cfg *config.Config) {
	metrics.SetMode(string(cfg.Mode), string(a.chosen))
	if a.fellBack != nil {
		metrics.SetModeFallback(string(a.fellBack.mode), string(cfg.Mode), a.fellBack.reason)
	}
}
