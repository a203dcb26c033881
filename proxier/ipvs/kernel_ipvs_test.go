package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	libipvs "github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
	"github.com/sluice-proxy/sluice/test/uml"
)

// TestKernelWithIPVS runs the tests below where there is IPVS.
func TestKernelWithIPVS(t *testing.T) {
	if uml.Inside() {
		t.Skip("SKIPPED: it starts the others")
	}
	m := uml.Machine{Env: []string{"SLUICE_FIGURES=" + os.Getenv("SLUICE_FIGURES")}}
	uml.RerunIn(t, m, "^TestGuestKernel")
}

// guest gives a test a network namespace for good, on a kernel with IPVS.
func guest(t *testing.T) {
	t.Helper()
	if !uml.Inside() {
		t.Skip("SKIPPED: TestKernelWithIPVS runs it on a kernel with IPVS")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "set", "lo", "up") // without any address, all are broadcast
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
}

func guestKernel(t *testing.T, f model.Family) *nlKernel {
	t.Helper()
	guest(t)
	p, err := xtables.Find(xtables.Legacy, f)
	if err != nil {
		t.Fatal(err)
	}
	k, err := newKernel(f, p, xtables.Stats{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.close)
	return k
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return string(out)
}

var families = []model.Family{model.IPv4, model.IPv6}

func eachFamily(t *testing.T, test func(t *testing.T, f model.Family)) {
	for _, f := range families {
		t.Run(f.String(), func(t *testing.T) { test(t, f) })
	}
}

// nth is an address of a range: 10.n.x.y or 2001:db8:n::i.
func nth(f model.Family, n, i int) netip.Addr {
	if f == model.IPv6 {
		return netip.MustParseAddr(fmt.Sprintf("2001:db8:%x::%x:%x", n, i>>16, i&0xffff))
	}
	return netip.AddrFrom4([4]byte{10, byte(n), byte(i >> 8), byte(i)})
}

func sampleStatic(f model.Family) static {
	set := func(id setID) string { return "-m set --match-set " + id.name(f) + " dst,dst" }
	return static{family: f,
		chains: []rules{
			{tableNAT, chainMarkMasq, []string{"-j MARK --set-xmark 0x4000/0x4000"}},
			{tableNAT, chainServices, []string{set(setClusterIP) + " -j " + chainMarkMasq, set(setClusterIP) + " -j ACCEPT"}},
			{tableFilter, chainIPVSFilter, []string{set(setClusterIP) + " -j RETURN"}},
			{tableMangle, chainIPVSOut, []string{"-j SET --map-set " + setInside.name(f) + " dst,dst --map-mark"}},
		},
		jumps: []jump{
			{tableNAT, "PREROUTING", `-m comment --comment "kubernetes service portals" -j ` + chainServices},
			{tableNAT, "OUTPUT", `-m comment --comment "kubernetes service portals" -j ` + chainServices},
			{tableFilter, "INPUT", `-m comment --comment "kubernetes ipvs access filter" -j ` + chainIPVSFilter},
			{tableMangle, "OUTPUT", `-m comment --comment "kubernetes ipvs access filter" -j ` + chainIPVSOut},
		}}
}

func prepared(t *testing.T, k *nlKernel, want repairs) {
	t.Helper()
	got, err := k.prepare(context.Background(), sampleStatic(k.family))
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Fatalf("repairs %+v, want %+v", got, want)
	}
}

func do(t *testing.T, k *nlKernel, ops ...op) []failure {
	t.Helper()
	failures, err := k.apply(context.Background(), ops)
	if err != nil {
		t.Fatal(err)
	}
	return failures
}

func must(t *testing.T, k *nlKernel, ops ...op) {
	t.Helper()
	if failures := do(t, k, ops...); len(failures) > 0 {
		t.Fatalf("%d refused, the first: %v: %v", len(failures), failures[0].op, failures[0].err)
	}
}

