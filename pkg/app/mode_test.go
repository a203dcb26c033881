package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/state"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/ipvs"
	"github.com/sluice-proxy/sluice/proxier/nftables"
)

// fakeIPVS is a machine's IPVS as a test wants it.
type fakeIPVS struct {
	errs     map[model.Family]error // by Probe
	timeouts []time.Duration
}

var errScheduler = errors.New(`this kernel has no scheduler "xx": it offers lc, rr`)

func (f *fakeIPVS) kernel() ipvsKernel {
	return ipvsKernel{
		probe: func(_ context.Context, family model.Family, _ string) (ipvs.Host, error) {
			if err := f.errs[family]; err != nil {
				return ipvs.Host{}, err
			}
			return ipvs.Host{Version: "1.2.1", Schedulers: []string{"lc", "rr"}, Inside: true, Missing: []string{"it cannot do this"}}, nil
		},
		open: func(o ipvs.Options) (ipvsProxier, error) { return &fakeProxier{options: o}, nil },
		checkScheduler: func(name string, offered []string) error {
			if !slices.Contains(offered, name) {
				return errScheduler
			}
			return nil
		},
		setTimeouts: func(tcp, tcpFin, udp time.Duration) error {
			f.timeouts = append(f.timeouts, tcp, tcpFin, udp)
			return nil
		},
		removeOther: func(context.Context, model.Family, []netip.Prefix) (bool, error) { return false, nil },
		cleanup:     func(context.Context, model.Family, []netip.Prefix) error { return nil },
	}
}

// fakeProxier does nothing, and says that something drains.
type fakeProxier struct {
	proxier.Proxier
	options  ipvs.Options
	failures int
	synced   int
}

func (x *fakeProxier) Sync(context.Context, *plan.Set) error {
	if x.failures > 0 {
		x.failures--
		return errors.New("no kernel")
	}
	x.synced++
	return nil
}
func (x *fakeProxier) Check(context.Context, bool) (bool, error)      { return false, nil }
func (x *fakeProxier) Prime(context.Context, *plan.Set) (bool, error) { return false, nil }
func (x *fakeProxier) Draining() []ipvs.Draining {
	return []ipvs.Draining{{Server: "10.96.0.1:80/TCP", Endpoint: netip.MustParseAddrPort("10.244.1.1:8080"), Active: 2}}
}

// agentFor loads a configuration from flags and gives it to an agent with a fake
// kernel.
func agentFor(t *testing.T, f *fakeIPVS, args ...string) (*agent, *config.Config, *bytes.Buffer) {
	t.Helper()
	flags := config.NewFlags()
	fs := pflag.NewFlagSet("sluice", pflag.ContinueOnError)
	fs.SetNormalizeFunc(config.NormalizeFlag)
	flags.AddTo(fs)
	if err := fs.Parse(append([]string{"--hostname-override=node-1"}, args...)); err != nil {
		t.Fatal(err)
	}
	cfg, err := flags.Load()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	a := newAgent(cfg, slog.New(slog.NewTextHandler(&log, nil)))
	a.ipvs = f.kernel()
	return a, cfg, &log
}

