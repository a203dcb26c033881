package config

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNodePortAddresses(t *testing.T) {
	all := NodePortFilter{All: true}
	cidrs := func(list ...string) NodePortFilter {
		var f NodePortFilter
		for _, s := range list {
			f.Prefixes = append(f.Prefixes, netip.MustParsePrefix(s))
		}
		return f
	}
	for _, tc := range []struct {
		entries []string
		v4, v6  NodePortFilter
	}{
		{nil, all, all},
		{[]string{"all"}, all, all},
		{[]string{"all", "primary", "10.0.0.0/8"}, all, all},
		{[]string{"primary"}, NodePortFilter{Primary: true}, NodePortFilter{Primary: true}},
		{[]string{"localhost"}, cidrs("127.0.0.0/8"), cidrs("::1/128")},
		// What is said of one family says nothing of the other.
		{[]string{"10.0.0.0/8"}, cidrs("10.0.0.0/8"), all},
		{[]string{"fd00::/8"}, all, cidrs("fd00::/8")},
		{[]string{"0.0.0.0/0", "fd00::/8"}, all, cidrs("fd00::/8")},
		{[]string{"10.9.9.9/8", "10.0.0.0/8", "9.0.0.0/8", "fd00::/8"}, cidrs("9.0.0.0/8", "10.0.0.0/8"), cidrs("fd00::/8")},
		{[]string{"primary", "localhost"},
			NodePortFilter{Primary: true, Prefixes: cidrs("127.0.0.0/8").Prefixes},
			NodePortFilter{Primary: true, Prefixes: cidrs("::1/128").Prefixes}},
		{[]string{"::ffff:10.0.0.0/104"}, cidrs("10.0.0.0/8"), all},
	} {
		var ps problems
		got := parseNodePortAddresses(tc.entries, &ps)
		if len(ps) > 0 {
			t.Errorf("%q: %v", tc.entries, ps)
		}
		if diff := cmp.Diff(NodePortAddresses{tc.v4, tc.v6}, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tc.entries, diff)
		}
	}
}
