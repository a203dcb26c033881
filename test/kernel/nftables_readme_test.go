package kernel

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/test/scenarios"
)

const packetsPath = "../../proxier/nftables/README.md"

// shown is a block of the README that a test writes: the comment before it says what
// it shows.
var shown = regexp.MustCompile("(?s)(<!-- (path|table) ([a-z0-9-]+)(?:: ([^\n]*))? -->\n+```\n)(.*?)(```\n)")

// compareREADME compares the blocks of a kind with what they should be, or writes them.
func compareREADME(t *testing.T, kind string, least int, content func(t *testing.T, scenario, flow string) string) {
	t.Helper()
	text, err := os.ReadFile(packetsPath)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	now := shown.ReplaceAllStringFunc(string(text), func(block string) string {
		m := shown.FindStringSubmatch(block)
		if m[2] != kind {
			return block
		}
		found++
		want := content(t, m[3], m[4])
		if m[5] != want && !*update {
			t.Errorf("%s %s: %s; run this test with -update, and read the difference:\n%s\nit is\n%s", kind, m[3], m[4], m[5], want)
		}
		return m[1] + want + m[6]
	})
	if found < least {
		t.Errorf("found %d blocks only", found)
	}
	if *update {
		if err := os.WriteFile(packetsPath, []byte(now), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNFTablesREADMETable: the README shows a scenario's table, with rules that stand
// there several times written once. That nft lists it so is TestNFTablesText's to say.
func TestNFTablesREADMETable(t *testing.T) {
	compareREADME(t, "table", 1, func(t *testing.T, name, _ string) string {
		s, err := scenarios.Load("../scenarios/" + name + ".txtar")
		if err != nil {
			t.Fatal(err)
		}
		text, ok := s.Golden("nftables-ipv4")
		if !ok {
			t.Fatalf("scenario %s has no table", name)
		}
		return once(text)
	})
}

// once writes lines that follow each other and are the same as one.
func once(text string) string {
	var b strings.Builder
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i := 0; i < len(lines); {
		n := 1
		for i+n < len(lines) && lines[i+n] == lines[i] {
			n++
		}
		b.WriteString(lines[i])
		if n > 1 {
			fmt.Fprintf(&b, " # %d times", n)
		}
		b.WriteByte('\n')
		i += n
	}
	return b.String()
}

// TestNFTablesREADMEPaths: the README shows which rules the first packet of a flow
// meets in the kernel.
func TestNFTablesREADMEPaths(t *testing.T) {
	needNFT(t)
	compareREADME(t, "path", 3, func(t *testing.T, name, text string) string {
		var b strings.Builder
		is := func(f *scenarios.Flow) bool { return f.Text == text }
		pathsOf(t, name, model.IPv4, is, func(_ *scenarios.Scenario, _ *scenarios.Flow, _ string, path []visit) {
			for _, v := range path {
				b.WriteString(v.String() + "\n")
			}
		})
		if b.Len() == 0 {
			t.Errorf("scenario %s has no flow %s", name, text)
		}
		return b.String()
	})
}

// String gives the rule, and the verdict if the rule does not say it.
func (v visit) String() string {
	text := v.chain + ": " + normal.Replace(v.rule)
	if v.verdict != "continue" && !strings.HasSuffix(v.rule, v.verdict) {
		text += "   (" + v.verdict + ")"
	}
	return text
}
