package modes

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/uml"
)

// foreignTables are what others have in nf_tables: names close to ours and
// kube-proxy's are among them, in a family that neither uses.
const foreignTables = `table inet sluice {
	chain c { type filter hook forward priority filter; policy accept; ip saddr 192.0.2.4 drop; }
}
table inet kube-proxy {
	set s { type ipv4_addr; elements = { 192.0.2.5 } }
}
table ip theirs {
	chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; ip daddr 192.0.2.6 tcp dport 80 dnat to 192.0.2.7:8080; }
}
table ip6 theirs {
	map services { type inet_service : verdict; elements = { 80 : drop } }
}
`

// newTablesWorld is a world on the machine's own kernel, which must have nf_tables;
// it need not have IPVS. Others have rules in both variants of iptables.
func newTablesWorld(t *testing.T, binary string) *world {
	t.Helper()
	w := buildWorld(t, binary)
	if _, err := w.node.Run(context.Background(), "nft", "list", "tables"); err != nil {
		t.Skip("SKIPPED, changes to nftables mode not tested: ", err)
	}
	w.iptables = []string{"iptables-nft", "iptables-legacy"}
	for _, iptables := range w.iptables {
		w.commands(strings.ReplaceAll(strings.ReplaceAll(foreignRules, "IPTABLES", iptables), "FOREIGN", "FOREIGN-"+iptables[9:]))
	}
	w.nft(foreignTables)
	return w
}

func (w *world) nft(script string) {
	w.t.Helper()
	if _, err := w.node.RunInput(context.Background(), script, "nft", "-f", "-"); err != nil {
		w.t.Fatal(err)
	}
}

// tables are those of nf_tables, but for the ones that iptables' nft variant has:
// the rules in there are listed by iptables. Contents are those of others' tables.
func (w *world) tables() []string {
	w.t.Helper()
	var out []string
	for line := range strings.Lines(w.run("nft", "list", "tables")) {
		table := strings.TrimSpace(line)
		f := strings.Fields(table)
		switch f[2] {
		case "filter", "nat", "mangle", "raw", "security":
			continue
		}
		out = append(out, table)
		if f[1] == "inet" || f[2] == "theirs" {
			out = append(out, w.run("nft", "list", "table", f[1], f[2]))
		}
	}
	return out
}

// kubeProxyTable is what kube-proxy's nftables mode makes for the manifest, in one
// family (its pkg/proxy/nftables, abridged to what this Service needs).
func kubeProxyTable(family, vip, empty, node, pod string) string {
	return strings.NewReplacer("FAMILY", family, "ADDR", map[string]string{"ip": "ipv4_addr", "ip6": "ipv6_addr"}[family],
		"VIP", vip, "EMPTY", empty, "NODE", node, "POD", pod, "NAME", strings.ReplaceAll(pod, ":", "."), "TO", netip.AddrPortFrom(netip.MustParseAddr(pod), echoPort).String()).Replace(`
table FAMILY kube-proxy {
	comment "rules for kube-proxy"
	set cluster-ips { type ADDR; comment "Active ClusterIPs"; elements = { VIP, EMPTY } }
	set nodeport-ips { type ADDR; comment "IPs that accept NodePort traffic"; elements = { NODE } }
	map no-endpoint-services { type ADDR . inet_proto . inet_service : verdict; comment "vmap to drop or reject packets to services with no endpoints"; }
	map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
	map firewall-ips { type ADDR . inet_proto . inet_service : verdict; }
	map service-ips { type ADDR . inet_proto . inet_service : verdict; comment "ClusterIP, ExternalIP and LoadBalancer IP traffic"; }
	map service-nodeports { type inet_proto . inet_service : verdict; comment "NodePort traffic"; }
	chain reject-chain { reject; }
	chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
	chain masquerading {
		meta mark and 0x4000 == 0 return
		meta mark set meta mark xor 0x4000
		masquerade fully-random
	}
	chain endpoint-QUUHYN4Y-default/web/tcp/http__NAME/8080 {
		FAMILY saddr POD jump mark-for-masquerade
		meta l4proto tcp dnat to TO
	}
	chain service-3PE2MPRC-default/web/tcp/http { numgen random mod 1 vmap { 0 : goto endpoint-QUUHYN4Y-default/web/tcp/http__NAME/8080 }; }
	chain external-3PE2MPRC-default/web/tcp/http { goto service-3PE2MPRC-default/web/tcp/http; }
	chain firewall-check { FAMILY daddr . meta l4proto . th dport vmap @firewall-ips; }
	chain service-endpoints-check { FAMILY daddr . meta l4proto . th dport vmap @no-endpoint-services; }
	chain nodeport-endpoints-check { FAMILY daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }
	chain cluster-ips-check { FAMILY daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"; }
	chain services {
		FAMILY daddr . meta l4proto . th dport vmap @service-ips
		FAMILY daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
	}
	chain filter-prerouting { type filter hook prerouting priority dstnat - 10; policy accept; ct state new jump firewall-check; }
	chain filter-input { type filter hook input priority -110; policy accept; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }
	chain filter-forward { type filter hook forward priority -110; policy accept; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
	chain filter-output { type filter hook output priority -110; policy accept; ct state new jump service-endpoints-check; ct state new jump firewall-check; }
	chain filter-output-post-dnat { type filter hook output priority -90; policy accept; ct state new jump cluster-ips-check; }
	chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
	chain nat-output { type nat hook output priority -100; policy accept; jump services; }
	chain nat-postrouting { type nat hook postrouting priority srcnat; policy accept; jump masquerading; }
}
add element FAMILY kube-proxy no-endpoint-services { EMPTY . tcp . 80 comment "default/empty" : goto reject-chain }
add element FAMILY kube-proxy service-ips { VIP . tcp . 80 : goto service-3PE2MPRC-default/web/tcp/http }
add element FAMILY kube-proxy service-nodeports { tcp . 30001 : goto external-3PE2MPRC-default/web/tcp/http }
`)
}

