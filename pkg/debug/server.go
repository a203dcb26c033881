package debug

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"slices"

	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/component-base/metrics/prometheus/slis"

	"github.com/sluice-proxy/sluice/pkg/health"
	"github.com/sluice-proxy/sluice/pkg/health/listen"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/state"
)

// Options are where the pages come from. Functions are called when a page is
// asked for, from any goroutine; a nil one leaves its page or part out.
type Options struct {
	Addr       string // metricsBindAddress; "" serves nothing
	HardFail   bool   // bindAddressHardFail
	BindFailed func(error)
	Log        *slog.Logger

	Version   string
	Mode      func() string         // the mode in force
	Configz   func() map[string]any // by API group, as it goes out in JSON
	Profiling bool                  // enableProfiling: pprof and /debug/flags/v
	// SetVerbosity changes the log level ("4", as klog's -v).
	SetVerbosity func(level string) error

	Snapshot func() *state.Snapshot
	Sets     map[model.Family]func() *plan.Set // the last Set given to the proxier
	// SetAside returns the kernel's last refusal of a port, nil if it is in force.
	SetAside func(model.Family, model.PortKey) error
	// Ruleset returns what a Service's plans compile to, "" if to nothing.
	Ruleset func(context.Context, model.ServiceName) (string, error)
	Health  func() health.Report
	IPVS    func() IPVS // nil in other modes
}

// Server is the metrics and debug server.
type Server struct {
	opts   Options
	listen listen.Server
}

// NewServer returns a server; Run serves it.
func NewServer(o Options) *Server {
	s := &Server{opts: o}
	s.listen = listen.Server{Name: "metrics", Addr: o.Addr, Handler: s.Handler(),
		HardFail: o.HardFail, Failed: o.BindFailed, Log: o.Log}
	return s
}

// Run serves until ctx is done. It returns an error only with HardFail.
func (s *Server) Run(ctx context.Context) error { return s.listen.Run(ctx) }

// Handler returns what is served.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	s.kubeProxyPages(mux)
	if s.opts.Profiling {
		s.profilingPages(mux)
	}
	s.sluicePages(mux)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", health.Product)
		w.Header().Set("X-Content-Type-Options", "nosniff")
		mux.ServeHTTP(w, r)
	})
}

// kubeProxyPages are those of kube-proxy that are always there.
func (s *Server) kubeProxyPages(mux *http.ServeMux) {
	mux.HandleFunc("/healthz", healthz)
	mux.HandleFunc("/healthz/ping", func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusOK, "ok") })
	mux.Handle("/metrics", legacyregistry.Handler())
	slis.SLIMetricsWithReset{}.Install(mux) // /metrics/slis
	if s.opts.Mode != nil {
		mux.HandleFunc("/proxyMode", func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusOK, s.opts.Mode()) })
	}
	if s.opts.Configz != nil {
		mux.HandleFunc("/configz", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, s.opts.Configz()) })
	}
}

// healthz says that this server answers, which says nothing of the dataplane:
// see pkg/health for that. Its words are those of all Kubernetes components.
func healthz(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	detail := "[+]ping excluded: ok\n"
	if !slices.Contains(query["exclude"], "ping") {
		detail = "[+]ping ok\n"
		_ = slis.ObserveHealthcheck(r.Context(), "ping", "healthz", slis.Success)
	}
	if query.Has("verbose") {
		plain(w, http.StatusOK, detail+"healthz check passed\n")
		return
	}
	plain(w, http.StatusOK, "ok")
}

func (s *Server) profilingPages(mux *http.ServeMux) {
	mux.Handle("/debug/pprof", http.RedirectHandler("/debug/pprof/", http.StatusFound))
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	if s.opts.SetVerbosity == nil {
		return
	}
	flags := func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusOK, "v\n") }
	mux.HandleFunc("/debug/flags", flags)
	mux.HandleFunc("/debug/flags/", flags)
	mux.HandleFunc("/debug/flags/v", s.setVerbosity)
}

func (s *Server) setVerbosity(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPut {
		plain(w, http.StatusNotAcceptable, "unsupported http method\n") // the code is kube-proxy's
		return
	}
	level, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<10))
	if err != nil {
		plain(w, http.StatusBadRequest, "error reading request body: "+err.Error()+"\n")
		return
	}
	if err := s.opts.SetVerbosity(string(level)); err != nil {
		plain(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	plain(w, http.StatusOK, fmt.Sprintf("successfully set klog.logging.verbosity to %s\n", level))
}

func plain(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = io.WriteString(w, text)
}

func writeJSON(w http.ResponseWriter, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "encode the answer: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(body)
}
