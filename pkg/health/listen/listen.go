// Package listen serves HTTP on one address for as long as the agent lives, and
// keeps trying while something else has the address. It knows nothing of what
// it serves.
package listen

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// retryEvery is kube-proxy's pause between attempts to get an address.
const retryEvery = 5 * time.Second

// Server is an address and what is served there. The zero value of every field
// but Addr and Handler is usable.
type Server struct {
	Name    string // for messages: "healthz", "metrics"
	Addr    string // host:port; "" disables the server
	Handler http.Handler

	// HardFail makes Run return the first failure instead of trying again
	// (bindAddressHardFail).
	HardFail bool
	// Failed hears of failures to get the address; once for a series of equal
	// ones, so that an Event can be made of each.
	Failed func(error)
	Log    *slog.Logger
	// Listen replaces net.Listen, for tests.
	Listen func(ctx context.Context, network, addr string) (net.Listener, error)
}

// Run serves until ctx is done, then finishes what is being answered and
// returns nil. It returns an error only with HardFail.
func (s *Server) Run(ctx context.Context) error {
	if s.Addr == "" {
		return nil
	}
	log := s.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("server", s.Name, "address", s.Addr)
	reported := ""
	for {
		l, err := s.listen(ctx)
		if err == nil {
			log.Debug("listening")
			reported = ""
			err = s.serve(ctx, l)
		}
		if ctx.Err() != nil {
			return nil
		}
		err = fmt.Errorf("serve %s on %s: %w", s.Name, s.Addr, err)
		if err.Error() != reported {
			reported = err.Error()
			log.Error("cannot serve", "error", err, "again", !s.HardFail)
			if s.Failed != nil {
				s.Failed(err)
			}
		}
		if s.HardFail {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryEvery):
		}
	}
}

func (s *Server) listen(ctx context.Context) (net.Listener, error) {
	if s.Listen != nil {
		return s.Listen(ctx, "tcp", s.Addr)
	}
	// "tcp" and an unspecified address of either family means both, as it does
	// for kube-proxy.
	return new(net.ListenConfig).Listen(ctx, "tcp", s.Addr)
}

// serve answers until ctx is done or the listener breaks.
func (s *Server) serve(ctx context.Context, l net.Listener) error {
	srv := New(s.Handler)
	broken := make(chan error, 1)
	go func() { broken <- srv.Serve(l) }()
	select {
	case err := <-broken:
		_ = srv.Close()
		return err
	case <-ctx.Done():
		Stop(srv)
		<-broken
		return nil
	}
}

// New returns a server with limits that keep a stuck or hostile client from
// holding on to memory. Answers may take as long as they need: profiles do.
func New(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		// Whatever a scanner sends is not worth a line on standard error.
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}
}

// Stop closes a server: no new connections from now on, one second for requests
// that are being answered.
func Stop(srv *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil && !errors.Is(err, http.ErrServerClosed) {
		_ = srv.Close()
	}
}