// kubeProxy puts the tables of kube-proxy's nftables mode into the kernel.
func (w *world) kubeProxy() {
	w.t.Helper()
	w.nft(kubeProxyTable("ip", "10.96.1.1", "10.96.1.2", "172.18.0.11", "10.244.1.11") +
		kubeProxyTable("ip6", "fd00:10:96::101", "fd00:10:96::102", "fd00:172:18::11", "fd00:10:244:1::11"))
}

// dialers are clients that connect all the time.
type dialers struct {
	w     *world
	end   func() // stops them; the test fails if a connection did
	stop  chan struct{}
	ended sync.WaitGroup

	mu     sync.Mutex
	made   map[string]int
	failed []error
}

// dialAllTheTime starts the clients: pods that dial the ClusterIP, the node
// itself, and somebody outside that dials the node port.
func (w *world) dialAllTheTime() *dialers {
	d := &dialers{w: w, stop: make(chan struct{}), made: map[string]int{}}
	for _, q := range [][2]string{{"pod2", "10.96.1.1:80"}, {"pod2", "[fd00:10:96::101]:80"}, {"node1", "10.96.1.1:80"}, {"client", "172.18.0.11:30001"}} {
		from, to := w.lab.Host(q[0]), netip.MustParseAddrPort(q[1])
		way := q[0] + " to " + q[1]
		d.count(way, 0)
		d.ended.Go(func() {
			for {
				select {
				case <-d.stop:
					return
				default:
				}
				begin := time.Now()
				a, err := from.Ask(context.Background(), "tcp", netip.Addr{}, to, 5*time.Second)
				if err == nil && a.Result != netlab.Answered {
					err = fmt.Errorf("%s from %s: %s after %v", to, from.Name, a, time.Since(begin))
				}
				d.count(way, 1, err)
			}
		})
	}
	d.end = sync.OnceFunc(d.judge)
	w.t.Cleanup(d.end)
	return d
}

// count notes n connections, and the errors of those that failed.
func (d *dialers) count(way string, n int, failed ...error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.made[way] += n
	for _, err := range failed {
		if err != nil {
			d.failed = append(d.failed, err)
		}
	}
}

func (d *dialers) judge() {
	close(d.stop)
	d.ended.Wait()
	d.w.t.Logf("connections: %v", d.made)
	for _, err := range d.failed[:min(len(d.failed), 10)] {
		d.w.t.Errorf("of %d that failed: %v", len(d.failed), err)
	}
}

// more waits until each client has made a few more connections.
func (d *dialers) more(n int) {
	d.w.t.Helper()
	counts := func() map[string]int {
		d.mu.Lock()
		defer d.mu.Unlock()
		return maps.Clone(d.made)
	}
	was := counts()
	d.w.until("all clients have connected again", func() error {
		for k, v := range counts() {
			if v < was[k]+n {
				return fmt.Errorf("%s: %d more", k, v-was[k])
			}
		}
		return nil
	})
}

