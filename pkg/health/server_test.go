package health

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"testing"
	"time"

	"k8s.io/component-base/metrics/testutil"

	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
)

// clock is moved by the test.
type clock struct{ t time.Time }

func (c *clock) now() time.Time       { return c.t }
func (c *clock) pass(d time.Duration) { c.t = c.t.Add(d) }
func newClock() *clock                { return &clock{time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }
func (c *clock) text() string         { return c.t.Format(time.RFC3339Nano) }
func ask(h http.Handler, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

func TestFreshness(t *testing.T) {
	const timeout = 60 * time.Second // twice the sync period
	type step func(*Server, *clock)
	queue := func(f model.Family) step { return func(s *Server, _ *clock) { s.QueuedUpdate(f) } }
	done := func(f model.Family) step { return func(s *Server, _ *clock) { s.Updated(f) } }
	wait := func(d time.Duration) step { return func(_ *Server, c *clock) { c.pass(d) } }
	for _, c := range []struct {
		name  string
		steps []step
		stale []string
	}{
		{"nothing ever happened", nil, nil},
		{"idle for a day", []step{queue(4), done(4), wait(24 * time.Hour)}, nil},
		{"a change waits, not too long", []step{done(4), queue(4), wait(timeout - 1)}, nil},
		{"a change waits too long", []step{done(4), queue(4), wait(timeout)}, []string{"IPv4"}},
		{"the oldest change counts", []step{done(4), queue(4), wait(timeout - 1), queue(4), wait(1)}, []string{"IPv4"}},
		{"in force at last", []step{done(4), queue(4), wait(2 * timeout), done(4)}, nil},
		{"next change after that", []step{queue(4), wait(timeout), done(4), queue(4), wait(timeout - 1)}, nil},
		{"one family of two", []step{done(4), done(6), queue(4), queue(6), done(4), wait(timeout)}, []string{"IPv6"}},
		{"never a success", []step{queue(6), wait(timeout)}, []string{"IPv6"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			clk := newClock()
			s := NewServer(Options{SyncPeriod: timeout / 2, Now: clk.now})
			for _, f := range c.steps {
				f(s, clk)
			}
			r := s.Health()
			var stale []string
			for f, fr := range r.Status {
				if !fr.Healthy {
					stale = append(stale, f)
				}
			}
			if !slices.Equal(stale, c.stale) || r.Healthy != (c.stale == nil) || s.Healthy() != r.Healthy {
				t.Errorf("stale %v, healthy %v, want stale %v", stale, r.Healthy, c.stale)
			}
		})
	}
}

func TestNodeEligibilityMattersForHealthzOnly(t *testing.T) {
	for _, c := range []struct {
		name string
		node *model.Node
		ok   bool
	}{
		{"unknown", nil, false},
		{"plain", &model.Node{Name: "n"}, true},
		{"being deleted", &model.Node{Deleting: true}, false},
		{"marked by the autoscaler", &model.Node{Draining: true}, false},
	} {
		s := NewServer(Options{SyncPeriod: time.Second})
		s.SyncNode(c.node)
		want := http.StatusServiceUnavailable
		if c.ok {
			want = http.StatusOK
		}
		if got := ask(s.Handler(), "/healthz").Code; got != want || s.NodeEligible() != c.ok {
			t.Errorf("%s: /healthz %d, want %d", c.name, got, want)
		}
		if got := ask(s.Handler(), "/livez").Code; got != http.StatusOK {
			t.Errorf("%s: /livez %d", c.name, got)
		}
	}
}

func TestBodiesAndHeaders(t *testing.T) {
	clk := newClock()
	s := NewServer(Options{SyncPeriod: time.Second, Now: clk.now})
	s.SyncNode(&model.Node{})
	at := clk.text()
	s.Updated(model.IPv4)
	s.QueuedUpdate(model.IPv4)
	clk.pass(time.Second)
	fresh := clk.text()
	for path, want := range map[string]string{
		"/healthz": `{"lastUpdated":"` + fresh + `","currentTime":"` + fresh + `","nodeEligible":true,"healthy":true,` +
			`"status":{"IPv4":{"lastUpdated":"` + at + `","healthy":true}}}`,
		"/livez": `{"lastUpdated":"` + fresh + `","currentTime":"` + fresh + `","healthy":true,` +
			`"status":{"IPv4":{"lastUpdated":"` + at + `","healthy":true}}}`,
	} {
		check(t, path, ask(s.Handler(), path), http.StatusOK, want)
	}
	clk.pass(time.Second)
	stale := clk.text()
	for path, want := range map[string]string{
		"/healthz": `{"lastUpdated":"` + at + `","currentTime":"` + stale + `","nodeEligible":true,"healthy":false,` +
			`"status":{"IPv4":{"lastUpdated":"` + at + `","healthy":false}}}`,
		"/livez": `{"lastUpdated":"` + at + `","currentTime":"` + stale + `","healthy":false,` +
			`"status":{"IPv4":{"lastUpdated":"` + at + `","healthy":false}}}`,
	} {
		check(t, path, ask(s.Handler(), path), http.StatusServiceUnavailable, want)
	}
	if got := ask(s.Handler(), "/").Code; got != http.StatusNotFound {
		t.Errorf("/: status %d", got)
	}
}

func check(t *testing.T, what string, w *httptest.ResponseRecorder, code int, body string) {
	t.Helper()
	var got, want any
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatalf("%s: %v in %q", what, err, w.Body)
	}
	if err := json.Unmarshal([]byte(body), &want); err != nil {
		t.Fatal(err)
	}
	if w.Code != code || !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %d %s\nwant %d %s", what, w.Code, w.Body, code, body)
	}
	for name, value := range map[string]string{"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"} {
		if got := w.Header().Get(name); got != value {
			t.Errorf("%s: header %s is %q, want %q", what, name, got, value)
		}
	}
}

func TestAnswersAreCountedByCode(t *testing.T) {
	if err := metrics.Register(metrics.IPTables); err != nil {
		t.Fatal(err)
	}
	count := func(c metrics.Counter) float64 {
		v, err := testutil.GetCounterMetricValue(c)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	s := NewServer(Options{SyncPeriod: time.Second})
	healthz, livez := count(metrics.HealthzResponses(503)), count(metrics.LivezResponses(200))
	ask(s.Handler(), "/healthz")
	ask(s.Handler(), "/livez")
	ask(s.Handler(), "/livez")
	if got := count(metrics.HealthzResponses(503)) - healthz; got != 1 {
		t.Errorf("/healthz 503 counted %v times", got)
	}
	if got := count(metrics.LivezResponses(200)) - livez; got != 2 {
		t.Errorf("/livez 200 counted %v times", got)
	}
}
