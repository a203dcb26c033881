package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	libipvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/proxier/ipvs"
)

// others is somebody else on the node who uses the same kernel: keepalived, or
// LVS by hand.
type others struct{ w *world }

const (
	othersSet    = "OTHERS"
	othersDevice = "others0"
	othersServer = "192.0.2.200" // where their virtual servers lead
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
		d := &libipvs.Destination{Address: net.ParseIP(othersServer).To4(), Port: 80, Weight: 7, ConnectionFlags: libipvs.ConnectionFlagMasq, AddressFamily: unix.AF_INET}
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
	b.WriteString(o.w.serverTexts(true))
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

// serverTexts are the virtual servers that are others', or those that are not,
// sorted.
func (w *world) serverTexts(foreign bool) string {
	w.t.Helper()
	var list []string
	for _, s := range w.servers() {
		if s.foreign() == foreign {
			list = append(list, s.String())
		}
	}
	slices.Sort(list)
	return strings.Join(list, "")
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
	b.WriteString(w.serverTexts(false))
	for _, a := range w.addrs(proxyDevice) {
		if !strings.HasPrefix(a, "192.0.2.") {
			fmt.Fprintln(&b, proxyDevice, a)
		}
	}
	sets, err := w.node.Run(w.t.Context(), "ipset", "list", "-n")
	if err != nil {
		w.t.Error(err)
	}
	var list []string
	for line := range strings.Lines(sets) {
		if strings.HasPrefix(line, "KUBE-") {
			list = append(list, "set "+line)
		}
	}
	rules, err := w.node.Run(w.t.Context(), "iptables-legacy-save")
	if err != nil {
		w.t.Error(err)
	}
	for table := range strings.SplitSeq(rules, "\n*") { // tables come in the order in which they were made
		name, content, _ := strings.Cut(strings.TrimPrefix(table, "*"), "\n")
		for line := range strings.Lines(content) {
			// KUBE-FIREWALL is the kubelet's as well, and stays.
			if strings.Contains(line, "KUBE-") && !strings.Contains(line, "KUBE-FIREWALL") {
				list = append(list, name+" "+line)
			}
		}
	}
	// The order of tables, of chains and of jumps from built-in chains says who came
	// first; that of other rules counts.
	slices.SortStableFunc(list, func(a, b string) int { return strings.Compare(rank(a), rank(b)) })
	return b.String() + strings.Join(list, "")
}

// rank is what lines of ours are sorted by.
func rank(line string) string {
	f := strings.Fields(line)
	if f[1] == "-A" && strings.HasPrefix(f[2], "KUBE-") {
		return strings.Join(f[:3], " ")
	}
	return line
}

// reports are what a proxier reported of ports that it set aside.
type reports map[model.PortKey]error

func (r reports) SetAside(p model.PortKey, err error) { r[p] = err }
func (r reports) DriftRepaired(string, int)           {}

func foreignServices(endpoints string) []service {
	return []service{
		{name: "web", addrs: []string{"10.96.3.1", "203.0.113.61", "172.18.0.11"}, endpoints: endpoints},
		{name: "taken", addrs: []string{"10.96.3.2", "203.0.113.60"}, endpoints: endpoints},
		{name: "local", addrs: []string{"10.96.3.3", "203.0.113.62"}, endpoints: endpoints + " d", local: true},
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
	if n := strings.Count(want, othersServer); n != 6 {
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
}

// TestCleanup: nothing of ours stays, and everything of others, also when the
// proxier starts again.
func TestCleanup(t *testing.T) {
	list := foreignServices("a b")
	for _, tc := range []struct {
		what  string
		clean func(*ipvs.Proxier) error
	}{
		{"by the proxier", func(p *ipvs.Proxier) error { return p.Cleanup(t.Context()) }},
		{"of the host", func(*ipvs.Proxier) error { return ipvs.CleanupHost(t.Context(), model.IPv4, nil) }},
	} {
		t.Run(tc.what, func(t *testing.T) {
			w := newIdleWorld(t, list)
			o := others{w}
			o.arrive()
			w.sync(list)
			o.arriveLate()
			want := o.state()
			for range 2 { // the second time there is nothing
				w.do(func() error { return tc.clean(w.p) })
				if got := o.state(); got != want {
					t.Errorf("others have\n%s\ninstead of\n%s", got, want)
				}
			}
			if left := w.ours(); left != "" {
				t.Errorf("there is still\n%s", left)
			}
			w.restart()
			w.sync(list)
			if got := o.state(); got != want {
				t.Errorf("after another start others have\n%s\ninstead of\n%s", got, want)
			}
		})
	}
}

// TestModeChange: from iptables mode to ipvs mode and back. What others have stays,
// and nothing stays of the mode before. Connections of iptables mode go on in
// ipvs mode; those of ipvs mode end with it.
func TestModeChange(t *testing.T) {
	list := []service{
		{name: "web", addrs: []string{"10.96.3.1", "203.0.113.61"}, endpoints: "a b"},
		{name: "local", addrs: []string{"10.96.3.2", "203.0.113.62"}, endpoints: "a d", local: true},
	}
	w := newIdleWorld(t, list)
	o := others{w}
	o.arrive()
	want := o.state()
	same := func(after string) {
		t.Helper()
		if got := o.state(); got != want {
			t.Errorf("after %s others have\n%s\ninstead of\n%s", after, got, want)
		}
	}
	before := w.iptablesMode(list)
	same("the start of iptables mode")
	h := w.hold(3, sources(1)[0], vip("10.96.3.1"))

	w.sync(list)
	w.do(func() error { _, err := iptables.RemoveObjects(t.Context(), model.IPv4); return err })
	same("the change to ipvs mode")
	h.wantAlive(t)
	wantTally(t, "ipvs mode", w.short(4, sources(1)[0], vip("10.96.3.1")), tally{"a": 2, "b": 2})
	for _, rest := range []string{":KUBE-SVC-", ":KUBE-SEP-", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS"} {
		if strings.Contains(w.ours(), rest) {
			t.Errorf("%s is still there in ipvs mode:\n%s", rest, w.ours())
		}
	}
	fresh := newWorld(t, list) // the same without a past
	if got, want := w.ours(), fresh.ours(); got != want {
		t.Errorf("ipvs mode after iptables mode has\n%s\ninstead of\n%s", got, want)
	}

	o.arriveLate()
	want = o.state()
	w.iptablesMode(list)
	w.do(func() error { _, err := ipvs.RemoveOther(t.Context(), model.IPv4, nil); return err })
	same("the change to iptables mode")
	for range 8 {
		if c, err := w.open(sources(1)[0], vip("10.96.3.1")); err != nil {
			t.Errorf("iptables mode: %v", err)
		} else if err := c.Reset(); err != nil {
			t.Error(err)
		}
	}
	if got := w.ours(); got != before {
		t.Errorf("iptables mode after ipvs mode has\n%s\ninstead of\n%s", got, before)
	}
}

// iptablesMode makes the node serve by iptables, and returns what that has.
func (w *world) iptablesMode(list []service) string {
	w.t.Helper()
	s := scenario(w.t, list)
	p, err := newIPTables("legacy")(s, model.IPv4)
	if err != nil {
		w.t.Fatal(err)
	}
	w.do(func() error { return p.Sync(w.t.Context(), s.Set(model.IPv4)) })
	w.t.Cleanup(func() { w.do(func() error { return p.Cleanup(context.Background()) }) })
	return w.ours()
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

// do does something on the node.
func (w *world) do(f func() error) {
	w.t.Helper()
	if err := w.node.Do(f); err != nil {
		w.t.Fatal(err)
	}
}

// force lets the proxier compare everything.
func (w *world) force() {
	w.t.Helper()
	w.do(func() error {
		_, err := w.p.Check(w.t.Context(), true)
		return err
	})
}

// servers are the node's virtual servers with their destinations, read by another
// library than the proxier's. /proc/net/ip_vs is no help: Linux 6.1 leaves out
// some where network namespaces have some each.
func (w *world) servers() (list []server) {
	w.t.Helper()
	w.do(func() error {
		h, err := libipvs.New("")
		if err != nil {
			return err
		}
		defer h.Close()
		found, err := h.GetServices()
		if err != nil {
			return err
		}
		for _, s := range found {
			d, err := h.GetDestinations(s)
			if err != nil {
				return err
			}
			list = append(list, server{s, d})
		}
		return nil
	})
	return list
}

type server struct {
	*libipvs.Service
	destinations []*libipvs.Destination
}

func (s server) at() netip.AddrPort { return addrPort(s.Address, s.Port) }

func addrPort(ip net.IP, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}

// String prints all that lasts: no connections.
func (s server) String() string {
	text := fmt.Sprintf("server %s protocol %d mark %#x scheduler %s flags %#x timeout %d", s.at(), s.Protocol, s.FWMark, s.SchedName, s.Flags, s.Timeout)
	var list []string
	for _, d := range s.destinations {
		list = append(list, fmt.Sprintf("\n  %s weight %d flags %#x", addrPort(d.Address, d.Port), d.Weight, d.ConnectionFlags))
	}
	slices.Sort(list)
	return text + strings.Join(list, "") + "\n"
}

// foreign says whether a virtual server has the others' destination.
func (s server) foreign() bool {
	return slices.ContainsFunc(s.destinations, func(d *libipvs.Destination) bool { return d.Address.String() == othersServer })
}
