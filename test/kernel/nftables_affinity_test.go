package kernel

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/nftables"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
)

// stickyPlace is a family's addresses of a Service with affinity: its ClusterIP, the
// node that serves it, and endpoints by the node that they are on. The node itself and
// another one are among them.
type stickyPlace struct {
	family    model.Family
	vip, node string
	client    string // addresses begin so
	endpoints map[string]string
}

var stickyPlaces = []stickyPlace{
	{model.IPv4, "10.96.3.1", "172.18.0.11", "198.51.100.", map[string]string{
		"10.244.1.21": "node1", "10.244.2.22": "node2", "10.244.3.23": "node3", "172.18.0.11": "node1", "172.18.0.12": "node2"}},
	{model.IPv6, "fd00:10:96::301", "fd00:172:18::11", "fd00:198:51:100::", map[string]string{
		"fd00:10:244:1::21": "node1", "fd00:10:244:2::22": "node2", "fd00:10:244:3::23": "node3", "fd00:172:18::11": "node1", "fd00:172:18::12": "node2"}},
}

// scenario has the Service with those endpoints that are not gone, over TCP and UDP;
// without affinity if keep is 0.
func (p *stickyPlace) scenario(t *testing.T, keep time.Duration, gone ...string) *scenarios.Scenario {
	t.Helper()
	affinity := "sessionAffinity: None"
	if keep > 0 {
		affinity = fmt.Sprintf("sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: %d}}", keep/time.Second)
	}
	text := fmt.Sprintf(`A Service with affinity.
-- objects.yaml --
kind: Service
metadata: {name: web, namespace: ns}
spec:
  type: NodePort
  clusterIP: %q
  clusterIPs: [%q]
  ports: [{name: t, port: 80, nodePort: 30080}, {name: u, port: 80, nodePort: 30080, protocol: UDP}]
  %s
---
kind: EndpointSlice
metadata: {name: web, namespace: ns, labels: {kubernetes.io/service-name: web}}
addressType: %s
ports: [{name: t, port: 8080}, {name: u, port: 8080, protocol: UDP}]
endpoints:
`, p.vip, p.vip, affinity, p.family)
	for _, a := range slices.Sorted(maps.Keys(p.endpoints)) {
		if !slices.Contains(gone, a) {
			text += fmt.Sprintf("- {addresses: [%q], nodeName: %s}\n", a, p.endpoints[a])
		}
	}
	s, err := scenarios.Parse("test", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// caller is a client at a frontend, as the map of affinity has it.
type caller struct {
	from     netip.Addr
	to       netip.AddrPort
	protocol string
}

func (c caller) String() string {
	return fmt.Sprintf("%s . %s . %s . %d", c.from, c.to.Addr(), c.protocol, c.to.Port())
}

// stickyNode is the node under test, and who dials its Service.
type stickyNode struct {
	t       *testing.T
	place   *stickyPlace
	lab     *netlab.Lab
	p       proxier.Proxier
	hosts   map[netip.Addr]string
	callers []caller
}

const stickyFor = 3 * time.Hour

// newStickyNode programs a node. A pod of its own, the node itself and many a client
// outside are going to dial the Service's ClusterIP and node port, over TCP and UDP.
func newStickyNode(t *testing.T, place *stickyPlace) *stickyNode {
	t.Helper()
	s := place.scenario(t, stickyFor)
	w := &stickyNode{t: t, place: place, hosts: map[netip.Addr]string{}}
	client := s.Cluster.Host("client")
	for i := range 20 {
		a := netip.MustParseAddr(fmt.Sprint(place.client, 10+i))
		client.Addrs = append(client.Addrs, a)
		w.hosts[a] = "client"
	}
	for _, host := range []string{"shell", scenarios.NodeName} {
		for _, a := range s.Cluster.Host(host).Addrs {
			if model.FamilyOf(a) == place.family {
				w.hosts[a] = host
			}
		}
	}
	for from := range w.hosts {
		for _, to := range []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(place.vip), 80), netip.AddrPortFrom(netip.MustParseAddr(place.node), 30080)} {
			w.callers = append(w.callers, caller{from, to, "tcp"}, caller{from, to, "udp"})
		}
	}
	w.lab = build(t, s)
	err := w.node().Do(func() (err error) {
		w.p, err = nftables.New(nftables.Options{Family: place.family, MasqueradeBit: 14, Detector: proxier.Detector(s.Detector(place.family))})
		return err
	})
	if err != nil {
		t.Skipf("SKIPPED, nftables not tested: %v", err)
	}
	t.Cleanup(func() {
		if err := w.node().Do(func() error { return w.p.Cleanup(context.Background()) }); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	w.sync(s.SetIn("nftables", place.family))
	return w
}

func (w *stickyNode) node() *netlab.Namespace { return w.lab.Host(scenarios.NodeName) }

func (w *stickyNode) sync(set *plan.Set) {
	w.t.Helper()
	if err := w.node().Do(func() error { return w.p.Sync(w.t.Context(), set) }); err != nil {
		w.t.Fatal(err)
	}
}

// change has the Service be another way.
func (w *stickyNode) change(keep time.Duration, gone ...string) {
	w.t.Helper()
	w.sync(w.place.scenario(w.t, keep, gone...).SetIn("nftables", w.place.family))
}

// ask makes a connection, and returns the endpoint that has answered.
func (w *stickyNode) ask(c caller) string {
	w.t.Helper()
	a, err := w.lab.Host(w.hosts[c.from]).Ask(w.t.Context(), c.protocol, c.from, c.to, patience)
	if err != nil || a.Result != netlab.Answered {
		w.t.Fatalf("%s: %v, %v", c, a, err)
	}
	return netip.MustParseAddrPort(a.Server).Addr().String()
}

// askAll makes a connection for each caller.
func (w *stickyNode) askAll() map[caller]string {
	w.t.Helper()
	met := map[caller]string{}
	for _, c := range w.callers {
		met[c] = w.ask(c)
	}
	return met
}

// remembered is an element of the map of affinity.
type remembered struct {
	endpoint string
	expires  time.Duration
}

var stickyElement = regexp.MustCompile(`([0-9a-f:.]+ \. [0-9a-f:.]+ \. [a-z]+ \. [0-9]+)(?: timeout \S+)? expires (\S+) : (\S+) \. 8080`)

// memory reads the map, by callers as they are written there.
func (w *stickyNode) memory() map[string]remembered {
	w.t.Helper()
	word := map[model.Family]string{model.IPv4: "ip", model.IPv6: "ip6"}[w.place.family]
	text, err := w.node().Run(w.t.Context(), "nft", "list", "map", word, "sluice", "affinity")
	if err != nil {
		w.t.Fatal(err)
	}
	list := map[string]remembered{}
	for _, m := range stickyElement.FindAllStringSubmatch(text, -1) {
		d, err := time.ParseDuration(m[2])
		if err != nil {
			w.t.Fatal(err)
		}
		list[m[1]] = remembered{m[3], d}
	}
	if n := strings.Count(text, "expires"); n != len(list) {
		w.t.Fatalf("understood %d of %d elements:\n%s", len(list), n, text)
	}
	return list
}

// until waits for something that is seen in the map.
func (w *stickyNode) until(what string, done func(map[string]remembered) bool) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		memory := w.memory()
		if done(memory) {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: it is not so: %v", what, memory)
		}
	}
}

