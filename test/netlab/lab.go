package netlab

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Config says what a lab consists of. All addresses are distinct; a host can
// have addresses of one family or both.
type Config struct {
	Nodes   []NodeSpec
	Clients []HostSpec // outside of the cluster
}

// HostSpec is a machine with an interface eth0.
type HostSpec struct {
	Name  string
	Addrs []netip.Addr // the first of a family is the source it prefers
}

// NodeSpec is a node of the cluster.
type NodeSpec struct {
	HostSpec
	PodCIDRs []netip.Prefix
	Pods     []HostSpec

	// Bridge, if not empty, is the interface that all pods hang on; otherwise
	// every pod has a link of its own to the node, whose name begins with "veth".
	Bridge string
}

// Default returns a dual-stack cluster of two nodes with two pods each, and a
// client outside.
func Default() Config {
	host := func(name string, addrs ...string) HostSpec {
		h := HostSpec{Name: name}
		for _, a := range addrs {
			h.Addrs = append(h.Addrs, netip.MustParseAddr(a))
		}
		return h
	}
	cidrs := func(list ...string) (out []netip.Prefix) {
		for _, c := range list {
			out = append(out, netip.MustParsePrefix(c))
		}
		return out
	}
	return Config{
		Nodes: []NodeSpec{{
			HostSpec: host("node1", "172.18.0.11", "fd00:172:18::11"),
			PodCIDRs: cidrs("10.244.1.0/24", "fd00:10:244:1::/64"),
			Pods: []HostSpec{
				host("pod1", "10.244.1.11", "fd00:10:244:1::11"),
				host("pod2", "10.244.1.12", "fd00:10:244:1::12"),
			},
		}, {
			HostSpec: host("node2", "172.18.0.12", "fd00:172:18::12"),
			PodCIDRs: cidrs("10.244.2.0/24", "fd00:10:244:2::/64"),
			Pods: []HostSpec{
				host("pod3", "10.244.2.11", "fd00:10:244:2::11"),
				host("pod4", "10.244.2.12", "fd00:10:244:2::12"),
			},
		}},
		Clients: []HostSpec{host("client", "192.168.100.10", "fd00:192:168:100::10")},
	}
}

// Lab is a running set of namespaces. Every host is linked to the "fabric", a
// router in a namespace of its own that knows all hosts and pod ranges; links
// are point to point, neighbours are entered by hand, so that nothing has to be
// resolved or waited for. It is built complete, and can be dialled through at
// once.
type Lab struct {
	Fabric *Namespace
	// Nowhere is where packets end that a node should have translated and did
	// not: see RouteVia.
	Nowhere *Namespace
	hosts   map[string]*Namespace
	addrs   map[string][]netip.Addr
	links   map[string]string // name of a pod's link on its node
	tables  map[string]int    // routing table of the fabric for what comes from a node
	nextMAC uint32
}

// The gateways by which hosts reach what is beyond their link. Nobody has these
// addresses; the neighbour tables say which card answers for them.
var gateways = [2]netip.Addr{netip.MustParseAddr("169.254.0.1"), netip.MustParseAddr("fe80::1")}

