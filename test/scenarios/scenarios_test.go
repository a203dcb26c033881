package scenarios

import (
	"flag"
	"fmt"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/test/trace"
)

var update = flag.Bool("update", false, "write plans and rulesets into the scenarios instead of comparing them")

// golden compares a text with a file of the scenario, or writes it there.
func golden(t *testing.T, s *Scenario, name, got string) {
	t.Helper()
	want, _ := s.Golden(name)
	if got == want {
		return
	}
	if *update {
		if err := s.SetGolden(name, got); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("%s differs (run with -update, and read the difference):\n%s", name, firstDifference(want, got))
}

func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := 0; i < len(w) || i < len(g); i++ {
		a, b := "(end)", "(end)"
		if i < len(w) {
			a = w[i]
		}
		if i < len(g) {
			b = g[i]
		}
		if a != b {
			return fmt.Sprintf("line %d\n  want %s\n  got  %s", i+1, a, b)
		}
	}
	return ""
}

func each(t *testing.T, run func(t *testing.T, s *Scenario)) {
	list, err := LoadAll(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		t.Run(s.Name, func(t *testing.T) { run(t, s) })
	}
}

func TestPlans(t *testing.T) {
	each(t, func(t *testing.T, s *Scenario) { golden(t, s, "plan", s.PlanText()) })
}

// TestServiceCIDRs: a scenario's ServiceCIDRs are facts in the mode that uses them,
// and change no other's plans.
func TestServiceCIDRs(t *testing.T) {
	const text = "about\n-- objects.yaml --\nkind: Service\nmetadata: {name: a, namespace: b}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n"
	const cidrs = "---\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/16, 'fd00:10:96::/112']}\n" +
		"---\nkind: ServiceCIDR\nmetadata: {name: more}\nspec: {cidrs: [10.95.0.0/16]}\n"
	without, err := Parse("without", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Parse("with", []byte(text+cidrs))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		mode   string
		family model.Family
		want   string
	}{
		{"nftables", model.IPv4, "[10.95.0.0/16 10.96.0.0/16]"},
		{"nftables", model.IPv6, "[fd00:10:96::/112]"},
		{"iptables", model.IPv4, "[]"},
		{"ipvs", model.IPv4, "[]"},
	} {
		if got := fmt.Sprint(s.SetIn(tc.mode, tc.family).Facts.ServiceCIDRs); got != tc.want {
			t.Errorf("%s, %s: %s, want %s", tc.mode, tc.family, got, tc.want)
		}
	}
	if f := without.FactsIn("nftables", model.IPv4); f.ServiceCIDRs != nil {
		t.Errorf("without any: %v", f.ServiceCIDRs)
	}
	if got, want := s.PlanText(), without.PlanText(); got != want {
		t.Errorf("the plans are others:\n%s", firstDifference(want, got))
	}
}

// TestBadScenarios: a scenario that says something else than its author thinks
// is worse than none.
func TestBadScenarios(t *testing.T) {
	const service = "-- objects.yaml --\nkind: Service\nmetadata: {name: a, namespace: b}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n"
	for text, want := range map[string]string{
		service:                                  "what it is about",
		"about\n":                                "no objects.yaml",
		"about\n" + service + service:            "twice",
		"about\n-- objects.yaml --\nkind: Pod\n": "Pod",
		"about\n-- objects.yaml --\nkind: Service\nspek: {}\n":                                    "spek",
		"about\n-- objects.yaml --\nkind: ServiceCIDR\nspec: {cidr: 10.96.0.0/16}\n":              "cidr",
		"about\n-- objects.yaml --\nkind: Node\nmetadata: {name: x}\n":                            "node1",
		"about\n-- settings.yaml --\nnodePortAddresses: [10.0.0.1]\n" + service:                   "nodePortAddresses",
		"about\n-- settings.yaml --\nmasquerade: true\n" + service:                                "masquerade",
		"about\n" + service + "-- flows --\npod shell tcp\n":                                      "not of the form",
		"about\n" + service + "-- flows --\npod shell -> icmp 1.2.3.4:5 = drop\n":                 "icmp",
		"about\n" + service + "-- flows --\nebpf: pod shell -> tcp 1.2.3.4:5 = drop\n":            "ebpf",
		"about\n" + service + "-- flows --\npod nobody -> tcp 1.2.3.4:5 = drop\n":                 "no such pod",
		"about\n" + service + "-- flows --\nnode shell -> tcp 1.2.3.4:5 = drop\n":                 "no such node",
		"about\n" + service + "-- flows --\npod shell -> tcp 1.2.3.4:5 = nobody kept\n":           "nobody",
		"about\n" + service + "-- flows --\npod shell -> tcp 1.2.3.4:5 = far-shell\n":             "kept or masq",
		"about\n" + service + "-- flows --\npod shell -> tcp 1.2.3.4:5 = far-shell:x kept\n":      "x",
		"about\n" + service + "-- flows --\npod shell -> tcp 1.2.3.4:5 = far-shell half kept\n":   "half",
		"about\n" + service + "-- flows --\nclient fd00::1 -> tcp 1.2.3.4:5 = drop\n":             "fit",
		"about\n" + service + "-- flows --\npod shell -> tcp 1.2.3.4:5 = far-shell kept sticky x": "x",
	} {
		if _, err := Parse("bad", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\nerror %v, want one with %q", text, err, want)
		}
	}
}

// TestFollowNotices: each kind of wrong ruleset makes a flow fail.
func TestFollowNotices(t *testing.T) {
	const text = `about
-- objects.yaml --
kind: Service
metadata: {name: web, namespace: ns}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
kind: EndpointSlice
metadata: {name: web, namespace: ns}
addressType: IPv4
ports: [{name: "", port: 80}]
endpoints: [{addresses: [10.244.1.1], targetRef: {name: a}}, {addresses: [10.244.2.1], targetRef: {name: b}}]
-- flows --
pod shell -> tcp 10.96.0.1:80 = a, b kept
pod shell -> tcp 10.96.0.1:80 = a 30%, b 70% kept
pod shell -> tcp 10.96.0.1:80 = a, b masq
pod shell -> tcp 10.96.0.1:80 = a kept
pod shell -> tcp 10.96.0.1:80 = a, b:81 kept
pod shell -> tcp 10.96.0.1:80 = 3 endpoints kept
pod shell -> tcp 10.96.0.1:80 = a, b kept sticky 10s
pod shell -> tcp 10.96.0.1:80 = reject
pod shell -> tcp 10.96.0.1:80 = drop
pod shell -> tcp 10.96.0.1:80 = none
pod shell -> tcp 10.96.0.1:80 = 2 endpoints kept
`
	s, err := Parse("notices", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := trace.Parse(`*nat
:PREROUTING ACCEPT
:POSTROUTING ACCEPT
-A PREROUTING -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -m statistic --mode random --probability 0.5 -j DNAT --to-destination 10.244.1.1:80
-A PREROUTING -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.244.2.1:80
COMMIT
`)
	if err != nil {
		t.Fatal(err)
	}
	good := map[int]bool{0: true, len(s.Flows) - 1: true}
	for i := range s.Flows {
		if err := s.Follow(&s.Flows[i], rules); (err == nil) != good[i] {
			t.Errorf("%s: %v", s.Flows[i].Text, err)
		}
	}
}