// TestNFTables goes to nftables mode and back on the machine's own kernel.
func TestNFTables(t *testing.T) {
	if uml.Inside() {
		t.Skip("this is for the machine's own kernel")
	}
	if err := netlab.Supported(); err != nil {
		t.Skip("SKIPPED, changes to nftables mode not tested: ", err)
	}
	binary := buildAgent(t, t.TempDir())
	t.Run("iptables-nft", func(t *testing.T) { testNFTables(t, binary, "nft") })
	t.Run("iptables-legacy", func(t *testing.T) { testNFTables(t, binary, "legacy") })
	t.Run("kube-proxy", func(t *testing.T) { testAfterKubeProxy(t, binary) })
}

var ofNFTables = []string{"table ip sluice", "table ip6 sluice"}

// testNFTables goes from iptables mode to nftables mode, back, and to nftables
// mode again, then cleans up, while clients connect all the time.
func testNFTables(t *testing.T, binary, variant string) {
	w := newTablesWorld(t, binary)
	before := w.state()
	has := func(mode string, of, not []string) {
		t.Helper()
		w.serves(mode)
		for _, word := range of {
			w.has(mode, word)
		}
		w.lacks(mode, not...)
		w.keeps(mode, before)
	}
	chain := []string{"iptables-" + variant + "-save :KUBE-SERVICES", "ip6tables-" + variant + "-save :KUBE-SERVICES"}
	ofIPTables := []string{"KUBE-"} // all of it, unlike in ipvs mode

	w.start("iptables", "", "--iptables-variant="+variant)
	has("iptables", chain, ofNFTables)
	conn, err := w.lab.Host("pod2").Open(t.Context(), netip.Addr{}, netip.MustParseAddrPort("10.96.1.1:7000"), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	clients := w.dialAllTheTime()
	for _, step := range []struct {
		to, removes string
		of, not     []string
	}{
		{"nftables", goneIPTables, ofNFTables, ofIPTables},
		{"iptables", goneNFTables, chain, ofNFTables},
		{"nftables", goneIPTables, ofNFTables, ofIPTables},
	} {
		clients.more(20)
		w.stop()
		w.start(step.to, step.removes, "--iptables-variant="+variant)
		clients.more(20)
		has(step.to, step.of, step.not)
		if err := conn.Echo(5 * time.Second); err != nil {
			t.Errorf("a connection from before the change to %s: %v", step.to, err)
		}
	}
	w.stop()
	has("nftables, stopped", ofNFTables, ofIPTables)
	clients.more(20)
	clients.end()
	w.kubeProxy()
	w.cleanup(before)
}

// testAfterKubeProxy starts in nftables mode, and in iptables mode, where
// kube-proxy's table serves.
func testAfterKubeProxy(t *testing.T, binary string) {
	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) {
			w := newTablesWorld(t, binary)
			before := w.state()
			w.kubeProxy()
			w.serves("kube-proxy's")
			w.has("kube-proxy's", "table ip kube-proxy")
			w.has("kube-proxy's", "table ip6 kube-proxy")
			clients := w.dialAllTheTime()
			clients.more(20)
			w.start(mode, goneKubeProxy, "--iptables-variant=nft")
			clients.more(20)
			w.serves(mode)
			w.lacks(mode, "table ip kube-proxy", "table ip6 kube-proxy")
			w.keeps(mode, before)
			w.stop()
			clients.end()
			w.cleanup(before)
		})
	}
}

// TestIPVSAndNFTables goes from ipvs to nftables mode and back, where a kernel can
// do both. Elsewhere the agent refuses, and what ipvs mode has stays in force.
func TestIPVSAndNFTables(t *testing.T) {
	if !uml.Inside() {
		t.Skip("run by TestModes, on a kernel with IPVS")
	}
	w := newWorld(t)
	w.start("ipvs", "")
	w.stop()
	w.launch("nftables")
	if w.refused() {
		w.serves("ipvs, after nftables mode was refused")
		t.Skip("SKIPPED, ipvs to nftables mode and back is not tested: this kernel has IPVS, but not all that nftables mode needs: ", w.logged())
	}
	w.stop()
	w.start("ipvs", goneNFTables)
	w.serves("ipvs")
	w.stop()
	w.start("nftables", goneIPVS)
	w.serves("nftables")
	w.lacks("nftables", "KUBE-", "kube-ipvs0")
	w.stop()
}
