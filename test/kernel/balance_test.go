package kernel

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier/ipvs"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
)

// service is a Service of the tests here: port 80 of one or more addresses, with
// the endpoints port 8080 of some of the hosts.
type service struct {
	name      string
	scheduler string // annotations; none if empty
	flags     string
	weights   string
	addrs     []string // the first is its ClusterIP, the others are externalIPs
	endpoints string   // "a b c"
	local     bool     // externalTrafficPolicy Local

	internalLocal bool // internalTrafficPolicy Local
}

// hosts are pods, of the node and, as for d, of another.
var hosts = map[string]string{"a": "10.244.1.21", "b": "10.244.1.22", "c": "10.244.1.23", "d": "10.244.2.24"}

// sources are addresses that the client has, besides its own.
func sources(n int) []netip.Addr {
	var list []netip.Addr
	for i := range n {
		list = append(list, netip.AddrFrom4([4]byte{198, 51, 100, byte(10 + i)}))
	}
	return list
}

// scenario puts Services into the usual cluster.
func scenario(t *testing.T, list []service) *scenarios.Scenario {
	t.Helper()
	var b strings.Builder
	b.WriteString("Services of a test.\n-- settings.yaml --\npods: {shell: [10.244.1.200]}\n-- objects.yaml --\n")
	for _, s := range list {
		fmt.Fprintf(&b, "---\nkind: Service\nmetadata:\n  name: %s\n  namespace: ns\n  annotations: {\"sluice.io/ipvs-scheduler\": \"%s\", \"sluice.io/ipvs-sched-flags\": \"%s\", \"sluice.io/ipvs-weights\": \"%s\"}\n",
			s.name, s.scheduler, s.flags, s.weights)
		policy := "Cluster"
		if s.local {
			policy = "Local"
		}
		internal := "Cluster"
		if s.internalLocal {
			internal = "Local"
		}
		fmt.Fprintf(&b, "spec: {clusterIP: %s, clusterIPs: [%s], externalIPs: [%s], externalTrafficPolicy: %s, internalTrafficPolicy: %s, ports: [{port: 80}]}\n",
			s.addrs[0], s.addrs[0], strings.Join(s.addrs[1:], ", "), policy, internal)
		fmt.Fprintf(&b, "---\nkind: EndpointSlice\nmetadata: {name: %s-4, namespace: ns, labels: {kubernetes.io/service-name: %s}}\naddressType: IPv4\nports: [{name: \"\", port: 8080}]\nendpoints:\n", s.name, s.name)
		for _, h := range strings.Fields(s.endpoints) {
			fmt.Fprintf(&b, "- {addresses: [%s], nodeName: node%c, targetRef: {kind: Pod, name: %s}}\n", hosts[h], hosts[h][len("10.244.")], h)
		}
	}
	s, err := scenarios.Parse("test", []byte(strings.Replace(b.String(), "---\n", "", 1)))
	if err != nil {
		t.Fatal(err)
	}
	client := s.Cluster.Host("client")
	client.Addrs = append(client.Addrs, sources(24)...)
	return s
}

// world is a node under test whose Services have servers that keep connections
// open.
type world struct {
	t     *testing.T
	lab   *netlab.Lab
	node  *netlab.Namespace
	p     *ipvs.Proxier
	state *scenarios.Scenario

	services []service // as of newWorld
}

// newWorld builds the cluster of the Services, with servers on the hosts, and
// programs its node.
func newWorld(t *testing.T, list []service, options ...func(*ipvs.Options)) *world {
	t.Helper()
	w := newIdleWorld(t, list, options...)
	w.sync(list)
	return w
}

// newIdleWorld is newWorld before the proxier has done anything.
func newIdleWorld(t *testing.T, list []service, options ...func(*ipvs.Options)) *world {
	t.Helper()
	inside(t)
	s := scenario(t, list)
	w := &world{t: t, lab: buildCluster(t, s), state: s, services: list}
	w.node = w.lab.Host(scenarios.NodeName)
	prepareIPVS(t, s, w.node)
	for h, a := range hosts {
		if s.Cluster.Host(h) == nil {
			continue
		}
		at := netip.AddrPortFrom(netip.MustParseAddr(a), 8080)
		if _, err := w.lab.Host(h).ServeOpen(h, at); err != nil {
			t.Fatal(err)
		}
	}
	w.p = w.newProxier(options...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(evidence(w.node))
		}
		if err := w.node.Do(func() error { return w.p.Cleanup(context.Background()) }); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return w
}

