package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	libipvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/ipvs"
)

// others is somebody else on the node who uses the same kernel: keepalived, or
// LVS by hand.
type others struct{ w *world }

const (
	othersSet    = "OTHERS"
	othersDevice = "others0"
	proxyDevice  = "kube-ipvs0"
)

// arrive makes what others have before the proxier comes.
func (o others) arrive() {
	o.w.t.Helper()
	o.server(&libipvs.Service{Address: net.ParseIP("192.0.2.50").To4(), Port: 80, Protocol: unix.IPPROTO_TCP, SchedName: "wrr"})
	o.server(&libipvs.Service{Address: net.ParseIP("192.0.2.50").To4(), Port: 53, Protocol: unix.IPPROTO_UDP, SchedName: "sh"})
	o.server(&libipvs.Service{Address: net.ParseIP("172.18.0.11").To4(), Port: 8443, Protocol: unix.IPPROTO_TCP, SchedName: "lc"})
	o.server(&libipvs.Service{FWMark: 7, SchedName: "rr"})
	o.server(&libipvs.Service{FWMark: 0x4001, SchedName: "rr"})
	// One at an address that a Service is going to ask for.
	o.server(&libipvs.Service{Address: net.ParseIP("203.0.113.60").To4(), Port: 80, Protocol: unix.IPPROTO_TCP, SchedName: "wlc"})
	if err := o.w.node.Netlink().LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: othersDevice}}); err != nil {
		o.w.t.Fatal(err)
	}
	o.addr(othersDevice, "192.0.2.51/32")
	o.addr("lo", "192.0.2.53/32")
	for _, argv := range [][]string{
		{"ipset", "create", othersSet, "hash:ip"},
		{"ipset", "add", othersSet, "192.0.2.99"},
		{"iptables-legacy", "-N", othersSet},
		{"iptables-legacy", "-A", othersSet, "-m", "set", "--match-set", othersSet, "src", "-j", "DROP"},
		{"iptables-legacy", "-A", "INPUT", "-j", othersSet},
		{"iptables-legacy", "-t", "mangle", "-A", "PREROUTING", "-d", "192.0.2.54", "-j", "MARK", "--set-mark", "7"},
	} {
		if _, err := o.w.node.Run(o.w.t.Context(), argv[0], argv[1:]...); err != nil {
			o.w.t.Fatal(err)
		}
	}
}

// arriveLate makes what others have on the proxier's device, once it is there.
func (o others) arriveLate() {
	o.w.t.Helper()
	o.addr(proxyDevice, "192.0.2.52/32")
	o.server(&libipvs.Service{Address: net.ParseIP("192.0.2.52").To4(), Port: 80, Protocol: unix.IPPROTO_TCP, SchedName: "rr"})
	// Another port of an address that is a Service's.
	o.server(&libipvs.Service{Address: net.ParseIP("172.18.0.11").To4(), Port: 9443, Protocol: unix.IPPROTO_TCP, SchedName: "rr"})
}

func (o others) addr(device, addr string) {
	o.w.t.Helper()
	link, err := o.w.node.Netlink().LinkByName(device)
	if err == nil {
		var a *netlink.Addr
		if a, err = netlink.ParseAddr(addr); err == nil {
			err = o.w.node.Netlink().AddrAdd(link, a)
		}
	}
	if err != nil {
		o.w.t.Fatalf("address %s on %s: %v", addr, device, err)
	}
}

// server makes a virtual server with a destination.
func (o others) server(s *libipvs.Service) {
	o.w.t.Helper()
	s.Netmask, s.AddressFamily = 0xffffffff, unix.AF_INET
	err := o.w.node.Do(func() error {
		h, err := libipvs.New("")
		if err != nil {
			return err
		}
		defer h.Close()
		d := &libipvs.Destination{Address: net.ParseIP("192.0.2.200").To4(), Port: 80, Weight: 7, ConnectionFlags: libipvs.ConnectionFlagMasq, AddressFamily: unix.AF_INET}
		return errors.Join(h.NewService(s), h.NewDestination(s, d))
	})
	if err != nil {
		o.w.t.Fatalf("virtual server %s: %v", s.Address, err)
	}
}

