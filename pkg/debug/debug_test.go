package debug

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/pkg/health"
	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/state"
)

var update = flag.Bool("update", false, "write golden files")

// cluster is a store with one Service of each sort that a page shows.
func cluster() (*state.Store, map[model.Family]func() *plan.Set) {
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	st := state.NewStore()
	addrs := func(list ...string) (out []netip.Addr) {
		for _, a := range list {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	service := func(namespace, name string, age int, change func(*model.Service)) {
		s := &model.Service{ServiceName: model.ServiceName{Namespace: namespace, Name: name},
			UID: "0c3d9d2e-" + name, Created: created.Add(-time.Duration(age) * time.Hour),
			Ports: []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: 80}}}
		change(s)
		st.SetService(s)
	}
	slice := func(namespace, service string, f model.Family, eps ...model.Endpoint) {
		st.SetSlice(&model.Slice{Namespace: namespace, Name: service + "-" + strings.ToLower(f.String()), Service: service, Family: f,
			Ports: []model.SlicePort{{Name: "http", Protocol: model.TCP, Port: 8080}}, Endpoints: eps})
	}
	ep := func(addr, node string) model.Endpoint {
		return model.Endpoint{Addr: netip.MustParseAddr(addr), Node: node, Ready: true, Serving: true}
	}
	service("default", "web", 3, func(s *model.Service) {
		s.ClusterIPs = addrs("10.96.0.10", "fd00::10")
		s.LoadBalancerIPs = addrs("203.0.113.5")
		s.SourceRanges = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
		s.Ports[0].NodePort = 30080
		s.ExternalLocal = true
		s.HealthCheckNodePort = 32000
		s.Affinity = 3 * time.Hour
	})
	draining := ep("10.244.2.4", "node-2")
	draining.Ready, draining.Terminating = false, true
	slice("default", "web", model.IPv4, ep("10.244.1.7", "node-1"), ep("10.244.2.3", "node-2"), draining)
	slice("default", "web", model.IPv6, ep("fd01::7", "node-2"))
	service("default", "empty", 2, func(s *model.Service) { s.ClusterIPs = addrs("10.96.0.11") })
	service("shop", "cart", 1, func(s *model.Service) {
		s.ClusterIPs = addrs("10.96.0.12")
		s.ExternalIPs = addrs("203.0.113.5")
		s.InternalLocal = true
	})
	slice("shop", "cart", model.IPv4, ep("10.244.1.9", "node-1"))
	service("shop", "<script>", 1, func(s *model.Service) { s.ClusterIPs = addrs("10.96.0.13") })
	slice("shop", "orphan", model.IPv4, ep("10.244.1.9", "node-1"))
	st.SetSynced()
	st.Publish()

	sets := map[model.Family]func() *plan.Set{}
	for _, f := range []model.Family{model.IPv4, model.IPv6} {
		p := plan.NewPlanner(&plan.Facts{Family: f, NodeName: "node-1", DetectLocal: true, NodePorts: plan.NodePortAddresses{All: true}})
		for e := range st.Current().All {
			p.Update(e.Name, e.Service, e.Slices)
		}
		set := p.Set()
		sets[f] = func() *plan.Set { return set }
	}
	return st, sets
}

func options() Options {
	st, sets := cluster()
	return Options{
		Version: "v0.1.0", Mode: func() string { return "iptables" },
		Configz: func() map[string]any {
			return map[string]any{"kubeproxy.config.k8s.io": map[string]any{"kind": "KubeProxyConfiguration"}}
		},
		Snapshot: st.Current, Sets: sets,
		SetAside: func(f model.Family, k model.PortKey) error {
			if f == model.IPv4 && k.Name == "<script>" {
				return errors.New("iptables-restore: line 7 failed")
			}
			return nil
		},
		Ruleset: func(_ context.Context, n model.ServiceName) (string, error) {
			switch n.String() {
			case "default/web":
				return "*nat\n-A KUBE-SERVICES ...\n", nil
			case "shop/cart":
				return "", errors.New("no compiler")
			}
			return "", nil
		},
		Health: func() health.Report {
			at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
			return health.Report{Healthy: true, CurrentTime: at.Add(90 * time.Second),
				Status: map[string]health.FamilyReport{"IPv4": {LastUpdated: at, Healthy: true}, "IPv6": {LastUpdated: at, Healthy: true}}}
		},
	}
}

