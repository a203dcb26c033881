package kernel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/ipvs"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
	"github.com/sluice-proxy/sluice/test/uml"
)

// TestIPVS runs what needs a kernel with IPVS on one: every scenario with the
// ipvs proxier, and the tests of what only that can do. All in one go, for a
// kernel that boots takes seconds.
func TestIPVS(t *testing.T) {
	m := uml.Machine{Modules: append(uml.DefaultModules(), "sctp")} // whose flows need sockets
	uml.RerunIn(t, m, "^(TestProbe|TestScenarios|TestSchedulers|TestTermination|TestDrain|TestKeep|TestForeign|TestCleanup|TestModeChange|TestHostPorts)$")
}

// inside skips a test where TestIPVS has not started it.
func inside(t *testing.T) {
	t.Helper()
	if !uml.Inside() {
		t.Skip("run by TestIPVS, on a kernel with IPVS")
	}
}

// probed is what the kernel offers, by family.
var probed = map[model.Family]func() (ipvs.Host, error){}

func init() {
	for _, f := range []model.Family{model.IPv4, model.IPv6} {
		probed[f] = sync.OnceValues(func() (ipvs.Host, error) { return ipvs.Probe(context.Background(), f, "legacy") })
	}
}

// TestProbe: the kernel under test offers everything, so that what follows tests
// everything.
func TestProbe(t *testing.T) {
	inside(t)
	for f, probe := range probed {
		h, err := probe()
		if err != nil || !h.Inside || !slices.Equal(h.Schedulers, scenarios.Schedulers) || h.Version == "" || len(h.Missing) > 0 {
			t.Errorf("%s: %+v, %v", f, h, err)
		}
	}
}

func ipvsOptions(s *scenarios.Scenario, f model.Family) (ipvs.Options, error) {
	h, err := probed[f]()
	return ipvs.Options{
		Family:        f,
		Programs:      h.Programs,
		MasqueradeBit: 14,
		RandomFully:   h.RandomFully,
		Detector:      proxier.Detector(s.Detector(f)),
		Schedulers:    h.Schedulers,
		Inside:        h.Inside,
	}, err
}

func newIPVS(s *scenarios.Scenario, f model.Family) (proxier.Proxier, error) {
	o, err := ipvsOptions(s, f)
	if err != nil {
		return nil, err
	}
	return ipvs.New(o)
}

// prepareIPVS sets the sysctls that the agent sets in ipvs mode, and the policy
// of FORWARD.
func prepareIPVS(t *testing.T, s *scenarios.Scenario, on *netlab.Namespace) {
	t.Helper()
	err := on.Do(func() error {
		var sys node.System
		version, err := sys.KernelVersion()
		if err != nil {
			return err
		}
		settings := node.Network{IPVS: true, Kernel: version}
		return errors.Join(sys.Apply(node.NetworkSysctls(settings, sys.ReadInt))...)
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.Settings.ForwardPolicy == "" {
		return
	}
	for _, program := range []string{"iptables-legacy", "ip6tables-legacy"} {
		if _, err := on.Run(t.Context(), program, "-w", "-P", "FORWARD", s.Settings.ForwardPolicy); err != nil {
			t.Fatal(err)
		}
	}
}

// awaitAddrs waits until packets to all addresses of Services come in. The kernel
// makes the route of an IPv6 address a moment after the address (addrconf_dad_work
// runs later, also where there is nothing to detect); until then the node sends
// packets on, as it would without the Service.
func awaitAddrs(t *testing.T, on *netlab.Namespace) {
	t.Helper()
	link, err := on.Netlink().LinkByName(proxyDevice)
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := on.Netlink().AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for _, a := range addrs {
		for {
			routes, err := on.Netlink().RouteGet(a.IP)
			if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("packets to %s do not come in: %v, %v", a.IP, routes, err)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// evidence is what a node's kernel has, as independent programs print it.
func evidence(on *netlab.Namespace) string {
	var b strings.Builder
	for _, argv := range [][]string{
		{"ipvsadm", "-Ln"}, {"ipvsadm", "-Lnc"}, {"ipset", "list"}, {"iptables-save", "-c"}, {"ip6tables-save", "-c"}, {"ip", "addr"}, {"dmesg"},
	} {
		out, err := on.Run(context.Background(), argv[0], argv[1:]...)
		fmt.Fprintf(&b, "$ %s\n%s", strings.Join(argv, " "), out)
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	return b.String()
}
