package health

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/pkg/health/listen"
	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
)

// Options are what a Server needs to know.
type Options struct {
	Addr       string // healthzBindAddress; "" serves nothing
	SyncPeriod time.Duration
	Now        func() time.Time // nil: time.Now

	// HardFail is bindAddressHardFail: Run returns if the address is taken.
	HardFail bool
	// BindFailed hears why the address could not be had (Event
	// FailedToStartProxierHealthcheck), once for a series of equal failures.
	BindFailed func(error)
	Log        *slog.Logger
}

// Report is the health of the proxy. Its JSON is kube-proxy's.
type Report struct {
	// LastUpdated is the latest success of any family; in the answer of a
	// healthy proxy it is the time of the answer, since an idle proxy is not an
	// outdated one.
	LastUpdated  time.Time               `json:"lastUpdated"`
	CurrentTime  time.Time               `json:"currentTime"`
	NodeEligible *bool                   `json:"nodeEligible,omitempty"` // /healthz only
	Healthy      bool                    `json:"healthy"`                // every family is
	Status       map[string]FamilyReport `json:"status,omitempty"`       // by "IPv4", "IPv6"
}

// FamilyReport is the health of one family.
type FamilyReport struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// Server is the proxy health server. A family is healthy unless a change has
// been waiting for longer than two sync periods; idle is healthy. Its methods
// are safe for concurrent use.
type Server struct {
	timeout time.Duration
	now     func() time.Time
	listen  listen.Server

	mu      sync.Mutex
	updated map[model.Family]time.Time // last success
	queued  map[model.Family]time.Time // oldest change that is not in force
	node    *model.Node
}

// NewServer returns a Server that believes in good health and does not know its
// Node yet. Run serves it.
func NewServer(o Options) *Server {
	s := &Server{
		timeout: 2 * o.SyncPeriod,
		now:     o.Now,
		updated: map[model.Family]time.Time{},
		queued:  map[model.Family]time.Time{},
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.listen = listen.Server{Name: "healthz", Addr: o.Addr, Handler: s.Handler(),
		HardFail: o.HardFail, Failed: o.BindFailed, Log: o.Log}
	return s
}

// Run serves until ctx is done. It returns an error only with HardFail.
func (s *Server) Run(ctx context.Context) error { return s.listen.Run(ctx) }

// QueuedUpdate says that a change of a family arrived and is not in force yet.
// Further ones before the next Updated do not matter: the oldest counts.
func (s *Server) QueuedUpdate(f model.Family) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, waiting := s.queued[f]; !waiting {
		s.queued[f] = s.now()
	}
}

// Updated says that everything queued for a family is in force. A change that
// came while that was being done, and is not in it, must be queued again
// afterwards, or nobody would notice if it got stuck.
func (s *Server) Updated(f model.Family) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.queued, f)
	s.updated[f] = s.now()
}

// SyncNode replaces what is known of the own Node; nil: it does not exist, or
// is not known yet.
func (s *Server) SyncNode(n *model.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.node = n
}

// Health returns the health at this moment, without the node's eligibility.
//
// Unlike kube-proxy's, a family counts that never had a success: a proxy that
// could not program anything for two sync periods must not look healthy.
func (s *Server) Health() Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := Report{CurrentTime: s.now(), Healthy: true, Status: map[string]FamilyReport{}}
	for f, at := range s.updated {
		if at.After(r.LastUpdated) {
			r.LastUpdated = at
		}
		r.Status[f.String()] = FamilyReport{LastUpdated: at, Healthy: true}
	}
	for f, since := range s.queued {
		if r.CurrentTime.Sub(since) >= s.timeout {
			r.Healthy = false
			r.Status[f.String()] = FamilyReport{LastUpdated: s.updated[f]}
		}
	}
	return r
}

// Healthy says whether every family is healthy.
func (s *Server) Healthy() bool { return s.Health().Healthy }

// NodeEligible says whether load balancers should send traffic to this node: it
// exists, is not being deleted, and the cluster autoscaler has not marked it
// for removal (KEP-3836).
func (s *Server) NodeEligible() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.node != nil && !s.node.Deleting && !s.node.Draining
}

// Handler returns what is served: /healthz for load balancers, /livez, which
// ignores the Node, for liveness probes.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		r, eligible := s.Health(), s.NodeEligible()
		r.NodeEligible = &eligible
		metrics.HealthzResponses(answer(w, r, r.Healthy && eligible)).Inc()
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		r := s.Health()
		metrics.LivezResponses(answer(w, r, r.Healthy)).Inc()
	})
	return mux
}

// answer writes a report and returns the status code.
func answer(w http.ResponseWriter, r Report, ok bool) int {
	code := http.StatusServiceUnavailable
	if ok {
		code = http.StatusOK
		r.LastUpdated = r.CurrentTime
	}
	setHeaders(w)
	w.WriteHeader(code)
	body, _ := json.Marshal(r)
	_, _ = w.Write(body) // a client that went away needs no answer
	return code
}

func setHeaders(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Server", Product)
}