func ask(t *testing.T, h http.Handler, method, target string, accept string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(method, target, strings.NewReader("4"))
	if accept != "" {
		r.Header.Set("Accept", accept)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestPagesOfKubeProxy(t *testing.T) {
	if err := metrics.Register(metrics.IPTables, model.IPv4); err != nil {
		t.Fatal(err)
	}
	metrics.SyncDuration(model.IPv4).Observe(0.1)
	h := NewServer(options()).Handler()
	const text = "text/plain; charset=utf-8"
	for _, c := range []struct {
		path, kind, body string // body: whole, or with "..." a part
	}{
		{"/healthz", text, "ok"},
		{"/healthz?verbose", text, "[+]ping ok\nhealthz check passed\n"},
		{"/healthz?verbose&exclude=ping", text, "[+]ping excluded: ok\nhealthz check passed\n"},
		{"/healthz/ping", text, "ok"},
		{"/proxyMode", text, "iptables"},
		{"/configz", "application/json", `{"kubeproxy.config.k8s.io":{"kind":"KubeProxyConfiguration"}}`},
		{"/metrics", "", "...\nkubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} "},
		{"/metrics", "", "...\nprocess_resident_memory_bytes "},
		{"/metrics/slis", "", "...kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} "},
	} {
		w := ask(t, h, http.MethodGet, c.path, "")
		part, wantPart := strings.CutPrefix(c.body, "...")
		if w.Code != http.StatusOK || wantPart && !strings.Contains(w.Body.String(), part) || !wantPart && w.Body.String() != c.body {
			t.Errorf("%s: %d %.300s", c.path, w.Code, w.Body)
		}
		if got := w.Header().Get("Content-Type"); c.kind != "" && got != c.kind {
			t.Errorf("%s: Content-Type %q", c.path, got)
		}
		if got := w.Header().Get("X-Content-Type-Options"); got != "nosniff" {
			t.Errorf("%s: X-Content-Type-Options %q", c.path, got)
		}
	}
	if got := ask(t, h, http.MethodGet, "/", "").Code; got != http.StatusNotFound {
		t.Errorf("/: %d", got)
	}
}

func TestProfilingOnlyWhenAskedFor(t *testing.T) {
	o := options()
	var level string
	o.SetVerbosity = func(l string) error {
		if level != "" {
			return errors.New("no such level")
		}
		level = l
		return nil
	}
	pages := []string{"/debug/pprof/", "/debug/pprof/goroutine?debug=1", "/debug/pprof/cmdline", "/debug/flags", "/debug/flags/"}
	off := NewServer(o).Handler()
	for _, p := range append(pages, "/debug/pprof", "/debug/flags/v") {
		if got := ask(t, off, http.MethodGet, p, "").Code; got != http.StatusNotFound {
			t.Errorf("off: %s: %d", p, got)
		}
	}
	o.Profiling = true
	on := NewServer(o).Handler()
	for _, p := range pages {
		if got := ask(t, on, http.MethodGet, p, "").Code; got != http.StatusOK {
			t.Errorf("on: %s: %d", p, got)
		}
	}
	if w := ask(t, on, http.MethodGet, "/debug/pprof", ""); w.Code != http.StatusFound || w.Header().Get("Location") != "/debug/pprof/" {
		t.Errorf("/debug/pprof: %d to %q", w.Code, w.Header().Get("Location"))
	}
	if w := ask(t, on, http.MethodPut, "/debug/flags/v", ""); w.Code != http.StatusOK || level != "4" ||
		w.Body.String() != "successfully set klog.logging.verbosity to 4\n" {
		t.Errorf("PUT: %d %s, level %q", w.Code, w.Body, level)
	}
	if w := ask(t, on, http.MethodPut, "/debug/flags/v", ""); w.Code != http.StatusBadRequest || w.Body.String() != "no such level\n" {
		t.Errorf("PUT of a bad level: %d %s", w.Code, w.Body)
	}
	if got := ask(t, on, http.MethodGet, "/debug/flags/v", "").Code; got != http.StatusNotAcceptable {
		t.Errorf("GET: %d", got)
	}
}

// testdata holds the pages as people read them.
func TestPages(t *testing.T) {
	h := NewServer(options()).Handler()
	for file, path := range map[string]string{
		"services.txt":           "/sluice/services",
		"services.json":          "/sluice/services?format=json",
		"services-problems.txt":  "/sluice/services?problems",
		"services-namespace.txt": "/sluice/services?namespace=shop",
		"service-web.txt":        "/sluice/services/default/web",
		"service-web.json":       "/sluice/services/default/web?format=json",
		"service-cart.txt":       "/sluice/services/shop/cart",
		"service-empty.txt":      "/sluice/services/default/empty",
		"service-orphan.txt":     "/sluice/services/shop/orphan",
		"index.html":             "/sluice/",
		"services.html":          "/sluice/services?format=html",
	} {
		w := ask(t, h, http.MethodGet, path, "")
		if w.Code != http.StatusOK {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
		got := w.Body.Bytes()
		if strings.HasSuffix(file, ".json") && !json.Valid(got) {
			t.Errorf("%s: no JSON: %s", path, got)
		}
		if bytes.Contains(got, []byte("<script>")) && strings.Contains(w.Header().Get("Content-Type"), "html") {
			t.Errorf("%s: a Service's name became HTML", path)
		}
		golden := "testdata/" + file
		if *update {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(golden); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s differs from %s (%v; run with -update and read the difference):\n%s", path, golden, err, got)
		}
	}
}

func TestFormats(t *testing.T) {
	h := NewServer(options()).Handler()
	for _, c := range []struct{ query, accept, kind string }{
		{"", "", "text/plain; charset=utf-8"},
		{"", "*/*", "text/plain; charset=utf-8"},
		{"", "application/json", "application/json"},
		{"", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8", "text/html; charset=utf-8"},
		{"?format=text", "application/json", "text/plain; charset=utf-8"},
		{"?format=json", "text/html", "application/json"},
		{"?format=html", "", "text/html; charset=utf-8"},
	} {
		for _, page := range []string{"/sluice/services", "/sluice/services/default/web"} {
			w := ask(t, h, http.MethodGet, page+c.query, c.accept)
			if got := w.Header().Get("Content-Type"); w.Code != http.StatusOK || got != c.kind {
				t.Errorf("%s%s, Accept %q: %d %q", page, c.query, c.accept, w.Code, got)
			}
		}
	}
	for _, page := range []string{"/sluice/services", "/sluice/services/default/web"} {
		if got := ask(t, h, http.MethodGet, page+"?format=yaml", "").Code; got != http.StatusBadRequest {
			t.Errorf("%s as yaml: %d", page, got)
		}
	}
}

func TestWhatIsNotThere(t *testing.T) {
	h := NewServer(options()).Handler()
	for _, c := range []struct {
		method, path string
		code         int
		says         string
	}{
		{http.MethodGet, "/sluice/services/default/nothing", http.StatusNotFound, "headless"},
		{http.MethodGet, "/sluice/nothing", http.StatusNotFound, ""},
		{http.MethodPost, "/sluice/services", http.StatusMethodNotAllowed, ""},
		{http.MethodGet, "/sluice/ruleset", http.StatusBadRequest, "NAMESPACE/NAME"},
		{http.MethodGet, "/sluice/ruleset?service=a/b/c", http.StatusBadRequest, "NAMESPACE/NAME"},
		{http.MethodGet, "/sluice/ruleset?service=default/empty", http.StatusNotFound, "/sluice/services/default/empty"},
		{http.MethodGet, "/sluice/ruleset?service=shop/cart", http.StatusInternalServerError, "no compiler"},
		{http.MethodGet, "/sluice/ruleset?service=default/web", http.StatusOK, "KUBE-SERVICES"},
	} {
		if w := ask(t, h, c.method, c.path, ""); w.Code != c.code || !strings.Contains(w.Body.String(), c.says) {
			t.Errorf("%s %s: %d %s", c.method, c.path, w.Code, w.Body)
		}
	}
}

// Before the first Set, and with every optional function missing, pages are
// empty, not broken.
func TestNothingYet(t *testing.T) {
	for name, o := range map[string]Options{
		"no functions": {},
		"no Set":       {Snapshot: state.NewStore().Current, Sets: map[model.Family]func() *plan.Set{model.IPv4: func() *plan.Set { return nil }}},
	} {
		h := NewServer(o).Handler()
		for path, code := range map[string]int{
			"/sluice/": 200, "/sluice/services": 200, "/sluice/services?format=json": 200, "/sluice/services?format=html": 200,
			"/sluice/services/a/b": 404, "/sluice/ruleset?service=a/b": 404, "/proxyMode": 404, "/configz": 404, "/healthz": 200,
		} {
			if w := ask(t, h, http.MethodGet, path, ""); w.Code != code {
				t.Errorf("%s: %s: %d %s", name, path, w.Code, w.Body)
			}
		}
	}
	if err := NewServer(Options{}).Run(t.Context()); err != nil {
		t.Error(err)
	}
}

// What one Sluice asks another before it starts.
func TestAnotherSluiceRecognizesUs(t *testing.T) {
	srv := httptest.NewServer(NewServer(options()).Handler())
	defer srv.Close()
	peer, found := health.PeerProxy(t.Context(), "", srv.Listener.Addr().String())
	if !found || !peer.Sluice || peer.Mode != "iptables" {
		t.Errorf("found %v: %+v", found, peer)
	}
}

// What ipvs mode shows besides: the scheduler and weights of a Service, what it
// asks for in vain, and endpoints that leave.
func TestPagesOfIPVS(t *testing.T) {
	st := state.NewStore()
	name := model.ServiceName{Namespace: "shop", Name: "cart"}
	st.SetService(&model.Service{ServiceName: name, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.20")},
		Ports:   []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: 80}},
		Balance: &model.Balance{Scheduler: "wrr", FlagsSet: true, SchedFlags: []string{"mh-port"}, Weights: &model.Weights{Default: 1, Zones: map[string]uint16{"a": 5, "c": 0}}}})
	slice := &model.Slice{Namespace: "shop", Name: "cart-1", Service: "cart", Family: model.IPv4, Ports: []model.SlicePort{{Name: "http", Protocol: model.TCP, Port: 8080}}}
	for i, zone := range []string{"a", "b", "c"} {
		slice.Endpoints = append(slice.Endpoints, model.Endpoint{Addr: netip.AddrFrom4([4]byte{10, 244, 1, byte(i)}), Ready: true, Serving: true})
		slice.Origins = append(slice.Origins, model.Origin{Zone: zone})
	}
	slice.Endpoints = append(slice.Endpoints, model.Endpoint{Addr: netip.MustParseAddr("10.244.1.9"), Serving: true, Terminating: true})
	st.SetSlice(slice)
	st.SetSynced()
	st.Publish()
	planner := plan.NewPlanner(&plan.Facts{Family: model.IPv4, NodeName: "node-1", NodePorts: plan.NodePortAddresses{All: true},
		Schedulers: []string{"rr", "wrr"}, DefaultScheduler: "rr"})
	e := st.Current().Get(name)
	planner.Update(e.Name, e.Service, e.Slices)
	set := planner.Set()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	until := at.Add(15 * time.Minute)
	h := NewServer(Options{Snapshot: st.Current, Sets: map[model.Family]func() *plan.Set{model.IPv4: func() *plan.Set { return set }},
		IPVS: func() IPVS {
			return IPVS{Scheduler: "rr", Schedulers: []string{"rr", "wrr"}, Draining: []Draining{
				{Family: model.IPv4, Server: "10.96.0.20:80/TCP", Endpoint: netip.MustParseAddrPort("10.244.1.8:8080"), Since: at, Until: &until, Active: 12, Inactive: 3},
				{Family: model.IPv6, Server: "[fd00::10]:80/TCP", Endpoint: netip.MustParseAddrPort("[fd00:1::8]:8080"), Since: at, Active: 1},
			}}
		}}).Handler()
	for file, path := range map[string]string{
		"ipvs.txt":            "/sluice/ipvs",
		"ipvs.json":           "/sluice/ipvs?format=json",
		"ipvs-service.txt":    "/sluice/services/shop/cart",
		"ipvs-service.json":   "/sluice/services/shop/cart?format=json",
		"ipvs-problems.txt":   "/sluice/services?problems",
		"ipvs.html":           "/sluice/ipvs?format=html",
		"ipvs-index-link.txt": "/sluice/",
	} {
		got := ask(t, h, http.MethodGet, path, "").Body.Bytes()
		if file == "ipvs-index-link.txt" {
			if !bytes.Contains(got, []byte(`href="/sluice/ipvs"`)) {
				t.Error("the index does not lead to /sluice/ipvs")
			}
			continue
		}
		golden := "testdata/" + file
		if *update {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(golden); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s differs from %s (%v; run with -update and read the difference):\n%s", path, golden, err, got)
		}
	}
	if got := ask(t, NewServer(options()).Handler(), http.MethodGet, "/sluice/ipvs", "").Code; got != http.StatusNotFound {
		t.Errorf("/sluice/ipvs in another mode: %d", got)
	}
}
