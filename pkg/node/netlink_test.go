package node

import (
	"context"
	"fmt"
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
)

// inNamespace runs the rest of the test in a network namespace of its own, and
// returns a function by which other goroutines enter it.
func inNamespace(t *testing.T) (enter func() error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: needs root to make a network namespace")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test's goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("SKIPPED: cannot make a network namespace: %v", err)
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return func() error {
		runtime.LockOSThread()
		return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
	}
}

func ip(t *testing.T, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

func TestAddresses(t *testing.T) {
	inNamespace(t)
	ip(t, "link set lo up")
	ip(t, "link add eth0 type veth peer name eth1")
	ip(t, "link add kube-ipvs0 type bridge") // the name counts; dummy is not everywhere
	ip(t, "addr add 192.168.1.5/24 dev eth0")
	ip(t, "addr add 10.0.0.5 peer 10.0.0.6/32 dev eth0")
	ip(t, "addr add 192.168.1.5/32 dev lo")
	ip(t, "addr add 10.96.0.1/32 dev kube-ipvs0")
	ip(t, "-6 addr add fd00::5/64 dev eth1 nodad")
	ip(t, "-6 addr add fd00:96::1/128 dev kube-ipvs0 nodad")
	for family, want := range map[model.Family][]netip.Addr{
		model.IPv4: addrs("10.0.0.5", "127.0.0.1", "192.168.1.5"),
		model.IPv6: addrs("::1", "fd00::5"),
	} {
		got, err := Addresses(family)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%v: %v, %v; want %v", family, got, err, want)
		}
	}
}

// watching runs Watch in a namespace until the test ends and returns what tells
// of its calls. Each call waits for gate, if there is one.
func watching(t *testing.T, enter func() error, gate <-chan struct{}) <-chan struct{} {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	calls := make(chan struct{}, 10_000)
	ended := make(chan error, 1)
	go func() {
		if err := enter(); err != nil {
			ended <- err
			return
		}
		ended <- Watch(ctx, func() {
			calls <- struct{}{}
			if gate != nil {
				<-gate
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Watch: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Watch did not end with its context")
		}
	})
	return calls
}

func awaitCall(t *testing.T, calls <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-calls:
	case <-time.After(20 * time.Second):
		t.Fatalf("no call after: %s", what)
	}
}

func TestWatch(t *testing.T) {
	enter := inNamespace(t)
	ip(t, "link set lo up")
	for _, change := range []string{
		"addr add 192.168.1.5/24 dev lo",
		"addr del 192.168.1.5/24 dev lo",
		"-6 addr add fd00::5/64 dev lo",
		"-6 addr del fd00::5/64 dev lo",
		"link add eth0 type veth peer name eth1",
		"link set eth0 up",
		"link del eth0",
	} {
		// A subscription of its own, so that no echo of the change before is
		// taken for this one's.
		t.Run(change, func(t *testing.T) {
			if err := enter(); err != nil {
				t.Fatal(err)
			}
			calls := watching(t, enter, nil)
			awaitCall(t, calls, "start")
			ip(t, change)
			awaitCall(t, calls, change)
		})
	}
}

// addMany adds n addresses to an interface.
func addMany(t *testing.T, device string, n int) {
	t.Helper()
	var batch strings.Builder
	for i := range n {
		fmt.Fprintf(&batch, "addr add 10.%d.%d.1/32 dev %s\n", 1+i>>8, i&255, device)
	}
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(batch.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ip -batch: %v: %s", err, out)
	}
}

// TestWatchCoalesces: thousands of changes are few calls, and what is listed
// after the last call is the end state.
func TestWatchCoalesces(t *testing.T) {
	enter := inNamespace(t)
	ip(t, "link set lo up")
	calls := watching(t, enter, nil)
	awaitCall(t, calls, "start")
	const n = 3000
	begin := time.Now()
	addMany(t, "lo", n)
	took := time.Since(begin)
	count := 0
	for list := []netip.Addr(nil); len(list) != n+1; count++ {
		awaitCall(t, calls, fmt.Sprintf("%d of %d addresses listed", len(list), n+1))
		var err error
		if list, err = Addresses(model.IPv4); err != nil {
			t.Fatal(err)
		}
	}
	if most := int(took/settleFor) + 3; count > most {
		t.Errorf("%d calls for %d changes within %v, want at most %d", count, n, took, most)
	}
}

