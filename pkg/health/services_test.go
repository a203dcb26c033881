package health

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// fakeNet gives out loopback listeners for any address, each address once.
type fakeNet struct {
	t     *testing.T
	mu    sync.Mutex
	bound map[string]*fakeListener // by the address asked for
	taken map[string]bool          // by other programs
	binds int
}

type fakeListener struct {
	net.Listener
	release func()
	once    sync.Once
}

func (l *fakeListener) Close() error { l.once.Do(l.release); return l.Listener.Close() }

func newFakeNet(t *testing.T) *fakeNet {
	return &fakeNet{t: t, bound: map[string]*fakeListener{}, taken: map[string]bool{}}
}

func (n *fakeNet) listen(ctx context.Context, network, addr string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := network + " " + addr
	if n.bound[key] != nil || n.taken[key] {
		return nil, errors.New("listen " + key + ": address already in use")
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	fl := &fakeListener{Listener: l}
	fl.release = func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.bound, key)
	}
	n.bound[key] = fl
	n.binds++
	return fl, nil
}

func (n *fakeNet) open() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Join(slices.Sorted(maps.Keys(n.bound)), ", ")
}

func (n *fakeNet) get(key string) (*http.Response, string) {
	n.t.Helper()
	n.mu.Lock()
	l := n.bound[key]
	n.mu.Unlock()
	if l == nil {
		n.t.Fatalf("nobody listens on %q; open: %s", key, n.open())
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + l.Addr().String() + "/whatever")
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return resp, string(body)
}

// lb is a LoadBalancer Service with a health port, ports "a", "b", ... and
// local endpoints.
func lb(p *plan.Planner, name string, healthPort uint16, ports, local int) {
	sn := model.ServiceName{Namespace: "ns", Name: name}
	svc := &model.Service{ServiceName: sn, UID: "uid-" + name, ExternalLocal: true, HealthCheckNodePort: healthPort,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}}
	sl := &model.Slice{Namespace: "ns", Name: name + "-1", Service: name, Family: p.Facts().Family}
	for i := range ports {
		n := string(rune('a' + i))
		svc.Ports = append(svc.Ports, model.ServicePort{Name: n, Protocol: model.TCP, Port: uint16(80 + i)})
		sl.Ports = append(sl.Ports, model.SlicePort{Name: n, Protocol: model.TCP, Port: uint16(8080 + i)})
	}
	addr := netip.MustParseAddr("10.1.0.1")
	if p.Facts().Family == model.IPv6 {
		addr = netip.MustParseAddr("fd01::1")
	}
	for range local {
		sl.Endpoints = append(sl.Endpoints, model.Endpoint{Addr: addr, Node: "here", Ready: true, Serving: true})
		addr = addr.Next()
	}
	p.Update(sn, svc, []*model.Slice{sl})
}

func everywhere(f model.Family) *plan.Facts {
	return &plan.Facts{Family: f, NodeName: "here", NodePorts: plan.NodePortAddresses{All: true}}
}

// rig is a planner whose Sets go to servers on a fake net.
type rig struct {
	t        *testing.T
	net      *fakeNet
	planner  *plan.Planner
	servers  *ServiceServers
	healthy  bool
	failures []BindFailure
}

func newRig(t *testing.T, facts *plan.Facts) *rig {
	r := &rig{t: t, net: newFakeNet(t), planner: plan.NewPlanner(facts), healthy: true}
	r.servers = NewServiceServers(ServicesOptions{
		Healthy:    func() bool { return r.healthy },
		BindFailed: func(f BindFailure) { r.failures = append(r.failures, f) },
		Listen:     r.net.listen,
	})
	t.Cleanup(r.servers.Close)
	return r
}

func (r *rig) sync(want string) {
	r.t.Helper()
	if err := r.servers.Sync(r.t.Context(), r.planner.Set()); err != nil {
		r.t.Fatal(err)
	}
	if got := r.net.open(); got != want {
		r.t.Errorf("open: %q, want %q", got, want)
	}
}

