package watch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/sluice-proxy/sluice/pkg/convert"
)

func TestAPIFollowsServiceCIDRs(t *testing.T) {
	f := newFakeAPI(t)
	f.set("services", apiService("web", "10.96.0.1"))
	f.set("servicecidrs", apiServiceCIDR("kubernetes", "10.96.0.0/16", "fd00:10:96::/112"))
	store, stats := follow(t, f, withServiceCIDRs)
	sees(t, store, "web: [10.96.0.1]\nServiceCIDRs: [10.96.0.0/16 fd00:10:96::/112]")
	f.set("servicecidrs", apiServiceCIDR("more", "10.97.0.0/16"))
	sees(t, store, "web: [10.96.0.1]\nServiceCIDRs: [10.96.0.0/16 10.97.0.0/16 fd00:10:96::/112]")
	f.del("servicecidrs", apiServiceCIDR("kubernetes"))
	sees(t, store, "web: [10.96.0.1]\nServiceCIDRs: [10.97.0.0/16]")

	f.expire() // a new list
	f.set("servicecidrs", apiServiceCIDR("more", "10.98.0.0/16"))
	sees(t, store, "web: [10.96.0.1]\nServiceCIDRs: [10.98.0.0/16]")

	f.stop()
	eventually(t, "loss noticed", func() bool { return !stats.LostSince().IsZero() })
	sees(t, store, "web: [10.96.0.1]\nServiceCIDRs: [10.98.0.0/16]")
	f.set("servicecidrs", apiServiceCIDR("new", "10.99.0.0/16"))
	f.del("servicecidrs", apiServiceCIDR("more"))
	f.start(t)
	sees(t, store, "web: [10.96.0.1]\nServiceCIDRs: [10.99.0.0/16]")
	eventually(t, "regained", func() bool { return stats.LostSince().IsZero() })
}

func TestAPIDoesNotAskForServiceCIDRs(t *testing.T) {
	f := newFakeAPI(t)
	f.set("services", apiService("web", "10.96.0.1"))
	f.set("servicecidrs", apiServiceCIDR("kubernetes", "10.96.0.0/16"))
	store, _ := follow(t, f, nil)
	sees(t, store, "web: [10.96.0.1]")
	if n := f.asked("servicecidrs"); n > 0 {
		t.Errorf("asked %d times though nobody wants them", n)
	}
}

// TestAPIForbiddenNode: who may not read the own Node has to do without it.
func TestAPIForbiddenNode(t *testing.T) {
	f := newFakeAPI(t)
	f.nodeless = true
	f.set("services", apiService("web", "10.96.0.1"))
	store, _ := follow(t, f, nil)
	sees(t, store, "web: [10.96.0.1]")
	if f.asked("nodes") == 0 || store.Current().Node() != nil {
		t.Errorf("asked %d times for the Node; it is %v", f.asked("nodes"), store.Current().Node())
	}
}

// TestAPIWithheldServiceCIDRs: a server without ServiceCIDRs, or that does not let
// us read them, serves everything else, is not out of reach, and is told of once;
// what it gives later is taken.
func TestAPIWithheldServiceCIDRs(t *testing.T) {
	for _, way := range []struct {
		name, says string
		answer     func(http.ResponseWriter)
	}{
		{"unknown kind", "does not have this kind", func(w http.ResponseWriter) {
			fail(w, http.StatusNotFound, metav1.StatusReasonNotFound, "the server could not find the requested resource")
		}},
		{"unknown group", "Kubernetes has it since 1.33", func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "text/plain")
			http.Error(w, "404 page not found", http.StatusNotFound)
		}},
		{"forbidden", "check the ClusterRole", func(w http.ResponseWriter) {
			fail(w, http.StatusForbidden, metav1.StatusReasonForbidden, "servicecidrs.networking.k8s.io is forbidden")
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			f := newFakeAPI(t)
			withhold := func(answer func(http.ResponseWriter)) {
				f.mu.Lock()
				defer f.mu.Unlock()
				f.withhold = answer
			}
			tried := func(t *testing.T) {
				t.Helper()
				before := f.asked("servicecidrs")
				eventually(t, "several tries", func() bool { return f.asked("servicecidrs") > before+6 })
			}
			var mu sync.Mutex
			var buf bytes.Buffer
			said := func(t *testing.T, want ...string) {
				t.Helper()
				mu.Lock()
				defer mu.Unlock()
				if strings.Count(buf.String(), "\n") != 1 {
					t.Errorf("want one line, got\n%s", &buf)
				}
				for _, s := range want {
					if !strings.Contains(buf.String(), s) {
						t.Errorf("no %q in\n%s", s, &buf)
					}
				}
				buf.Reset()
			}
			withhold(way.answer)
			f.set("services", apiService("web", "10.96.0.1"))
			f.set("servicecidrs", apiServiceCIDR("kubernetes", "10.96.0.0/16"))
			store, stats := follow(t, f, func(a *API) {
				a.ServiceCIDRs = true
				a.Log = slog.New(slog.NewTextHandler(lockedWriter{&mu, &buf}, nil))
			})
			sees(t, store, "web: [10.96.0.1]")
			tried(t)
			said(t, "level=WARN", "connections to unallocated ClusterIPs will not be refused", way.says)

			withhold(nil)
			sees(t, store, "web: [10.96.0.1]\nServiceCIDRs: [10.96.0.0/16]")
			eventually(t, "told", func() bool { mu.Lock(); defer mu.Unlock(); return buf.Len() > 0 })
			said(t, "level=INFO", "ServiceCIDRs are followed now")

			withhold(way.answer)
			f.expire()
			f.set("servicecidrs", apiServiceCIDR("more", "10.97.0.0/16"))
			tried(t)
			sees(t, store, "web: [10.96.0.1]\nServiceCIDRs: [10.96.0.0/16]")
			said(t, "level=WARN", "the last known ones stay in force", way.says)
			if !stats.LostSince().IsZero() || stats.WatchErrors.Load() > 0 {
				t.Errorf("lost since %v, %d errors", stats.LostSince(), stats.WatchErrors.Load())
			}
		})
	}
}