func TestChooseMode(t *testing.T) {
	no := fmt.Errorf("probe: %w", &ipvs.Unavailable{Err: errors.New("the kernel has no IPVS")})
	none := map[model.Family]error{model.IPv4: no, model.IPv6: no}
	busy := errors.New("the xtables lock is held")
	for _, tc := range []struct {
		name   string
		args   []string
		host   fakeIPVS
		want   config.Mode // "": it refuses
		says   []string    // in the error, or in the log
		reason string      // of the fallback
	}{
		{"iptables", []string{"--proxy-mode=iptables"}, fakeIPVS{errs: none}, config.ModeIPTables, nil, ""},
		{"no mode", nil, fakeIPVS{errs: none}, config.ModeIPTables, nil, ""},
		{"ipvs", []string{"--proxy-mode=ipvs"}, fakeIPVS{}, config.ModeIPVS, nil, ""},
		{"ipvs, one of its schedulers", []string{"--proxy-mode=ipvs", "--ipvs-scheduler=lc"}, fakeIPVS{}, config.ModeIPVS, nil, ""},
		{"ipvs, none of its schedulers", []string{"--proxy-mode=ipvs", "--ipvs-scheduler=xx"}, fakeIPVS{}, "",
			[]string{"ipvs.scheduler", "offers lc, rr"}, ""},
		{"no IPVS", []string{"--proxy-mode=ipvs"}, fakeIPVS{errs: none}, config.ModeIPTables,
			[]string{"level=WARN", "the kernel has no IPVS", "choose mode iptables"}, "not possible on this node"},
		{"no IPVS, and nothing else will do", []string{"--proxy-mode=ipvs", "--mode-fallback=false"}, fakeIPVS{errs: none}, "",
			[]string{"mode ipvs cannot run here", "the kernel has no IPVS", "modeFallback is off"}, ""},
		{"no IPVS for IPv6", []string{"--proxy-mode=ipvs"}, fakeIPVS{errs: map[model.Family]error{model.IPv6: none[model.IPv6]}}, config.ModeIPVS, nil, ""},
		{"no answer", []string{"--proxy-mode=ipvs"}, fakeIPVS{errs: map[model.Family]error{model.IPv4: busy, model.IPv6: busy}}, "",
			[]string{"find out whether mode ipvs can serve IPv4", "lock is held"}, ""},
		{"no answer for IPv4", []string{"--proxy-mode=ipvs"}, fakeIPVS{errs: map[model.Family]error{model.IPv4: busy}}, "", []string{"lock is held"}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, cfg, log := agentFor(t, &tc.host, tc.args...)
			got, err := a.enterMode(t.Context(), cfg)
			text := log.String()
			if tc.want == "" {
				if err == nil {
					t.Fatalf("it starts in mode %s", got.Mode)
				}
				if a.mode != nil || log.Len() > 0 {
					t.Errorf("it goes on with %T: %s", a.mode, log)
				}
				text = err.Error()
			} else if err != nil || got.Mode != tc.want || a.cfg.Load() != got {
				t.Fatalf("%v, error %v; want mode %s", got, err, tc.want)
			}
			for _, s := range tc.says {
				if !strings.Contains(text, s) {
					t.Errorf("%q does not say %q", text, s)
				}
			}
			if warnings := strings.Count(log.String(), "level=WARN"); warnings > 1 {
				t.Errorf("%d warnings: %s", warnings, log)
			}
			if got := reasonOf(a.fellBack); got != tc.reason {
				t.Errorf("reason of the fallback: %q, want %q", got, tc.reason)
			}
		})
	}
}

func reasonOf(e *unavailable) string {
	if e == nil {
		return ""
	}
	return e.reason
}

// TestChooseNFTables: each thing that the kernel lacks is a line of its own, and a
// question without an answer changes nothing.
func TestChooseNFTables(t *testing.T) {
	none := &nftables.Unavailable{Missing: []string{"lacks fib", "lacks numgen"}}
	for _, tc := range []struct {
		name   string
		args   []string
		v4, v6 error
		want   config.Mode
		says   []string
		lines  int
		reason string
	}{
		{"there", nil, nil, nil, config.ModeNFTables, nil, 0, ""},
		{"not for IPv6", nil, nil, none, config.ModeNFTables, []string{"lacks fib", "lacks numgen"}, 2, ""},
		{"not there", nil, none, none, config.ModeIPTables, []string{"lacks fib", "lacks numgen", "choose mode iptables"}, 5, "not possible on this node"},
		{"not there, and nothing else will do", []string{"--mode-fallback=false"}, none, none, "", []string{"mode nftables cannot run here", "lacks fib", "modeFallback is off"}, 4, ""},
		{"no answer", nil, nil, errors.New("no memory"), "", []string{"no memory", "nothing is changed"}, 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, cfg, log := agentFor(t, &fakeIPVS{}, append(tc.args, "--proxy-mode=nftables")...)
			a.probeNFTables = func(_ context.Context, f model.Family) (nftables.Host, error) {
				return nftables.Host{}, map[model.Family]error{model.IPv4: tc.v4, model.IPv6: tc.v6}[f]
			}
			got, err := a.enterMode(t.Context(), cfg)
			text := log.String()
			if tc.want == "" {
				if err == nil {
					t.Fatalf("it starts in mode %s", got.Mode)
				}
				text += err.Error()
			} else if err != nil || got.Mode != tc.want || a.cfg.Load() != got {
				t.Fatalf("%v, error %v; want mode %s", got, err, tc.want)
			}
			for _, s := range tc.says {
				if !strings.Contains(text, s) {
					t.Errorf("%q does not say %q", text, s)
				}
			}
			if lines := strings.Count(log.String(), "level=WARN"); lines != tc.lines {
				t.Errorf("%d warnings, want %d: %s", lines, tc.lines, log)
			}
			if got := reasonOf(a.fellBack); got != tc.reason {
				t.Errorf("reason of the fallback: %q, want %q", got, tc.reason)
			}
		})
	}
}

