package netlab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/uml"
)

const patience = 10 * time.Second

func newLab(t *testing.T, cfg Config) *Lab {
	t.Helper()
	if err := Supported(); err != nil {
		t.Skip("SKIPPED, needs network namespaces: ", err)
	}
	lab, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lab.Close)
	return lab
}

// networks are the protocols to test here. TestSCTP tests that one alone: the
// others were tested outside, and routers answer a host that has no route only
// about once a second (ip_error in the kernel's net/ipv4/route.c).
func networks(t *testing.T) []string {
	t.Helper()
	err := SCTP()
	switch {
	case uml.Inside() && err == nil:
		return []string{"sctp"}
	case uml.Inside():
		t.Skip("SKIPPED, SCTP not tested: ", err)
	case err == nil:
		return []string{"tcp", "udp", "sctp"}
	}
	return []string{"tcp", "udp"}
}

// TestSCTP runs the tests of what hosts ask each other on a kernel that may have
// SCTP, where the machine's own has none.
func TestSCTP(t *testing.T) {
	if SCTP() == nil {
		t.Skip("the other tests are about SCTP too")
	}
	modules := []string{"veth", "bridge", "sctp"}
	uml.RerunIn(t, uml.Machine{Modules: modules}, "^(TestEverybodyReachesEverybody|TestAnswers|TestSourceAndAddedAddress)$")
}

