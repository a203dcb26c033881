package kernel

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
	"github.com/sluice-proxy/sluice/test/uml"
)

// TestMain gives the iptables programs a lock file of their own: the tests
// neither wait for the machine's nor need the right to write it.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "sluice-kernel-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Setenv("XTABLES_LOCKFILE", filepath.Join(dir, "xtables.lock"))
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func TestScenarios(t *testing.T) {
	if err := netlab.Supported(); err != nil {
		t.Skip("SKIPPED, real kernel not tested: ", err)
	}
	list, err := scenarios.LoadAll("../scenarios")
	if err != nil {
		t.Fatal(err)
	}
	for _, sub := range subjects {
		if sub.ipvs != uml.Inside() {
			continue // TestIPVS runs it, on a kernel that has IPVS
		}
		t.Run(sub.name, func(t *testing.T) {
			for _, s := range list {
				t.Run(s.Name, func(t *testing.T) { runScenario(t, &sub, s) })
			}
		})
	}
}

func runScenario(t *testing.T, sub *subject, s *scenarios.Scenario) {
	lab := build(t, s)
	node := lab.Host(scenarios.NodeName)
	sub.prepare(t, s, node)
	for _, f := range s.Families() {
		var p proxier.Proxier
		err := node.Do(func() (err error) { // where it opens its sockets
			p, err = sub.new(s, f)
			return err
		})
		switch {
		case err != nil && sub.ipvs:
			t.Fatal(err)
		case err != nil:
			t.Skipf("SKIPPED, %s not tested: %v", sub.name, err)
		}
		program(t, node, p, s.SetIn(sub.mode, f))
		t.Cleanup(func() {
			if err := node.Do(func() error { return p.Cleanup(context.Background()) }); err != nil {
				t.Errorf("clean up %s: %v", f, err)
			}
		})
	}
	if sub.ipvs {
		awaitAddrs(t, node)
	}
	for i, err := range dialAll(t.Context(), lab, s, sub.mode) {
		f := &s.Flows[i]
		switch {
		case !f.In(sub.mode):
		case sockets(f.Protocol) != nil:
			t.Run(f.Text, func(t *testing.T) { t.Skipf("SKIPPED, %v; the tracer follows this flow", sockets(f.Protocol)) })
		case err != nil:
			t.Errorf("%s:\n%v", f.Text, err)
		}
	}
	if t.Failed() && sub.ipvs {
		t.Log(evidence(node))
	}
}

// dialAll dials the flows of a mode, and returns by index what is not as they
// say. Those to one frontend follow each other: two clients that take turns at
// its round robin would each meet the same endpoint every time.
func dialAll(ctx context.Context, lab *netlab.Lab, s *scenarios.Scenario, mode string) []error {
	type frontend struct {
		at       netip.AddrPort
		protocol model.Protocol
	}
	flows := map[frontend][]int{}
	for i := range s.Flows {
		if f := &s.Flows[i]; f.In(mode) && sockets(f.Protocol) == nil {
			here := frontend{f.To, f.Protocol}
			flows[here] = append(flows[here], i)
		}
	}
	problems := make([]error, len(s.Flows))
	var wg sync.WaitGroup
	turn := make(chan struct{}, 16) // so many flows at a time
	for _, list := range flows {
		wg.Go(func() {
			turn <- struct{}{}
			for _, i := range list {
				problems[i] = dial(ctx, lab, s, &s.Flows[i])
			}
			<-turn
		})
	}
	wg.Wait()
	return problems
}

// sockets says why a protocol cannot be served and dialled here; nil if it can.
func sockets(p model.Protocol) error {
	if p == model.SCTP {
		return sctp()
	}
	return nil
}

var sctp = sync.OnceValue(netlab.SCTP)

// program lets the proxier start from nothing, and asks a second time for the
// same, which must change nothing and fail for nothing.
func program(t *testing.T, node *netlab.Namespace, p proxier.Proxier, set *plan.Set) {
	t.Helper()
	for range 2 {
		err := node.Do(func() error { return p.Sync(t.Context(), set) })
		if err != nil {
			t.Fatalf("sync %s: %v", set.Facts.Family, err)
		}
	}
}

// build makes the scenario's cluster and starts its endpoints. Each answers
// with its own address.
func build(t *testing.T, s *scenarios.Scenario) *netlab.Lab {
	t.Helper()
	lab := buildCluster(t, s)
	for _, l := range s.Cluster.Listeners {
		if sockets(l.Protocol) == nil {
			serve(t, lab.Host(l.Host), l.At.String(), l.Protocol, l.At)
		}
	}
	serveNowhere(t, lab, s)
	return lab
}