func TestServiceHealthAnswer(t *testing.T) {
	r := newRig(t, everywhere(model.IPv4))
	for _, c := range []struct {
		local   int
		healthy bool
		code    int
	}{{2, true, 200}, {0, true, 503}, {1, false, 503}, {1, true, 200}} {
		lb(r.planner, "web", 30000, 2, c.local)
		r.healthy = c.healthy
		r.sync("tcp4 0.0.0.0:30000")
		resp, body := r.net.get("tcp4 0.0.0.0:30000")
		wantBody := fmt.Sprintf("{\n\t\"service\": {\n\t\t\"namespace\": \"ns\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": %v\n}", c.local, c.healthy)
		if resp.StatusCode != c.code || body != wantBody {
			t.Errorf("%+v: %d %s", c, resp.StatusCode, body)
		}
		for name, want := range map[string]string{
			"Content-Type": "application/json", "X-Content-Type-Options": "nosniff",
			"X-Load-Balancing-Endpoint-Weight": fmt.Sprint(c.local),
		} {
			if got := resp.Header.Get(name); got != want {
				t.Errorf("%+v: header %s is %q, want %q", c, name, got, want)
			}
		}
	}
	if r.net.binds != 1 {
		t.Errorf("bound %d times: a listener that stays was not kept", r.net.binds)
	}
}

func TestServiceHealthPortsFollowTheServices(t *testing.T) {
	r := newRig(t, everywhere(model.IPv4))
	web, api := model.ServiceName{Namespace: "ns", Name: "web"}, model.ServiceName{Namespace: "ns", Name: "api"}
	r.sync("")
	lb(r.planner, "web", 30000, 3, 1)
	r.sync("tcp4 0.0.0.0:30000")
	lb(r.planner, "api", 30001, 1, 1)
	r.sync("tcp4 0.0.0.0:30000, tcp4 0.0.0.0:30001")
	lb(r.planner, "web", 30000, 1, 1) // two ports fewer, the Service stays
	r.sync("tcp4 0.0.0.0:30000, tcp4 0.0.0.0:30001")
	if r.net.binds != 2 {
		t.Errorf("bound %d times", r.net.binds)
	}
	lb(r.planner, "web", 30001, 1, 1) // swapped in one Sync
	lb(r.planner, "api", 30000, 1, 2)
	r.sync("tcp4 0.0.0.0:30000, tcp4 0.0.0.0:30001")
	if _, body := r.net.get("tcp4 0.0.0.0:30000"); !strings.Contains(body, `"api"`) || !strings.Contains(body, `"localEndpoints": 2`) {
		t.Errorf("after the swap 30000 says %s", body)
	}
	r.planner.Update(api, nil, nil)
	lb(r.planner, "web", 30000, 1, 1) // takes over from one that goes
	r.sync("tcp4 0.0.0.0:30000")
	lb(r.planner, "web", 0, 1, 1) // externalTrafficPolicy is Cluster now
	r.sync("")
	lb(r.planner, "web", 30002, 1, 1)
	r.sync("tcp4 0.0.0.0:30002")
	r.planner.Update(web, nil, nil)
	r.sync("")
	if len(r.failures) != 0 {
		t.Errorf("failures: %v", r.failures)
	}
}

func TestServiceHealthFollowsNodePortAddresses(t *testing.T) {
	some := func(addrs ...string) *plan.Facts {
		f := everywhere(model.IPv6)
		f.NodePorts = plan.NodePortAddresses{}
		for _, a := range addrs {
			f.NodePorts.Addrs = append(f.NodePorts.Addrs, netip.MustParseAddr(a))
		}
		return f
	}
	r := newRig(t, some("fd02::1", "fd02::2"))
	lb(r.planner, "web", 30000, 1, 1)
	r.sync("tcp6 [fd02::1]:30000, tcp6 [fd02::2]:30000")
	r.planner.SetFacts(some("fd02::2", "fd02::3"))
	r.sync("tcp6 [fd02::2]:30000, tcp6 [fd02::3]:30000")
	r.planner.SetFacts(some())
	r.sync("")
	r.planner.SetFacts(everywhere(model.IPv6))
	r.sync("tcp6 [::]:30000")
}