// newProxier makes another proxier, which knows nothing of what is in force.
func (w *world) newProxier(options ...func(*ipvs.Options)) (p *ipvs.Proxier) {
	w.t.Helper()
	o, err := ipvsOptions(w.state, model.IPv4)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, set := range options {
		set(&o)
	}
	err = w.node.Do(func() (err error) {
		p, err = ipvs.New(o)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// run runs a subtest of the world's test.
func (w *world) run(name string, test func(t *testing.T)) {
	outer := w.t
	defer func() { w.t = outer }()
	outer.Run(name, func(t *testing.T) {
		w.t = t // what is opened in a subtest is closed at its end
		test(t)
	})
}

// set plans Services.
func (w *world) set(list []service) *plan.Set {
	w.t.Helper()
	return scenario(w.t, list).SetIn("ipvs", model.IPv4)
}

// sync makes the node serve these Services and no others.
func (w *world) sync(list []service) {
	w.t.Helper()
	set := w.set(list)
	if err := w.node.Do(func() error { return w.p.Sync(w.t.Context(), set) }); err != nil {
		w.t.Fatal(err)
	}
}

// check lets the proxier look after what it has written.
func (w *world) check() {
	w.t.Helper()
	err := w.node.Do(func() error {
		_, err := w.p.Check(w.t.Context(), false)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// vip is port 80 of an address.
func vip(addr string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(addr), 80) }

// open opens a connection from the client outside.
func (w *world) open(source netip.Addr, to netip.AddrPort) (*netlab.Conn, error) {
	return w.lab.Host("client").Open(w.t.Context(), source, to, patience)
}

// tally is how many connections reached each endpoint.
type tally map[string]int

func (c tally) String() string {
	var parts []string
	for _, h := range slices.Sorted(maps.Keys(c)) {
		parts = append(parts, fmt.Sprintf("%s=%d", h, c[h]))
	}
	return strings.Join(parts, " ")
}

// hold opens connections and keeps them open until the test ends or lets go.
func (w *world) hold(n int, source netip.Addr, to netip.AddrPort) *held {
	w.t.Helper()
	h := &held{w: w, to: to}
	for range n {
		c, err := w.open(source, to)
		if err != nil {
			w.t.Fatalf("%v, after %s", err, h.tally())
		}
		h.conns = append(h.conns, c)
	}
	w.t.Cleanup(func() {
		for _, c := range h.conns {
			_ = c.Close()
		}
	})
	return h
}

// held are open connections to one virtual server.
type held struct {
	w     *world
	to    netip.AddrPort
	conns []*netlab.Conn
}

func (h *held) tally() tally {
	count := tally{}
	for _, c := range h.conns {
		count[c.Server]++
	}
	return count
}

// release ends the connections to one endpoint, or to all for "", and waits until
// the kernel has seen it. They are reset: IPVS remembers others for minutes.
func (h *held) release(server string) {
	h.w.t.Helper()
	before := h.w.active(h.to)
	closed := 0
	h.conns = slices.DeleteFunc(h.conns, func(c *netlab.Conn) bool {
		if server != "" && c.Server != server {
			return false
		}
		closed++
		return c.Reset() == nil
	})
	h.w.until(func() bool { return h.w.active(h.to) == before-closed })
}

// short opens connections one after the other, each closed before the next.
func (w *world) short(n int, source netip.Addr, to netip.AddrPort) tally {
	w.t.Helper()
	count := tally{}
	for range n {
		h := w.hold(1, source, to)
		count[h.conns[0].Server]++
		h.release("")
	}
	return count
}

// until waits for something that happens without being told.
func (w *world) until(done func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(4 * patience)
	for !done() {
		if time.Now().After(deadline) {
			w.t.Fatal("it does not happen")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// destination is a real server, as the kernel has it.
type destination struct{ weight, active, inactive int }

// destinations reads a virtual server from the kernel; nil if it is not there.
func (w *world) destinations(of netip.AddrPort) map[string]destination {
	w.t.Helper()
	for _, s := range w.servers() {
		if s.at() != of {
			continue
		}
		list := map[string]destination{}
		for _, d := range s.destinations {
			list[w.hostAt(addrPort(d.Address, d.Port).Addr())] = destination{d.Weight, d.ActiveConnections, d.InactiveConnections}
		}
		return list
	}
	return nil
}

func (w *world) hostAt(a netip.Addr) string {
	for h, addr := range hosts {
		if addr == a.String() {
			return h
		}
	}
	return a.String()
}

func (w *world) active(of netip.AddrPort) (n int) {
	w.t.Helper()
	for _, d := range w.destinations(of) {
		n += d.active
	}
	return n
}
