package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/uml"
)

// TestModeFallback: on a kernel without IPVS the agent says so, in all the ways
// that people look, and serves in iptables mode; or it refuses, if it is told to.
func TestModeFallback(t *testing.T) {
	c := newTest(t)
	if other {
		t.Skip("SKIPPED: only Sluice has --mode-fallback, and this is ", binary)
	}
	if uml.Native() {
		t.Skip("SKIPPED: this machine's kernel has IPVS, so nothing has to fall back")
	}
	svc := c.service(t, "fallback")
	if err := c.endpoints("fallback", "pod1", "pod3"); err != nil {
		t.Fatal(err)
	}
	a := c.startAgent(t, "node1")
	a.stop(syscall.SIGTERM)
	flags := []string{"--kubeconfig=" + filepath.Join(a.dir, "kubeconfig.conf"), "--hostname-override=node1", "--cluster-cidr=" + clusterCIDR, "--proxy-mode=ipvs"}

	p, err := start(a.ns(), filepath.Join(a.dir, t.Name()+"-refused.log"), a.env(), binary, append(flags, "--mode-fallback=false")...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.stop(syscall.SIGKILL) })
	until(t, "the agent refuses to start", func() error {
		if p.ended() == nil {
			return errors.New("it runs")
		}
		return nil
	})
	var exit *exec.ExitError
	if !errors.As(p.err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("it ended with %v, want exit status 1", p.err)
	}
	refusals := 0
	for line := range strings.Lines(p.output()) {
		if strings.Contains(line, "mode ipvs cannot run here: ") && strings.Contains(line, "modeFallback is off") {
			refusals++
		}
	}
	if refusals != 1 {
		t.Errorf("%d lines say why it does not start, want 1:\n%s", refusals, p.output())
	}

	p, err = start(a.ns(), filepath.Join(a.dir, t.Name()+"-fallback.log"), a.env(), binary, flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.stop(syscall.SIGKILL)
		if t.Failed() {
			t.Log(p.tail())
		}
	})
	answeredBy(t, c.lab.Host("pod2"), clusterIP(svc), "pod1", "pod3")
	if err := c.endpoints("fallback", "pod4"); err != nil { // the rules above may be those of before
		t.Fatal(err)
	}
	answeredBy(t, c.lab.Host("pod2"), clusterIP(svc), "pod4")
	if n := strings.Count(p.output(), "The chosen mode cannot run here; iptables mode is used instead"); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
	const metrics = "127.0.0.1:10249"
	until(t, "the fallback is in the metrics", func() error {
		return get(a.ns(), metrics, "/metrics", 200, `sluice_mode_fallback{from="ipvs",reason="`, `to="iptables"} 1`,
			`sluice_proxy_mode{configured="ipvs",mode="iptables"} 1`)
	})
	if err := get(a.ns(), metrics, "/proxyMode", 200, "iptables"); err != nil {
		t.Error(err)
	}
	c.nodeWarned(t, "ModeFallback", "mode ipvs cannot run here")
}

