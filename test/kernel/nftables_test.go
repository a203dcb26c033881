package kernel

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/nftables"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
	"github.com/sluice-proxy/sluice/test/uml"
)

// needNFT skips a test that cannot have the nft program, or network namespaces.
func needNFT(t *testing.T) {
	t.Helper()
	if uml.Inside() {
		t.Skip("run on the machine's own kernel: user-mode Linux has no nat for nftables")
	}
	if err := netlab.Supported(); err != nil {
		t.Skip("SKIPPED, real kernel not tested: ", err)
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("SKIPPED, real kernel not tested: nft is not installed")
	}
}

// programNFTables lets the nftables proxier write its table on the node, with traffic
// counted of some Service ports. It returns how nft calls the table, and what Render
// gives for it.
func programNFTables(t *testing.T, s *scenarios.Scenario, node *netlab.Namespace, f model.Family, traffic int) (table, rendered string) {
	t.Helper()
	o := nftables.Options{Family: f, MasqueradeBit: 14, Detector: proxier.Detector(s.Detector(f)), Traffic: traffic}
	var p proxier.Proxier
	err := node.Do(func() (err error) {
		p, err = nftables.New(o)
		return err
	})
	if err != nil {
		t.Skipf("SKIPPED, nftables not tested: %v", err)
	}
	set := s.SetIn("nftables", f)
	program(t, node, p, set)
	rendered = nftables.Render(set, o)
	return strings.TrimSuffix(strings.TrimPrefix(strings.SplitAfter(rendered, "\n")[0], "table "), " {\n"), rendered
}

// TestNFTablesText: what Render gives, and packets are followed through, is what nft
// lists of the table that the proxier has written. nft can read that again.
func TestNFTablesText(t *testing.T) {
	needNFT(t)
	list, err := scenarios.LoadAll("../scenarios")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		t.Run(s.Name, func(t *testing.T) { compareTables(t, s, 0) })
	}
	for _, name := range []string{"external-local", "dual-stack", "affinity"} {
		s, err := scenarios.Load("../scenarios/" + name + ".txtar")
		if err != nil {
			t.Fatal(err)
		}
		t.Run(name+" counted", func(t *testing.T) { compareTables(t, s, 1000) })
	}
}

func compareTables(t *testing.T, s *scenarios.Scenario, traffic int) {
	t.Helper()
	lab := buildCluster(t, s)
	node, elsewhere := lab.Host(scenarios.NodeName), lab.Host("node2")
	for _, f := range s.Families() {
		table, rendered := programNFTables(t, s, node, f, traffic)
		if strings.Contains(rendered, "update @") {
			compareByChain(t, node, elsewhere, table, rendered)
			continue
		}
		listed, err := node.Run(t.Context(), "nft", append([]string{"list", "table"}, strings.Fields(table)...)...)
		if err != nil {
			t.Fatal(err)
		}
		compareListing(t, parseListing(rendered), parseListing(listed))
		if _, err := elsewhere.RunInput(t.Context(), listed, "nft", "-c", "-f", "-"); err != nil {
			t.Errorf("nft cannot read what it has listed: %v", err)
		}
	}
}

// compareByChain compares a table with affinity, object by object. nft aborts (1.0.6,
// and later ones have the same lines in netlink_parse_dynset) when it lists a rule
// that notes what it looks up in a map, and cannot read such a rule.
func compareByChain(t *testing.T, node, elsewhere *netlab.Namespace, table, rendered string) {
	t.Helper()
	if _, err := node.Run(t.Context(), "nft", append([]string{"list", "table"}, strings.Fields(table)...)...); err == nil {
		t.Error("this nft lists tables with affinity: compare them like others")
	}
	have := listing{}
	for what, want := range parseListing(rendered) {
		words := append([]string{"list"}, strings.Fields(what)[0])
		words = append(append(words, strings.Fields(table)...), strings.Fields(what)[1])
		out, err := node.Run(t.Context(), "nft", words...)
		sticky := strings.Contains(want, "update @")
		switch {
		case sticky != (err != nil):
			t.Errorf("nft %s: error %v", strings.Join(words, " "), err)
		case sticky:
			have[what] = want
			wrong := "table " + table + " {\n\tchain c {\n\t\t" + strings.ReplaceAll(want, "\n", "\n\t\t") + "\n\t}\n}\n"
			if _, err := elsewhere.RunInput(t.Context(), wrong, "nft", "-c", "-f", "-"); err == nil || !strings.Contains(err.Error(), "unexpected map") {
				t.Errorf("this nft reads rules that note what they look up: %v", err)
			}
		default:
			for what, text := range parseListing(out) {
				have[what] = text
			}
		}
	}
	compareListing(t, parseListing(rendered), have)
}

// listing is the objects of a table by kind and name, "chain services", in a form that
// can be compared.
type listing map[string]string

// parseListing takes a table's text apart. Elements are put in order; sets that are
// empty are left out, and numbers of counters.
func parseListing(text string) listing {
	out := listing{}
	what, empty := "", false
	var content []string
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		line := strings.TrimSpace(lines[i])
		words := strings.Fields(line)
		switch {
		case len(words) == 3 && words[2] == "{":
			what, content, empty = words[0]+" "+words[1], nil, words[0] != "chain"
		case line == "}":
			if what != "" && !empty {
				out[what] = strings.Join(content, "\n")
			}
			what = ""
		case strings.HasPrefix(line, "elements = {"):
			for !strings.HasSuffix(line, "}") {
				i++
				line += " " + strings.TrimSpace(lines[i])
			}
			elements := strings.Split(strings.TrimSuffix(strings.TrimPrefix(line, "elements = {"), "}"), ",")
			for i := range elements {
				elements[i] = strings.TrimSuffix(strings.TrimSpace(elements[i]), " counter packets 0 bytes 0")
			}
			slices.Sort(elements)
			content, empty = append(content, elements...), false
		case line != "" && what != "":
			content = append(content, normal.Replace(line))
		}
	}
	return out
}

// normal takes away what differs without a meaning: the kernel counts, nft forgets
// what it is that maps of verdicts are asked for, and it has no words for a priority
// that is so far from the one with a name.
var normal = strings.NewReplacer(
	"priority srcnat + 50;", "priority 150;",
	"counter packets 0 bytes 0", "counter",
	"type ipv4_addr . inet_proto . inet_service : verdict", "typeof ip daddr . meta l4proto . th dport : verdict",
	"type ipv6_addr . inet_proto . inet_service : verdict", "typeof ip6 daddr . meta l4proto . th dport : verdict",
	"type inet_proto . inet_service : verdict", "typeof meta l4proto . th dport : verdict",
)

func compareListing(t *testing.T, rendered, listed listing) {
	t.Helper()
	for what, want := range rendered {
		if got := listed[what]; got != want {
			t.Errorf("%s\nrendered:\n%s\nlisted:\n%s", what, want, got)
		}
	}
	for what, text := range listed {
		if _, ok := rendered[what]; !ok {
			t.Errorf("%s is listed, but not rendered:\n%s", what, text)
		}
	}
}
