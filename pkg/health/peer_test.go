package health

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPeerProxy(t *testing.T) {
	answer := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code); fmt.Fprint(w, body) }
	}
	const report = `{"lastUpdated":"2026-01-02T03:04:05Z","currentTime":"2026-01-02T03:04:05Z","nodeEligible":true}`
	ours := NewServer(Options{SyncPeriod: time.Second}).Handler() // 503: node unknown
	for _, c := range []struct {
		name             string
		healthz, metrics http.Handler
		want             []string // parts of the sentence; nil: nobody
	}{
		{"nobody", nil, nil, nil},
		{"kube-proxy by its metrics port", nil, answer(200, "iptables"), []string{"kube-proxy (or another service proxy) in mode iptables", "twice", "keep it off this node", "nodeSelector"}},
		{"kube-proxy by its health port", answer(200, report), nil, []string{"kube-proxy (or another", "answers on 127.0.0.1:"}},
		{"kube-proxy on a node being drained", answer(503, report), nil, []string{"kube-proxy"}},
		{"another Sluice", ours, nil, []string{"another Sluice answers", "stop it first"}},
		{"a web server", answer(200, "<html>hello"), answer(200, "<html>hello"), nil},
		{"a web server that knows no such path", answer(404, "iptables"), answer(404, "iptables"), nil},
		{"some JSON", answer(200, `{"status":"ok"}`), answer(200, `{"mode":"iptables"}`), nil},
		{"a redirect elsewhere", http.RedirectHandler("http://192.0.2.1/", http.StatusFound), nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr := func(h http.Handler) string {
				if h == nil {
					return closedPort(t)
				}
				s := httptest.NewServer(h)
				t.Cleanup(s.Close)
				return s.Listener.Addr().String()
			}
			peer, found := PeerProxy(t.Context(), addr(c.healthz), addr(c.metrics))
			if found != (c.want != nil) {
				t.Fatalf("found %v: %v", found, peer)
			}
			for _, part := range c.want {
				if !strings.Contains(peer.String(), part) {
					t.Errorf("%q does not say %q", peer, part)
				}
			}
		})
	}
}

// closedPort returns an address that refuses connections: a socket has it and
// does not listen, so that nobody else gets it.
func closedPort(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port)
}

func TestPeerProxyGivesUpOnASilentOne(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // accepts in the kernel, never answers
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if peer, found := PeerProxy(ctx, l.Addr().String(), l.Addr().String()); found {
		t.Errorf("found %v", peer)
	}
}

func TestUnspecifiedAddressesAreAskedOnLoopback(t *testing.T) {
	for in, want := range map[string]string{
		"0.0.0.0:10256": "[127.0.0.1:10256 [::1]:10256]", "[::]:10256": "[127.0.0.1:10256 [::1]:10256]",
		":10256": "[127.0.0.1:10256 [::1]:10256]", "192.0.2.1:1": "[192.0.2.1:1]",
		"": "[]", "192.0.2.1": "[]", "127.0.0.1:0": "[]",
	} {
		if got := fmt.Sprint(dialable(in)); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}