// buildCluster makes the scenario's cluster without servers.
func buildCluster(t *testing.T, s *scenarios.Scenario) *netlab.Lab {
	t.Helper()
	var cfg netlab.Config
	for _, h := range s.Cluster.Hosts {
		spec := netlab.HostSpec{Name: h.Name, Addrs: h.Addrs}
		switch h.Place {
		case scenarios.Node:
			n := netlab.NodeSpec{HostSpec: spec, PodCIDRs: scenarios.PodCIDRs(h.Name)}
			if h.Name == scenarios.NodeName {
				n.Bridge = s.Settings.BridgeInterface
			}
			for _, p := range s.Cluster.Hosts {
				if p.On == h.Name {
					n.Pods = append(n.Pods, netlab.HostSpec{Name: p.Name, Addrs: p.Addrs})
				}
			}
			cfg.Nodes = append(cfg.Nodes, n)
		case scenarios.Outside:
			cfg.Clients = append(cfg.Clients, spec)
		}
	}
	lab, err := netlab.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lab.Close)
	for _, a := range s.Cluster.ServiceAddrs {
		route(t, lab, a)
	}
	return lab
}

func route(t *testing.T, lab *netlab.Lab, a netip.Addr) {
	t.Helper()
	if err := lab.RouteVia(netip.PrefixFrom(a, a.BitLen()), scenarios.NodeName); err != nil {
		t.Fatal(err)
	}
}

func serve(t *testing.T, where *netlab.Namespace, name string, p model.Protocol, at netip.AddrPort) {
	t.Helper()
	if _, err := where.Serve(name, p.String(), at); err != nil {
		t.Fatal(err)
	}
}

// serveNowhere starts a server where packets arrive that the node leaves alone:
// on the host that has the address, or else behind the node. So a flow that
// must be left alone is proved by an answer, and one that must be refused is
// refused by nobody but the node.
func serveNowhere(t *testing.T, lab *netlab.Lab, s *scenarios.Scenario) {
	type place struct {
		at       netip.AddrPort
		protocol model.Protocol
	}
	taken := map[place]bool{}
	for _, l := range s.Cluster.Listeners {
		taken[place{l.At, l.Protocol}] = true
	}
	for _, f := range s.Flows {
		here := place{f.To, f.Protocol}
		if f.Expect == scenarios.Endpoints || sockets(f.Protocol) != nil || taken[here] {
			continue
		}
		taken[here] = true
		where := lab.Nowhere
		switch owner := s.Cluster.Owner(f.To.Addr()); {
		case owner != nil:
			where = lab.Host(owner.Name)
		case f.To.Addr().IsLoopback():
			where = lab.Host(f.From.Name)
		default:
			route(t, lab, f.To.Addr())
		}
		serve(t, where, f.To.String(), f.Protocol, f.To)
	}
}

const (
	// patience is how long an answer or a refusal may take. A refused IPv6
	// connection can take as long as TCP needs to try again.
	patience = 15 * time.Second
	// silence is how long nothing must come to be a drop. It is less than TCP
	// needs to try again, for nothing is gained by that.
	silence = 500 * time.Millisecond
)

// dial makes connections until it is certain that the flow is as it says, and
// returns what is not.
func dial(ctx context.Context, lab *netlab.Lab, s *scenarios.Scenario, f *scenarios.Flow) error {
	ask := func(wait time.Duration) (netlab.Answer, error) {
		return lab.Host(f.From.Name).Ask(ctx, f.Protocol.String(), f.Source, f.To, wait)
	}
	switch f.Expect {
	case scenarios.Drop:
		return expect(1, netlab.TimedOut, func() (netlab.Answer, error) { return ask(silence) })
	case scenarios.Reject:
		return expect(3, netlab.Refused, func() (netlab.Answer, error) { return ask(patience) })
	case scenarios.None:
		return dialNowhere(f, func() (netlab.Answer, error) { return ask(patience) })
	}
	if pastNode(f) {
		return dialPastNode(lab, f, func() (netlab.Answer, error) { return ask(silence) })
	}
	return dialEndpoints(lab, f, func() (netlab.Answer, error) { return ask(patience) })
}

func expect(times int, want netlab.Result, ask func() (netlab.Answer, error)) error {
	for range times {
		a, err := ask()
		if err != nil {
			return err
		}
		if a.Result != want {
			return fmt.Errorf("%v, want %v", a, want)
		}
	}
	return nil
}

// dialNowhere: the packet arrives where it was sent, as it was sent.
func dialNowhere(f *scenarios.Flow, ask func() (netlab.Answer, error)) error {
	for range 3 {
		a, err := ask()
		if err != nil {
			return err
		}
		if a.Result != netlab.Answered || a.Server != f.To.String() || a.Seen != a.Local {
			return fmt.Errorf("%v, want an answer of %s itself", a, f.To)
		}
	}
	return nil
}

// pastNode says whether some endpoint's answers do not pass the node again: it
// is elsewhere, and sees the true source of a client that is elsewhere too. The
// client cannot make anything of such an answer. So it is with kube-proxy, and
// no matter in practice: such clients use their own node.
func pastNode(f *scenarios.Flow) bool {
	if f.From.Name == scenarios.NodeName || f.From.On == scenarios.NodeName {
		return false
	}
	return slices.ContainsFunc(f.Target, func(t scenarios.Target) bool {
		return !t.Masq && t.Host.Name != scenarios.NodeName && t.Host.On != scenarios.NodeName
	})
}

