package scenarios

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/nftables"
	"github.com/sluice-proxy/sluice/test/trace"
)

func renderNFTables(s *Scenario, f model.Family) string { return renderCounting(s, f, 0) }

// renderCounting renders with counters for some Service ports.
func renderCounting(s *Scenario, f model.Family, ports int) string {
	return nftables.Render(s.SetIn("nftables", f), nftables.Options{
		Family: f, MasqueradeBit: 14, Detector: proxier.Detector(s.Detector(f)), Traffic: ports})
}

// TestNFTables renders each scenario for the nftables proxier, compares the table
// with the golden one, and follows every flow through it.
func TestNFTables(t *testing.T) {
	each(t, func(t *testing.T, s *Scenario) {
		rules := map[model.Family]Rules{}
		for _, family := range s.Families() {
			text := renderNFTables(s, family)
			golden(t, s, "nftables-"+strings.ToLower(family.String()), text)
			table, err := s.NFTables(text)
			if err != nil {
				t.Fatalf("%s: %v", family, err)
			}
			rules[family] = table
		}
		followAll(t, s, "nftables", rules)
	})
}

// TestNFTablesTraffic: where traffic is counted, flows are the same, and the packet of
// each that is translated is counted once.
func TestNFTablesTraffic(t *testing.T) {
	each(t, func(t *testing.T, s *Scenario) {
		rules := map[model.Family]Rules{}
		for _, family := range s.Families() {
			table, err := s.NFTables(renderCounting(s, family, 1000))
			if err != nil {
				t.Fatalf("%s: %v", family, err)
			}
			rules[family] = table
		}
		followAll(t, s, "nftables", rules)
		for i := range s.Flows {
			f := &s.Flows[i]
			if !f.In("nftables") || f.Expect != Endpoints {
				continue
			}
			outs, err := s.Outcomes(f, rules[f.Family()])
			if err != nil {
				t.Fatal(err)
			}
			counted := strings.Count(strings.Join(outs[0].Path, "\n"), "count-requests: ")
			if counted != 1 {
				t.Errorf("%s: counted %d times; its way:\n  %s", f.Text, counted, strings.Join(outs[0].Path, "\n  "))
			}
		}
	})
}

// TestNFTablesStates: what is no new connection passes or not by its state, and is
// translated and refused by nobody.
func TestNFTablesStates(t *testing.T) {
	s, err := Load("cluster-ip.txtar")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := s.NFTables(renderNFTables(s, model.IPv4))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		state   trace.State
		to      string
		verdict trace.Verdict
	}{
		{trace.Established, "10.244.1.11:8080", trace.Forwarded},
		{trace.Related, "10.244.1.11:8080", trace.Forwarded},
		{trace.Invalid, "10.244.1.11:8080", trace.Dropped},
		{trace.Established, "10.96.0.10:80", trace.Forwarded},
		{trace.Established, "10.96.0.10:81", trace.Forwarded},
	} {
		p := trace.Packet{In: "eth0", State: tc.state, Protocol: "tcp",
			Src: netip.MustParseAddrPort("192.168.100.10:40000"), Dst: netip.MustParseAddrPort(tc.to)}
		outs, err := rules.Outcomes(s.machine(), p, nil)
		if err != nil || len(outs) != 1 || outs[0].Verdict != tc.verdict || outs[0].Translated || outs[0].Masqueraded {
			t.Errorf("state %d to %s: %v, %v; want %v", tc.state, tc.to, outs, err, tc.verdict)
		}
	}
}

