package scenarios

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Cluster is the little world of a scenario. Nodes are node1 (the one that is
// looked at), node2 and node3; pods live on the node whose range their address
// is from: 10.244.N.0/24 and fd00:10:244:N::/64. Other addresses are outside.
type Cluster struct {
	Hosts []Host // by name

	// ServiceAddrs are all addresses that Services claim, other than node1's
	// own: the fabric routes them to node1.
	ServiceAddrs []netip.Addr

	// Listeners are all endpoints' addresses, each once.
	Listeners []Listener
}

// Place says what kind of host something is.
type Place uint8

// Places.
const (
	Outside Place = iota
	Node
	Pod
)

// Host is a machine or pod.
type Host struct {
	Name  string
	Place Place
	On    string // a pod's node
	Addrs []netip.Addr
}

// Listener is an address at which an endpoint answers.
type Listener struct {
	Host     string
	At       netip.AddrPort
	Protocol model.Protocol
}

var podRanges = func() map[string][2]netip.Prefix {
	out := map[string][2]netip.Prefix{}
	for n := 1; n <= 3; n++ {
		k := strconv.Itoa(n)
		out["node"+k] = [2]netip.Prefix{netip.MustParsePrefix("10.244." + k + ".0/24"), netip.MustParsePrefix("fd00:10:244:" + k + "::/64")}
	}
	return out
}()

// PodCIDRs returns a node's pod ranges, IPv4 first.
func PodCIDRs(node string) []netip.Prefix {
	r := podRanges[node]
	return r[:]
}

// Host returns the host of a name, nil if there is none.
func (c *Cluster) Host(name string) *Host {
	i := slices.IndexFunc(c.Hosts, func(h Host) bool { return h.Name == name })
	if i < 0 {
		return nil
	}
	return &c.Hosts[i]
}

// Owner returns the host that has an address, nil if none has.
func (c *Cluster) Owner(a netip.Addr) *Host {
	i := slices.IndexFunc(c.Hosts, func(h Host) bool { return slices.Contains(h.Addrs, a) })
	if i < 0 {
		return nil
	}
	return &c.Hosts[i]
}

// Addr returns a host's first address of a family; invalid if it has none.
func (h *Host) Addr(f model.Family) netip.Addr {
	for _, a := range h.Addrs {
		if model.FamilyOf(a) == f {
			return a
		}
	}
	return netip.Addr{}
}

func newCluster(s *Scenario) (Cluster, error) {
	var c Cluster
	node := Host{Name: NodeName, Place: Node}
	for _, a := range s.Node.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && !slices.Contains(node.Addrs, ip) {
			node.Addrs = append(node.Addrs, ip)
		}
	}
	c.Hosts = []Host{node,
		{Name: "node2", Place: Node, Addrs: []netip.Addr{netip.MustParseAddr("172.18.0.12"), netip.MustParseAddr("fd00:172:18::12")}},
		{Name: "node3", Place: Node, Addrs: []netip.Addr{netip.MustParseAddr("172.18.0.13"), netip.MustParseAddr("fd00:172:18::13")}},
		{Name: "client", Place: Outside, Addrs: []netip.Addr{netip.MustParseAddr("192.168.100.10"), netip.MustParseAddr("fd00:192:168:100::10")}},
	}
	for name, addrs := range s.Settings.Pods {
		for _, a := range addrs {
			if err := c.add(name, a); err != nil {
				return c, fmt.Errorf("pod %s: %w", name, err)
			}
		}
	}
	for _, sl := range s.Slices {
		for _, e := range sl.Endpoints {
			if len(e.Addresses) == 0 {
				continue
			}
			a, err := netip.ParseAddr(e.Addresses[0])
			if err != nil || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() {
				continue // a bad object, which the scenario is about
			}
			name := ""
			if e.TargetRef != nil {
				name = e.TargetRef.Name
			}
			if err := c.add(name, a); err != nil {
				return c, fmt.Errorf("slice %s: %w", sl.Name, err)
			}
			for _, p := range sl.Ports {
				if p.Port != nil && *p.Port > 0 && *p.Port < 65536 {
					c.listen(a, uint16(*p.Port), protocolOf(p.Protocol))
				}
			}
		}
	}
	c.serviceAddrs(s)
	slices.SortFunc(c.Hosts, func(a, b Host) int { return strings.Compare(a.Name, b.Name) })
	return c, nil
}

func protocolOf[P ~string](p *P) model.Protocol {
	if p == nil {
		return model.TCP
	}
	return map[string]model.Protocol{"": model.TCP, "TCP": model.TCP, "UDP": model.UDP, "SCTP": model.SCTP}[string(*p)]
}

// add gives the address to the named host, or, without a name, to one that
// holds all nameless addresses of its place.
func (c *Cluster) add(name string, a netip.Addr) error {
	if owner := c.Owner(a); owner != nil {
		if name != "" && owner.Name != name && owner.Place != Node {
			return fmt.Errorf("%s belongs to %s and to %s", a, owner.Name, name)
		}
		return nil
	}
	h := Host{Name: name, Place: Outside}
	for node, r := range podRanges {
		if r[0].Contains(a) || r[1].Contains(a) {
			h.Place, h.On = Pod, node
		}
	}
	if name == "" {
		h.Name = strings.TrimPrefix(h.On+"-others", "-")
	}
	if had := c.Host(h.Name); had != nil {
		if had.Place != h.Place || had.On != h.On {
			return fmt.Errorf("host %s is in two places", h.Name)
		}
		had.Addrs = append(had.Addrs, a)
		return nil
	}
	h.Addrs = []netip.Addr{a}
	c.Hosts = append(c.Hosts, h)
	return nil
}

func (c *Cluster) listen(a netip.Addr, port uint16, proto model.Protocol) {
	l := Listener{Host: c.Owner(a).Name, At: netip.AddrPortFrom(a, port), Protocol: proto}
	if !slices.Contains(c.Listeners, l) {
		c.Listeners = append(c.Listeners, l)
	}
}

func (c *Cluster) serviceAddrs(s *Scenario) {
	add := func(text string) {
		a, err := netip.ParseAddr(text)
		if err == nil && c.Owner(a) == nil && !a.IsLoopback() && !slices.Contains(c.ServiceAddrs, a) {
			c.ServiceAddrs = append(c.ServiceAddrs, a)
		}
	}
	for _, svc := range s.Services {
		add(svc.Spec.ClusterIP)
		for _, list := range [][]string{svc.Spec.ClusterIPs, svc.Spec.ExternalIPs} {
			for _, a := range list {
				add(a)
			}
		}
		for _, in := range svc.Status.LoadBalancer.Ingress {
			add(in.IP)
		}
	}
}