// roundTrip answers requests without a network.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestWithheldKindsAreAskedForSeldom: long pauses, after a few shorter ones. (The
// tests' patience is a thousand times shorter.)
func TestWithheldKindsAreAskedForSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		var down atomic.Bool
		cfg := &rest.Config{Host: "http://fake", QPS: -1, Transport: roundTrip(func(*http.Request) (*http.Response, error) {
			asked.Add(1)
			if down.Load() {
				return nil, errors.New("connection refused")
			}
			return &http.Response{StatusCode: http.StatusNotFound, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("404 page not found"))}, nil
		})}
		a := &API{Config: cfg, ServiceCIDRs: true}
		all := a.sources(must(newClients(cfg)), &convert.Converter{})
		s := all[len(all)-1]
		stats := &Stats{}
		log := slog.New(slog.DiscardHandler)
		s.conn, s.report = &connectionState{log: log, stats: stats, now: time.Now}, &reporter{log: log, stats: stats}
		ctx, cancel := context.WithCancel(klog.NewContext(t.Context(), logr.Discard()))
		done := make(chan struct{})
		go func() { defer close(done); s.keepListing(ctx, s.reflector(ctx, make(chan event)), nil) }()
		pass := func(d time.Duration) int64 {
			before := asked.Load()
			time.Sleep(d) // the bubble's time
			synctest.Wait()
			return asked.Load() - before
		}
		if n := pass(patience.Cap); n < 3 || n > 5 {
			t.Errorf("%d tries at first", n)
		}
		if n := pass(100 * patience.Cap); n < 80 || n > 100 {
			t.Errorf("%d tries in a hundred pauses", n)
		}
		down.Store(true) // the ordinary pauses, which begin anew for what is withheld
		pass(100 * patience.Cap)
		if stats.LostSince().IsZero() {
			t.Error("a server that does not answer is not out of reach")
		}
		down.Store(false)
		pass(2 * backoff.Cap)
		if !stats.LostSince().IsZero() {
			t.Error("a server that answers 404 is out of reach")
		}
		cancel()
		<-done
	})
}

// TestOnlyWhatIsOptionalCanBeWithheld: without Services we cannot do, and a failure
// of another sort is a loss for every kind.
func TestOnlyWhatIsOptionalCanBeWithheld(t *testing.T) {
	a := &API{NodeName: "me", ServiceCIDRs: true}
	forbidden := fmt.Errorf("list: %w", apierrors.NewForbidden(corev1.Resource("x"), "", nil))
	for _, s := range a.sources(clients{}, &convert.Converter{}) {
		if got, want := s.withheld(forbidden), s.kind == serviceCIDRs; got != want {
			t.Errorf("%s: withheld %t, want %t", s.kind, got, want)
		}
		for _, err := range []error{nil, apierrors.NewUnauthorized("no"), apierrors.NewServiceUnavailable("starting"), errors.New("connection refused")} {
			if s.withheld(err) {
				t.Errorf("%s: %v is taken for an answer", s.kind, err)
			}
		}
	}
}