// New builds a lab. On an error nothing of it remains.
func New(cfg Config) (lab *Lab, err error) {
	lab = &Lab{hosts: map[string]*Namespace{}, addrs: map[string][]netip.Addr{}, links: map[string]string{}, tables: map[string]int{}}
	defer func() {
		if err != nil {
			lab.Close()
			lab, err = nil, fmt.Errorf("build lab: %w", err)
		}
	}()
	if lab.Fabric, err = newRouter("fabric"); err != nil {
		return
	}
	for _, a := range []string{"192.0.2.1", "2001:db8::1"} { // sources of its ICMP errors
		if err = lab.Fabric.addAddr("lo", netip.MustParseAddr(a)); err != nil {
			return
		}
	}
	nowhere := HostSpec{Name: "nowhere", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")}}
	for _, c := range append(slices.Clone(cfg.Clients), nowhere) {
		if err = lab.addHost(c, false); err != nil {
			return
		}
	}
	lab.Nowhere = lab.hosts[nowhere.Name]
	if err = lab.Nowhere.tune([][2]string{{"net.ipv6.ip_nonlocal_bind", "1"}}); err != nil {
		return
	}
	for i, n := range cfg.Nodes {
		if err = lab.addNode(n, 100+i); err != nil {
			return
		}
	}
	err = lab.awaitLinks()
	return
}

// awaitLinks waits until every link passes packets. A veth is switched on by a
// kernel thread some time after its second end is brought up; until then it
// drops what is sent.
func (l *Lab) awaitLinks() error {
	deadline := time.Now().Add(linksUp)
	for _, n := range append(slices.Collect(maps.Values(l.hosts)), l.Fabric) {
		for {
			down, err := n.linkDown()
			if err != nil {
				return err
			}
			if down == "" {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("link %s of %s does not come up", down, n.Name)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

const linksUp = 30 * time.Second

// linkDown returns a link that does not pass packets yet, "" if all do.
func (n *Namespace) linkDown() (string, error) {
	links, err := n.link.LinkList()
	if err != nil {
		return "", fmt.Errorf("list links of %s: %w", n.Name, err)
	}
	inUse := map[int]bool{} // bridges: one without ports stays down
	for _, link := range links {
		inUse[link.Attrs().MasterIndex] = true
	}
	for _, link := range links {
		a := link.Attrs()
		if (link.Type() == "veth" || inUse[a.Index]) && a.OperState != netlink.OperUp {
			return a.Name, nil
		}
	}
	return "", nil
}

// Host returns the namespace of a node, pod or client by its name; nil if there
// is none.
func (l *Lab) Host(name string) *Namespace { return l.hosts[name] }

// Addrs returns a host's addresses.
func (l *Lab) Addrs(name string) []netip.Addr { return l.addrs[name] }

// Addr returns a host's first address of the family of like; invalid if none.
func (l *Lab) Addr(name string, is4 bool) netip.Addr {
	for _, a := range l.addrs[name] {
		if a.Is4() == is4 {
			return a
		}
	}
	return netip.Addr{}
}

// PodLink returns the name of the node's interface by which a pod is reached;
// that of the bridge if the pod hangs on one.
func (l *Lab) PodLink(pod string) string { return l.links[pod] }

// Close takes the lab away: servers and commands are stopped, namespaces given
// up. It can be called twice.
func (l *Lab) Close() {
	for _, n := range l.hosts {
		n.close()
	}
	if l.Fabric != nil {
		l.Fabric.close()
	}
}

// RouteVia makes the fabric send a range of addresses (of Services, of load
// balancers) to a node. What the node sends back unchanged, because it does not
// serve the address, does not circle: it ends in Nowhere, which has all these
// addresses and refuses, unless Serve was called there.
func (l *Lab) RouteVia(to netip.Prefix, node string) error {
	table, ok := l.tables[node]
	if !ok {
		return fmt.Errorf("route %s: no node %q", to, node)
	}
	is4 := to.Addr().Is4()
	if err := l.Fabric.addRoute(netlink.Route{Dst: ipNet(to)}, l.links[node], l.Addr(node, is4)); err != nil {
		return fmt.Errorf("route %s via %s: %w", to, node, err)
	}
	back := netlink.Route{Dst: ipNet(to), Table: table}
	if err := l.Fabric.addRoute(back, l.links["nowhere"], l.Addr("nowhere", is4)); err != nil {
		return fmt.Errorf("route %s from %s: %w", to, node, err)
	}
	// Answers of Nowhere go back the way the packets came, past the node's
	// connection tracking.
	rule := netlink.NewRule()
	rule.Family, rule.IifName, rule.Src = family(to.Addr()), l.links["nowhere"], ipNet(to)
	rule.Table, rule.Priority = table+answersTable, table+answersTable
	if err := l.Fabric.link.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add rule for %s: %w", to, err)
	}
	answers := netlink.Route{Dst: ipNet(everything(is4)), Table: table + answersTable}
	if err := l.Fabric.addRoute(answers, l.links[node], l.Addr(node, is4)); err != nil {
		return err
	}
	local := netlink.Route{Dst: ipNet(to), Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST}
	return l.Nowhere.addRoute(local, "lo", netip.Addr{})
}

// answersTable, added to a node's routing table, is the one for what Nowhere
// answers in its stead.
const answersTable = 1000

func everything(is4 bool) netip.Prefix {
	if is4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

func (l *Lab) addNode(spec NodeSpec, table int) error {
	if err := l.addHost(spec.HostSpec, true); err != nil {
		return err
	}
	node, uplink := l.hosts[spec.Name], l.links[spec.Name]
	l.tables[spec.Name] = table
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		rule := netlink.NewRule()
		rule.Family, rule.IifName, rule.Table, rule.Priority = f, uplink, table, table
		if err := l.Fabric.link.RuleAdd(rule); err != nil {
			return fmt.Errorf("add rule for %s: %w", uplink, err)
		}
	}
	for _, c := range spec.PodCIDRs {
		if err := l.Fabric.addRoute(netlink.Route{Dst: ipNet(c)}, uplink, l.Addr(spec.Name, c.Addr().Is4())); err != nil {
			return err
		}
	}
	if spec.Bridge != "" {
		// A bridge without a given address takes the lowest of its ports', which
		// changes as pods come.
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: spec.Bridge, HardwareAddr: l.mac()}}
		if err := node.link.LinkAdd(bridge); err != nil {
			return fmt.Errorf("add bridge %s: %w", spec.Bridge, err)
		}
		if err := node.link.LinkSetUp(bridge); err != nil {
			return fmt.Errorf("bring up bridge %s: %w", spec.Bridge, err)
		}
	}
	for _, p := range spec.Pods {
		if err := l.addPod(spec, p); err != nil {
			return err
		}
	}
	return nil
}

// addHost links a host to the fabric.
func (l *Lab) addHost(spec HostSpec, router bool) error {
	n, err := l.newHost(spec, router)
	if err != nil {
		return err
	}
	w, err := l.wire(l.Fabric, n, "")
	if err != nil {
		return err
	}
	l.links[spec.Name] = w.near
	return l.reach(w, spec.Addrs, netip.Addr{}, netip.Addr{})
}

func (l *Lab) addPod(node NodeSpec, spec HostSpec) error {
	n, err := l.newHost(spec, false)
	if err != nil {
		return err
	}
	w, err := l.wire(l.hosts[node.Name], n, node.Bridge)
	if err != nil {
		return err
	}
	l.links[spec.Name] = w.near
	return l.reach(w, spec.Addrs, l.Addr(node.Name, true), l.Addr(node.Name, false))
}

func (l *Lab) newHost(spec HostSpec, router bool) (*Namespace, error) {
	if l.hosts[spec.Name] != nil {
		return nil, fmt.Errorf("two hosts are named %q", spec.Name)
	}
	for other, addrs := range l.addrs {
		for _, a := range spec.Addrs {
			if slices.Contains(addrs, a) {
				return nil, fmt.Errorf("hosts %s and %s both have address %s", other, spec.Name, a)
			}
		}
	}
	make := newEndHost
	if router {
		make = newRouter
	}
	n, err := make(spec.Name)
	if err != nil {
		return nil, err
	}
	l.hosts[spec.Name], l.addrs[spec.Name] = n, spec.Addrs
	return n, nil
}

// newEndHost makes a namespace whose links work the moment they are made: no
// duplicate address detection, no redirects, no filter on reverse paths. It
// refuses as often as it is asked: the kernel's limits on ICMP errors would make
// a REJECT of a test look like a DROP. That takes the masks of what is limited: a
// rate of 0 (icmp_ratelimit) lifts the limit per destination, but not the one of
// the whole namespace (icmp_msgs_burst), which the errors of 16 flows in 20 ms
// reach.
func newEndHost(name string) (*Namespace, error) {
	return newTuned(name, [][2]string{
		{"net.ipv6.conf.default.accept_dad", "0"},
		{"net.ipv6.conf.default.accept_ra", "0"},
		{"net.ipv6.conf.default.accept_redirects", "0"},
		{"net.ipv4.conf.default.accept_redirects", "0"},
		{"net.ipv4.conf.all.accept_redirects", "0"},
		{"net.ipv4.conf.default.rp_filter", "0"},
		{"net.ipv4.conf.all.rp_filter", "0"},
		{"net.ipv4.icmp_ratemask", "0"},
		{"net.ipv6.icmp.ratemask", "0"},
	})
}

// newRouter makes a namespace that also forwards.
func newRouter(name string) (*Namespace, error) {
	n, err := newEndHost(name)
	if err != nil {
		return nil, err
	}
	return n, n.tune([][2]string{
		{"net.ipv4.ip_forward", "1"},
		{"net.ipv6.conf.all.forwarding", "1"},
		{"net.ipv4.conf.default.send_redirects", "0"},
		{"net.ipv4.conf.all.send_redirects", "0"},
	})
}

func newTuned(name string, sysctls [][2]string) (*Namespace, error) {
	n, err := newNamespace(name)
	if err != nil {
		return nil, err
	}
	if err := n.tune(sysctls); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *Namespace) tune(sysctls [][2]string) error {
	for _, s := range sysctls {
		if err := n.Sysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	return nil
}

// wire is a link between a router (near) and a host (far).
type wire struct {
	router, host    *Namespace
	near            string // the router's interface towards the host: the bridge, if it hangs on one
	nearMAC, farMAC net.HardwareAddr
}

// wire makes a veth pair with eth0 at the host's end.
func (l *Lab) wire(router, host *Namespace, bridge string) (wire, error) {
	prefix := "veth"
	if router == l.Fabric {
		prefix = "wire"
	}
	router.links++
	w := wire{router: router, host: host, near: fmt.Sprintf("%s%d", prefix, router.links), nearMAC: l.mac(), farMAC: l.mac()}
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: w.near, HardwareAddr: w.nearMAC},
		PeerName:  "eth0", PeerHardwareAddr: w.farMAC, PeerNamespace: netlink.NsFd(int(host.ns)),
	}
	if err := router.link.LinkAdd(veth); err != nil {
		return w, fmt.Errorf("link %s to %s: %w", host.Name, router.Name, err)
	}
	if bridge != "" {
		br, err := router.link.LinkByName(bridge)
		if err == nil {
			err = router.link.LinkSetMaster(veth, br)
		}
		if err == nil {
			// br_netfilter bridges what it has translated: a pod that reaches
			// itself is sent back by the port it came from.
			err = router.link.LinkSetHairpin(veth, true)
		}
		if err != nil {
			return w, fmt.Errorf("put %s on bridge %s: %w", w.near, bridge, err)
		}
		w.nearMAC = br.Attrs().HardwareAddr
	}
	if err := router.link.LinkSetUp(veth); err != nil {
		return w, fmt.Errorf("bring up %s: %w", w.near, err)
	}
	eth0, err := host.link.LinkByName("eth0")
	if err == nil {
		err = host.link.LinkSetUp(eth0)
	}
	if err != nil {
		return w, fmt.Errorf("bring up eth0 of %s: %w", host.Name, err)
	}
	if bridge != "" {
		w.near = bridge
	}
	return w, nil
}

// reach gives the host its addresses and enters routes and neighbours at both
// ends. The router's own connections to the host have the preferred sources
// src4 and src6, if they are valid.
func (l *Lab) reach(w wire, addrs []netip.Addr, src4, src6 netip.Addr) error {
	for _, a := range addrs {
		if err := w.host.addAddr("eth0", a); err != nil {
			return err
		}
		if err := w.router.addNeighbour(w.near, a, w.farMAC); err != nil {
			return err
		}
		src := src4
		if !a.Is4() {
			src = src6
		}
		route := netlink.Route{Dst: ipNet(netip.PrefixFrom(a, a.BitLen())), Scope: netlink.SCOPE_LINK}
		if src.IsValid() {
			route.Src = src.AsSlice()
		}
		if err := w.router.addRoute(route, w.near, netip.Addr{}); err != nil {
			return err
		}
	}
	for i, gw := range gateways {
		if !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == (i == 0) }) {
			continue
		}
		if err := w.host.addNeighbour("eth0", gw, w.nearMAC); err != nil {
			return err
		}
		route := netlink.Route{Dst: ipNet(everything(gw.Is4()))}
		for _, a := range addrs {
			if a.Is4() == gw.Is4() {
				route.Src = a.AsSlice() // the first one is preferred
				break
			}
		}
		if err := w.host.addRoute(route, "eth0", gw); err != nil {
			return err
		}
	}
	return nil
}