// TestNFTablesNotices: a table that differs from the right one by a little makes a
// flow fail, or cannot be read.
func TestNFTablesNotices(t *testing.T) {
	for _, tc := range []struct {
		scenario, old, new string
	}{
		{"affinity", "random mod 5", "random mod 1"},
		{"affinity", "random mod 5", "random mod 2"},
		{"cluster-ip", "map @endpoints", "map @local-endpoints"},
		{"cluster-ip", ". tcp . 80 . 1 : 10.244.2.12 . 8080", ". tcp . 80 . 1 : 10.244.2.12 . 8081"},
		{"cluster-ip", ". tcp . 80 . 1 : 10.244.2.12 . 8080", ". tcp . 80 . 0 : 10.244.2.12 . 8080"},
		{"cluster-ip", "ip saddr != 10.244.0.0/16 meta mark set meta mark | 0x00004000", "counter"},
		{"cluster-ip", "ip saddr != 10.244.0.0/16", "ip saddr 10.244.0.0/16"},
		{"cluster-ip", "@hairpin", "@none"},
		{"cluster-ip", "ip daddr @cluster-ips goto reject-all", "ip daddr @cluster-ips drop"},
		{"cluster-ip", "ip daddr @cluster-ips goto reject-all", "ip daddr @cluster-ips goto reject"},
		{"cluster-ip", "hook postrouting priority srcnat", "hook output priority srcnat"},
		{"cluster-ip", "ct status dnat ip saddr", "ip saddr != 10.0.0.0/8 ip saddr"},
		{"cluster-ip", "vmap @services", "vmap @endpoints"},
		{"affinity", "timeout 3h", "timeout 1h"},
		{"affinity", "timeout 10s", "timeout 20s"},
		{"affinity", "map @affinity", "map @none"},
		{"affinity", "update @affinity", "update @none"},
		{"affinity", "vmap @sticky", "vmap @none"},
		{"affinity", "hook postrouting priority filter", "hook postrouting priority srcnat + 1"},
		{"affinity", "vmap @node-port-sticky", "vmap @none"},
		{"affinity", "10.96.0.131 . tcp . 80 : goto remember-10s", "10.96.0.131 . tcp . 80 : goto remember-3h"},
		{"affinity", "tcp . 30132 : goto remember-3h", "tcp . 30132 : goto remember-10s"},
		{"affinity", "ct original ip daddr . meta", "ip daddr . meta"},
		{"affinity", "ct original proto-dst timeout", "th dport timeout"},
		{"affinity", " : ip daddr . th dport }\n\t}", " : ip saddr . th dport }\n\t}"},
		{"affinity", "hook input priority filter; policy accept;\n\t\tct status dnat jump remember", "hook input priority filter; policy accept;"},
		{"affinity", "nat hook input priority filter", "nat hook prerouting priority filter"},
		{"affinity", "hook postrouting priority filter; policy accept;\n\t\tct status dnat jump remember", "hook postrouting priority filter; policy accept;"},
		{"source-ranges", "198.51.100.0/25", "198.51.100.0/24"},
		{"source-ranges", "@source-ranges goto", "@cluster-ips goto"},
		{"external-local", "fib saddr type local goto port", "ip saddr 127.0.0.1 goto port"},
		{"external-local", "fib saddr type local", "fib daddr type local"},
		{"external-local", "tcp . 30040 : goto", "udp . 30040 : goto"},
		{"node-ports-primary", "172.18.0.11", "172.18.0.12"},
		{"service-cidr", "ip daddr 10.96.0.0/16 goto reject-all", "counter"},
		{"forward-drop", "hook forward", "hook input"},
	} {
		s, err := Load(tc.scenario + ".txtar")
		if err != nil {
			t.Fatal(err)
		}
		text := renderNFTables(s, model.IPv4)
		if !strings.Contains(text, tc.old) {
			t.Errorf("%s: there is no %s", tc.scenario, tc.old)
			continue
		}
		if tc.scenario == "forward-drop" { // it is the policy that drops, whatever our table says
			s.Settings.ForwardPolicy = ""
		}
		rules, err := s.NFTables(strings.ReplaceAll(text, tc.old, tc.new))
		for i := range s.Flows {
			if f := &s.Flows[i]; err == nil && f.In("nftables") && f.Family() == model.IPv4 {
				err = s.Follow(f, rules)
			}
		}
		if err == nil {
			t.Errorf("%s: %s instead of %s is not noticed", tc.scenario, tc.new, tc.old)
		}
	}
}