// state is all that is others', as text.
func (o others) state() string {
	o.w.t.Helper()
	var b strings.Builder
	for _, block := range o.w.serverBlocks() {
		if strings.Contains(block, "C00002C8:0050") { // their destination
			b.WriteString(block)
		}
	}
	for _, device := range []string{othersDevice, proxyDevice, "lo"} {
		for _, a := range o.w.addrs(device) {
			if strings.HasPrefix(a, "192.0.2.") {
				fmt.Fprintln(&b, device, a)
			}
		}
	}
	set, err := o.w.node.Run(o.w.t.Context(), "ipset", "save", othersSet)
	if err != nil {
		o.w.t.Error(err)
	}
	rules, err := o.w.node.Run(o.w.t.Context(), "iptables-legacy-save")
	if err != nil {
		o.w.t.Error(err)
	}
	b.WriteString(set)
	for line := range strings.Lines(rules) {
		if strings.Contains(line, othersSet) && !strings.HasPrefix(line, ":") || strings.Contains(line, "192.0.2.54") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// serverBlocks are the virtual servers of the node, with their destinations, as
// the kernel prints them, sorted.
func (w *world) serverBlocks() []string {
	w.t.Helper()
	var blocks []string
	for line := range strings.Lines(w.servers()) {
		switch f := strings.Fields(line); {
		case f[0] == "->" && len(blocks) > 0:
			blocks[len(blocks)-1] += line
		case f[0] == "TCP", f[0] == "UDP", f[0] == "SCTP", f[0] == "FWM":
			blocks = append(blocks, line)
		}
	}
	slices.Sort(blocks)
	return blocks
}

// addrs are a device's addresses; none if there is no such device.
func (w *world) addrs(device string) (list []string) {
	w.t.Helper()
	link, err := w.node.Netlink().LinkByName(device)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	var found []netlink.Addr
	if err == nil {
		found, err = w.node.Netlink().AddrList(link, unix.AF_INET)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	for _, a := range found {
		list = append(list, a.IPNet.String())
	}
	slices.Sort(list)
	return list
}

// ours is what there is of the proxier's own: virtual servers, addresses, sets
// and chains.
func (w *world) ours() string {
	w.t.Helper()
	var b strings.Builder
	for _, block := range w.serverBlocks() {
		if !strings.Contains(block, "C00002C8:0050") {
			b.WriteString(block)
		}
	}
	for _, a := range w.addrs(proxyDevice) {
		if !strings.HasPrefix(a, "192.0.2.") {
			fmt.Fprintln(&b, proxyDevice, a)
		}
	}
	for _, argv := range [][]string{{"ipset", "list", "-n"}, {"iptables-legacy-save"}} {
		out, err := w.node.Run(w.t.Context(), argv[0], argv[1:]...)
		if err != nil {
			w.t.Error(err)
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, "KUBE-") {
				b.WriteString(line)
			}
		}
	}
	return b.String()
}

// reports are what a proxier reported of ports that it set aside.
type reports map[model.PortKey]error

func (r reports) SetAside(p model.PortKey, err error) { r[p] = err }
func (r reports) DriftRepaired(string, int)           {}

func foreignServices(endpoints string) []service {
	return []service{
		{name: "web", addrs: []string{"10.96.3.1", "203.0.113.61", "172.18.0.11"}, endpoints: endpoints},
		{name: "taken", addrs: []string{"10.96.3.2", "203.0.113.60"}, endpoints: endpoints},
	}
}

// TestForeign: nothing that the proxier does, from start to cleanup, touches what
// others have in the same kernel.
func TestForeign(t *testing.T) {
	list := foreignServices("a b")
	told := reports{}
	report := func(o *ipvs.Options) { o.Report = told }
	w := newIdleWorld(t, list, report)
	o := others{w}
	o.arrive()
	want := o.state()
	if n := strings.Count(want, "C00002C8"); n != 6 {
		t.Fatalf("others have %d virtual servers, not 6:\n%s", n, want)
	}
	same := func(after string) {
		t.Helper()
		if got := o.state(); got != want {
			t.Errorf("after %s others have\n%s\ninstead of\n%s", after, got, want)
		}
	}
	w.sync(list)
	same("the start")
	if err := told[model.PortKey{Namespace: "ns", Name: "taken", Protocol: model.TCP}]; err == nil {
		t.Errorf("the port that others have is not reported: %v", told)
	}
	wantTally(t, "the Service beside", w.short(4, sources(1)[0], vip("10.96.3.1")), tally{"a": 2, "b": 2})
	wantTally(t, "what is left of the other", w.short(4, sources(1)[0], vip("10.96.3.2")), tally{"a": 2, "b": 2})

	o.arriveLate()
	want = o.state()
	w.sync(foreignServices("b c"))
	same("a change")
	w.force()
	same("a full comparison")
	w.restart(report)
	w.sync(list)
	same("a restart")
	w.sync(nil)
	same("the end of all Services")
	w.sync(list)
	w.clean()
	same("cleanup")
	if left := w.ours(); left != "" {
		t.Errorf("after cleanup there is\n%s", left)
	}
	w.restart(report)
	w.clean()
	same("cleanup of nothing")
}

// TestHostPorts: what listens on all of the node's addresses is not reached by
// the addresses of Services, which are the node's own in ipvs mode.
func TestHostPorts(t *testing.T) {
	list := []service{{name: "web", addrs: []string{"10.96.3.1", "203.0.113.61"}, endpoints: "a"}}
	w := newWorld(t, list)
	at := netip.AddrPortFrom(netip.IPv4Unspecified(), 9999)
	if _, err := w.node.ServeOpen("host", at); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{"client", "shell", "node1"} {
		for _, addr := range []string{"10.96.3.1", "203.0.113.61"} {
			c, err := w.lab.Host(from).Open(t.Context(), netip.Addr{}, netip.AddrPortFrom(netip.MustParseAddr(addr), 9999), patience)
			switch {
			case err == nil:
				t.Errorf("%s reaches the host by %s", from, addr)
				_ = c.Close()
			case !errors.Is(err, unix.ECONNREFUSED):
				t.Errorf("%s is not refused: %v", from, err)
			}
		}
		c, err := w.lab.Host(from).Open(t.Context(), netip.Addr{}, netip.AddrPortFrom(netip.MustParseAddr("172.18.0.11"), 9999), patience)
		if err != nil {
			t.Fatalf("%s does not reach the host by its own address: %v", from, err)
		}
		_ = c.Close()
	}
}

// force lets the proxier compare everything.
func (w *world) force() {
	w.t.Helper()
	err := w.node.Do(func() error {
		_, err := w.p.Check(w.t.Context(), true)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) clean() {
	w.t.Helper()
	if err := w.node.Do(func() error { return w.p.Cleanup(context.Background()) }); err != nil {
		w.t.Fatal(err)
	}
}

// servers is the kernel's own list.
func (w *world) servers() string {
	w.t.Helper()
	var text []byte
	err := w.node.Do(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/ip_vs")
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return string(text)
}
