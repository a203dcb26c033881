package metrics

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/component-base/metrics/testutil"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

var update = flag.Bool("update", false, "write golden files")

func mustRegister(t *testing.T, modes ...string) {
	t.Helper()
	for _, m := range modes {
		if err := Register(m, model.IPv4, model.IPv6); err != nil {
			t.Fatal(err)
		}
	}
}

// touchAll gives every metric a series, so that it appears in a scrape.
func touchAll() {
	const f = model.IPv4
	for _, h := range []Histogram{SyncDuration(f), SyncFullDuration(f), SyncPartialDuration(f), NetworkProgramming(f),
		ConntrackDuration(f), ProgrammingLatency(f), RestoreLockWait(f)} {
		h.Observe(0.5)
	}
	for _, g := range []Gauge{SyncLast(f), SyncLastQueued(f), EndpointChangesPending(), ServiceChangesPending(),
		IPTablesRules("nat", f), IPTablesRulesLast("nat", f), LocalhostListeners(f), ServicesSetAside(f),
		SnapshotServices(), SnapshotEndpoints(), RefusedSettings(f)} {
		g.Set(1)
	}
	for _, c := range []Counter{EndpointChanges(), ServiceChanges(), HealthzResponses(200), LivezResponses(503),
		RestoreFailures(f), PartialRestoreFailures(f), NFTablesSyncFailures(f), NFTablesCleanupFailures(f),
		LocalhostListenerFailures(f), ConntrackDeleted(f), DriftRepaired("chain", f), RestoreBytes("nat", f), SyncFailures(f)} {
		c.Inc()
	}
	SetBuild("v1", "abc")
	SetMode(IPTables, IPVS)
	SetModeFallback(IPVS, IPTables, "missing ip_vs")
	_ = NewPlans(f).Sync(context.Background(), plan.EmptySet(&plan.Facts{Family: f}))
}

// describe renders what a dashboard depends on: name, type, label names,
// buckets and help.
func describe(f *dto.MetricFamily) string {
	var b strings.Builder
	var labels []string
	m := f.Metric[0]
	for _, l := range m.Label {
		labels = append(labels, l.GetName())
	}
	fmt.Fprintf(&b, "%s %s {%s}\n  %s\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ","), f.GetHelp())
	if h := m.Histogram; h != nil {
		b.WriteString(" ")
		for _, k := range h.Bucket {
			fmt.Fprintf(&b, " %g", k.GetUpperBound())
		}
		b.WriteString("\n")
	}
	return b.String()
}

// testdata/metrics.txt was compared with kube-proxy 1.37.1's source: an
// operator's dashboards must not notice the difference.
func TestEveryMetricKeepsItsNameTypeLabelsBucketsAndHelp(t *testing.T) {
	mustRegister(t, IPTables, IPVS, NFTables)
	if err := RegisterLocalhostNodePorts(func() []RejectedPackets {
		return []RejectedPackets{{model.IPv4, "UDP", 7}}
	}); err != nil {
		t.Fatal(err)
	}
	if err := RegisterDraining(func() []Draining { return []Draining{{model.IPv4, 3}} }); err != nil {
		t.Fatal(err)
	}
	web := model.PortKey{Namespace: "ns", Name: "web", Port: "http", Protocol: model.TCP}
	if err := RegisterServiceTraffic(func() ServiceTraffic {
		return ServiceTraffic{Ports: []PortTraffic{{model.IPv4, web, Count{1, 2}, Count{3, 4}}}, LeftOut: 5}
	}); err != nil {
		t.Fatal(err)
	}
	touchAll()
	got := scrape(t, func(name string) bool {
		return strings.HasPrefix(name, "kubeproxy_") && !strings.HasPrefix(name, "kubeproxy_iptables_") || strings.HasPrefix(name, "sluice_")
	})
	compareGolden(t, "testdata/metrics.txt", got)
}

func scrape(t *testing.T, keep func(string) bool) []byte {
	t.Helper()
	families, err := legacyregistry.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, f := range families {
		if keep(f.GetName()) {
			b.WriteString(describe(f))
		}
	}
	return b.Bytes()
}

func compareGolden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (run with -update and read the difference); got:\n%s", path, got)
	}
}