// TestWatchIgnoresVIPs: ipvs mode adds an address for each Service, and nobody
// needs to hear of that; also where kube-ipvs0 is made under a running Watch, and
// made again.
func TestWatchIgnoresVIPs(t *testing.T) {
	enter := inNamespace(t)
	ip(t, "link set lo up")
	calls := watching(t, enter, nil)
	awaitCall(t, calls, "start")
	// own is a change that matters, and comes after all that was before it.
	own := func(addr string) {
		t.Helper()
		ip(t, "addr add "+addr+" dev lo")
		for {
			awaitCall(t, calls, addr)
			list, err := Addresses(model.IPv4)
			if err != nil {
				t.Fatal(err)
			}
			if slices.Contains(list, netip.MustParsePrefix(addr).Addr()) {
				return
			}
		}
	}
	for i := range 2 {
		ip(t, "link add kube-ipvs0 type bridge")
		own(fmt.Sprintf("192.168.1.%d/32", i+1))
		for len(calls) > 0 {
			<-calls
		}
		addMany(t, "kube-ipvs0", 500)
		own(fmt.Sprintf("192.168.2.%d/32", i+1))
		if n := len(calls); n > 0 {
			t.Errorf("%d more calls than the one for the node's own address", n)
		}
		ip(t, "link del kube-ipvs0")
		own(fmt.Sprintf("192.168.3.%d/32", i+1))
	}
}

// TestWatchOverflow: while the caller is busy more comes than the socket holds.
// It is told once it is free, and of later changes, too.
func TestWatchOverflow(t *testing.T) {
	enter := inNamespace(t)
	ip(t, "link set lo up")
	gate := make(chan struct{})
	calls := watching(t, enter, gate)
	awaitCall(t, calls, "start")
	// The call is still going on.
	addMany(t, "lo", 5000)
	if !dropped(t) {
		t.Error("no socket lost a message: the test shows nothing")
	}
	close(gate)
	awaitCall(t, calls, "overflow")
	for len(calls) > 0 {
		<-calls
	}
	ip(t, "addr add 192.168.1.5/32 dev lo")
	awaitCall(t, calls, "change after an overflow")
}

// dropped says whether a netlink socket of this namespace has lost messages.
func dropped(t *testing.T) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n")[1:] {
		if f := strings.Fields(line); len(f) > 8 && f[8] != "0" {
			return true
		}
	}
	return false
}

// TestSysctlsOnKernel: in a namespace of its own some settings can be written
// and nf_conntrack_max cannot; that is one error, and the rest is done.
func TestSysctlsOnKernel(t *testing.T) {
	inNamespace(t)
	s := System{}
	if _, err := s.ReadInt(nf + "tcp_timeout_close_wait"); err != nil {
		t.Skipf("SKIPPED: no conntrack here: %v", err)
	}
	limit, err := s.ReadInt(nf + "max")
	if err != nil {
		t.Fatal(err)
	}
	settings := defaults()
	settings.Min = limit + 1
	settings.UDPTimeout = 45 * time.Second
	var changes []Change
	for _, c := range append(ConntrackSysctls(settings, 1, s.ReadInt), NetworkSysctls(Network{LocalhostNodePorts: true}, s.ReadInt)...) {
		if c.Path != hashsize { // the host's, not the namespace's
			changes = append(changes, c)
		}
	}
	if errs := s.Apply(changes); len(errs) != 1 || !strings.Contains(errs[0].Error(), "nf_conntrack_max") {
		t.Errorf("errors %v, want one about nf_conntrack_max", errs)
	}
	for name, want := range map[string]int{
		nf + "tcp_timeout_established": 86400, nf + "tcp_timeout_close_wait": 3600, nf + "udp_timeout": 45,
		"proc/sys/net/ipv4/conf/all/route_localnet": 1,
	} {
		if n, err := s.ReadInt(name); n != want || err != nil {
			t.Errorf("%s is %d, %v; want %d", name, n, err, want)
		}
	}
}
