package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/netlab"
)

var podsAddr = netip.MustParseAddr("192.168.100.30")

// cluster is where programs are measured: a lab with one host that has every
// endpoint, and a node with one pod, the client, for each program and variant.
type cluster struct {
	s      *settings
	dir    string
	lab    *netlab.Lab
	writer writer
	starts *starts // nil where the kernel does not tell

	canaryVersion int
	version       []int // of each numbered Service's endpoints
}

// writer changes endpoints in the API server.
type writer interface {
	setCanary(ctx context.Context, version int) error
	setEndpoints(ctx context.Context, i, version int) error
}

// nodeName is the node on which a program runs; program "bare" stands for a node
// without any.
func nodeName(program, variant string) string { return program + "-" + variant }

func podName(node string) string { return "client-" + node }

const bare = "bare"

func nodeSpecs(s *settings) []netlab.NodeSpec {
	var nodes []netlab.NodeSpec
	for _, v := range s.variants {
		for _, p := range append([]string{bare}, s.programs...) {
			n := len(nodes) + 1
			name, pods := nodeName(p, v), netip.PrefixFrom(plus(clusterRange.Addr(), n<<8), 24)
			nodes = append(nodes, netlab.NodeSpec{
				HostSpec: netlab.HostSpec{Name: name, Addrs: []netip.Addr{plus(nodeRange.Addr(), 10+n)}},
				PodCIDRs: []netip.Prefix{pods},
				Pods:     []netlab.HostSpec{{Name: podName(name), Addrs: []netip.Addr{plus(pods.Addr(), 11)}}},
			})
		}
	}
	return nodes
}

var controlHost = netlab.HostSpec{Name: "control", Addrs: []netip.Addr{controlAddr}}

// newCluster builds the lab, with further hosts. The caller sets the writer.
func newCluster(s *settings, dir string, others ...netlab.HostSpec) (*cluster, error) {
	hosts := append([]netlab.HostSpec{{Name: "pods", Addrs: []netip.Addr{podsAddr}}}, others...)
	lab, err := netlab.New(netlab.Config{Clients: hosts, Nodes: nodeSpecs(s)})
	if err != nil {
		return nil, err
	}
	c := &cluster{s: s, dir: dir, lab: lab, version: make([]int, s.services)}
	if err := c.serveEndpoints(); err != nil {
		lab.Close()
		return nil, fmt.Errorf("serve endpoints: %w", err)
	}
	return c, nil
}

// serveEndpoints gives the whole range of endpoints to the host "pods" and
// listens there. An endpoint answers with its own address and closes. The host
// also gets what was meant for a Service and no node translated, and refuses it.
func (c *cluster) serveEndpoints() error {
	for _, p := range []netip.Prefix{endpointRange, serviceRange} {
		if err := c.routeToPods(ipNet(p)); err != nil {
			return fmt.Errorf("route %s: %w", p, err)
		}
	}
	l, err := c.lab.Host("pods").Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", endpointPort))
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue // a client that has gone again
			}
			if a, ok := conn.LocalAddr().(*net.TCPAddr); ok {
				_, _ = conn.Write(a.IP.To4())
			}
			conn.Close()
		}
	}()
	return nil
}

// routeToPods makes the host "pods" have a range of addresses.
func (c *cluster) routeToPods(dst *net.IPNet) error {
	fabric, pods := c.lab.Fabric.Netlink(), c.lab.Host("pods").Netlink()
	link, err := fabric.LinkByName(c.lab.PodLink("pods"))
	if err != nil {
		return err
	}
	if err := fabric.RouteReplace(&netlink.Route{Dst: dst, LinkIndex: link.Attrs().Index, Gw: podsAddr.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}); err != nil {
		return err
	}
	lo, err := pods.LinkByName("lo")
	if err != nil {
		return err
	}
	return pods.RouteReplace(&netlink.Route{Dst: dst, LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST})
}

// changeCanary swaps the canary's endpoint and returns the new one.
func (c *cluster) changeCanary(ctx context.Context) (netip.Addr, <-chan error) {
	c.canaryVersion++
	next := canaryEndpoint(c.canaryVersion)
	done := make(chan error, 1)
	go func() { done <- c.writer.setCanary(ctx, c.canaryVersion) }()
	return next, done
}

// changeOne swaps one endpoint of the i-th Service.
func (c *cluster) changeOne(ctx context.Context, i int) error {
	c.version[i]++
	return c.writer.setEndpoints(ctx, i, c.version[i])
}