func TestWhatEveryKubernetesProcessExposes(t *testing.T) {
	mustRegister(t, IPTables)
	SetFeature("AllowServiceExternalIPs", "BETA", true)
	got := string(scrape(t, func(string) bool { return true }))
	for _, name := range []string{"kubernetes_build_info", "kubernetes_feature_enabled", "go_goroutines", "process_start_time_seconds"} {
		if !strings.Contains(got, "\n"+name+" ") {
			t.Errorf("%s is not exposed", name)
		}
	}
}

func TestModesHaveTheirOwnMetrics(t *testing.T) {
	for _, c := range []struct {
		mode        string
		has, hasNot []string
	}{
		{IPTables,
			[]string{"kubeproxy_sync_full_proxy_rules_duration_seconds", "kubeproxy_sync_proxy_rules_iptables_total", "sluice_restore_bytes_total"},
			[]string{"kubeproxy_sync_proxy_rules_nftables_sync_failures_total"}},
		{IPVS,
			[]string{"kubeproxy_sync_proxy_rules_iptables_restore_failures_total", "kubeproxy_conntrack_reconciler_deleted_entries_total"},
			[]string{"kubeproxy_sync_full_proxy_rules_duration_seconds", "kubeproxy_sync_proxy_rules_iptables_total"}},
		{NFTables,
			[]string{"kubeproxy_sync_partial_proxy_rules_duration_seconds", "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total"},
			[]string{"kubeproxy_sync_proxy_rules_iptables_restore_failures_total", "sluice_restore_bytes_total",
				"kubeproxy_nftables_localhost_nodeport_listeners"}},
	} {
		list, _, err := of(c.mode)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, m := range list {
			names = append(names, m.FQName())
		}
		for _, n := range c.has {
			if !slices.Contains(names, n) {
				t.Errorf("%s: %s is missing", c.mode, n)
			}
		}
		for _, n := range c.hasNot {
			if slices.Contains(names, n) {
				t.Errorf("%s: %s belongs to another mode", c.mode, n)
			}
		}
	}
	if err := Register("userspace"); err == nil {
		t.Error("an unknown mode was registered")
	}
}

func TestFailureCountersStartAtZero(t *testing.T) {
	mustRegister(t, NFTables)
	families, err := legacyregistry.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	series := 0
	for _, f := range families {
		if f.GetName() == nftablesCleanupFailures.FQName() {
			series = len(f.Metric)
		}
	}
	if series != 2 {
		t.Errorf("%d series before any failure, want one per family", series)
	}
}

func TestSetModeReplacesTheModeBefore(t *testing.T) {
	mustRegister(t, IPTables)
	SetMode(IPVS, IPVS)
	SetMode(IPTables, IPVS)
	want := "# HELP sluice_proxy_mode [ALPHA] A metric with a constant '1' value labeled by the mode in force and the mode asked for; they differ after a fallback.\n" +
		"# TYPE sluice_proxy_mode gauge\nsluice_proxy_mode{configured=\"ipvs\",mode=\"iptables\"} 1\n"
	if err := testutil.GatherAndCompare(legacyregistry.DefaultGatherer, strings.NewReader(want), "sluice_proxy_mode"); err != nil {
		t.Error(err)
	}
}

func TestModeFallbackNamesTheReason(t *testing.T) {
	mustRegister(t, IPTables)
	SetModeFallback(NFTables, IPTables, "not in this version")
	SetModeFallback(IPVS, IPTables, "missing ip_vs")
	want := "# HELP sluice_mode_fallback [ALPHA] A metric with a constant '1' value, there only if the mode asked for (from) cannot run here and another (to) is in force, labeled by the reason.\n" +
		"# TYPE sluice_mode_fallback gauge\nsluice_mode_fallback{from=\"ipvs\",reason=\"missing ip_vs\",to=\"iptables\"} 1\n"
	if err := testutil.GatherAndCompare(legacyregistry.DefaultGatherer, strings.NewReader(want), "sluice_mode_fallback"); err != nil {
		t.Error(err)
	}
}

