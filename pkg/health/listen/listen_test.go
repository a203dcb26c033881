package listen

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// quietListener is bound and never gets a connection.
type quietListener struct {
	closed chan struct{}
	once   sync.Once
}

func (l *quietListener) Accept() (net.Conn, error) { <-l.closed; return nil, net.ErrClosed }
func (l *quietListener) Addr() net.Addr            { return &net.TCPAddr{} }
func (l *quietListener) Close() error              { l.once.Do(func() { close(l.closed) }); return nil }

func TestTriesEveryFiveSecondsAndReportsASeriesOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		var tries []time.Duration
		var reports []string
		l := &quietListener{closed: make(chan struct{})}
		s := &Server{Name: "healthz", Addr: "127.0.0.1:1", Handler: http.NotFoundHandler(),
			Failed: func(err error) { reports = append(reports, err.Error()) },
			Listen: func(context.Context, string, string) (net.Listener, error) {
				tries = append(tries, time.Since(start))
				switch len(tries) {
				case 1, 2:
					return nil, errors.New("address in use")
				case 3:
					return nil, errors.New("permission denied")
				}
				return l, nil
			}}
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		time.Sleep(time.Minute) // bubble time
		synctest.Wait()
		if len(tries) != 4 || tries[3] != 15*time.Second {
			t.Errorf("tried at %v", tries)
		}
		if len(reports) != 2 || !strings.Contains(reports[0], "serve healthz on 127.0.0.1:1: address in use") {
			t.Errorf("reported %q", reports)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run at the end: %v", err)
		}
		select {
		case <-l.closed:
		default:
			t.Error("the listener was left open")
		}
	})
}

func TestHardFailReturnsTheFirstFailure(t *testing.T) {
	busy := errors.New("address in use")
	s := &Server{Addr: "x:1", HardFail: true, Handler: http.NotFoundHandler(),
		Listen: func(context.Context, string, string) (net.Listener, error) { return nil, busy }}
	if err := s.Run(t.Context()); !errors.Is(err, busy) {
		t.Errorf("got %v", err)
	}
}

func TestServesARealAddressUntilTheEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	bound := make(chan string, 1)
	s := &Server{Addr: "127.0.0.1:0",
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }),
		Listen: func(ctx context.Context, network, addr string) (net.Listener, error) {
			l, err := new(net.ListenConfig).Listen(ctx, network, addr)
			if err == nil {
				bound <- l.Addr().String()
			}
			return l, err
		}}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	addr := <-bound
	resp, err := http.Get("http://" + addr)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusTeapot {
		t.Errorf("status %d", resp.StatusCode)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("still accepts connections after the end")
	}
}

func TestNoAddressMeansNoServer(t *testing.T) {
	if err := (&Server{}).Run(t.Context()); err != nil {
		t.Error(err)
	}
}