func (n *Namespace) addAddr(iface string, a netip.Addr) error {
	link, err := n.link.LinkByName(iface)
	if err == nil {
		err = n.link.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD})
	}
	if err != nil {
		return fmt.Errorf("add address %s to %s of %s: %w", a, iface, n.Name, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 || a.Is4() {
		return nil
	}
	return n.awaitLocal(a)
}

// awaitLocal waits until packets to an own IPv6 address come in: the kernel makes
// its route some time after the address (addrconf_dad_work), also where there is
// nothing to detect.
func (n *Namespace) awaitLocal(a netip.Addr) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		routes, err := n.link.RouteGet(a.AsSlice())
		if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("address %s of %s has no route: %v, %w", a, n.Name, routes, err)
		}
	}
}

func (n *Namespace) addNeighbour(iface string, a netip.Addr, mac net.HardwareAddr) error {
	link, err := n.link.LinkByName(iface)
	if err == nil {
		err = n.link.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: family(a), State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac})
	}
	if err != nil {
		return fmt.Errorf("enter neighbour %s at %s of %s: %w", a, iface, n.Name, err)
	}
	return nil
}

// addRoute completes a route by its interface and, if via is valid, its gateway.
func (n *Namespace) addRoute(r netlink.Route, iface string, via netip.Addr) error {
	link, err := n.link.LinkByName(iface)
	if err == nil {
		r.LinkIndex = link.Attrs().Index
		if via.IsValid() {
			r.Gw, r.Flags = via.AsSlice(), int(netlink.FLAG_ONLINK)
		}
		err = n.link.RouteReplace(&r)
	}
	if err != nil {
		return fmt.Errorf("route %s by %s of %s: %w", r.Dst, iface, n.Name, err)
	}
	return nil
}

// mac returns a hardware address that no other link of the lab has.
func (l *Lab) mac() net.HardwareAddr {
	l.nextMAC++
	m := l.nextMAC
	return net.HardwareAddr{0x02, 0, byte(m >> 24), byte(m >> 16), byte(m >> 8), byte(m)}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// AddAddr gives a host one more address (on eth0) and makes the fabric, or the
// node of a pod, route it there: a load balancer's on a node, say.
func (l *Lab) AddAddr(host string, a netip.Addr) error {
	n := l.hosts[host]
	if n == nil {
		return fmt.Errorf("add address %s: no host %q", a, host)
	}
	if strings.HasPrefix(l.links[host], "wire") {
		if err := l.Fabric.addRoute(netlink.Route{Dst: ipNet(netip.PrefixFrom(a, a.BitLen()))}, l.links[host], l.Addr(host, a.Is4())); err != nil {
			return err
		}
	}
	l.addrs[host] = append(slices.Clone(l.addrs[host]), a)
	return n.addAddr("eth0", a)
}