// A family is left alone only where the kernel said that it cannot be served.
func TestNoAnswerForOneFamily(t *testing.T) {
	missing := &ipvs.Unavailable{Err: errors.New("the kernel has no IPVS")}
	busy := errors.New("no memory")
	for _, tc := range []struct {
		name string
		errs map[model.Family]error
	}{
		{"IPv6 has no answer", map[model.Family]error{model.IPv6: busy}},
		{"IPv4 has none, IPv6 is missing", map[model.Family]error{model.IPv4: busy, model.IPv6: missing}},
		{"IPv4 is missing, IPv6 has none", map[model.Family]error{model.IPv4: missing, model.IPv6: busy}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, cfg, log := agentFor(t, &fakeIPVS{errs: tc.errs}, "--proxy-mode=ipvs")
			if len(a.families()) < 2 {
				t.Skip("SKIPPED: this machine has no IPv6")
			}
			if _, err := a.enterMode(t.Context(), cfg); !errors.Is(err, busy) || a.fellBack != nil || log.Len() > 0 {
				t.Errorf("error %v, log %s", err, log)
			}
		})
	}
}

// A proxier that cannot be opened ends the agent, unless the mode says that the
// family cannot be served.
func TestOpenFails(t *testing.T) {
	a, cfg, log := agentFor(t, &fakeIPVS{}, "--proxy-mode=ipvs")
	a.ipvs.open = func(ipvs.Options) (ipvsProxier, error) { return nil, errors.New("no sockets left") }
	cfg, err := a.enterMode(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if planes, err := a.dataplanes(t.Context(), cfg, a.mode); err == nil || !strings.Contains(err.Error(), "no sockets left") || strings.Contains(log.String(), "left alone") {
		t.Errorf("planes %v, error %v, log %s", planes, err, log)
	}
}

// An agent that is stopped while it looks for IPVS does not go on without it.
func TestNoFallbackAtTheEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a, cfg, log := agentFor(t, &fakeIPVS{errs: map[model.Family]error{model.IPv4: context.Canceled, model.IPv6: context.Canceled}}, "--proxy-mode=ipvs")
	if _, err := a.enterMode(ctx, cfg); !errors.Is(err, context.Canceled) || log.Len() > 0 {
		t.Errorf("error %v, log %s", err, log)
	}
}

func TestIPVSPlanes(t *testing.T) {
	host := &fakeIPVS{errs: map[model.Family]error{model.IPv6: &ipvs.Unavailable{Err: errors.New("no ip6tables")}}}
	a, cfg, log := agentFor(t, host, "--proxy-mode=ipvs", "--ipvs-udp-timeout=30s", "--ipvs-exclude-cidrs=192.0.2.0/24", "--ipvs-scheduler=lc", "--cluster-cidr=10.244.0.0/16")
	cfg, err := a.enterMode(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	a.mode.prepare()
	if !slices.Equal(host.timeouts, []time.Duration{0, 0, 30 * time.Second}) {
		t.Errorf("timeouts %v", host.timeouts)
	}
	planes, err := a.dataplanes(t.Context(), cfg, a.mode)
	if err != nil || len(planes) != 1 || planes[0].family != model.IPv4 {
		t.Fatalf("planes %v, error %v; want IPv4 alone", planes, err)
	}
	o := planes[0].engine.(ipvsEngine).options
	if o.Scheduler != "lc" || !o.Inside || !slices.Equal(o.Schedulers, []string{"lc", "rr"}) || o.MasqueradeBit != 14 || !o.Detector.Detects() ||
		!slices.Equal(o.Exclude, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}) || o.Report != proxier.Reporter(planes[0]) {
		t.Errorf("options %+v", o)
	}
	for _, says := range []string{"127.0.0.1", "loopback source", "left alone", "no ip6tables", "it cannot do this"} {
		if len(a.families()) == 2 && strings.Count(log.String(), says) == 0 {
			t.Errorf("the log does not say %q: %s", says, log)
		}
	}
	a.loops = []*family{{family: model.IPv4, plane: planes[0]}}
	if got := a.countDraining(); len(got) != 1 || got[0].Endpoints != 1 || got[0].Family != model.IPv4 {
		t.Errorf("draining %+v", got)
	}
	page := a.ipvsPage()()
	if page.Scheduler != "lc" || len(page.Draining) != 1 || page.Draining[0].Until != nil || page.Draining[0].Active != 2 || !slices.Equal(page.Schedulers, o.Schedulers) {
		t.Errorf("page %+v", page)
	}
}

