package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/proxier/nftables"
)

// prepareProcess asks the kernel to spare this process when memory is short.
func (a *agent) prepareProcess(cfg *config.Config) {
	if err := (node.System{}).SetOOMScoreAdj(cfg.OOMScoreAdj); err != nil {
		a.log.Warn("Could not set the OOM score", "err", err)
	}
}

// prepareHost sets what the node's kernel needs in the mode of cfg. Nothing of it
// is a reason not to start: in containers and network namespaces many settings are
// read-only. starting says that it is the first time.
func prepareHost(cfg *config.Config, log *slog.Logger, starting bool) {
	var system node.System
	changes := node.ConntrackSysctls(node.Conntrack{
		MaxPerCore: cfg.Conntrack.MaxPerCore, Min: cfg.Conntrack.Min,
		TCPEstablishedTimeout: cfg.Conntrack.TCPEstablishedTimeout, TCPCloseWaitTimeout: cfg.Conntrack.TCPCloseWaitTimeout,
		TCPBeLiberal: cfg.Conntrack.TCPBeLiberal,
		UDPTimeout:   cfg.Conntrack.UDPTimeout, UDPStreamTimeout: cfg.Conntrack.UDPStreamTimeout,
	}, system.OnlineCPUs(), system.ReadInt)
	changes = append(changes, node.NetworkSysctls(networkOf(cfg), system.ReadInt)...)
	for _, c := range changes {
		log.Info("Kernel setting", "change", c.String())
	}
	for _, err := range system.Apply(changes) {
		log.Warn("Could not change a kernel setting; going on without", "err", err)
	}
	if starting && cfg.Mode == config.ModeIPVS {
		log.Info("How IPVS treats a client's port that is used again", "kernel", node.ReuseText(kernelVersion()))
	}
}

// networkOf is what a mode needs of the kernel's network. Where NodePorts are not
// served on 127.0.0.1 no rule keeps others from loopback addresses either
// (CVE-2020-8558), so route_localnet must then be left alone.
func networkOf(cfg *config.Config) node.Network {
	// The node's primary address may not be known yet. For this question any
	// address that is no loopback one stands for it.
	anyPrimary := netip.IPv4Unspecified()
	n := node.Network{LocalhostNodePorts: cfg.LocalhostNodePorts && node.IncludesLocalhost(nodePorts(cfg.NodePortAddresses.IPv4), anyPrimary)}
	if cfg.Mode == config.ModeIPVS {
		n.IPVS, n.StrictARP, n.Kernel = true, cfg.IPVS.StrictARP, kernelVersion()
	}
	return n
}

// nodePorts is nodePortAddresses as pkg/node understands it. Localhost is among
// the prefixes.
func nodePorts(f config.NodePortFilter) node.Spec {
	return node.Spec{All: f.All, Primary: f.Primary, Prefixes: f.Prefixes}
}

// kernelVersion is the running kernel's; zero if it cannot be read.
func kernelVersion() node.KernelVersion {
	v, err := (node.System{}).KernelVersion()
	if err != nil {
		return node.KernelVersion{}
	}
	return v
}

// InitOnly does what needs all privileges, so that the agent can then run with
// CAP_NET_ADMIN and CAP_NET_RAW only.
func InitOnly(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	a := newAgent(cfg, log)
	cfg, err := a.enterMode(ctx, cfg) // loads modules, too
	if err != nil {
		return err
	}
	prepareHost(cfg, log, true)
	return nil
}

// Cleanup removes everything that Sluice or kube-proxy wrote to the node, in any
// mode, and nothing else.
func Cleanup(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	host := systemIPVS()
	var errs []error
	for _, f := range []model.Family{model.IPv4, model.IPv6} {
		if err := iptables.CleanupHost(ctx, f); err != nil {
			errs = append(errs, fmt.Errorf("clean up %s: %w", f, err))
		}
		if err := host.cleanup(ctx, f, cfg.IPVS.ExcludeCIDRs); err != nil { // after the rules: they hold on to sets
			errs = append(errs, fmt.Errorf("clean up ipvs mode of %s: %w", f, err))
		}
		if err := nftables.CleanupHost(f); err != nil {
			errs = append(errs, fmt.Errorf("clean up nftables mode of %s: %w", f, err))
		}
	}
	if len(errs) == 0 {
		log.Info("Everything of Sluice and of kube-proxy's iptables, ipvs and nftables modes is removed; this node forwards no Service any more")
	}
	return errors.Join(errs...)
}