// A Service counts once, however many ports it has.
func TestRefusedSettingsCountServices(t *testing.T) {
	mustRegister(t, IPVS)
	const f = model.IPv4
	facts := &plan.Facts{Family: f, NodeName: "here", Schedulers: []string{"rr"}, DefaultScheduler: "rr", NodePorts: plan.NodePortAddresses{All: true}}
	planner, gauges := plan.NewPlanner(facts), NewPlans(f)
	name := model.ServiceName{Namespace: "ns", Name: "a"}
	for _, step := range []struct {
		scheduler string
		want      float64
	}{{"", 0}, {"xx", 1}, {"yy", 1}, {"rr", 0}} {
		planner.Update(name, &model.Service{ServiceName: name, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
			Ports:   []model.ServicePort{{Name: "a", Protocol: model.TCP, Port: 80}, {Name: "b", Protocol: model.TCP, Port: 81}},
			Balance: &model.Balance{Scheduler: step.scheduler}}, nil)
		if err := gauges.Sync(context.Background(), planner.Set()); err != nil {
			t.Fatal(err)
		}
		if got := value(t, RefusedSettings(f)); got != step.want {
			t.Errorf("scheduler %q: %v Services, want %v", step.scheduler, got, step.want)
		}
	}
}

func value(t *testing.T, g Gauge) float64 {
	t.Helper()
	v, err := testutil.GetGaugeMetricValue(g)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestPlansFollowChanges(t *testing.T) {
	mustRegister(t, IPTables)
	const f = model.IPv6
	facts := &plan.Facts{Family: f, NodeName: "here", NodePorts: plan.NodePortAddresses{All: true}}
	planner, gauges := plan.NewPlanner(facts), NewPlans(f)
	service := func(name, ip string, age time.Duration, change func(*model.Service)) *model.Service {
		s := &model.Service{
			ServiceName: model.ServiceName{Namespace: "ns", Name: name},
			Created:     time.Unix(1000, 0).Add(-age),
			ClusterIPs:  []netip.Addr{netip.MustParseAddr(ip)},
			Ports:       []model.ServicePort{{Protocol: model.TCP, Port: 80}},
		}
		if change != nil {
			change(s)
		}
		return s
	}
	elsewhere := []*model.Slice{{Namespace: "ns", Name: "s", Family: f,
		Ports:     []model.SlicePort{{Protocol: model.TCP, Port: 8080}},
		Endpoints: []model.Endpoint{{Addr: netip.MustParseAddr("fd01::1"), Node: "there", Ready: true, Serving: true}}}}
	check := func(step string, ports, endpoints, lost, internal, external float64) {
		t.Helper()
		if err := gauges.Sync(context.Background(), planner.Set()); err != nil {
			t.Fatal(err)
		}
		got := [5]float64{
			value(t, plannedPorts.WithLabelValues(f.String())), value(t, plannedEndpoints.WithLabelValues(f.String())),
			value(t, clashes.WithLabelValues(f.String())),
			value(t, noLocalEndpoints.WithLabelValues("internal", f.String())), value(t, noLocalEndpoints.WithLabelValues("external", f.String())),
		}
		if want := [5]float64{ports, endpoints, lost, internal, external}; got != want {
			t.Errorf("%s: ports, endpoints, clashes, internal, external = %v, want %v", step, got, want)
		}
	}
	name := func(n string) model.ServiceName { return model.ServiceName{Namespace: "ns", Name: n} }

	planner.Update(name("a"), service("a", "fd00::1", time.Hour, nil), elsewhere)
	check("plain Service", 1, 1, 0, 0, 0)
	planner.Update(name("b"), service("b", "fd00::2", 0, func(s *model.Service) { s.InternalLocal = true }), elsewhere)
	check("internal Local, endpoint elsewhere", 2, 1, 0, 1, 0)
	planner.Update(name("c"), service("c", "fd00::3", 0, func(s *model.Service) {
		s.ExternalLocal = true
		s.Ports[0].NodePort = 30080
		s.ExternalIPs = []netip.Addr{netip.MustParseAddr("fd00::1")}
	}), elsewhere)
	check("external Local, externalIP of another Service", 3, 2, 1, 1, 1)
	planner.Update(name("b"), nil, nil)
	planner.Update(name("c"), service("c", "fd00::3", 0, nil), elsewhere)
	check("policies gone", 2, 2, 0, 0, 0)
	planner.Update(name("a"), nil, nil)
	planner.Update(name("c"), nil, nil)
	check("nothing left", 0, 0, 0, 0, 0)
}
