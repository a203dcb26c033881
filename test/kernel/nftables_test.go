package kernel

import (
	"os/exec"
	"regexp"
	"slices"
	"strconv"
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
// lists of the table that the proxier has written. nft can read that again, but for what
// is dialled by conntrack's account.
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
		listed, err := node.Run(t.Context(), "nft", append([]string{"list", "table"}, strings.Fields(table)...)...)
		if err != nil {
			t.Fatal(err)
		}
		compareListing(t, parseListing(rendered), parseListing(listed))
		readAgain(t, elsewhere, listed)
	}
}

// unread are the rules that nft 1.0.6 lists, but cannot read: they are in tables of
// Services with affinity.
const unread = "update @affinity"

// readAgain has nft read what it has listed. If it cannot, then for no other reason than
// the rules with what is unread, and what is left without them it can.
func readAgain(t *testing.T, elsewhere *netlab.Namespace, listed string) {
	t.Helper()
	check := func(text string) error {
		_, err := elsewhere.RunInput(t.Context(), text, "nft", "-c", "-f", "-")
		return err
	}
	err := check(listed)
	if err == nil {
		return // a later nft, perhaps
	}
	lines := strings.Split(listed, "\n")
	reasons := readError.FindAllStringSubmatch(err.Error(), -1)
	if reasons == nil {
		t.Errorf("nft cannot read what it has listed: %v", err)
	}
	for _, r := range reasons {
		n, _ := strconv.Atoi(r[1])
		if line := lines[n-1]; !strings.Contains(line, unread) || !strings.HasPrefix(r[2], "datatype mismatch: expected concatenation of ") {
			t.Errorf("nft cannot read %s: %s", strings.TrimSpace(line), r[2])
		}
	}
	rest := slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, unread) })
	if err := check(strings.Join(rest, "\n")); err != nil {
		t.Errorf("nft cannot read the rest of what it has listed: %v", err)
	}
}

var readError = regexp.MustCompile(`/dev/stdin:([0-9]+):[0-9]+-[0-9]+: Error: (.*)`)

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

// normal takes away what differs without a meaning: the kernel counts.
var normal = strings.NewReplacer("counter packets 0 bytes 0", "counter")

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
