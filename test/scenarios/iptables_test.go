package scenarios

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/test/trace"
)

func render(s *Scenario, f model.Family) string {
	d := s.Detector(f)
	return iptables.Render(s.Set(f), iptables.Options{
		Family: f, MasqueradeBit: 14, RandomFully: true,
		Detector: iptables.Detector{CIDR: d.CIDR, BridgeInterface: d.BridgeInterface, InterfacePrefix: d.InterfacePrefix},
	})
}

// TestIPTables renders each scenario for the iptables proxier, compares the
// ruleset with the golden one, and follows every flow through it.
func TestIPTables(t *testing.T) {
	each(t, func(t *testing.T, s *Scenario) {
		rules := map[model.Family]Rules{}
		for _, family := range s.Families() {
			text := render(s, family)
			golden(t, s, "iptables-"+strings.ToLower(family.String()), text)
			rs, err := s.Rules(text)
			if err != nil {
				t.Fatalf("%s: %v", family, err)
			}
			rules[family] = rs
		}
		followAll(t, s, "iptables", rules)
	})
}

// followAll follows the flows of a mode.
func followAll(t *testing.T, s *Scenario, mode string, rules map[model.Family]Rules) {
	t.Helper()
	for i := range s.Flows {
		f := &s.Flows[i]
		switch {
		case !f.In(mode):
		case rules[f.Family()] == nil:
			t.Errorf("%s: no Service of family %s", f.Text, f.Family())
		default:
			if err := s.Follow(f, rules[f.Family()]); err != nil {
				t.Errorf("%s:\n%v", f.Text, err)
			}
		}
	}
}

// TestIPTablesStates: what is no new connection passes or not by its state, and
// is translated by nobody.
func TestIPTablesStates(t *testing.T) {
	s, err := Load("forward-drop.txtar")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := s.Rules(render(s, model.IPv4))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		state   trace.State
		verdict trace.Verdict
	}{
		{trace.Established, trace.Forwarded},
		{trace.Related, trace.Forwarded},
		{trace.Invalid, trace.Dropped},
	} {
		p := trace.Packet{In: "eth0", State: tc.state, Protocol: "tcp",
			Src: netip.MustParseAddrPort("192.168.100.10:40000"), Dst: netip.MustParseAddrPort("10.244.1.11:8080")}
		outs, err := rules.Outcomes(s.machine(), p, nil)
		if err != nil || len(outs) != 1 || outs[0].Verdict != tc.verdict || outs[0].Translated || outs[0].Masqueraded {
			t.Errorf("state %d: %v, %v; want %v", tc.state, outs, err, tc.verdict)
		}
	}
}