// TestNFTablesAffinity: connections to a Service with affinity, from everywhere, by
// ClusterIP and node port, to endpoints that are pods, other nodes, and the node itself.
func TestNFTablesAffinity(t *testing.T) {
	needNFT(t)
	for i := range stickyPlaces {
		t.Run(stickyPlaces[i].family.String(), func(t *testing.T) { testAffinity(t, newStickyNode(t, &stickyPlaces[i])) })
	}
}

func testAffinity(t *testing.T, w *stickyNode) {
	first := w.askAll()
	counts := map[string]int{}
	for _, endpoint := range first {
		counts[endpoint]++
	}
	if len(counts) != len(w.place.endpoints) {
		t.Fatalf("not all endpoints were met: %v", counts)
	}
	for c, again := range w.askAll() {
		if again != first[c] {
			t.Errorf("%s was at %s, and then at %s", c, first[c], again)
		}
	}
	memory := w.memory()
	if len(memory) != len(w.callers) {
		t.Errorf("%d are remembered, %d have called", len(memory), len(w.callers))
	}
	for _, c := range w.callers {
		if m := memory[c.String()]; m.endpoint != first[c] || m.expires > stickyFor || m.expires < stickyFor-time.Hour {
			t.Errorf("%s was at %s; remembered: %v", c, first[c], m)
		}
	}
	testAffinityRenewed(w, first)
	testAffinityForgotten(w, first)
}

// testAffinityRenewed: each connection has the time begin anew, whichever way it ends.
func testAffinityRenewed(w *stickyNode, first map[caller]string) {
	for _, protocol := range []string{"tcp", "udp"} {
		for _, local := range []bool{true, false} {
			c := w.callers[slices.IndexFunc(w.callers, func(c caller) bool {
				return c.protocol == protocol && (first[c] == w.place.node) == local && w.hosts[c.from] == "client"
			})]
			before := w.memory()[c.String()].expires
			w.until("time passes for "+c.String(), func(m map[string]remembered) bool { return m[c.String()].expires < before })
			w.until(c.String()+" is renewed", func(map[string]remembered) bool {
				w.ask(c)
				m := w.memory()[c.String()]
				return m.expires > before && m.endpoint == first[c]
			})
		}
	}
}

