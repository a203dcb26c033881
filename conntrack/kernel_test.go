package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// namespace is a network namespace that a test made.
type namespace struct{ *os.File }

// enter moves the calling goroutine there, on a thread that ends with it.
func (ns namespace) enter() error {
	runtime.LockOSThread() // never unlocked
	return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
}

// inNamespace runs the rest of the test in a network namespace of its own, on
// a thread that ends with it.
func inNamespace(t testing.TB) namespace {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: needs root to make a network namespace")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test's goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("SKIPPED: cannot make a network namespace: %v", err)
	}
	command(t, "ip", "link", "set", "lo", "up")
	command(t, "ip", "addr", "add", nodeIP.String()+"/32", "dev", "lo")
	command(t, "ip", "addr", "add", nodeIP6.String()+"/128", "dev", "lo", "nodad")
	command(t, "ip", "route", "add", "10.0.0.0/8", "dev", "lo")
	command(t, "ip", "-6", "route", "add", "local", "fd00::/8", "dev", "lo")
	// Connections are tracked only where some rule needs it.
	command(t, "iptables", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-d", "192.0.2.1", "-j", "DNAT", "--to-destination", "192.0.2.2")
	command(t, "ip6tables", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-d", "2001:db8::1", "-j", "DNAT", "--to-destination", "2001:db8::2")
	probe, err := open()
	if err != nil {
		t.Skipf("SKIPPED: no netfilter by netlink here: %v", err)
	}
	defer probe.close()
	if _, err := probe.dumpRetrying(context.Background(), model.IPv4, filter{}, func(*Flow) {}); err != nil {
		t.Skipf("SKIPPED: no conntrack by netlink here: %v", err)
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return namespace{ns}
}

func command(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: %s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// dnat makes the node translate what it sends to a destination, and returns
// what removes the rule again.
func dnat(t *testing.T, dst, to string) (remove func()) {
	t.Helper()
	ap := netip.MustParseAddrPort(dst)
	program := "iptables"
	if ap.Addr().Is6() {
		program = "ip6tables"
	}
	rule := []string{"OUTPUT", "-p", "udp", "-d", ap.Addr().String(), "--dport", fmt.Sprint(ap.Port()), "-j", "DNAT", "--to-destination", to}
	command(t, program, append([]string{"-t", "nat", "-A"}, rule...)...)
	return func() { command(t, program, append([]string{"-t", "nat", "-D"}, rule...)...) }
}

// client is a socket that never closes: its flow keeps its translation.
type client struct {
	net.PacketConn
	dst netip.AddrPort
}

func dial(t *testing.T, dst string) *client {
	t.Helper()
	ap := netip.MustParseAddrPort(dst)
	local := nodeIP
	if ap.Addr().Is6() {
		local = nodeIP6
	}
	conn, err := net.ListenPacket("udp", netip.AddrPortFrom(local, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &client{conn, ap}
	c.send(t)
	return c
}

func (c *client) send(t *testing.T) {
	t.Helper()
	_, err := c.WriteTo([]byte("one way"), net.UDPAddrFromAddrPort(c.dst))
	if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatal(err)
	}
}

// flow returns the client's flow as the kernel has it, nil if none.
func (c *client) flow(t *testing.T, k *Kernel) *Flow {
	t.Helper()
	src := c.LocalAddr().(*net.UDPAddr).AddrPort()
	var found *Flow
	err := k.List(t.Context(), model.FamilyOf(c.dst.Addr()), []Frontend{{model.UDP, c.dst.Addr(), c.dst.Port()}}, func(f *Flow) {
		if f.Src.Port() == src.Port() {
			clone := *f
			found = &clone
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// settle runs the cleaner once for a Set, in this thread and so in this namespace.
func settle(t *testing.T, c *Cleaner, set *plan.Set) {
	t.Helper()
	c.opts.OnError = func(_ model.Family, err error) { t.Errorf("run failed: %v", err) }
	_ = c.Sync(t.Context(), set)
	c.run(t.Context())
}

func locals(list ...netip.Addr) func() ([]netip.Addr, error) {
	return func() ([]netip.Addr, error) { return list, nil }
}

// TestKernelCases: each case of a stale flow, on the kernel, with DNAT rules
// made by hand; and beside each the flows that must stay.
func TestKernelCases(t *testing.T) {
	ns := inNamespace(t)
	ep := func(n int) string { return fmt.Sprintf("10.244.0.%d:5353", n) }
	tests := []struct {
		name     string
		dst      string
		to       string // translated to, "" for not at all
		old, new []*testService
		stale    bool
	}{
		{"endpoint removed", "10.96.0.1:53", ep(1), svcs(udp("a", 1, 2)), svcs(udp("a", 2)), true},
		{"endpoint stays", "10.96.0.1:53", ep(2), svcs(udp("a", 1, 2)), svcs(udp("a", 2)), false},
		{"endpoints to zero", "10.96.0.1:53", ep(1), svcs(udp("a", 1)), svcs(udp("a")), true},
		{"from zero to some", "10.96.0.1:53", "", svcs(udp("a")), svcs(udp("a", 1)), true},
		{"service deleted", "10.96.0.1:53", ep(1), svcs(udp("a", 1)), nil, true},
		{"port changed", "10.96.0.1:53", ep(1), svcs(udp("a", 1)), svcs(udp("a", 1).port(54)), true},
		{"clusterIP changed", "10.96.0.1:53", ep(1), svcs(udp("a", 1)), svcs(udp("a", 1).at("10.96.0.2")), true},
		{"externalIP removed", "203.0.113.7:53", ep(1), svcs(udp("a", 1).external("203.0.113.7")), svcs(udp("a", 1)), true},
		{"externalIP stays", "203.0.113.7:53", ep(1), svcs(udp("a", 1, 2).external("203.0.113.7")), svcs(udp("a", 1).external("203.0.113.7")), false},
		{"load balancer's endpoint removed", "203.0.113.8:53", ep(1), svcs(udp("a", 1, 2).balancer("203.0.113.8")), svcs(udp("a", 2).balancer("203.0.113.8")), true},
		{"nodePort's endpoint removed", nodeIP.String() + ":30053", ep(1), svcs(udp("a", 1, 2).node(30053)), svcs(udp("a", 2).node(30053)), true},
		{"nodePort, endpoints to zero", nodeIP.String() + ":30053", ep(1), svcs(udp("a", 1).node(30053)), svcs(udp("a").node(30053)), true},
		{"nodePort changed", nodeIP.String() + ":30053", ep(1), svcs(udp("a", 1).node(30053)), svcs(udp("a", 1).node(30054)), true},
		{"nodePort's number at another host", "10.200.0.1:30053", "", svcs(udp("a", 1).node(30053)), svcs(udp("a").node(30053)), false},
		{"nodePort's number at another host, translated by others", "10.200.0.1:30053", ep(9), svcs(udp("a", 1).node(30053)), svcs(udp("a").node(30053)), false},
		{"somebody else's", "10.97.0.1:53", ep(1), svcs(udp("a", 1)), nil, false},
		{"taken over with the same endpoint", "10.96.0.1:53", ep(1), svcs(udp("a", 1)), svcs(udp("b", 1)), false},
		{"taken over without it", "10.96.0.1:53", ep(1), svcs(udp("a", 1)), svcs(udp("b", 2)), true},
		{"IPv6 endpoint removed", "[fd00:96::1]:53", "[fd00:244::1]:5353", svcs(udp6("a", 1, 2)), svcs(udp6("a", 2)), true},
		{"IPv6 nodePort's endpoint removed", "[" + nodeIP6.String() + "]:30053", "[fd00:244::1]:5353", svcs(udp6("a", 1).node(30053)), svcs(udp6("a").node(30053)), true},
	}
	k := &Kernel{}
	command(t, "ip", "route", "add", "203.0.113.0/24", "dev", "lo")
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if err := ns.enter(); err != nil {
				t.Fatal(err)
			}
			family := model.FamilyOf(netip.MustParseAddrPort(test.dst).Addr())
			if test.to != "" {
				defer dnat(t, test.dst, test.to)()
			}
			// Flows that the same client port number, endpoint or neighbour
			// address could be mistaken for.
			others := []*client{dial(t, "10.97.0.1:53"), dial(t, "10.200.0.9:5353"), dial(t, nodeIP.String()+":9")}
			p := planner(family)
			cleaner := NewCleaner(family, k, Options{Locals: locals(nodeIP, nodeIP6)})
			settle(t, cleaner, p.set(test.old...))
			c := dial(t, test.dst)
			before := c.flow(t, k)
			if before == nil {
				t.Fatal("the kernel has no flow to begin with")
			}
			if want := test.to; want != "" && before.ReplySrc != netip.MustParseAddrPort(want) {
				t.Fatalf("flow is answered by %v, want %v", before.ReplySrc, want)
			}
			settle(t, cleaner, p.set(test.new...))
			after := c.flow(t, k)
			if (after == nil) != test.stale {
				t.Errorf("flow deleted: %v, want %v", after == nil, test.stale)
			}
			for _, o := range others {
				if o.flow(t, k) == nil {
					t.Errorf("the flow to %v, which is not ours, was deleted", o.dst)
				}
			}
		})
	}
}

// TestKernelFollows: after the cleaning the next packet of the same socket goes
// to the new endpoint, with a real receiver and its replies.
func TestKernelFollows(t *testing.T) {
	inNamespace(t)
	receiver := func(addr string) net.PacketConn {
		command(t, "ip", "addr", "add", addr+"/32", "dev", "lo")
		conn, err := net.ListenPacket("udp", addr+":5353")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	receives := func(conn net.PacketConn) bool {
		if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		_, from, err := conn.ReadFrom(make([]byte, 100))
		if err != nil {
			return false
		}
		_, err = conn.WriteTo([]byte("reply"), from)
		return err == nil
	}
	one, two := receiver("10.244.0.1"), receiver("10.244.0.2")
	k := &Kernel{}
	p := planner(model.IPv4)
	cleaner := NewCleaner(model.IPv4, k, Options{Locals: locals(nodeIP)})
	remove := dnat(t, "10.96.0.1:53", "10.244.0.1:5353")
	settle(t, cleaner, p.set(udp("a", 1)))
	c := dial(t, "10.96.0.1:53")
	if !receives(one) {
		t.Fatal("endpoint 1 received nothing")
	}
	remove()
	dnat(t, "10.96.0.1:53", "10.244.0.2:5353")
	c.send(t)
	if !receives(one) {
		t.Fatal("the flow did not keep its first endpoint: the test shows nothing")
	}
	settle(t, cleaner, p.set(udp("a", 2)))
	c.send(t)
	if !receives(two) {
		t.Error("endpoint 2 received nothing after the cleaning")
	}
}

// TestKernelMasqueraded: who the reply goes to does not matter.
func TestKernelMasqueraded(t *testing.T) {
	inNamespace(t)
	command(t, "ip", "addr", "add", "10.1.1.1/32", "dev", "lo")
	dnat(t, "10.96.0.1:53", "10.244.0.1:5353")
	command(t, "iptables", "-t", "nat", "-A", "POSTROUTING", "-p", "udp", "-j", "SNAT", "--to-source", "10.1.1.1")
	k := &Kernel{}
	p := planner(model.IPv4)
	cleaner := NewCleaner(model.IPv4, k, Options{Locals: locals(nodeIP)})
	settle(t, cleaner, p.set(udp("a", 1)))
	c := dial(t, "10.96.0.1:53")
	settle(t, cleaner, p.set(udp("a", 1, 2)))
	if c.flow(t, k) == nil {
		t.Fatal("a masqueraded flow to a serving endpoint was deleted")
	}
	settle(t, cleaner, p.set(udp("a", 2)))
	if c.flow(t, k) != nil {
		t.Error("a masqueraded flow to a removed endpoint stayed")
	}
}

// TestKernelRun: the whole Cleaner, running.
func TestKernelRun(t *testing.T) {
	ns := inNamespace(t)
	dnat(t, "10.96.0.1:53", "10.244.0.1:5353")
	k := &Kernel{}
	c := dial(t, "10.96.0.1:53")
	deleted := make(chan int, 10)
	cleaner := NewCleaner(model.IPv4, k, Options{
		Locals:    locals(nodeIP),
		OnDeleted: func(_ model.Family, n int) { deleted <- n },
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		if err := ns.enter(); err != nil {
			ended <- err
			return
		}
		ended <- cleaner.Run(ctx)
	}()
	// The first Set after a start: the flow is older than we are.
	_ = cleaner.Sync(ctx, planner(model.IPv4).set(udp("a", 2)))
	select {
	case n := <-deleted:
		if n != 1 {
			t.Errorf("deleted %d flows, want 1", n)
		}
	case err := <-ended:
		t.Fatalf("Run ended: %v", err)
	case <-time.After(20 * time.Second):
		t.Fatal("nothing deleted")
	}
	if c.flow(t, k) != nil {
		t.Error("the flow is still there")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// create puts a flow into the kernel's table by netlink.
func create(t testing.TB, flows ...Flow) {
	t.Helper()
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for len(flows) > 0 {
		n := min(len(flows), deleteBatch)
		m := message{}
		for i := range flows[:n] {
			f := &flows[i]
			m.begin(ctNew, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL, s.next(), model.FamilyOf(f.Dst.Addr()))
			m.tuple(ctaTupleOrig, f.Protocol, f.Src, f.Dst, f.ZoneOfOriginal, f.Zone)
			m.tuple(ctaTupleReply, f.Protocol, f.ReplySrc, f.Src, false, 0)
			if f.Zone != 0 && !f.ZoneOfOriginal {
				m.big16(ctaZone, f.Zone)
			}
			m.attribute(ctaStatus, 0, 0, 0, 1<<3) // confirmed
			m.attribute(ctaTimeout, 0, 0, 4, 0)
			m.end()
		}
		if err := s.send(m.buf); err != nil {
			t.Fatal(err)
		}
		answers := 0
		err := s.receive(func(h header, payload []byte) (bool, error) {
			answers++
			return answers == n, h.failure(payload)
		})
		if err != nil {
			t.Fatalf("create flows: %v", err)
		}
		flows = flows[n:]
	}
}

func listed(t testing.TB, k *Kernel, family model.Family, want ...Frontend) []Flow {
	t.Helper()
	var out []Flow
	if err := k.List(t.Context(), family, want, func(f *Flow) { out = append(out, *f) }); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestKernelFilter: the kernel sends what was asked for and nothing else, and
// without its help the same comes out.
func TestKernelFilter(t *testing.T) {
	inNamespace(t)
	var flows []Flow
	for i := range 100 {
		src := fmt.Sprintf("10.1.0.%d:4000", i)
		flows = append(flows, flow(src, fmt.Sprintf("10.96.0.%d:53", i%10), "10.244.0.1:53"),
			flow(src, nodeIP.String()+":30053", "10.244.0.2:53"))
	}
	for i := range flows {
		if i%20 == 0 {
			flows[i].Protocol = model.SCTP
		}
	}
	create(t, flows...)
	create(t, flow("[fd00::1]:1", "[fd00:96::1]:53", "[fd00:244::1]:53"))

	if got := listed(t, &Kernel{}, model.IPv6, Frontend{model.UDP, netip.MustParseAddr("fd00:96::1"), 53}); len(got) != 1 {
		t.Errorf("an IPv6 frontend has flows %v, want 1", got)
	}
	if got := listed(t, &Kernel{}, model.IPv6, Frontend{model.UDP, netip.MustParseAddr("fd00:96::2"), 53}); len(got) != 0 {
		t.Errorf("an unused IPv6 frontend has flows %v", got)
	}
	few := []Frontend{{model.UDP, netip.MustParseAddr("10.96.0.3"), 53}, {Protocol: model.UDP, Port: 30053}}
	var many []Frontend
	for i := range 9 {
		many = append(many, Frontend{model.UDP, netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), 53})
	}
	works, ignored := &Kernel{}, &Kernel{}
	ignored.filter.Store(filterIgnored)
	for _, want := range [][]Frontend{few, many, {{model.SCTP, netip.MustParseAddr("10.96.0.0"), 53}}} {
		expect := 0
		for _, f := range flows {
			if matches(&f, want) {
				expect++
			}
		}
		a, b := listed(t, works, model.IPv4, want...), listed(t, ignored, model.IPv4, want...)
		if len(a) != expect || len(b) != expect || expect == 0 {
			t.Errorf("%v: %d flows by the kernel's filter, %d by ours, want %d", want, len(a), len(b), expect)
		}
	}
	if works.filter.Load() != filterWorks {
		t.Skip("SKIPPED the rest: this kernel has no CTA_FILTER (before 5.8)")
	}
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for _, test := range []struct {
		family model.Family
		want   filter
		seen   int
	}{
		{model.IPv4, filter{}, 200},
		{model.IPv6, filter{}, 1},
		{model.IPv4, filter{protocol: model.UDP}, 190},
		{model.IPv4, filter{protocol: model.SCTP}, 10},
		{model.IPv4, filter{model.UDP, netip.MustParseAddr("10.96.0.3"), 53}, 10},
		{model.IPv4, filter{protocol: model.UDP, port: 30053}, 100},
		{model.IPv6, filter{protocol: model.UDP, port: 53}, 1},
		{model.IPv6, filter{protocol: model.UDP, port: 54}, 0},
	} {
		seen, err := s.dumpRetrying(t.Context(), test.family, test.want, func(*Flow) {})
		if err != nil || seen != test.seen {
			t.Errorf("%v: the kernel sent %d flows (%v), want %d", test.want, seen, err, test.seen)
		}
	}
}

// TestKernelDelete: exactly the entry that was seen goes, not a younger one,
// not one of another zone.
func TestKernelDelete(t *testing.T) {
	inNamespace(t)
	k := &Kernel{}
	dns := Frontend{model.UDP, netip.MustParseAddr("10.96.0.1"), 53}
	plain := flow("10.1.0.1:4000", "10.96.0.1:53", "10.244.0.1:53")
	zoned, own := plain, plain
	zoned.Zone = 7
	own.Zone, own.ZoneOfOriginal = 9, true
	own.ReplySrc = netip.MustParseAddrPort("10.244.0.9:53") // its reply is in zone 0
	create(t, plain, zoned, own)
	before := listed(t, k, model.IPv4, dns)
	if len(before) != 3 {
		t.Fatalf("%d flows to begin with, want 3: %v", len(before), before)
	}
	for _, f := range before {
		if f.ID == 0 {
			t.Errorf("no ID: %v", f)
		}
		other := f
		other.ID++
		if n, err := k.Delete(t.Context(), []Flow{other}); n != 0 || err != nil {
			t.Errorf("another entry's ID: deleted %d, %v; want 0 and no error", n, err)
		}
	}
	for i, f := range before {
		if n, err := k.Delete(t.Context(), []Flow{f, f}); n != 1 || err != nil {
			t.Errorf("%v: deleted %d, %v; want 1: the second time it is gone", f, n, err)
		}
		if after := listed(t, k, model.IPv4, dns); !slices.Equal(after, before[i+1:]) {
			t.Errorf("left: %v, want %v", after, before[i+1:])
		}
	}
}

// TestKernelMany: more than one batch, while the table is read.
func TestKernelMany(t *testing.T) {
	inNamespace(t)
	const n = 3*deleteAtOnce + 17
	create(t, spread(n, "10.96.0.1:53", "10.244.0.1:5353")...)
	create(t, spread(500, "10.97.0.1:53", "10.244.0.9:5353")...)
	deleted := 0
	cleaner := NewCleaner(model.IPv4, &Kernel{}, Options{OnDeleted: func(_ model.Family, n int) { deleted += n }})
	settle(t, cleaner, planner(model.IPv4).set(udp("a", 2)))
	if deleted != n {
		t.Errorf("deleted %d flows, want %d", deleted, n)
	}
	if left := listed(t, &Kernel{}, model.IPv4, Frontend{model.UDP, netip.MustParseAddr("10.97.0.1"), 53}); len(left) != 500 {
		t.Errorf("%d foreign flows left, want 500", len(left))
	}
}

// spread returns flows of many clients to one destination.
func spread(n int, dst, replySrc string) []Flow {
	out := make([]Flow, n)
	for i := range out {
		out[i] = flow("10.1.0.1:4000", dst, replySrc)
		out[i].Src = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 16), byte(i >> 8)}), uint16(1000+i&0xff))
	}
	return out
}

// BenchmarkList: 50,000 foreign UDP flows in the table and 10 of ours.
func BenchmarkList(b *testing.B) {
	ns := inNamespace(b)
	create(b, spread(50_000, "10.97.0.1:53", "10.244.0.9:5353")...)
	create(b, spread(10, "10.96.0.1:53", "10.244.0.1:5353")...)
	dns := Frontend{model.UDP, netip.MustParseAddr("10.96.0.1"), 53}
	var many []Frontend
	for i := range 100 {
		many = append(many, Frontend{model.UDP, netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), 53})
	}
	for _, bench := range []struct {
		name   string
		filter int32
		want   []Frontend
	}{
		{"kernel filter, 1 frontend", filterWorks, []Frontend{dns}},
		{"kernel filter, 4 frontends", filterWorks, many[:4]},
		{"protocol filter, 100 frontends", filterWorks, many},
		{"no kernel filter, 1 frontend", filterIgnored, []Frontend{dns}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			if err := ns.enter(); err != nil {
				b.Fatal(err)
			}
			k := &Kernel{}
			k.filter.Store(bench.filter)
			b.ReportAllocs()
			for b.Loop() {
				if n := len(listed(b, k, model.IPv4, bench.want...)); n != 10 {
					b.Fatalf("%d flows, want 10", n)
				}
			}
		})
	}
}
