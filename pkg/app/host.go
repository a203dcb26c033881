package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/proxier/nftables"
)

// prepareHost sets what the node's kernel needs. Nothing of it is a reason not
// to start: in containers and network namespaces many settings are read-only.
func prepareHost(cfg *config.Config, log *slog.Logger, starting bool) {
	var system node.System
	if starting {
		if err := system.SetOOMScoreAdj(cfg.OOMScoreAdj); err != nil {
			log.Warn("Could not set the OOM score", "err", err)
		}
	}
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
}

// networkOf is what NodePorts need of the kernel's network. Where they are not
// served on loopback addresses no rule keeps others from those either
// (CVE-2020-8558), so route_localnet must then be left alone.
func networkOf(cfg *config.Config) node.Network {
	filter := cfg.NodePortAddresses.IPv4
	loopback := func(p netip.Prefix) bool { return p.Contains(localhost) }
	return node.Network{LocalhostNodePorts: cfg.LocalhostNodePorts && (filter.All || slices.ContainsFunc(filter.Prefixes, loopback))}
}

// localhost is where IPv4 NodePorts may be served besides the node's addresses.
var localhost = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// InitOnly does what needs all privileges, so that the agent can then run with
// CAP_NET_ADMIN and CAP_NET_RAW only.
func InitOnly(_ context.Context, cfg *config.Config, log *slog.Logger) error {
	prepareHost(cfg, log, false)
	return nil
}

// Cleanup removes everything that Sluice or kube-proxy wrote to the node in
// iptables and nftables mode, and nothing else.
func Cleanup(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	var errs []error
	for _, f := range []model.Family{model.IPv4, model.IPv6} {
		if err := iptables.CleanupHost(ctx, f); err != nil {
			errs = append(errs, fmt.Errorf("clean up %s: %w", f, err))
		}
		if _, err := nftables.RemoveKubeProxy(f); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		log.Info("All rules of Sluice and of kube-proxy's iptables and nftables modes are removed; this node forwards no Service any more")
	}
	return errors.Join(errs...)
}
