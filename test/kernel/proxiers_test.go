package kernel

import (
	"fmt"
	"os/exec"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/proxier/nftables"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
)

// subject is a proxier under test.
type subject struct {
	name string
	mode string // as flows name it
	ipvs bool   // it needs a kernel with IPVS: see TestIPVS

	// new makes the proxier of one family. An error is the reason why it cannot
	// run on this machine.
	new func(s *scenarios.Scenario, f model.Family) (proxier.Proxier, error)

	// prepare does to the node what the agent does besides the proxier (sysctls),
	// and what the scenario says that others have done.
	prepare func(t *testing.T, s *scenarios.Scenario, node *netlab.Namespace)
}

var subjects = []subject{
	{name: "iptables-nft", mode: "iptables", new: newIPTables("nft"), prepare: prepareIPTables("nft")},
	{name: "iptables-legacy", mode: "iptables", new: newIPTables("legacy"), prepare: prepareIPTables("legacy")},
	{name: "nftables", mode: "nftables", new: newNFTables, prepare: prepareNFTables},
	{name: "ipvs", mode: "ipvs", ipvs: true, new: newIPVS, prepare: prepareIPVS},
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
		var err error
		if o.Programs, err = programs(variant, f); err != nil {
			return nil, err
		}
		return iptables.New(o), nil
	}
}

func newNFTables(s *scenarios.Scenario, f model.Family) (proxier.Proxier, error) {
	return nftables.New(nftables.Options{Family: f, MasqueradeBit: 14, Detector: proxier.Detector(s.Detector(f))})
}

// prepareNFTables is prepareIPTables: FORWARD is iptables' in any mode.
func prepareNFTables(t *testing.T, s *scenarios.Scenario, node *netlab.Namespace) {
	allowLoopback(t, s, node)
	setForwardPolicy(t, s, node, "nft")
}

func programs(variant string, f model.Family) (iptables.Programs, error) {
	p := iptables.Programs{Family: f, Variant: "nft"}
	if variant == "legacy" {
		p.Variant = "legacy"
	}
	program := "iptables-" + variant
	if f == model.IPv6 {
		program = "ip6tables-" + variant
	}
	for suffix, where := range map[string]*[]string{"": &p.Command, "-restore": &p.Restore, "-save": &p.Save} {
		path, err := exec.LookPath(program + suffix)
		if err != nil {
			return p, fmt.Errorf("%s is not installed", program+suffix)
		}
		*where = []string{path}
	}
	return p, nil
}

// prepareIPTables lets packets from 127.0.0.1 be translated, for node ports on
// loopback.
func prepareIPTables(variant string) func(*testing.T, *scenarios.Scenario, *netlab.Namespace) {
	return func(t *testing.T, s *scenarios.Scenario, node *netlab.Namespace) {
		allowLoopback(t, s, node)
		setForwardPolicy(t, s, node, variant)
	}
}

// setForwardPolicy gives the filter table's FORWARD chain the scenario's policy.
func setForwardPolicy(t *testing.T, s *scenarios.Scenario, node *netlab.Namespace, variant string) {
	for _, program := range []string{"iptables-" + variant, "ip6tables-" + variant} {
		if _, err := exec.LookPath(program); err != nil || s.Settings.ForwardPolicy == "" {
			continue // the proxier says so
		}
		if _, err := node.Run(t.Context(), program, "-w", "-P", "FORWARD", s.Settings.ForwardPolicy); err != nil {
			t.Fatal(err)
		}
	}
}

func allowLoopback(t *testing.T, s *scenarios.Scenario, node *netlab.Namespace) {
	if s.LocalhostNodePorts() {
		if err := node.Sysctl("net.ipv4.conf.all.route_localnet", "1"); err != nil {
			t.Fatal(err)
		}
	}
}
