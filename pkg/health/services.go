package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/sluice-proxy/sluice/pkg/health/listen"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// BindFailure says that a Service's healthCheckNodePort could not be served
// (Event FailedToStartServiceHealthcheck on the Service).
type BindFailure struct {
	Service model.ServiceName
	UID     string
	Port    uint16
	Err     error
}

// ServicesOptions are what ServiceServers need to know.
type ServicesOptions struct {
	// Healthy says whether the proxy is (Server.Healthy): a node whose rules are
	// outdated must not get a load balancer's traffic.
	Healthy func() bool
	// BindFailed hears of ports that cannot be had, once for each Service, port
	// and error. It is called by Sync and must not block.
	BindFailed func(BindFailure)
	Log        *slog.Logger
	// Listen replaces net.Listen, for tests.
	Listen func(ctx context.Context, network, addr string) (net.Listener, error)
}

// ServiceServers serve the healthCheckNodePorts of one family: one HTTP server
// for each Service, whatever number of ports it has. Sync and Close belong to
// one goroutine.
type ServiceServers struct {
	opts     ServicesOptions
	last     *plan.Set
	services map[model.ServiceName]*service
	unserved map[model.ServiceName]*service // those of services that are not open
	stopping sync.WaitGroup
}

// NewServiceServers returns servers that serve nothing yet.
func NewServiceServers(o ServicesOptions) *ServiceServers {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Listen == nil {
		o.Listen = new(net.ListenConfig).Listen
	}
	return &ServiceServers{opts: o, services: map[model.ServiceName]*service{}, unserved: map[model.ServiceName]*service{}}
}

// service is a Service with a healthCheckNodePort.
type service struct {
	name    model.ServiceName
	plans   map[model.PortKey]*plan.Plan // never empty between Syncs
	port    uint16                       // as it should be served, or is
	local   atomic.Int64                 // read by handlers
	open    bool
	servers []bound
	failure string // what BindFailed has heard
}

// bound is one address of a Service's health port.
type bound struct {
	listener net.Listener
	server   *http.Server
}

// Sync serves the health ports of want: those that stay keep their listeners,
// those gone are closed before new ones are opened, so that a port can move
// from one Service to another. A port that cannot be had is reported and tried
// again by every later Sync; it is no error, since nothing else depends on it.
func (s *ServiceServers) Sync(ctx context.Context, want *plan.Set) error {
	touched := s.note(want)
	if s.last != nil && !sameAddresses(s.last.Facts, want.Facts) {
		for name, svc := range s.services {
			s.close(svc)
			touched[name] = svc
		}
	}
	s.last = want
	for name, svc := range touched {
		s.settle(name, svc)
	}
	if len(s.unserved) == 0 {
		return nil
	}
	addrs := addresses(want.Facts)
	for _, name := range slices.SortedFunc(maps.Keys(s.unserved), model.ServiceName.Compare) {
		s.open(ctx, s.unserved[name], want.Facts.Family, addrs)
	}
	return nil
}

// note takes the changed plans over and returns the Services they belong to.
func (s *ServiceServers) note(want *plan.Set) map[model.ServiceName]*service {
	touched := map[model.ServiceName]*service{}
	plan.Changes(s.last, want, func(old, new *plan.Plan) bool {
		if old != nil && old.HealthPort != 0 {
			name := old.PortKey.Service()
			svc := s.services[name]
			delete(svc.plans, old.PortKey)
			touched[name] = svc
		}
		if new != nil && new.HealthPort != 0 {
			name := new.PortKey.Service()
			svc := s.services[name]
			if svc == nil {
				svc = &service{name: name, plans: map[model.PortKey]*plan.Plan{}}
				s.services[name] = svc
			}
			svc.plans[new.PortKey] = new
			touched[name] = svc
		}
		return true
	})
	return touched
}

// settle works out what a Service needs after a change, and closes what it
// does not.
func (s *ServiceServers) settle(name model.ServiceName, svc *service) {
	p := svc.any()
	if p == nil {
		s.close(svc)
		delete(s.services, name)
		delete(s.unserved, name)
		return
	}
	if p.HealthPort != svc.port {
		s.close(svc)
		svc.port, svc.failure = p.HealthPort, ""
	}
	svc.local.Store(int64(p.HealthLocal))
	if !svc.open {
		s.unserved[name] = svc
	}
}

// any returns one of the Service's plans: they all say the same of its health
// port.
func (svc *service) any() *plan.Plan {
	for _, p := range svc.plans {
		return p
	}
	return nil
}

func (s *ServiceServers) open(ctx context.Context, svc *service, f model.Family, addrs []netip.Addr) {
	network := "tcp4"
	if f == model.IPv6 {
		network = "tcp6"
	}
	for _, a := range addrs {
		l, err := s.opts.Listen(ctx, network, netip.AddrPortFrom(a, svc.port).String())
		if err != nil {
			s.close(svc)
			s.failed(svc, err)
			return
		}
		srv := listen.New(s.handler(svc))
		svc.servers = append(svc.servers, bound{l, srv})
		s.stopping.Go(func() {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
				s.opts.Log.Error("healthCheckNodePort server stopped", "service", svc.name, "error", err)
			}
		})
	}
	svc.open, svc.failure = true, ""
	delete(s.unserved, svc.name)
	s.opts.Log.Debug("serving healthCheckNodePort", "service", svc.name, "port", svc.port)
}

func (s *ServiceServers) failed(svc *service, err error) {
	if err.Error() == svc.failure {
		return
	}
	svc.failure = err.Error()
	s.opts.Log.Error("cannot serve healthCheckNodePort", "service", svc.name, "port", svc.port, "error", err)
	if s.opts.BindFailed != nil {
		s.opts.BindFailed(BindFailure{Service: svc.name, UID: svc.any().UID(), Port: svc.port, Err: err})
	}
}

// close frees a Service's port at once; requests being answered are finished
// in the background.
func (s *ServiceServers) close(svc *service) {
	for _, b := range svc.servers {
		// Not left to Stop: a Serve that has not begun yet has not told its server
		// of the listener, and the next Service may need the port now.
		_ = b.listener.Close()
		s.stopping.Go(func() { listen.Stop(b.server) })
	}
	svc.servers, svc.open = nil, false
}

// Close closes every port and returns when all requests have been answered or
// a second has passed. A later Sync starts from nothing.
func (s *ServiceServers) Close() {
	for _, svc := range s.services {
		s.close(svc)
	}
	clear(s.services)
	clear(s.unserved)
	s.last = nil
	s.stopping.Wait()
}

// handler answers a load balancer, on any path, in kube-proxy's words.
func (s *ServiceServers) handler(svc *service) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		local, healthy := svc.local.Load(), s.opts.Healthy()
		setHeaders(w)
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.FormatInt(local, 10))
		if local == 0 || !healthy {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = fmt.Fprintf(w, "{\n\t\"service\": {\n\t\t\"namespace\": %q,\n\t\t\"name\": %q\n\t},\n"+
			"\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": %v\n}", svc.name.Namespace, svc.name.Name, local, healthy)
	})
}

// addresses returns where health ports are served: where NodePorts are.
func addresses(f *plan.Facts) []netip.Addr {
	switch {
	case !f.NodePorts.All:
		return f.NodePorts.Addrs
	case f.Family == model.IPv6:
		return []netip.Addr{netip.IPv6Unspecified()}
	}
	return []netip.Addr{netip.IPv4Unspecified()}
}

func sameAddresses(a, b *plan.Facts) bool { return a == b || slices.Equal(addresses(a), addresses(b)) }