// sampleServers are one by each protocol, and one by mark.
func sampleServers(f model.Family) []server {
	dests := []destination{{netip.AddrPortFrom(nth(f, 244, 1), 8080), 1}, {netip.AddrPortFrom(nth(f, 244, 2), 8080), 3}}
	vip := nth(f, 96, 1)
	return []server{
		{serverKey{addr: vip, port: 80, protocol: model.TCP}, settings{scheduler: "rr"}, dests},
		{serverKey{addr: vip, port: 53, protocol: model.UDP}, settings{scheduler: "wrr", flags: flagPersistent, timeout: 10800}, dests[:1]},
		{serverKey{addr: vip, port: 9, protocol: model.SCTP}, settings{scheduler: "mh", flags: flagSched1 | flagSched2}, nil},
		{serverKey{mark: 0x2801}, settings{scheduler: "sh"}, dests},
	}
}

func opsFor(servers []server) []op {
	var ops []op
	for _, s := range servers {
		if s.addr.IsValid() {
			ops = append(ops, op{kind: addEntry, set: setClusterIP, entry: entry{addr: s.addr, protocol: s.protocol, port: s.port}},
				op{kind: addAddr, addr: s.addr})
		}
		ops = append(ops, op{kind: putServer, key: s.serverKey, settings: s.settings})
		for _, d := range s.destinations {
			ops = append(ops, op{kind: putDest, key: s.serverKey, dest: d})
		}
	}
	return ops
}

func wantServers(servers []server) map[serverKey]*liveServer {
	out := map[serverKey]*liveServer{}
	for _, s := range servers {
		l := &liveServer{settings: s.settings, destinations: map[netip.AddrPort]liveDest{}}
		for _, d := range s.destinations {
			l.destinations[d.at] = liveDest{weight: d.weight}
		}
		out[s.serverKey] = l
	}
	return out
}

var comparers = cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmp.AllowUnexported(serverKey{}, liveServer{}, settings{}, liveDest{})}

func wantRead(t *testing.T, k *nlKernel, servers []server) *actual {
	t.Helper()
	ctx := context.Background()
	a, err := k.read(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := wantServers(servers)
	if diff := cmp.Diff(want, a.servers, comparers); diff != "" {
		t.Fatalf("read (-want +got):\n%s", diff)
	}
	keys := append(slices.Collect(maps.Keys(want)), serverKey{addr: nth(k.family, 96, 99), port: 1, protocol: model.TCP})
	got, err := k.lookup(ctx, keys)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, comparers); diff != "" {
		t.Fatalf("lookup (-want +got):\n%s", diff)
	}
	return a
}

// TestGuestKernelReadsWhatItWrites: twice the same is as once, changes change,
// and deletions may be repeated; ipvsadm agrees.
func TestGuestKernelReadsWhatItWrites(t *testing.T) {
	eachFamily(t, func(t *testing.T, f model.Family) {
		k := guestKernel(t, f)
		prepared(t, k, repairs{chains: 4, jumps: 4, sets: int(setCount), devices: 1})
		prepared(t, k, repairs{})
		wantRead(t, k, nil)
		servers := sampleServers(f)
		for range 2 {
			must(t, k, opsFor(servers)...)
			wantRead(t, k, servers)
		}
		a := wantRead(t, k, servers)
		vip := nth(f, 96, 1)
		if want := map[netip.Addr]bool{vip: true}; !maps.Equal(a.addrs, want) {
			t.Errorf("addresses %v", a.addrs)
		}
		if want := map[entry]bool{{addr: vip, protocol: model.TCP, port: 80}: true, {addr: vip, protocol: model.UDP, port: 53}: true, {addr: vip, protocol: model.SCTP, port: 9}: true}; !maps.Equal(a.sets[setClusterIP], want) {
			t.Errorf("entries %v", a.sets[setClusterIP])
		}
		t.Log(run(t, "ipvsadm", "-Sn"))
		t.Log(run(t, "ip", "addr", "show", "dev", device))
		family := map[model.Family]string{model.IPv4: "-4", model.IPv6: "-6"}[f]
		if local := run(t, "ip", family, "route", "show", "table", "local"); !strings.Contains(local, vip.String()) {
			t.Errorf("the kernel does not take packets to %s as its own:\n%s", vip, local)
		}
		servers[0].scheduler, servers[0].flags, servers[0].timeout = "lc", flagPersistent, 60
		servers[0].destinations = []destination{{servers[0].destinations[0].at, 0}}
		must(t, k, op{kind: putServer, key: servers[0].serverKey, settings: servers[0].settings},
			op{kind: putDest, key: servers[0].serverKey, dest: servers[0].destinations[0]},
			op{kind: delDest, key: servers[0].serverKey, dest: destination{at: netip.AddrPortFrom(nth(f, 244, 2), 8080)}})
		wantRead(t, k, servers)
		removeAll(t, k, servers)
	})
}