// testAffinityForgotten: when endpoints go, their clients get others, and keep those.
// Then the time changes, and ends.
func testAffinityForgotten(w *stickyNode, first map[caller]string) {
	t := w.t
	gone := []string{w.place.node, slices.Sorted(maps.Keys(w.place.endpoints))[0]}
	w.change(stickyFor, gone...)
	second := w.askAll()
	for c, endpoint := range second {
		switch was := first[c]; {
		case slices.Contains(gone, endpoint):
			t.Errorf("%s is at %s, which is gone", c, endpoint)
		case !slices.Contains(gone, was) && endpoint != was:
			t.Errorf("%s had to leave %s for %s", c, was, endpoint)
		}
	}

	asked := w.callers[:len(w.callers)/2]
	w.change(time.Hour, gone...)
	for _, c := range asked {
		if endpoint := w.ask(c); endpoint != second[c] {
			t.Errorf("%s was at %s, and, since the time is another, is at %s", c, second[c], endpoint)
		}
	}
	for i, c := range w.callers {
		m := w.memory()[c.String()]
		if short := m.expires <= time.Hour; short != (i < len(asked)) || m.endpoint != second[c] {
			t.Errorf("%s, which was at %s: remembered %v", c, second[c], m)
		}
	}

	w.change(0, gone...)
	if m := w.memory(); len(m) != 0 {
		t.Errorf("affinity is off, and yet remembered: %v", m)
	}
	testNoAffinity(w, second)
}

// testNoAffinity: what is remembered for a Service that has no affinity is not used.
func testNoAffinity(w *stickyNode, somewhere map[caller]string) {
	word := map[model.Family]string{model.IPv4: "ip", model.IPv6: "ip6"}[w.place.family]
	for _, c := range w.callers[:8] {
		element := fmt.Sprintf("add element %s sluice affinity { %s timeout 1h : %s . 8080 }\n", word, c, somewhere[c])
		if _, err := w.node().RunInput(w.t.Context(), element, "nft", "-f", "-"); err != nil {
			w.t.Fatal(err)
		}
		met := map[string]bool{}
		for range 40 {
			met[w.ask(c)] = true
		}
		if len(met) < 2 {
			w.t.Errorf("%s is always at %v, without affinity", c, met)
		}
	}
	if m := w.memory(); len(m) != 8 {
		w.t.Errorf("a connection without affinity has been remembered: %v", m)
	}
}

// TestNFTablesAffinityListed: programs that people use on nodes go on working where
// there is affinity, and clients are remembered: nft has ended with a failed assertion at
// a rule that was before these.
func TestNFTablesAffinityListed(t *testing.T) {
	needNFT(t)
	s, err := scenarios.Load("../scenarios/affinity.txtar")
	if err != nil {
		t.Fatal(err)
	}
	lab := build(t, s)
	node := lab.Host(scenarios.NodeName)
	for _, f := range s.Families() {
		programNFTables(t, s, node, f, 1000)
	}
	for i := range s.Flows {
		f := &s.Flows[i]
		if _, err := lab.Host(f.From.Name).Ask(t.Context(), f.Protocol.String(), f.Source, f.To, patience); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ command, has string }{
		{"nft list ruleset", "timeout 3h"},
		{"nft -j list ruleset", `"affinity"`},
		{"nft -a list ruleset", "timeout 3h"},
		{"nft list tables", "table ip6 sluice"},
		{"nft list maps", "map affinity {"},
		{"nft list chains", "chain remember {"},
		{"iptables-nft-save", ""},
		{"ip6tables-nft-save", ""},
		{"iptables-nft -L -n", "Chain"},
		{"iptables-nft -t nat -L -n", "Chain"},
	} {
		words := strings.Fields(c.command)
		if _, err := exec.LookPath(words[0]); err != nil {
			t.Logf("SKIPPED: %s is not installed", words[0])
			continue
		}
		if out, err := node.Run(t.Context(), words[0], words[1:]...); err != nil || !strings.Contains(out, c.has) {
			t.Errorf("%s: %v; want %s in\n%s", c.command, err, c.has, out)
		}
	}
}

// TestNFTablesAffinityBesideOthers: clients are remembered by their own address, also
// where somebody else's chain, which has come later, masquerades before ours: nobody is
// asked after the first who translates.
func TestNFTablesAffinityBesideOthers(t *testing.T) {
	needNFT(t)
	w := newStickyNode(t, &stickyPlaces[0])
	const others = `
table ip others {
	chain postrouting {
		type nat hook postrouting priority srcnat - 10; policy accept;
		ct status dnat masquerade
	}
	chain input {
		type nat hook input priority 100; policy accept;
		ct status dnat snat to 192.0.2.77
	}
}
`
	if _, err := w.node().RunInput(t.Context(), others, "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	w.callers = slices.DeleteFunc(w.callers, func(c caller) bool { return w.hosts[c.from] != "client" })
	first := w.askAll()
	for c, again := range w.askAll() {
		if again != first[c] {
			t.Errorf("%s was at %s, and then at %s", c, first[c], again)
		}
	}
	memory := w.memory()
	for _, c := range w.callers {
		if m := memory[c.String()]; m.endpoint != first[c] {
			t.Errorf("%s was at %s; remembered: %v", c, first[c], m)
		}
	}
}