// What other modes left serves until the first Sync that succeeds. A removal that
// fails is tried again, not more often than once a minute, until it succeeds.
func TestOthersAreRemovedAfterTheFirstSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _, log := agentFor(t, &fakeIPVS{})
		m := &countingMode{failures: 2}
		x := &fakeProxier{failures: 2}
		p := &dataplane{engine: ipvsEngine{ipvsProxier: x}, family: model.IPv4, mode: m, a: a}
		for i, step := range []struct {
			after time.Duration
			want  int
		}{{0, 0}, {time.Hour, 0}, {0, 1}, {0, 1}, {59 * time.Second, 1}, {time.Second, 2}, {59 * time.Second, 2}, {time.Minute, 3}, {time.Hour, 3}} {
			time.Sleep(step.after)
			if err := p.Sync(t.Context(), nil); (err != nil) != (i < 2) {
				t.Errorf("Sync %d: %v", i, err)
			}
			if m.removed != step.want {
				t.Errorf("after Sync %d: removed %d times, want %d", i, m.removed, step.want)
			}
		}
		if got := strings.Count(log.String(), "the old chains"); got != 1 {
			t.Errorf("said %d times: %s", got, log)
		}
		if got := strings.Count(log.String(), "one is held"); got != 1 {
			t.Errorf("the error was said %d times: %s", got, log)
		}
	})
}

type countingMode struct {
	mode
	removed, failures int
}

func (m *countingMode) removeOthers(context.Context, model.Family) (string, error) {
	if m.removed++; m.removed <= m.failures {
		return "", errors.New("one is held")
	}
	return "the old chains", nil
}

func TestFactsOfIPVS(t *testing.T) {
	addrs := func(list ...string) (out []netip.Addr) {
		for _, s := range list {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	own := map[model.Family][]netip.Addr{
		model.IPv4: addrs("127.0.0.1", "169.254.1.1", "192.168.1.5"),
		model.IPv6: addrs("::1", "fd00::5", "fe80::1"),
	}
	for _, tc := range []struct {
		name      string
		args      []string
		family    model.Family
		own       []netip.Addr
		ports     plan.NodePortAddresses
		localhost bool
		scheduler string
	}{
		{"iptables", nil, model.IPv4, nil, plan.NodePortAddresses{All: true}, true, ""},
		{"iptables, IPv6", nil, model.IPv6, nil, plan.NodePortAddresses{All: true}, false, ""},
		{"iptables, without localhost", []string{"--nodeport-addresses=192.168.0.0/16"}, model.IPv4, nil,
			plan.NodePortAddresses{Addrs: addrs("192.168.1.5")}, false, ""},
		{"ipvs", []string{"--proxy-mode=ipvs"}, model.IPv4, addrs("169.254.1.1", "192.168.1.5"), plan.NodePortAddresses{All: true}, false, "rr"},
		{"ipvs, IPv6", []string{"--proxy-mode=ipvs", "--ipvs-scheduler=lc"}, model.IPv6, addrs("fd00::5"), plan.NodePortAddresses{All: true}, false, "lc"},
		{"ipvs, localhost asked for", []string{"--proxy-mode=ipvs", "--nodeport-addresses=localhost,192.168.0.0/16"}, model.IPv4,
			addrs("169.254.1.1", "192.168.1.5"), plan.NodePortAddresses{Addrs: addrs("127.0.0.1", "192.168.1.5")}, false, "rr"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, cfg, _ := agentFor(t, &fakeIPVS{}, tc.args...)
			if _, err := a.enterMode(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
			a.addresses.Store(&own)
			f := a.factsOf(tc.family, snapshotOf(&model.Node{Addrs: addrs("192.168.1.5", "fd00::5")}, "10.96.0.0/16", "fd00:10:96::/112"))
			if !slices.Equal(f.OwnAddrs, tc.own) || f.LocalhostNodePorts != tc.localhost ||
				f.NodePorts.All != tc.ports.All || !slices.Equal(f.NodePorts.Addrs, tc.ports.Addrs) {
				t.Errorf("%+v", f)
			}
			if f.ServiceCIDRs != nil {
				t.Errorf("ServiceCIDRs %v, which this mode does not use", f.ServiceCIDRs)
			}
			if f.DefaultScheduler != tc.scheduler || (f.Schedulers != nil) != (tc.scheduler != "") {
				t.Errorf("schedulers %v, default %q; want %q", f.Schedulers, f.DefaultScheduler, tc.scheduler)
			}
		})
	}
}

// snapshotOf is what a store publishes that knows a Node and a ServiceCIDR.
func snapshotOf(n *model.Node, cidrs ...string) *state.Snapshot {
	s := state.NewStore()
	s.SetNode(n)
	c := &model.ServiceCIDR{Name: "kubernetes"}
	for _, p := range cidrs {
		c.Prefixes = append(c.Prefixes, netip.MustParsePrefix(p))
	}
	s.SetServiceCIDR(c)
	s.Publish()
	return s.Current()
}

// refusingMode is a mode that refuses connections to unallocated ClusterIPs.
type refusingMode struct{ *iptablesMode }

func (refusingMode) refusesUnallocated() bool { return true }

func TestFactsOfAModeThatRefusesUnallocated(t *testing.T) {
	a, cfg, _ := agentFor(t, &fakeIPVS{})
	a.mode = refusingMode{newIPTablesMode(a, cfg)}
	a.addresses.Store(&map[model.Family][]netip.Addr{})
	both := snapshotOf(nil, "fd00:10:96::/112", "10.97.0.0/16", "10.96.0.0/16")
	for _, tc := range []struct {
		family model.Family
		snap   *state.Snapshot
		want   string
	}{
		{model.IPv4, both, "[10.96.0.0/16 10.97.0.0/16]"},
		{model.IPv6, both, "[fd00:10:96::/112]"},
		{model.IPv6, snapshotOf(nil, "10.96.0.0/16"), "[]"},
		{model.IPv4, snapshotOf(nil), "[]"},
	} {
		f := a.factsOf(tc.family, tc.snap)
		if got := fmt.Sprint(f.ServiceCIDRs); got != tc.want || got == "[]" && f.ServiceCIDRs != nil {
			t.Errorf("%s: %s, want %s", tc.family, got, tc.want)
		}
	}
}

// ServiceCIDRs are asked for in a mode that needs them, and in no other.
func TestSourceOfServiceCIDRs(t *testing.T) {
	for _, refuses := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a, cfg, _ := agentFor(t, &fakeIPVS{})
			a.log = slog.New(slog.DiscardHandler)
			a.mode = newIPTablesMode(a, cfg)
			if refuses {
				a.mode = refusingMode{newIPTablesMode(a, cfg)}
			}
			var asked atomic.Bool
			rc := &rest.Config{Host: "http://fake", Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
				if strings.HasSuffix(r.URL.Path, "/apis/networking.k8s.io/v1/servicecidrs") {
					asked.Store(true)
				}
				return nil, errors.New("connection refused")
			})}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- a.source(cfg, rc)(ctx) }()
			time.Sleep(time.Minute) // the bubble's time
			cancel()
			if err := <-done; err != nil || asked.Load() != refuses {
				t.Errorf("asked for ServiceCIDRs: %t, want %t; error %v", asked.Load(), refuses, err)
			}
		})
	}
}

