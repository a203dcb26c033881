package scenarios

import (
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/iptables"
	"github.com/sluice-proxy/sluice/test/trace"
)

// TestIPTables renders each scenario for the iptables proxier, compares the
// ruleset with the golden one, and follows every flow through it.
func TestIPTables(t *testing.T) {
	each(t, func(t *testing.T, s *Scenario) {
		rules := map[model.Family]*trace.Ruleset{}
		for _, family := range s.Families() {
			d := s.Detector(family)
			text := iptables.Render(s.Set(family), iptables.Options{
				Family: family, MasqueradeBit: 14, RandomFully: true,
				Detector: iptables.Detector{CIDR: d.CIDR, BridgeInterface: d.BridgeInterface, InterfacePrefix: d.InterfacePrefix},
			})
			golden(t, s, "iptables-"+strings.ToLower(family.String()), text)
			rs, err := trace.Parse(text)
			if err != nil {
				t.Fatalf("%s: %v", family, err)
			}
			rules[family] = rs
		}
		for i := range s.Flows {
			f := &s.Flows[i]
			if !f.In("iptables") {
				continue
			}
			if rules[f.Family()] == nil {
				t.Errorf("%s: no Service of family %s", f.Text, f.Family())
				continue
			}
			if err := s.Follow(f, rules[f.Family()]); err != nil {
				t.Errorf("%s:\n%v", f.Text, err)
			}
		}
	})
}