// dialPastNode accepts silence, but no answer that is wrong.
func dialPastNode(lab *netlab.Lab, f *scenarios.Flow, ask func() (netlab.Answer, error)) error {
	for range 6 {
		a, err := ask()
		switch {
		case err != nil:
			return err
		case a.Result == netlab.TimedOut:
			continue
		case a.Result != netlab.Answered:
			return fmt.Errorf("%v, want an answer or silence", a)
		}
		if _, err := judgeAnswer(lab, f, a); err != nil {
			return err
		}
	}
	return nil
}

// judgeAnswer returns the endpoint that answered, and whether it should have,
// and saw the source that it should have seen.
func judgeAnswer(lab *netlab.Lab, f *scenarios.Flow, a netlab.Answer) (netip.AddrPort, error) {
	server, err := netip.ParseAddrPort(a.Server)
	if err != nil {
		return server, err
	}
	masq := f.Masq
	if len(f.Target) > 0 {
		t := f.TargetAt(server)
		if t == nil {
			return server, fmt.Errorf("%v, not an endpoint that is expected", a)
		}
		masq = t.Masq
	}
	return server, judgeSource(lab, f, a, masq)
}

// dialEndpoints checks that every answer comes from an expected endpoint, which
// saw the right source, and that each of them is met.
func dialEndpoints(lab *netlab.Lab, f *scenarios.Flow, ask func() (netlab.Answer, error)) error {
	met := map[netip.AddrPort]int{}
	first := netip.AddrPort{}
	for range tries(f) {
		a, err := ask()
		if err != nil {
			return err
		}
		if a.Result != netlab.Answered {
			return fmt.Errorf("%v, after answers from %v", a, met)
		}
		server, err := judgeAnswer(lab, f, a)
		if err != nil {
			return err
		}
		if !first.IsValid() {
			first = server
		}
		if f.Sticky > 0 && server != first {
			return fmt.Errorf("%v, but the client was at %s before", a, first)
		}
		met[server]++
	}
	return judgeMet(f, met)
}

// tries is how many connections it takes to meet every endpoint, but for one
// run in ten million.
func tries(f *scenarios.Flow) int {
	if f.Sticky > 0 || f.Count > 0 {
		return 40
	}
	n := 1
	for _, t := range f.Target {
		if t.Chance < 1 {
			n = max(n, int(math.Ceil(math.Log(1e-7/float64(len(f.Target)))/math.Log(1-t.Chance))))
		}
	}
	return max(n, 5)
}

func judgeMet(f *scenarios.Flow, met map[netip.AddrPort]int) error {
	if f.Sticky > 0 {
		return nil
	}
	// Of 40 draws out of hundreds nearly all differ; out of a few, all are met.
	if f.Count > 0 && len(met) < min(f.Count, 20) {
		return fmt.Errorf("only %d endpoints answered: %v", len(met), met)
	}
	for _, t := range f.Target {
		count := 0
		for a, n := range met {
			if t.Is(a) {
				count += n
			}
		}
		if count == 0 {
			return fmt.Errorf("%s never answered, others did: %v", t.Host.Name, met)
		}
	}
	return nil
}

// judgeSource compares what the endpoint saw. Where the node itself is the
// client, its address is there either way.
func judgeSource(lab *netlab.Lab, f *scenarios.Flow, a netlab.Answer, masq bool) error {
	if f.From.Name == scenarios.NodeName && !f.Source.IsLoopback() {
		return nil
	}
	switch nodes := lab.Addrs(scenarios.NodeName); {
	case !masq && !a.SourceKept():
		return fmt.Errorf("%v, but its address should have been kept", a)
	case masq && !slices.Contains(nodes, a.Seen.Addr()):
		return fmt.Errorf("%v, but should have been seen as one of %v", a, nodes)
	}
	return nil
}

// TestFlowsFailWithoutProxier: a node that does nothing fails every flow that
// needs something done, so that the other test proves something.
func TestFlowsFailWithoutProxier(t *testing.T) {
	if err := netlab.Supported(); err != nil {
		t.Skip("SKIPPED, real kernel not tested: ", err)
	}
	for _, name := range []string{"external-local", "source-ranges", "no-endpoints", "forward-drop", "affinity"} {
		s, err := scenarios.Load("../scenarios/" + name + ".txtar")
		if err != nil {
			t.Fatal(err)
		}
		lab := build(t, s)
		for i := range s.Flows {
			f := &s.Flows[i]
			if f.Expect == scenarios.None {
				continue
			}
			if err := dial(t.Context(), lab, s, f); err == nil {
				t.Errorf("%s, %s: as it should be, without a proxier", name, f.Text)
			}
		}
	}
}