// nodeWarned waits for an Event on node1.
func (c *cluster) nodeWarned(t *testing.T, reason, note string) {
	t.Helper()
	until(t, "an Event "+reason+" says that "+note, func() error {
		events, err := c.client.EventsV1().Events("default").List(context.Background(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.Reason == reason && e.Type == "Warning" && e.Regarding.Kind == "Node" && e.Regarding.Name == "node1" && strings.Contains(e.Note, note) {
				return nil
			}
		}
		return fmt.Errorf("none among %d Events", len(events.Items))
	})
}

// needsNFTables skips where the mode cannot be had: then what is shipped falls back,
// and TestModeFallback is about that.
func needsNFTables(t *testing.T, c *cluster) {
	t.Helper()
	if other {
		t.Skip("SKIPPED: this is about Sluice's nftables mode, and this is ", binary)
	}
	if _, err := c.lab.Host("node1").Run(t.Context(), "nft", "list", "tables"); err != nil {
		t.Skip("SKIPPED, nftables mode not tested: ", err)
	}
}

// TestNFTables: the mode as it is deployed, but for the one word in the ConfigMap.
func TestNFTables(t *testing.T) {
	c := newTest(t)
	needsNFTables(t, c)
	steady, svc := c.service(t, "nft-steady"), c.service(t, "nft")
	for _, name := range []string{"nft-steady", "nft"} {
		if err := c.endpoints(name, "pod1", "pod3"); err != nil {
			t.Fatal(err)
		}
	}
	node, pod, outer := c.lab.Host("node1"), c.lab.Host("pod2"), t
	var a *agent
	// The node is known a moment after the Services, and with it where node ports are.
	if !t.Run("from iptables mode", func(t *testing.T) {
		before := c.startAgent(t, "node1")
		targets := []target{{c.nodePort("node1", svc), []string{"pod1", "pod3"}}, {clusterIP(svc), []string{"pod1", "pod3"}}}
		for _, to := range targets {
			answeredBy(t, node, to.addr, to.pods...)
		}
		client := connectAllTheTime(t, node, pod, targets)
		client.more(t, 50)
		before.stop(syscall.SIGTERM)
		a = c.startAgentIn(outer, "node1", "nftables")
		until(t, "what iptables mode has left is removed", func() error {
			if !strings.Contains(a.output(), `"Removed what another mode had left" ipFamily="IPv4" removed="the iptables mode's chains`) {
				return errors.New("the log does not say so")
			}
			return nil
		})
		client.more(t, 50)
	}) {
		t.FailNow()
	}
	for _, from := range []string{"pod2", "pod1", "node1"} { // pod1 also reaches itself
		answeredBy(t, c.lab.Host(from), clusterIP(svc), "pod1", "pod3")
	}
	t.Run("node ports", func(t *testing.T) {
		// By default on the primary address and on 127.0.0.1.
		at := c.nodePort("node1", svc)
		answeredBy(t, c.lab.Host("client"), at, "pod1", "pod3")
		answeredBy(t, node, at, "pod1", "pod3")
		answeredBy(t, node, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), at.Port()), "pod1", "pod3")
	})
	const metrics = "127.0.0.1:10249"
	t.Run("what it says of itself", func(t *testing.T) {
		if err := get(node, metrics, "/proxyMode", 200, "nftables"); err != nil {
			t.Error(err)
		}
		until(t, "the mode's metrics are there", func() error {
			return get(node, metrics, "/metrics", 200, `sluice_proxy_mode{configured="nftables",mode="nftables"} 1`,
				`kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family="IPv4"} 0`,
				`kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{ip_family="IPv4"} 0`,
				`sluice_drift_repaired_total{ip_family="IPv4",object="table"} 0`)
		})
	})
	t.Run("endpoints change", func(t *testing.T) {
		client := connectAllTheTime(t, node, pod, []target{{clusterIP(steady), []string{"pod1", "pod3"}}, {clusterIP(svc), []string{"pod1", "pod2", "pod3", "pod4"}}})
		for _, pods := range [][]string{{"pod1", "pod3", "pod4"}, {"pod4"}, {"pod2", "pod4"}} {
			client.more(t, 20)
			if err := c.endpoints("nft", pods...); err != nil {
				t.Fatal(err)
			}
			answeredBy(t, pod, clusterIP(svc), pods...)
		}
		a.stop(syscall.SIGKILL)
		client.more(t, 100)
		a.start()
		client.more(t, 100)
	})
	t.Run("addresses of ServiceCIDRs", func(t *testing.T) { testUnallocated(t, c, pod) })
	t.Run("drift", func(t *testing.T) {
		if _, err := node.Run(t.Context(), "nft", "flush", "ruleset"); err != nil {
			t.Fatal(err)
		}
		answeredBy(t, pod, clusterIP(svc), "pod2", "pod4")
		until(t, "the repair is in the metrics", func() error {
			return get(node, metrics, "/metrics", 200, `sluice_drift_repaired_total{ip_family="IPv4",object="table"} 1`)
		})
		c.nodeWarned(t, "DriftRepaired", "(IPv4, table)")
	})
	t.Run("fallback forbidden", func(t *testing.T) {
		a.stop(syscall.SIGTERM)
		p, err := start(node, filepath.Join(a.dir, "nftables-no-fallback.log"), a.env(), binary, "--kubeconfig="+filepath.Join(a.dir, "kubeconfig.conf"),
			"--hostname-override=node1", "--cluster-cidr="+clusterCIDR, "--proxy-mode=nftables", "--mode-fallback=false")
		if err != nil {
			t.Fatal(err)
		}
		defer p.stop(syscall.SIGKILL)
		if err := c.endpoints("nft", "pod3"); err != nil { // the rules of before still serve
			t.Fatal(err)
		}
		answeredBy(t, pod, clusterIP(svc), "pod3")
		if err := p.ended(); err != nil || strings.Contains(p.output(), "cannot run here") {
			t.Errorf("it has nothing to refuse: %v\n%s", err, p.tail())
		}
	})
}

// testUnallocated: what no Service has is refused in a range from the moment on that
// the API server has it, and no longer. Until then it is somebody else's, who answers.
func testUnallocated(t *testing.T, c *cluster, from *netlab.Namespace) {
	at := netip.MustParseAddrPort("10.97.0.7:80")
	if err := c.lab.RouteVia(netip.PrefixFrom(at.Addr(), 32), "node1"); err != nil {
		t.Fatal(err)
	}
	stop, err := c.lab.Nowhere.Serve("elsewhere", "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	answeredBy(t, from, at, "elsewhere")
	api := c.client.NetworkingV1().ServiceCIDRs()
	cidr := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "nftables"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.97.0.0/24"}}}
	if _, err := api.Create(t.Context(), cidr, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.Delete(context.Background(), cidr.Name, metav1.DeleteOptions{}) })
	until(t, "the new range's addresses are refused", func() error {
		a, err := from.Ask(t.Context(), "tcp", netip.Addr{}, at, askTimeout)
		if err == nil && a.Result != netlab.Refused {
			err = errors.New(a.String())
		}
		return err
	})
	if err := api.Delete(t.Context(), cidr.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	answeredBy(t, from, at, "elsewhere")
}