// TestEverybodyReachesEverybody: all pairs of hosts, both families, all
// protocols, at once, on a lab that was built this moment.
func TestEverybodyReachesEverybody(t *testing.T) {
	for name, bridge := range map[string]string{"routed": "", "bridge": "cbr0"} {
		t.Run(name, func(t *testing.T) {
			cfg := Default()
			cfg.Nodes[0].Bridge = bridge
			lab := newLab(t, cfg)
			hosts := []string{"node1", "node2", "pod1", "pod2", "pod3", "pod4", "client"}
			for _, h := range hosts {
				for _, a := range lab.Addrs(h) {
					for _, network := range networks(t) {
						if _, err := lab.Host(h).Serve(h, network, netip.AddrPortFrom(a, 80)); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			var wg sync.WaitGroup
			for _, from := range hosts {
				for _, to := range hosts {
					for _, a := range lab.Addrs(to) {
						for _, network := range networks(t) {
							wg.Go(func() {
								got, err := lab.Host(from).Ask(t.Context(), network, netip.Addr{}, netip.AddrPortFrom(a, 80), patience)
								if err != nil || got.Server != to || !got.SourceKept() {
									t.Errorf("%s to %s at %s over %s: %v, %v", from, to, a, network, got, err)
								}
								if want := lab.Addr(from, a.Is4()); from != to && got.Seen.Addr() != want {
									t.Errorf("%s to %s: seen as %s, want %s", from, to, got.Seen.Addr(), want)
								}
							})
						}
					}
				}
			}
			wg.Wait()
		})
	}
}

func TestAnswers(t *testing.T) {
	lab := newLab(t, Default())
	for _, p := range []string{"10.96.0.0/16", "fd00:10:96::/112"} {
		if err := lab.RouteVia(netip.MustParsePrefix(p), "node1"); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"203.0.113.0/24", "2001:db8:113::/64"} {
		err := lab.Fabric.Netlink().RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParsePrefix(p)), Type: unix.RTN_BLACKHOLE})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []string{"10.96.0.1:80", "[fd00:10:96::1]:80"} {
		for _, network := range networks(t) {
			if _, err := lab.Nowhere.Serve("nowhere", network, netip.MustParseAddrPort(a)); err != nil {
				t.Fatal(err)
			}
		}
	}
	var wg sync.WaitGroup
	for _, tc := range []struct {
		to   string
		want Result
		wait time.Duration
	}{
		{"10.244.1.11:81", Refused, patience},
		{"[fd00:10:244:1::11]:81", Refused, patience},
		{"10.96.0.1:81", Refused, patience},
		{"[fd00:10:96::1]:81", Refused, patience},
		{"10.96.0.1:80", Answered, patience},
		{"[fd00:10:96::1]:80", Answered, patience},
		{"10.97.0.1:80", Unreachable, patience},
		{"[fd00:10:97::1]:80", Unreachable, patience},
		{"203.0.113.1:80", TimedOut, 300 * time.Millisecond},
		{"[2001:db8:113::1]:80", TimedOut, 300 * time.Millisecond},
	} {
		for _, network := range networks(t) {
			for _, from := range []string{"client", "pod2", "node1"} {
				wg.Go(func() {
					got, err := lab.Host(from).Ask(t.Context(), network, netip.Addr{}, netip.MustParseAddrPort(tc.to), tc.wait)
					if err != nil || got.Result != tc.want {
						t.Errorf("%s to %s over %s: %v, %v; want %v", from, tc.to, network, got, err, tc.want)
					}
				})
			}
		}
	}
	wg.Wait()
	at := netip.MustParseAddrPort("192.168.100.10:1")
	if _, err := lab.Host("client").Ask(t.Context(), "dccp", netip.Addr{}, at, patience); err == nil {
		t.Error("DCCP was asked over no socket")
	}
	if _, err := lab.Host("client").Serve("client", "dccp", at); err == nil {
		t.Error("DCCP was served over no socket")
	}
}

// TestRefusesAsOftenAsAsked: a node sends an error for each of many datagrams in
// a moment. A kernel as it comes sends about 50, and keeps silent for 20 ms:
// net.ipv4.icmp_msgs_burst.
func TestRefusesAsOftenAsAsked(t *testing.T) {
	lab := newLab(t, Default())
	for _, addr := range lab.Addrs("node1") {
		nobody := netip.AddrPortFrom(addr, 81)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i := range 50 {
					a, err := lab.Host("client").Ask(t.Context(), "udp", netip.Addr{}, nobody, patience)
					if err != nil || a.Result != Refused {
						t.Errorf("datagram %d to %s: %v %v, want refused", i, nobody, a, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}

// TestWithoutSCTP: a kernel without says so; nobody takes it for a refusal.
func TestWithoutSCTP(t *testing.T) {
	err := SCTP()
	if err == nil {
		t.Skip("the kernel has SCTP")
	}
	lab := newLab(t, Default())
	at := netip.AddrPortFrom(lab.Addr("client", true), 80)
	if _, serr := lab.Host("client").Serve("client", "sctp", at); serr == nil {
		t.Errorf("SCTP was served, though: %v", err)
	}
	if got, aerr := lab.Host("pod1").Ask(t.Context(), "sctp", netip.Addr{}, at, patience); aerr == nil {
		t.Errorf("SCTP: %v, though: %v", got, err)
	}
}

func TestSourceAndAddedAddress(t *testing.T) {
	cfg := Default()
	other := netip.MustParseAddr("192.168.101.20")
	cfg.Clients[0].Addrs = append(cfg.Clients[0].Addrs, other)
	lab := newLab(t, cfg)
	vip := netip.MustParseAddr("203.0.113.7")
	if err := lab.AddAddr("node1", vip); err != nil {
		t.Fatal(err)
	}
	for _, network := range networks(t) {
		if _, err := lab.Host("node1").Serve("vip", network, netip.AddrPortFrom(vip, 80)); err != nil {
			t.Fatal(err)
		}
		got, err := lab.Host("client").Ask(t.Context(), network, other, netip.AddrPortFrom(vip, 80), patience)
		if err != nil || got.Server != "vip" || got.Seen.Addr() != other {
			t.Errorf("%s: %v, %v", network, got, err)
		}
	}
}

func TestCommandsRunInside(t *testing.T) {
	lab := newLab(t, Default())
	ns := lab.Host("pod1")
	want := ""
	if err := ns.Do(func() (err error) { want, err = os.Readlink("/proc/thread-self/ns/net"); return }); err != nil {
		t.Fatal(err)
	}
	got, err := ns.Run(t.Context(), "readlink", "/proc/self/ns/net")
	if err != nil || strings.TrimSpace(got) != want {
		t.Errorf("command ran in %q, want %q; %v", got, want, err)
	}
	outside, _ := os.Readlink("/proc/self/ns/net")
	if outside == want {
		t.Error("the pod is in the process's own namespace")
	}
	if _, err := ns.RunInput(t.Context(), "complaint", "sh", "-c", "cat >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "complaint") {
		t.Errorf("failing command: %v", err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	lab.Close()
	lab.Close()
	if err := cmd.Wait(); err == nil {
		t.Error("a command outlived its lab")
	}
}

// TestNothingRemains: neither links nor files, after labs that were closed and
// labs whose user panicked.
func TestNothingRemains(t *testing.T) {
	if err := Supported(); err != nil {
		t.Skip("SKIPPED, needs network namespaces: ", err)
	}
	files := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	build := func() {
		lab, err := New(Default())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = recover() }()
		defer lab.Close()
		if _, err := lab.Host("pod1").Serve("x", "tcp", netip.MustParseAddrPort("10.244.1.11:80")); err != nil {
			t.Fatal(err)
		}
		panic("a test that fails")
	}
	build() // opens what the runtime keeps
	before := files()
	for range 3 {
		build()
	}
	if after := files(); after > before {
		t.Errorf("%d files open before, %d after", before, after)
	}
}

func TestBadConfigs(t *testing.T) {
	if err := Supported(); err != nil {
		t.Skip("SKIPPED, needs network namespaces: ", err)
	}
	twice := Default()
	twice.Clients = append(twice.Clients, HostSpec{Name: "pod1"})
	same := Default()
	same.Clients = append(same.Clients, HostSpec{Name: "other", Addrs: same.Clients[0].Addrs[:1]})
	for name, cfg := range map[string]Config{"name twice": twice, "address twice": same} {
		if lab, err := New(cfg); err == nil {
			lab.Close()
			t.Errorf("%s: no error", name)
		}
	}
	lab := newLab(t, Default())
	if err := lab.RouteVia(netip.MustParsePrefix("10.0.0.0/8"), "pod1"); err == nil {
		t.Error("a route via a pod was accepted")
	}
	if err := lab.Host("pod1").Sysctl("net.ipv4.no_such_thing", "1"); err == nil {
		t.Error("a sysctl that does not exist was set")
	}
}

func Example() {
	lab, err := New(Default())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lab.Close()
	if _, err := lab.Host("pod1").Serve("pod1", "tcp", netip.MustParseAddrPort("10.244.1.11:80")); err != nil {
		fmt.Println(err)
		return
	}
	a, err := lab.Host("client").Ask(context.Background(), "tcp", netip.Addr{}, netip.MustParseAddrPort("10.244.1.11:80"), time.Second)
	fmt.Println(a.Server, a.Seen.Addr(), err)
	// Without output here, since it needs privileges; the tests above say more.
}

// TestOpenConnections: they carry lines until one end closes.
func TestOpenConnections(t *testing.T) {
	lab := newLab(t, Default())
	at := netip.AddrPortFrom(lab.Addr("pod3", true), 80)
	stop, err := lab.Host("pod3").ServeOpen("three", at)
	if err != nil {
		t.Fatal(err)
	}
	first, err := lab.Host("pod1").Open(t.Context(), lab.Addr("pod1", true), at, patience)
	if err != nil {
		t.Fatal(err)
	}
	second, err := lab.Host("client").Open(t.Context(), netip.Addr{}, at, patience)
	if err != nil {
		t.Fatal(err)
	}
	stop() // takes no more, and keeps what it has
	for range 3 {
		for _, c := range []*Conn{first, second} {
			if err := c.Echo(patience); err != nil || c.Server != "three" {
				t.Errorf("server %q, %v", c.Server, err)
			}
		}
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if err := first.Echo(patience); err == nil {
		t.Error("a closed connection carries lines")
	}
	if err := second.Reset(); err != nil {
		t.Error(err)
	}
	if _, err := lab.Host("pod1").Open(t.Context(), netip.Addr{}, at, patience); err == nil {
		t.Error("a connection to nobody")
	}
}
