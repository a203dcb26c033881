package app

import (
	"net/netip"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/config"
)

// route_localnet opens loopback addresses to the network, and the rule against
// that (CVE-2020-8558) is written only if NodePorts are served on 127.0.0.1.
func TestLoopbackIsOpenedOnlyWhereItIsServed(t *testing.T) {
	only := func(list ...string) config.NodePortFilter {
		var f config.NodePortFilter
		for _, s := range list {
			f.Prefixes = append(f.Prefixes, netip.MustParsePrefix(s))
		}
		return f
	}
	for _, tc := range []struct {
		name    string
		enabled bool
		filter  config.NodePortFilter
		want    bool
	}{
		{"all addresses", true, config.NodePortFilter{All: true}, true},
		{"all addresses, localhost node ports off", false, config.NodePortFilter{All: true}, false},
		{"localhost among others", true, only("192.168.0.0/16", "127.0.0.0/8"), true},
		{"a part of loopback", true, only("127.0.0.1/32"), true},
		{"another part of loopback", true, only("127.0.0.2/32"), false},
		{"node addresses only", true, only("192.168.0.0/16"), false},
		{"primary", true, config.NodePortFilter{Primary: true}, false},
		{"primary and localhost", true, config.NodePortFilter{Primary: true, Prefixes: only("127.0.0.0/8").Prefixes}, true},
	} {
		cfg := &config.Config{LocalhostNodePorts: tc.enabled}
		cfg.NodePortAddresses.IPv4 = tc.filter
		if got := networkOf(cfg).LocalhostNodePorts; got != tc.want {
			t.Errorf("%s: route_localnet %v, want %v", tc.name, got, tc.want)
		}
	}
}
