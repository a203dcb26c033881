package health

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Product is the Server header of our answers, here and in pkg/debug, by which
// one Sluice knows another.
const Product = "sluice"

// Peer is a service proxy that is alive on this node.
type Peer struct {
	Sluice bool   // it is one of us: an old instance during an update, say
	Mode   string // "iptables", "ipvs", ...; "" if it did not say
	Addr   string // where it answered
}

// String says in one sentence why we do not start beside it, and what to do.
func (p Peer) String() string {
	who, remedy := "kube-proxy (or another service proxy)",
		"keep it off this node first (deploy/README.md: a nodeSelector that no node has, on the DaemonSet kube-proxy)"
	if p.Sluice {
		who, remedy = "another Sluice", "stop it first"
	}
	if p.Mode != "" {
		who += " in mode " + p.Mode
	}
	return fmt.Sprintf("%s answers on %s, and two live proxies would translate every Service twice: %s", who, p.Addr, remedy)
}

// PeerProxy asks the addresses that we are about to serve whether another
// service proxy is alive there: kube-proxy answers /proxyMode on its metrics
// address and a JSON report on /healthz. An unspecified address is asked on
// loopback. Something else that has the port is not a Peer: binding will fail
// and say so. It takes two seconds at most.
func PeerProxy(ctx context.Context, healthzAddr, metricsAddr string) (Peer, bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	client := &http.Client{
		// Straight to the node's own address: no proxy from the environment.
		Transport:     &http.Transport{DisableKeepAlives: true},
		Timeout:       time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	for _, addr := range dialable(metricsAddr) {
		body, header, code := get(ctx, client, addr, "/proxyMode")
		if mode := strings.TrimSpace(string(body)); code == http.StatusOK && knownMode(mode) {
			return Peer{Sluice: header.Get("Server") == Product, Mode: mode, Addr: addr}, true
		}
	}
	for _, addr := range dialable(healthzAddr) {
		body, header, code := get(ctx, client, addr, "/healthz")
		if (code == http.StatusOK || code == http.StatusServiceUnavailable) && isReport(body) {
			return Peer{Sluice: header.Get("Server") == Product, Addr: addr}, true
		}
	}
	return Peer{}, false
}

func get(ctx context.Context, client *http.Client, addr, path string) ([]byte, http.Header, int) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return nil, nil, 0
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, 0
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return nil, nil, 0
	}
	return body, resp.Header, resp.StatusCode
}

func knownMode(m string) bool {
	return slices.Contains([]string{"iptables", "ipvs", "nftables", "userspace", "kernelspace"}, m)
}

// isReport recognizes the two fields that every version of kube-proxy, and what
// replaces it, has in its health report.
func isReport(body []byte) bool {
	var r struct{ LastUpdated, CurrentTime *time.Time }
	return json.Unmarshal(body, &r) == nil && r.LastUpdated != nil && r.CurrentTime != nil
}

// dialable returns addresses by which a local client reaches a server that is
// bound to addr.
func dialable(addr string) []string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port == "" || port == "0" {
		return nil
	}
	ip, err := netip.ParseAddr(host)
	if host == "" || (err == nil && ip.IsUnspecified()) {
		return []string{net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("::1", port)}
	}
	return []string{addr}
}
