package node

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
)

func addrs(list ...string) []netip.Addr {
	out := []netip.Addr{}
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func cidrs(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestSelect(t *testing.T) {
	node := addrs("192.168.2.5", "127.0.0.1", "192.168.1.5", "10.0.0.5", "192.168.1.5", "::1", "fd00::5", "fe80::1", "2001:db8::5")
	primary4, primary6 := netip.MustParseAddr("192.168.1.5"), netip.MustParseAddr("fd00::5")
	var none netip.Addr
	const all = "all"
	tests := []struct {
		name     string
		spec     Spec
		primary4 netip.Addr
		primary6 netip.Addr
		want4    []string
		want6    []string
	}{
		{"empty", Spec{}, primary4, primary6, []string{all}, []string{all}},
		{"all", Spec{All: true}, primary4, primary6, []string{all}, []string{all}},
		{"all beside a CIDR", Spec{All: true, Prefixes: cidrs("10.0.0.0/8")}, primary4, primary6, []string{all}, []string{all}},
		{"primary", Spec{Primary: true}, primary4, primary6, []string{"192.168.1.5"}, []string{"fd00::5"}},
		{"primary, none of IPv6", Spec{Primary: true}, primary4, none, []string{"192.168.1.5"}, []string{all}},
		{"primary not known, with a CIDR", Spec{Primary: true, Prefixes: cidrs("10.0.0.0/8")}, none, none, []string{"10.0.0.5"}, []string{all}},
		{"primary is loopback", Spec{Primary: true, Prefixes: cidrs("10.0.0.0/8")}, netip.MustParseAddr("127.0.0.1"), none, []string{"10.0.0.5"}, []string{all}},
		{"primary not on the node", Spec{Primary: true}, netip.MustParseAddr("203.0.113.1"), primary6, []string{}, []string{"fd00::5"}},
		{"localhost", Spec{Localhost: true}, primary4, primary6, []string{"127.0.0.1"}, []string{"::1"}},
		{"primary and localhost", Spec{Primary: true, Localhost: true}, primary4, primary6, []string{"127.0.0.1", "192.168.1.5"}, []string{"::1", "fd00::5"}},
		{"CIDR, other family gets all", Spec{Prefixes: cidrs("192.168.0.0/16")}, primary4, primary6, []string{"192.168.1.5", "192.168.2.5"}, []string{all}},
		{"CIDRs of both", Spec{Prefixes: cidrs("10.0.0.0/8", "2001:db8::/32", "fe80::/10")}, primary4, primary6, []string{"10.0.0.5"}, []string{"2001:db8::5", "fe80::1"}},
		{"CIDR with host bits", Spec{Prefixes: cidrs("10.0.0.77/8")}, primary4, primary6, []string{"10.0.0.5"}, []string{all}},
		{"CIDR that nothing matches", Spec{Prefixes: cidrs("172.16.0.0/12")}, primary4, primary6, []string{}, []string{all}},
		{"zero CIDR", Spec{Prefixes: cidrs("10.0.0.0/8", "0.0.0.0/0", "fd00::/8")}, primary4, primary6, []string{all}, []string{"fd00::5"}},
		{"overlapping", Spec{Primary: true, Prefixes: cidrs("192.168.1.0/24", "192.168.1.5/32")}, primary4, primary6, []string{"192.168.1.5"}, []string{"fd00::5"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, f := range []struct {
				family  model.Family
				primary netip.Addr
				want    []string
			}{{model.IPv4, test.primary4, test.want4}, {model.IPv6, test.primary6, test.want6}} {
				got := Select(test.spec, f.family, node, f.primary)
				if wantAll := len(f.want) == 1 && f.want[0] == all; wantAll {
					if !got.All || got.Addrs != nil {
						t.Errorf("%v: %+v, want all", f.family, got)
					}
				} else if got.All || !slices.Equal(got.Addrs, addrs(f.want...)) {
					t.Errorf("%v: %+v, want %v", f.family, got, f.want)
				}
			}
		})
	}
}

func TestIncludesLocalhost(t *testing.T) {
	primary := netip.MustParseAddr("192.168.1.5")
	for _, test := range []struct {
		name string
		spec Spec
		want bool
	}{
		{"empty", Spec{}, true},
		{"all", Spec{All: true}, true},
		{"primary", Spec{Primary: true}, false},
		{"localhost", Spec{Localhost: true}, true},
		{"only IPv6 given", Spec{Prefixes: cidrs("fd00::/8")}, true},
		{"network", Spec{Prefixes: cidrs("10.0.0.0/8")}, false},
		{"one loopback address", Spec{Prefixes: cidrs("127.0.0.1/32")}, true},
		{"another loopback address", Spec{Prefixes: cidrs("127.0.0.2/32")}, false},
		{"primary and localhost", Spec{Primary: true, Localhost: true}, true},
		{"wide", Spec{Prefixes: cidrs("64.0.0.0/2")}, true},
		{"zero", Spec{Prefixes: cidrs("0.0.0.0/0")}, true},
	} {
		if got := IncludesLocalhost(test.spec, primary); got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}

func TestPrimaryIP(t *testing.T) {
	node := &model.Node{Addrs: addrs("192.168.1.5", "fd00::5", "203.0.113.5")}
	for _, test := range []struct {
		name   string
		bind   string
		node   *model.Node
		family model.Family
		want   string
	}{
		{"from the Node", "0.0.0.0", node, model.IPv4, "192.168.1.5"},
		{"from the Node, IPv6", "0.0.0.0", node, model.IPv6, "fd00::5"},
		{"bind address", "10.0.0.5", node, model.IPv4, "10.0.0.5"},
		{"bind address of the other family", "10.0.0.5", node, model.IPv6, "fd00::5"},
		{"mapped bind address", "::ffff:10.0.0.5", node, model.IPv4, "10.0.0.5"},
		{"unspecified IPv6", "::", node, model.IPv6, "fd00::5"},
		{"no Node", "0.0.0.0", nil, model.IPv4, ""},
		{"no Node, bind address", "fd00::9", nil, model.IPv6, "fd00::9"},
		{"Node without addresses", "0.0.0.0", &model.Node{}, model.IPv4, ""},
		{"no bind address", "", node, model.IPv4, "192.168.1.5"},
	} {
		bind, _ := netip.ParseAddr(test.bind)
		got := PrimaryIP(bind, test.node, test.family)
		if want, _ := netip.ParseAddr(test.want); got != want {
			t.Errorf("%s: %v, want %q", test.name, got, test.want)
		}
	}
}