func TestServiceHealthPortTakenByAnother(t *testing.T) {
	facts := everywhere(model.IPv4)
	facts.NodePorts = plan.NodePortAddresses{Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}}
	r := newRig(t, facts)
	r.net.taken["tcp4 192.0.2.2:30000"] = true
	lb(r.planner, "web", 30000, 2, 1)
	lb(r.planner, "xyz", 30001, 1, 1)
	const xyz = "tcp4 192.0.2.1:30001, tcp4 192.0.2.2:30001"
	r.sync(xyz) // nothing half open, the other Service served
	r.sync(xyz)
	if len(r.failures) != 1 || r.failures[0].Service.Name != "web" || r.failures[0].UID != "uid-web" ||
		r.failures[0].Port != 30000 || r.failures[0].Err == nil {
		t.Fatalf("failures: %+v", r.failures)
	}
	delete(r.net.taken, "tcp4 192.0.2.2:30000")
	r.sync("tcp4 192.0.2.1:30000, " + "tcp4 192.0.2.1:30001, tcp4 192.0.2.2:30000, tcp4 192.0.2.2:30001")
	if len(r.failures) != 1 {
		t.Errorf("failures: %+v", r.failures)
	}
}

func TestTwoServicesWantOnePort(t *testing.T) {
	r := newRig(t, everywhere(model.IPv4))
	lb(r.planner, "a", 30000, 1, 1)
	lb(r.planner, "b", 30000, 1, 1)
	r.sync("tcp4 0.0.0.0:30000")
	if len(r.failures) != 1 || r.failures[0].Service.Name != "b" {
		t.Fatalf("failures: %+v", r.failures)
	}
	r.planner.Update(model.ServiceName{Namespace: "ns", Name: "a"}, nil, nil)
	r.sync("tcp4 0.0.0.0:30000")
	if _, body := r.net.get("tcp4 0.0.0.0:30000"); !strings.Contains(body, `"name": "b"`) {
		t.Errorf("30000 says %s", body)
	}
}

func TestServiceServersClose(t *testing.T) {
	r := newRig(t, everywhere(model.IPv4))
	lb(r.planner, "web", 30000, 1, 1)
	r.sync("tcp4 0.0.0.0:30000")
	r.servers.Close()
	if got := r.net.open(); got != "" {
		t.Errorf("open after Close: %s", got)
	}
	r.sync("tcp4 0.0.0.0:30000")
}

// On the machine's own kernel: both families serve the same port number, and a
// port that moves between Services in one Sync is free in time.
func TestBothFamiliesOnARealKernel(t *testing.T) {
	inOwnNamespace(t)
	planners := map[model.Family]*plan.Planner{}
	servers := map[model.Family]*ServiceServers{}
	for _, f := range []model.Family{model.IPv4, model.IPv6} {
		planners[f] = plan.NewPlanner(everywhere(f))
		servers[f] = NewServiceServers(ServicesOptions{Healthy: func() bool { return true },
			BindFailed: func(b BindFailure) { t.Errorf("%v: %+v", f, b) }})
		defer servers[f].Close()
	}
	for round := range 20 {
		a, b := uint16(30000+round%2), uint16(30001-round%2)
		for f, p := range planners {
			lb(p, "a", a, 2, 1)
			lb(p, "b", b, 1, 0)
			if err := servers[f].Sync(t.Context(), p.Set()); err != nil {
				t.Fatal(err)
			}
		}
		for _, host := range []string{"127.0.0.1", "::1"} {
			if got := status(t, host, a); got != 200 {
				t.Fatalf("round %d: %s port %d: status %d", round, host, a, got)
			}
			if got := status(t, host, b); got != 503 {
				t.Fatalf("round %d: %s port %d: status %d", round, host, b, got)
			}
		}
	}
}

// inOwnNamespace moves the test's thread into a new network namespace.
func inOwnNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("needs a network namespace of its own: ", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// status asks from the calling thread, whose namespace http.Client would leave.
func status(t *testing.T, host string, port uint16) int {
	t.Helper()
	fd := unix.AF_INET
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}}
	if strings.Contains(host, ":") {
		fd, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(port), Addr: [16]byte{15: 1}}
	}
	sock, err := unix.Socket(fd, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(sock)
	if err := unix.SetsockoptTimeval(sock, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(sock, sa); err != nil {
		t.Fatalf("connect %s port %d: %v", host, port, err)
	}
	if _, err := unix.Write(sock, []byte("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(fdReader(sock)), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

type fdReader int

func (fd fdReader) Read(p []byte) (int, error) {
	n, err := unix.Read(int(fd), p)
	if n == 0 && err == nil {
		return 0, io.EOF
	}
	return max(n, 0), err
}
