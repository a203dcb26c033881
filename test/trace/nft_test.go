package trace

import (
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// nftTable4 has what rules of one table can be: a map of Services, endpoints, affinity,
// ranges of sources, node ports, refusals in nat chains, hairpin, masquerading.
const nftTable4 = `
table ip test {
	map services {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 10.96.0.1 . tcp . 80 : goto to-3,
			     10.96.0.2 . tcp . 80 : goto sticky,
			     10.96.0.3 . tcp . 80 : goto reject-all, 10.96.0.4 . tcp . 80 : drop,
			     203.0.113.5 . tcp . 80 : goto sources }
	}

	map node-ports {
		typeof meta l4proto . th dport : verdict
		elements = { tcp . 30080 : goto port }
	}

	map endpoints {
		typeof ip daddr . meta l4proto . th dport . numgen random mod 65536 : ip daddr . th dport
		elements = { 10.96.0.1 . tcp . 80 . 0 : 10.244.1.1 . 8080,
			     10.96.0.1 . tcp . 80 . 1 : 10.244.2.2 . 8080,
			     10.96.0.1 . tcp . 80 . 2 : 10.244.2.3 . 8080,
			     10.96.0.2 . tcp . 80 . 0 : 10.244.1.1 . 8080,
			     10.96.0.2 . tcp . 80 . 1 : 10.244.2.2 . 8080,
			     203.0.113.5 . tcp . 80 . 0 : 10.244.2.2 . 8080 }
	}

	map node-port-endpoints {
		typeof meta l4proto . th dport . numgen random mod 65536 : ip daddr . th dport
		elements = { tcp . 30080 . 0 : 10.244.2.2 . 8080 }
	}

	map sticky {
		typeof ip daddr . meta l4proto . th dport : verdict
		elements = { 10.96.0.2 . tcp . 80 : goto remember-3h, 192.168.100.1 . tcp . 30082 : goto remember-3h }
	}

	map affinity {
		typeof ip saddr . ip daddr . meta l4proto . th dport : ip daddr . th dport
		size 2
		flags dynamic,timeout
	}

	set ranges {
		typeof ip daddr . meta l4proto . th dport . ip saddr
		flags interval
		elements = { 203.0.113.5 . tcp . 80 . 198.51.100.0/24, 203.0.113.5 . tcp . 80 . 10.0.0.7 }
	}

	set hairpin {
		typeof ip saddr . ip daddr . meta l4proto . th dport
		elements = { 10.244.1.1 . 10.244.1.1 . tcp . 8080 }
	}

	set traffic {
		typeof ip daddr . meta l4proto . th dport
		counter
	}

	chain reject-all {
		reject
	}

	chain to-3 {
		iifname != "veth*" meta mark set meta mark | 0x00004000
		dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 3 map @endpoints
	}

	chain sticky {
		dnat ip to ip saddr . ip daddr . meta l4proto . th dport map @affinity
		dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 2 map @endpoints
	}

	chain remember {
		ct original ip daddr . meta l4proto . ct original proto-dst vmap @sticky
	}

	chain remember-3h {
		update @affinity { ip saddr . ct original ip daddr . meta l4proto . ct original proto-dst timeout 3h : ip daddr . th dport }
	}

	chain sources {
		ip daddr . meta l4proto . th dport . ip saddr @ranges goto to-1
		drop
	}

	chain to-1 {
		dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 1 map @endpoints
	}

	chain port {
		fib saddr type local goto port-masq
		dnat ip to meta l4proto . th dport . numgen random mod 1 map @node-port-endpoints
	}

	chain port-masq {
		meta mark set meta mark | 0x00004000
		dnat ip to meta l4proto . th dport . numgen random mod 1 map @node-port-endpoints
	}

	chain services {
		ip daddr . meta l4proto . th dport vmap @services
		ip daddr 10.96.0.0/16 goto reject-all
		fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @node-ports
	}

	chain nat-prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		jump services
	}

	chain nat-output {
		type nat hook output priority -100; policy accept;
		jump services
	}

	chain nat-postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ct status dnat jump remember
		meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade fully-random
		ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin masquerade fully-random
	}

	chain nat-input {
		type nat hook input priority 100; policy accept;
		ct status dnat jump remember
	}

	chain filter-forward {
		type filter hook forward priority filter; policy accept;
		ct state invalid counter packets 3 bytes 120 drop
	}

	chain martian {
		ct state established,related return
		ct status dnat return
		drop
	}

	chain filter-input {
		type filter hook input priority filter; policy accept;
		ip daddr 127.0.0.0/8 ip saddr != 127.0.0.0/8 jump martian
	}
}
`

func mustParseNFT(t *testing.T, text string) *NFTables {
	t.Helper()
	rs, err := ParseNFTables(text)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func TestNFTables(t *testing.T) {
	rs := mustParseNFT(t, nftTable4)
	third := []string{"10.244.1.1:8080", "10.244.2.2:8080", "10.244.2.3:8080"}
	checkRoutes(t, rs, []route{
		{"pod to ClusterIP", packet("veth2", "10.244.1.2:999", "10.96.0.1:80"), Forwarded, third, never},
		{"hairpin", packet("veth1", "10.244.1.1:999", "10.96.0.1:80"), Forwarded, third, func(d string) bool { return d == third[0] }},
		{"outside to ClusterIP", packet("eth0", "198.51.100.7:999", "10.96.0.1:80"), Forwarded, third, always},
		{"node to ClusterIP: no interface", packet("", "192.168.100.1:999", "10.96.0.1:80"), Forwarded, third, always},
		{"affinity, first connection", packet("veth2", "10.244.1.2:999", "10.96.0.2:80"), Forwarded, third[:2], never},
		{"refused", packet("veth2", "10.244.1.2:999", "10.96.0.3:80"), Rejected, nil, nil},
		{"refused, from the node", packet("", "192.168.100.1:999", "10.96.0.3:80"), Rejected, nil, nil},
		{"dropped", packet("veth2", "10.244.1.2:999", "10.96.0.4:80"), Dropped, nil, nil},
		{"no such port", packet("veth2", "10.244.1.2:999", "10.96.0.1:81"), Rejected, nil, nil},
		{"in a range", packet("eth0", "198.51.100.7:999", "203.0.113.5:80"), Forwarded, third[1:2], never},
		{"an address as a range", packet("eth0", "10.0.0.7:999", "203.0.113.5:80"), Forwarded, third[1:2], never},
		{"in no range", packet("eth0", "198.51.101.7:999", "203.0.113.5:80"), Dropped, nil, nil},
		{"node port", packet("eth0", "198.51.100.7:999", "192.168.100.1:30080"), Forwarded, third[1:2], never},
		{"node to its node port", packet("", "192.168.100.1:999", "192.168.100.1:30080"), Forwarded, third[1:2], always},
		{"no node port", packet("eth0", "198.51.100.7:999", "192.168.100.1:30081"), Delivered, []string{"192.168.100.1:30081"}, never},
		{"not on loopback", packet("", "127.0.0.1:999", "127.0.0.1:30080"), Delivered, []string{"127.0.0.1:30080"}, never},
		{"martian", packet("eth0", "192.168.100.9:999", "127.0.0.1:80"), Dropped, nil, nil},
		{"other protocol", Packet{In: "eth0", Src: netip.MustParseAddrPort("198.51.100.7:9"), Dst: netip.MustParseAddrPort("203.0.113.5:80"), Protocol: "udp"}, Forwarded, []string{"203.0.113.5:80"}, never},
		{"other family", packet("eth0", "[fd00::1]:9", "[fd00::2]:80"), Forwarded, []string{"[fd00::2]:80"}, never},
	})
}

// TestNFTablesAffinity: a client keeps its endpoint as long as it comes back in time;
// each connection prolongs that. Whom there is no room for gets any endpoint.
func TestNFTablesAffinity(t *testing.T) {
	rs := mustParseNFT(t, nftTable4)
	connect := func(m Memory, src string, at time.Duration) []Outcome {
		p := packet("veth2", src, "10.96.0.2:80")
		p.At = at
		outs, err := rs.Outcomes(host, p, m)
		if err != nil {
			t.Fatal(err)
		}
		return outs
	}
	second := connect(nil, "10.244.1.2:999", 0)[1]
	if second.Dst.String() != "10.244.2.2:8080" {
		t.Fatal(second)
	}
	for _, tc := range []struct {
		src  string
		at   time.Duration
		ways int
	}{
		{"10.244.1.2:1000", 3*time.Hour - 1, 1},
		{"10.244.1.2:1000", 3 * time.Hour, 2},
		{"10.244.1.3:1000", time.Minute, 2},
	} {
		got := Destinations(connect(second.Memory, tc.src, tc.at))
		if len(got) != tc.ways || tc.ways == 1 && got[second.Dst] == 0 {
			t.Errorf("%s after %s: %v", tc.src, tc.at, got)
		}
	}
	later := connect(second.Memory, "10.244.1.2:999", 2*time.Hour)[0]
	if got := Destinations(connect(later.Memory, "10.244.1.2:999", 4*time.Hour)); len(got) != 1 {
		t.Errorf("not prolonged: %v", got)
	}
	if e := second.Memory["affinity"]; len(e) != 1 || e["10.244.1.2 . 10.96.0.2 . tcp . 80"].Seen != 0 {
		t.Errorf("a trace changed the memory it was given: %v", second.Memory)
	}
	full := connect(second.Memory, "10.244.1.3:999", time.Hour)[0].Memory
	third := connect(full, "10.244.1.4:999", time.Hour)
	if len(third[0].Memory["affinity"]) != 2 || len(Destinations(third)) != 2 {
		t.Errorf("no room for a third: %v, %v", third, third[0].Memory)
	}
	if m := connect(full, "10.244.1.4:999", 3*time.Hour)[0].Memory["affinity"]; len(m) != 2 {
		t.Errorf("room again when one's time is up: %v", m)
	}
}

// TestNFTablesRemembersWhatWasDialled: wherever a new connection's way ends, a client is
// noted as it came, for what it dialled, with the endpoint that it goes to. An entry
// that is there keeps its value, whatever endpoint the packet has.
func TestNFTablesRemembersWhatWasDialled(t *testing.T) {
	rs := mustParseNFT(t, `table ip t {
	map affinity {
		typeof ip saddr . ip daddr . meta l4proto . th dport : ip daddr . th dport
		size 10
		flags dynamic,timeout
	}
	map endpoints {
		typeof ip daddr . meta l4proto . th dport : ip daddr . th dport
		elements = { 10.96.0.1 . tcp . 80 : 192.168.100.1 . 8080, 10.96.0.2 . tcp . 80 : 10.244.2.2 . 8080 }
	}
	chain dnat {
		dnat ip to ip daddr . meta l4proto . th dport map @endpoints
	}
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		jump dnat
	}
	chain output {
		type nat hook output priority -100; policy accept;
		jump dnat
	}
	chain note {
		update @affinity { ip saddr . ct original ip daddr . meta l4proto . ct original proto-dst timeout 1h30m : ip daddr . th dport }
		masquerade fully-random
	}
	chain input {
		type nat hook input priority 100; policy accept;
		ct status dnat update @affinity { ip saddr . ct original ip daddr . meta l4proto . ct original proto-dst timeout 1h30m : ip daddr . th dport }
	}
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ct status dnat jump note
	}
}
`)
	was := Memory{"affinity": {"10.244.1.2 . 10.96.0.2 . tcp . 80": {Keep: time.Hour, Value: "10.244.2.3 . 8080"}}}
	for _, tc := range []struct {
		in, src, dst string
		noted        string // "" if nothing is
		memory       Memory
		value        string
	}{
		{"eth0", "198.51.100.7:999", "10.96.0.1:80", "198.51.100.7 . 10.96.0.1 . tcp . 80", nil, "192.168.100.1 . 8080"},
		{"eth0", "198.51.100.7:999", "10.96.0.2:80", "198.51.100.7 . 10.96.0.2 . tcp . 80", nil, "10.244.2.2 . 8080"},
		{"", "192.168.100.1:999", "10.96.0.1:80", "192.168.100.1 . 10.96.0.1 . tcp . 80", nil, "192.168.100.1 . 8080"},
		{"", "192.168.100.1:999", "10.96.0.2:80", "192.168.100.1 . 10.96.0.2 . tcp . 80", nil, "10.244.2.2 . 8080"},
		{"veth2", "10.244.1.2:999", "10.96.0.2:80", "10.244.1.2 . 10.96.0.2 . tcp . 80", was, "10.244.2.3 . 8080"},
		{"eth0", "198.51.100.7:999", "192.168.100.1:80", "", nil, ""},
		{"eth0", "198.51.100.7:999", "10.244.2.2:80", "", nil, ""},
	} {
		p := packet(tc.in, tc.src, tc.dst)
		p.At = time.Minute
		outs, err := rs.Outcomes(host, p, tc.memory)
		if err != nil || len(outs) != 1 {
			t.Fatal(outs, err)
		}
		list := outs[0].Memory["affinity"]
		want := Entry{Seen: time.Minute, Keep: 90 * time.Minute, Value: tc.value}
		if tc.noted == "" && len(list) > 0 || tc.noted != "" && (len(list) != 1 || list[tc.noted] != want) {
			t.Errorf("%s to %s: noted %v, want %s: %v", tc.src, tc.dst, list, tc.noted, want)
		}
	}
}

// TestNFTablesDialledIsKnownOfNewConnectionsOnly: of other packets the answer could be
// wrong.
func TestNFTablesDialledIsKnownOfNewConnectionsOnly(t *testing.T) {
	rs := mustParseNFT(t, "table ip t {\nchain f {\ntype filter hook forward priority filter; policy accept;\nct original ip daddr 10.0.0.0/8 drop\n}\n}\n")
	p := packet("eth0", "198.51.100.7:999", "10.244.2.2:80")
	if outs, err := rs.Outcomes(host, p, nil); err != nil || len(outs) != 1 || outs[0].Verdict != Dropped {
		t.Errorf("new: %v, %v", outs, err)
	}
	p.State = Established
	if outs, err := rs.Outcomes(host, p, nil); err == nil {
		t.Errorf("established: %v", outs)
	}
}

// TestNFTablesDraws: rules that draw a number that no endpoint has go on, and numbers
// without an endpoint are one way and not many.
func TestNFTablesDraws(t *testing.T) {
	const draw = "dnat ip to ip daddr . th dport . numgen random mod 1000 map @e\n"
	rs := mustParseNFT(t, "table ip t {\nmap e {\ntypeof ip daddr . th dport . numgen random mod 65536 : ip daddr . th dport\n"+
		"elements = { 10.96.0.1 . 80 . 0 : 10.0.0.1 . 80, 10.96.0.1 . 80 . 999 : 10.0.0.2 . 80, 10.96.0.1 . 80 . 1000 : 10.0.0.3 . 80 }\n}\n"+
		"chain c {\ntype nat hook prerouting priority dstnat; policy accept;\n"+strings.Repeat(draw, 20)+
		"dnat ip to ip daddr . th dport . numgen random mod 1 map @e\n}\n}\n")
	outs, err := rs.Outcomes(host, packet("eth0", "198.51.100.7:999", "10.96.0.1:80"), nil)
	if err != nil || len(outs) != 41 {
		t.Fatalf("%d ways, %v", len(outs), err)
	}
	missed := math.Pow(0.998, 20)
	for d, want := range map[string]float64{"10.0.0.1:80": (1-missed)/2 + missed, "10.0.0.2:80": (1 - missed) / 2} {
		if p := Destinations(outs)[netip.MustParseAddrPort(d)]; math.Abs(p-want) > 1e-9 {
			t.Errorf("%s with probability %v, want %v", d, p, want)
		}
	}
}

func TestNFTablesStates(t *testing.T) {
	rs := mustParseNFT(t, nftTable4)
	for _, tc := range []struct {
		state   State
		dst     string
		verdict Verdict
	}{
		{Established, "10.96.0.1:80", Forwarded},
		{Related, "10.96.0.3:80", Forwarded}, // refused are new connections
		{Invalid, "10.96.0.1:80", Dropped},
		{Established, "127.0.0.1:80", Delivered},
	} {
		p := packet("eth0", "198.51.100.7:999", tc.dst)
		p.State = tc.state
		outs, err := rs.Outcomes(host, p, nil)
		if err != nil || len(outs) != 1 || outs[0].Verdict != tc.verdict || outs[0].Translated {
			t.Errorf("state %d to %s: %v, %v", tc.state, tc.dst, outs, err)
		}
	}
}

// TestNFTablesControlFlow: every way through chains, each ending in another mark.
func TestNFTablesControlFlow(t *testing.T) {
	const mark = "meta mark set meta mark | "
	for _, tc := range []struct {
		name, forward, a, b string
		mark                uint32
		verdict             Verdict
	}{
		{"end of chain returns", "jump a\n" + mark + "2", mark + "1", "", 3, Forwarded},
		{"return leaves the chain", "jump a\n" + mark + "2", "return\n" + mark + "1", "", 2, Forwarded},
		{"return in a base chain is its policy", "return\ndrop", "", "", 0, Forwarded},
		{"goto does not come back", "jump a\n" + mark + "4", "goto b\n" + mark + "1", mark + "2", 6, Forwarded},
		{"return after goto returns to the caller's caller", "jump a\n" + mark + "4", "goto b\n" + mark + "1", "return\ndrop", 4, Forwarded},
		{"goto from a base chain ends it", "goto a\ndrop", mark + "1", "", 1, Forwarded},
		{"verdict ends everything", "jump a\n" + mark + "1", "jump b", "reject", 0, Rejected},
		{"statements before one that does not hold have happened", mark + "1 ct state invalid " + mark + "2", "", "", 1, Forwarded},
		{"prefixes", "ip saddr 198.51.100.0/24 ip daddr 10.244.1.1 " + mark + "1\nip saddr != 198.51.100.0/24 " + mark + "2\nip daddr != 10.244.1.2 " + mark + "4", "", "", 5, Forwarded},
		{"interfaces", "iifname \"eth0\" " + mark + "1\niifname \"eth\" " + mark + "2\niifname \"et*\" " + mark + "4\niifname != \"eth0\" " + mark + "8", "", "", 5, Forwarded},
		{"marks", mark + "0x7\nmeta mark set meta mark ^ 0x3\nmeta mark & 0x4 == 0x4 " + mark + "8\nmeta mark & 0x1 != 0x0 drop", "", "", 12, Forwarded},
		{"directions", "ct direction original " + mark + "1\nct direction reply " + mark + "2", "", "", 1, Forwarded},
		{"a set that is empty", "ip daddr @none drop\ncounter", "", "", 0, Forwarded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := "table ip t {\nchain f {\ntype filter hook forward priority filter; policy accept;\n" + tc.forward + "\n}\nchain a {\n" + tc.a + "\n}\nchain b {\n" + tc.b + "\n}\n}\n"
			outs, err := mustParseNFT(t, text).Outcomes(host, packet("eth0", "198.51.100.7:999", "10.244.1.1:80"), nil)
			if err != nil || len(outs) != 1 || outs[0].Mark != tc.mark || outs[0].Verdict != tc.verdict {
				t.Errorf("%+v, %v; want mark %#x %v", outs, err, tc.mark, tc.verdict)
			}
		})
	}
}

// TestNFTablesPriorities: of several tables' chains at a hook the lowest priority is
// first, and what one of them accepts the others are asked about all the same.
func TestNFTablesPriorities(t *testing.T) {
	rs := mustParseNFT(t, `table ip b {
	chain late {
		type filter hook forward priority 10; policy drop;
		meta mark & 0xff == 0x1 meta mark set meta mark | 0x2
	}
}
table ip a {
	chain early {
		type filter hook forward priority filter; policy accept;
		meta mark set meta mark | 0x1
	}
}
`)
	outs, err := rs.Outcomes(host, packet("eth0", "198.51.100.7:999", "10.244.1.1:80"), nil)
	if err != nil || len(outs) != 1 || outs[0].Verdict != Dropped || outs[0].Mark != 3 {
		t.Errorf("%+v, %v", outs, err)
	}
}

func TestNFTablesPath(t *testing.T) {
	outs, err := mustParseNFT(t, nftTable4).Outcomes(host, packet("eth0", "198.51.100.7:999", "203.0.113.5:80"), nil)
	if err != nil || len(outs) != 1 {
		t.Fatal(outs, err)
	}
	want := []string{
		"test nat-prerouting: jump services",
		"test services: ip daddr . meta l4proto . th dport vmap @services { 203.0.113.5 . tcp . 80 : goto sources }",
		"test sources: ip daddr . meta l4proto . th dport . ip saddr @ranges goto to-1 { 203.0.113.5 . tcp . 80 . 198.51.100.0/24 }",
		"test to-1: dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 1 map @endpoints { 203.0.113.5 . tcp . 80 . 0 : 10.244.2.2 . 8080 }",
		"test nat-postrouting: ct status dnat jump remember",
	}
	if got := strings.Join(outs[0].Path, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("path:\n%s", got)
	}
}

func TestNFTablesRefuseWhatTheyDoNotKnow(t *testing.T) {
	const set = "table ip t {\nset s {\ntypeof ip daddr . meta l4proto . th dport\n}\nchain c {\ntype nat hook output priority -100; policy accept;\n"
	for rule, want := range map[string]string{
		"accept":                   "accept",
		"ip daddr 10.0.0.1 accept": "accept",
		"ip daddr 10.0.0.1 log prefix \"x\" drop":                        "log",
		"ip6 daddr fd00::1 drop":                                         "ip6",
		"ip protocol tcp drop":                                           "protocol",
		"tcp dport 80 drop":                                              "tcp",
		"th dport 80 drop":                                               "80",
		"oifname \"eth0\" drop":                                          "oifname",
		"iifname eth0 drop":                                              "quotes",
		"fib daddr type broadcast drop":                                  "local",
		"fib daddr . iif type local drop":                                "type",
		"ct state fresh drop":                                            "fresh",
		"ct status snat drop":                                            "dnat",
		"ct direction both drop":                                         "both",
		"ct mark 1 drop":                                                 "state",
		"meta nfproto ipv4 drop":                                         "nfproto",
		"meta mark set 0x1":                                              "0x1",
		"meta mark & 0x1 > 0x0 drop":                                     ">",
		"numgen inc mod 2 vmap @v":                                       "inc",
		"reject with icmp type host-unreachable":                         "with",
		"masquerade":                                                     "middle",
		"masquerade random":                                              "fully-random",
		"dnat to 10.0.0.1:80":                                            "ip",
		"dnat ip to 10.0.0.1:80":                                         "10.0.0.1:80",
		"dnat ip to ip daddr map @s":                                     "s is by",
		"ip daddr @s drop":                                               "s is by",
		"ip daddr . meta l4proto . th dport vmap @s":                     "s is by",
		"ip daddr . meta l4proto . th dport @s goto nowhere":             "nowhere",
		"update @s { ip saddr timeout 1x : ip daddr . th dport }":        "1x",
		"update @s { ip saddr : ip daddr . th dport }":                   "timeout",
		"update @s { ip saddr timeout 1h }":                              ":",
		"update @s { ip saddr timeout 1h : ip daddr . th dport map @m }": "map",
		"update @s { ip saddr . ip daddr timeout 1h : ip daddr . th dport }": "s is by",
		"update @m { ip saddr timeout 1h : numgen random mod 2 }":            "number",
		"update @m { numgen random mod 2 timeout 1h : ip daddr . th dport }": "number",
		"add @m { ip saddr timeout 1h : ip daddr . th dport }":               "add",
		"ct original ip6 daddr fd00::1 drop":                                 "ip6",
		"ct original ip saddr 10.0.0.1 drop":                                 "saddr",
		"ct original proto-src . ip daddr @n drop":                           "proto-src",
		"ct original proto-dst 80 drop":                                      "80",
		"ct reply ip daddr 10.0.0.1 drop":                                    "reply",
		"ip daddr . ct reply proto-dst @n drop":                              "reply",
		"ip daddr 10.0.0.300 drop":                                           "10.0.0.300",
		"counter name \"x\" drop":                                            "name",
		"drop drop2":                                                         "drop2",
		"ip daddr . th dport 10.0.0.1 . 80 drop":                             "unknown match",
		"ip daddr @nowhere drop\nip daddr . meta l4proto @nowhere accept":    "nowhere is by",
	} {
		if _, err := ParseNFTables(set + rule + "\n}\n}\n"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one that names %s", rule, err, want)
		}
	}
	for text, want := range map[string]string{
		"table inet t {\n}\n":                                                             "inet",
		"table ip t {\n":                                                                  "not closed",
		"table ip t {\n}\ntable ip t {\n}\n":                                              "there already",
		"table ip t {\nchain a {\n}\nchain a {\ndrop\n}\n}\n":                             "there already",
		"table ip t {\nflowtable f {\n}\n}\n":                                             "neither",
		"table ip t {\nset a {\n}\n}\n":                                                   "no type",
		"table ip t {\nset a {\ntype mark\n}\n}\n":                                        "mark",
		"table ip t {\nset a {\ntype ipv4_addr\nauto-merge\n}\n}":                         "property",
		"table ip t {\nset a {\ntype ipv4_addr\nflags constant\n}\n}":                     "constant",
		"table ip t {\nset a {\ntype ipv4_addr\nelements = { 10.0.0.1, 10.0.0.1 }\n}\n}":  "two elements",
		"table ip t {\nset a {\ntype ipv4_addr\nelements = { 10.0.0.1 timeout 1s }\n}\n}": "timeout",
		"table ip t {\nset a {\ntype ipv4_addr\nelements = { 10.0.0.1,\n}\n}":             "bad address",
		"table ip t {\nset a {\ntype ipv4_addr . ipv4_addr\nflags interval\nelements = { 1.1.1.1 . 10.0.0.1-10.0.0.9 }\n}\n}":                 "10.0.0.1-10.0.0.9",
		"table ip t {\nset a {\ntypeof ip daddr . ip saddr\nflags interval\nelements = { 1.1.1.1 . 10.0.0.0/8, 1.1.1.1 . 10.1.0.0/16 }\n}\n}": "overlaps",
		"table ip t {\nmap a {\ntype ipv4_addr : verdict\nelements = { 10.0.0.1 : accept }\n}\n}":                                             "accept",
		"table ip t {\nmap a {\ntype ipv4_addr : verdict\nelements = { 10.0.0.1 : goto b }\n}\n}":                                             "no chain b",
		"table ip t {\nchain a {\ntype route hook output priority 0; policy accept;\n}\n}":                                                    "route",
		"table ip t {\nchain a {\ntype nat hook prerouting priority soon; policy accept;\n}\n}":                                               "soon",
	} {
		if _, err := ParseNFTables(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one that names %s", text, err, want)
		}
	}
}

func TestNFTablesLoopsAndMisplacedStatements(t *testing.T) {
	const head = "table ip t {\nchain out {\ntype nat hook output priority -100; policy accept;\n"
	for _, rest := range []string{
		"jump a\n}\nchain a {\njump b\n}\nchain b {\njump a\n}\n}\n",
		"masquerade fully-random\n}\n}\n",
		"}\nchain f {\ntype filter hook output priority filter; policy accept;\ndnat ip to ip daddr map @m\n}\n}\n",
		"update @m { ip saddr timeout 1h : ip daddr . th dport }\n}\n}\n",
	} {
		if outs, err := mustParseNFT(t, head+rest).Outcomes(host, packet("", "192.168.100.1:1", "1.2.3.4:5"), nil); err == nil {
			t.Errorf("%s: %v", rest, outs)
		}
	}
}

func FuzzParseNFTables(f *testing.F) {
	f.Add(nftTable4)
	f.Fuzz(func(t *testing.T, text string) {
		rs, err := ParseNFTables(text)
		if err != nil {
			return
		}
		// Whatever was understood must be followed to an end, or refused.
		_, _ = rs.Trace(host, packet("eth0", "198.51.100.7:999", "10.96.0.1:80"), nil, func(n int) int { return n - 1 })
	})
}
