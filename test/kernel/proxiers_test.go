package kernel

import (
	"fmt"
	"os/exec"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
)

// subject is a proxier under test.
type subject struct {
	name string
	mode string // as flows name it

	// new makes the proxier of one family. An error is the reason why it cannot
	// run on this machine.
	new func(s *scenarios.Scenario, f model.Family) (proxier.Proxier, error)

	// prepare does to the node what the agent does besides the proxier: sysctls.
	prepare func(s *scenarios.Scenario, node *netlab.Namespace) error
}

var subjects = []subject{
	{name: "iptables-nft", mode: "iptables", new: newIPTables("nft"), prepare: routeLocalnet},
	{name: "iptables-legacy", mode: "iptables", new: newIPTables("legacy"), prepare: routeLocalnet},
}

func newIPTables(variant string) func(*scenarios.Scenario, model.Family) (proxier.Proxier, error) {
	return func(s *scenarios.Scenario, f model.Family) (proxier.Proxier, error) {
		d := s.Detector(f)
		o := iptables.Options{
			Family:        f,
			MasqueradeBit: 14,
			RandomFully:   true,
			Detector:      iptables.Detector{CIDR: d.CIDR, BridgeInterface: d.BridgeInterface, InterfacePrefix: d.InterfacePrefix},
		}
		program := "iptables-" + variant
		o.Programs.Variant = "nft"
		if variant == "legacy" {
			o.Programs.Variant = "legacy"
		}
		if f == model.IPv6 {
			program = "ip6tables-" + variant
		}
		o.Programs.Family = f
		for suffix, where := range map[string]*[]string{"": &o.Programs.Command, "-restore": &o.Programs.Restore, "-save": &o.Programs.Save} {
			path, err := exec.LookPath(program + suffix)
			if err != nil {
				return nil, fmt.Errorf("%s is not installed", program+suffix)
			}
			*where = []string{path}
		}
		return iptables.New(o), nil
	}
}

// routeLocalnet lets packets from 127.0.0.1 be translated, for node ports on
// loopback.
func routeLocalnet(s *scenarios.Scenario, node *netlab.Namespace) error {
	if !s.Settings.LocalhostNodePorts {
		return nil
	}
	return node.Sysctl("net.ipv4.conf.all.route_localnet", "1")
}