// TestGuestKernelRoutesAreThere: when the ops are done the kernel takes packets to
// the addresses.
func TestGuestKernelRoutesAreThere(t *testing.T) {
	k := guestKernel(t, model.IPv6)
	ctx := context.Background()
	prepared(t, k, repairs{chains: 4, jumps: 4, sets: int(setCount), devices: 1})
	if local, err := k.isLocal(ctx, nth(k.family, 96, 1)); local || err != nil {
		t.Fatalf("%t, %v", local, err)
	}
	for range 2 { // the second time they exist
		var ops []op
		for i := range 300 {
			ops = append(ops, op{kind: addAddr, addr: nth(k.family, 96, i+1)})
		}
		start := time.Now()
		must(t, k, ops...)
		t.Logf("%d addresses: %v", len(ops), time.Since(start))
		for _, o := range ops {
			if local, err := k.isLocal(ctx, o.addr); !local || err != nil {
				t.Fatalf("%s: %t, %v", o.addr, local, err)
			}
		}
	}
	if k.routesLate {
		t.Error("the routes were late")
	}
	// One that never comes is waited for, but not for good.
	if err := k.awaitRoute(ctx, nth(k.family, 97, 1)); err != nil || !k.routesLate {
		t.Errorf("%v; late: %t", err, k.routesLate)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := k.awaitRoute(cancelled, nth(k.family, 97, 1)); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func removeAll(t *testing.T, k *nlKernel, servers []server) {
	t.Helper()
	for range 2 {
		var ops []op
		for _, s := range servers {
			for _, d := range s.destinations {
				ops = append(ops, op{kind: delDest, key: s.serverKey, dest: d})
			}
			ops = append(ops, op{kind: delServer, key: s.serverKey})
			if s.addr.IsValid() {
				ops = append(ops, op{kind: delAddr, addr: s.addr}, op{kind: delEntry, set: setClusterIP, entry: entry{addr: s.addr, protocol: s.protocol, port: s.port}})
			}
		}
		must(t, k, ops...)
	}
	a := wantRead(t, k, nil)
	if len(a.addrs) > 0 || len(a.sets[setClusterIP]) > 0 {
		t.Errorf("left: %v, %v", a.addrs, a.sets[setClusterIP])
	}
}

// TestGuestKernelLocalDestination: an endpoint on the node's own address is
// reached by NAT like any other.
func TestGuestKernelLocalDestination(t *testing.T) {
	eachFamily(t, func(t *testing.T, f model.Family) {
		k := guestKernel(t, f)
		own := nth(f, 7, 1)
		run(t, "ip", "addr", "add", netip.PrefixFrom(own, own.BitLen()).String(), "dev", "lo")
		s := sampleServers(f)[0]
		s.destinations = []destination{{netip.AddrPortFrom(own, 8080), 1}}
		must(t, k, opsFor([]server{s})[2:]...)
		wantRead(t, k, []server{s})
	})
}

// TestGuestKernelLastOpWins: an op that must be tried by another command does
// not overrule what comes after it.
func TestGuestKernelLastOpWins(t *testing.T) {
	eachFamily(t, func(t *testing.T, f model.Family) {
		k := guestKernel(t, f)
		s := sampleServers(f)[0]
		put := op{kind: putServer, key: s.serverKey, settings: s.settings}
		dest := op{kind: putDest, key: s.serverKey, dest: s.destinations[0]}
		must(t, k, put, dest)
		must(t, k, dest, op{kind: delDest, key: s.serverKey, dest: s.destinations[0]})
		s.destinations = nil
		wantRead(t, k, []server{s})
		must(t, k, put, op{kind: delServer, key: s.serverKey})
		wantRead(t, k, nil)
		must(t, k, put, dest, op{kind: delServer, key: s.serverKey}, put)
		wantRead(t, k, []server{s})
	})
}

// TestGuestKernelRefusals: what the kernel refuses is told with its reason, and
// the rest is done.
func TestGuestKernelRefusals(t *testing.T) {
	eachFamily(t, func(t *testing.T, f model.Family) {
		k := guestKernel(t, f)
		good := sampleServers(f)[0]
		bad := serverKey{addr: nth(f, 96, 2), port: 80, protocol: model.TCP}
		failures := do(t, k,
			op{kind: putServer, key: bad, settings: settings{scheduler: "nonesuch"}},
			op{kind: putDest, key: bad, dest: good.destinations[0]},
			op{kind: putServer, key: good.serverKey, settings: good.settings},
			op{kind: putDest, key: good.serverKey, dest: good.destinations[0]},
			op{kind: putDest, key: good.serverKey, dest: good.destinations[1]})
		if len(failures) != 2 || failures[0].op.kind != putServer || !strings.Contains(failures[0].err.Error(), `no scheduler "nonesuch"`) || failures[1].op.kind != putDest {
			t.Errorf("failures: %v", failures)
		}
		wantRead(t, k, []server{good})
		if _, err := k.apply(context.Background(), []op{{kind: addAddr, addr: nth(f, 96, 1)}}); err == nil {
			t.Error("an address was added to no device")
		}
	})
}

// TestGuestKernelFamiliesApart: each sees its own only, also where marks are the
// same.
func TestGuestKernelFamiliesApart(t *testing.T) {
	k4 := guestKernel(t, model.IPv4)
	p, err := xtables.Find(xtables.Legacy, model.IPv6)
	if err != nil {
		t.Fatal(err)
	}
	k6, err := newKernel(model.IPv6, p, xtables.Stats{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k6.close)
	for _, k := range []*nlKernel{k4, k6} {
		if _, err := k.prepare(context.Background(), sampleStatic(k.family)); err != nil {
			t.Fatal(err)
		}
		must(t, k, opsFor(sampleServers(k.family))...)
	}
	for _, k := range []*nlKernel{k4, k6} {
		a := wantRead(t, k, sampleServers(k.family))
		if len(a.addrs) != 1 {
			t.Errorf("%s: addresses %v", k.family, a.addrs)
		}
	}
}

// TestGuestKernelForeign: a server that is not reached by NAT is told apart, and
// what others wrote survives clear.
func TestGuestKernelForeign(t *testing.T) {
	eachFamily(t, func(t *testing.T, f model.Family) {
		k := guestKernel(t, f)
		prepared(t, k, repairs{chains: 4, jumps: 4, sets: int(setCount), devices: 1})
		at := netip.AddrPortFrom(nth(f, 50, 1), 443).String()
		real := netip.AddrPortFrom(nth(f, 60, 1), 443)
		run(t, "ipvsadm", "-A", "-t", at, "-s", "rr")
		run(t, "ipvsadm", "-a", "-t", at, "-r", real.String(), "-g", "-w", "7")
		key := serverKey{addr: nth(f, 50, 1), port: 443, protocol: model.TCP}
		a, err := k.read(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		found, err := k.lookup(context.Background(), []serverKey{key})
		if err != nil {
			t.Fatal(err)
		}
		want := liveDest{weight: 7, foreign: true}
		if s := a.servers[key]; s == nil || s.destinations[real] != want || found[key] == nil || found[key].destinations[real] != want {
			t.Errorf("read %v, found %v", s, found[key])
		}
		cmdline := k.run.Command
		iptables := func(args ...string) { run(t, append(slices.Clone(cmdline), args...)...) }
		iptables("-N", "THEIRS")
		iptables("-A", "THEIRS", "-j", "ACCEPT")
		iptables("-A", "INPUT", "-j", "THEIRS")
		run(t, "ipset", "create", "theirs", "hash:ip")
		if err := teardown(k); err != nil {
			t.Fatal(err)
		}
		iptables("-C", "INPUT", "-j", "THEIRS")
		iptables("-C", "THEIRS", "-j", "ACCEPT")
		if got := run(t, "ipset", "list", "-n"); got != "theirs\n" {
			t.Errorf("sets left: %q", got)
		}
		for _, table := range tables {
			if out := run(t, append(slices.Clone(cmdline), "-t", table, "-S")...); strings.Contains(out, "KUBE") {
				t.Errorf("table %s: left:\n%s", table, out)
			}
		}
		if _, err := net.InterfaceByName(device); err == nil {
			t.Errorf("%s was left", device)
		}
		run(t, "ipvsadm", "-d", "-t", at, "-r", real.String())
		if err := teardown(k); err != nil {
			t.Errorf("a second time: %v", err)
		}
	})
}

// TestGuestKernelDrift: what others change of the static rules changes the
// token, and is put right.
func TestGuestKernelDrift(t *testing.T) {
	eachFamily(t, func(t *testing.T, f model.Family) {
		ctx := context.Background()
		k := guestKernel(t, f)
		prepared(t, k, repairs{chains: 4, jumps: 4, sets: int(setCount), devices: 1})
		tok := func() token {
			got, err := k.token(ctx)
			if err != nil {
				t.Fatal(err)
			}
			return got
		}
		before := tok()
		if before.tables == "" || !before.device || before != tok() {
			t.Errorf("token %+v", before)
		}
		iptables := func(args ...string) { run(t, append(slices.Clone(k.run.Command), args...)...) }
		iptables("-t", "nat", "-D", chainServices, "1")
		iptables("-t", "mangle", "-F", "OUTPUT")
		run(t, "ipset", "destroy", setLoadBalancerFW.name(f))
		if tok() == before {
			t.Error("the token is the same after changes")
		}
		prepared(t, k, repairs{chains: 1, jumps: 1, sets: 1})
		prepared(t, k, repairs{})
		run(t, "ip", "link", "del", device)
		if tok().device {
			t.Error("the token still has the device")
		}
		prepared(t, k, repairs{devices: 1})
		must(t, k, op{kind: addEntry, set: setInside, entry: entry{addr: nth(f, 96, 1), protocol: model.TCP, port: 80, mark: 0x2801}})
		if got := tok(); got.elements[setInside] != 1 {
			t.Errorf("elements %v", got.elements)
		}
		a, err := k.read(ctx)
		if err != nil || !a.sets[setInside][entry{addr: nth(f, 96, 1), protocol: model.TCP, port: 80, mark: 0x2801}] {
			t.Errorf("%v, %v", a.sets[setInside], err)
		}
	})
}

// TestGuestKernelTakeover: iptables mode serves until our rules are in its place,
// also if we were killed before and there is a kube-ipvs0.
func TestGuestKernelTakeover(t *testing.T) {
	eachFamily(t, func(t *testing.T, f model.Family) {
		ctx := context.Background()
		k := guestKernel(t, f)
		want := func(serve bool) {
			t.Helper()
			if a, err := k.read(ctx); err != nil || a.othersServe != serve {
				t.Fatalf("others serve: %t, %v; want %t", a.othersServe, err, serve)
			}
		}
		iptables := func(args ...string) { run(t, append(slices.Clone(k.run.Command), args...)...) }
		want(false)
		iptables("-t", "nat", "-N", chainServices)
		want(false)
		iptables("-t", "nat", "-A", chainServices, "-d", nth(f, 96, 1).String(), "-p", "tcp", "--dport", "80", "-j", "ACCEPT")
		want(true)
		if _, err := k.prepare(ctx, static{family: f}); err != nil {
			t.Fatal(err)
		}
		must(t, k, opsFor(sampleServers(f))...)
		want(true)
		k.everywhere = true
		want(false) // it does not look
		k.everywhere = false
		if _, err := k.prepare(ctx, sampleStatic(f)); err != nil {
			t.Fatal(err)
		}
		want(false)
	})
}

// TestGuestKernelTimeouts: zero leaves a time as it is.
func TestGuestKernelTimeouts(t *testing.T) {
	guest(t)
	if err := SetTimeouts(100*time.Second, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := SetTimeouts(0, 20*time.Second, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	if got := run(t, "ipvsadm", "-L", "--timeout"); !strings.Contains(got, "100 20 30") {
		t.Errorf("%s", got)
	}
}

// TestGuestKernelFigures prints what a large load costs, beside the library's
// way. It is run by hand: SLUICE_FIGURES=1.
func TestGuestKernelFigures(t *testing.T) {
	if os.Getenv("SLUICE_FIGURES") == "" {
		t.Skip("SKIPPED: it measures and checks nothing (SLUICE_FIGURES=1)")
	}
	eachFamily(t, figures)
}

func figures(t *testing.T, f model.Family) {
	k := guestKernel(t, f)
	prepared(t, k, repairs{chains: 4, jumps: 4, sets: int(setCount), devices: 1})
	const services, each = 10000, 10
	var entries, addrs, servers []op
	for i := range services {
		key := serverKey{addr: nth(f, 96, i), port: 80, protocol: model.TCP}
		entries = append(entries, op{kind: addEntry, set: setClusterIP, entry: entry{addr: key.addr, protocol: key.protocol, port: 80}})
		addrs = append(addrs, op{kind: addAddr, addr: key.addr})
		servers = append(servers, op{kind: putServer, key: key, settings: settings{scheduler: "rr"}})
		for d := range each {
			servers = append(servers, op{kind: putDest, key: key, dest: destination{netip.AddrPortFrom(nth(f, 244, (i*each+d)&0xffff), 8080), 1}})
		}
	}
	calls := func() int { return k.sets.Calls() + k.route.Calls() + k.genl.Calls() }
	measure := func(what string, f func()) {
		start, before := time.Now(), calls()
		f()
		t.Logf("FIGURE %s: %v, %d system calls", what, time.Since(start).Round(time.Millisecond), calls()-before)
	}
	measure("10000 entries", func() { must(t, k, entries...) })
	measure("10000 addresses", func() { must(t, k, addrs...) })
	measure("10000 servers with 10 destinations each", func() { must(t, k, servers...) })
	measure("the same once more", func() { must(t, k, servers...) })
	measure("read", func() {
		if a, err := k.read(context.Background()); err != nil || len(a.servers) != services {
			t.Error(err)
		}
	})
	measure("token", func() { _, _ = k.token(context.Background()) })
	measure("one destination", func() { must(t, k, servers[1]) })
	for i := range servers {
		if servers[i].kind == putServer {
			servers[i].kind = delServer
		}
	}
	measure("delete the servers", func() {
		must(t, k, slices.DeleteFunc(servers, func(o op) bool { return o.kind != delServer })...)
	})
	if f == model.IPv4 {
		measureLibrary(t, services, each)
	}
}

func measureLibrary(t *testing.T, services, each int) {
	// Of a namespace of its own: where destinations were deleted, the kernel looks
	// through all of them for two minutes for each that is added (dest_trash).
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "set", "lo", "up")
	h, err := libipvs.New("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	start := time.Now()
	for i := range services {
		s := &libipvs.Service{Address: nth(model.IPv4, 96, i).AsSlice(), Protocol: 6, Port: 80, SchedName: "rr", AddressFamily: unix.AF_INET, Netmask: ^uint32(0)}
		err := h.NewService(s)
		for d := range each {
			err = errors.Join(err, h.NewDestination(s, &libipvs.Destination{Address: nth(model.IPv4, 244, i*each+d).AsSlice(), Port: 8080, Weight: 1, AddressFamily: unix.AF_INET}))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("FIGURE library, %d servers with %d destinations each: %v", services, each, time.Since(start).Round(time.Millisecond))
}

// teardown removes the static rules and the sets.
func teardown(k *nlKernel) error {
	_, err := k.unrule(context.Background(), all)
	return errors.Join(err, k.clear(context.Background()))
}