// roundTrip answers requests without a network.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A Service's problems are told once, however many ports and families it has, and
// again when they are others.
func TestProblemsAreToldOnce(t *testing.T) {
	a, _, log := agentFor(t, &fakeIPVS{})
	told := func() int { n := strings.Count(log.String(), "cannot be followed"); log.Reset(); return n }
	name := model.ServiceName{Namespace: "ns", Name: "a"}
	service := func(scheduler string) *model.Service {
		return &model.Service{ServiceName: name, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00::1")},
			Ports:   []model.ServicePort{{Name: "a", Protocol: model.TCP, Port: 80}, {Name: "b", Protocol: model.TCP, Port: 81}},
			Balance: &model.Balance{Scheduler: scheduler}}
	}
	type side struct {
		planner *plan.Planner
		sink    *problemSink
	}
	var sides []side
	for _, f := range []model.Family{model.IPv4, model.IPv6} {
		sides = append(sides, side{plan.NewPlanner(&plan.Facts{Family: f, NodeName: "n", NodePorts: plan.NodePortAddresses{All: true},
			Schedulers: []string{"rr"}, DefaultScheduler: "rr"}), a.problems.of()})
	}
	for _, step := range []struct {
		what string
		svc  *model.Service
		want int
	}{
		{"nothing wrong", service("rr"), 0},
		{"a bad scheduler", service("xx"), 1},
		{"the same again", service("xx"), 0},
		{"another", service("yy"), 1},
		{"mended", service(""), 0},
		{"bad once more", service("yy"), 1},
		{"deleted", nil, 0},
		{"made again", service("yy"), 1},
	} {
		for _, s := range sides {
			s.planner.Update(name, step.svc, nil)
			if err := s.sink.Sync(t.Context(), s.planner.Set()); err != nil {
				t.Fatal(err)
			}
		}
		if got := told(); got != step.want {
			t.Errorf("%s: told %d times, want %d", step.what, got, step.want)
		}
	}
	if len(a.problems.told) != 1 {
		t.Errorf("remembered: %v", a.problems.told)
	}
}
