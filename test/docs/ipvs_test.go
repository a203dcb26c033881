package docs

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/convert"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/ipvs"
	"github.com/sluice-proxy/sluice/test/scenarios"
	"github.com/sluice-proxy/sluice/test/uml"
)

const (
	operators   = "docs/ipvs.md"
	packetsPath = "proxier/ipvs/README.md"
	example     = "test/scenarios/external-local.txtar" // what the kernel's output is of
)

// options are those that the documents' examples are made with.
func options(s *scenarios.Scenario) ipvs.Options {
	return ipvs.Options{Family: model.IPv4, MasqueradeBit: 14, RandomFully: true, Detector: proxier.Detector(s.Detector(model.IPv4)),
		Schedulers: scenarios.Schedulers, Inside: true}
}

func scenario(t *testing.T, name string) *scenarios.Scenario {
	t.Helper()
	s, err := scenarios.Load(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// compiled gives what all Services of a scenario compile to in ipvs mode.
func compiled(t *testing.T, name string) string {
	t.Helper()
	s := scenario(t, name)
	set, done := s.SetIn("ipvs", model.IPv4), map[model.ServiceName]bool{}
	var b strings.Builder
	for _, p := range set.Sorted() {
		if n := p.PortKey.Service(); !done[n] {
			done[n] = true
			b.WriteString(ipvs.RenderService(set, options(s), n))
		}
	}
	return b.String()
}

// TestQuotedServers compares the virtual servers, addresses and elements of sets
// in the ipvs proxier's README with the scenario whose link stands last before
// them.
func TestQuotedServers(t *testing.T) {
	link := regexp.MustCompile(`\.\./\.\./(test/scenarios/[a-z0-9-]+\.txtar)`)
	shown := regexp.MustCompile(`^(ipvsadm -[Aa] |ip addr add |ipset add )`)
	text, lines := "", 0
	for line := range strings.Lines(read(t, packetsPath)) {
		if m := link.FindStringSubmatch(line); m != nil {
			text = compiled(t, m[1])
		}
		if !shown.MatchString(line) {
			continue
		}
		lines++
		if !strings.Contains("\n"+text, "\n"+line) {
			t.Errorf("%s: the scenario does not compile to %s", packetsPath, line)
		}
	}
	if lines < 20 {
		t.Errorf("found %d lines only", lines)
	}
}

// TestQuotedKernel compares rules, and what programs print, with a kernel on which
// the proxier has run.
func TestQuotedKernel(t *testing.T) { uml.Rerun(t, "^(TestInsideRules|TestInsideListings)$") }

// programmed is a kernel with the example's Services, as a program prints it.
func programmed(t *testing.T, command string) string {
	t.Helper()
	if !uml.Inside() {
		t.Skip("run by TestQuotedKernel, on a kernel with IPVS")
	}
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "lock"))
	h, err := ipvs.Probe(t.Context(), model.IPv4, "legacy")
	if err != nil {
		t.Fatal(err)
	}
	s := scenario(t, example)
	o := options(s)
	o.Programs = h.Programs
	p, err := ipvs.New(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Sync(t.Context(), s.SetIn("ipvs", model.IPv4)); err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(command)
	out, err := exec.CommandContext(t.Context(), words[0], words[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return "\n" + string(out)
}

func TestInsideRules(t *testing.T) {
	have, rules := programmed(t, "iptables-legacy-save"), 0
	for line := range strings.Lines(read(t, packetsPath)) {
		if !strings.HasPrefix(line, "-A ") {
			continue
		}
		rules++
		if !strings.Contains(have, "\n"+line) {
			t.Errorf("%s: the kernel does not have the rule %s", packetsPath, line)
		}
	}
	if rules < 15 {
		t.Errorf("found %d rules only", rules)
	}
}

// TestInsideListings: programs print what docs/ipvs.md says, in any order.
func TestInsideListings(t *testing.T) {
	found := 0
	for _, block := range (document{operators, read(t, operators)}).blocks("") {
		command, shown, ok := strings.Cut(block, "\n")
		command, is := strings.CutPrefix(command, "$ ")
		if !ok || !is || !strings.HasPrefix(command, "ipvsadm ") && !strings.HasPrefix(command, "ipset ") {
			continue
		}
		found++
		have := programmed(t, command)
		var lines []string // without blanks at the end, which ipvsadm prints
		for line := range strings.Lines(have) {
			lines = append(lines, strings.TrimRight(line, " \n"))
		}
		for line := range strings.Lines(shown) {
			if !slices.Contains(lines, strings.TrimSuffix(line, "\n")) {
				t.Errorf("%s: %s does not print %s, but%s", operators, command, line, have)
			}
		}
	}
	if found != 2 {
		t.Errorf("found %d listings", found)
	}
}

// TestSchedulersTable: the table has every scheduler that a kernel can have, and
// names those for which weights make no difference.
func TestSchedulersTable(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| `([a-z]+)` \\| .* \\| (0 only|yes)[^|]* \\| ").FindAllStringSubmatch(read(t, operators), -1)
	var names, unweighted []string
	for _, r := range rows {
		names = append(names, r[1])
		if r[2] == "0 only" {
			unweighted = append(unweighted, r[1])
		}
	}
	slices.Sort(names)
	slices.Sort(unweighted)
	if !slices.Equal(names, scenarios.Schedulers) {
		t.Errorf("%s: the table has %v, not %v", operators, names, scenarios.Schedulers)
	}
	for _, s := range scenarios.Schedulers {
		ignored := strings.Contains(balanceProblems(t, s, "web-1=3"), "takes no notice of weights")
		if ignored != slices.Contains(unweighted, s) {
			t.Errorf("%s: whether scheduler %s takes notice of weights", operators, s)
		}
	}
}

// balanceProblems is what the planner says of a scheduler with weights.
func balanceProblems(t *testing.T, scheduler, weights string) string {
	t.Helper()
	text := "A Service.\n-- objects.yaml --\nkind: Service\nmetadata: {name: web, namespace: ns, annotations: {\"" + convert.AnnotationScheduler + "\": \"" + scheduler +
		"\", \"" + convert.AnnotationWeights + "\": \"" + weights + "\"}}\nspec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 80}]}\n"
	s, err := scenarios.Parse("test", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var problems []string
	for _, p := range s.SetIn("ipvs", model.IPv4).Sorted() {
		problems = append(problems, p.Problems...)
	}
	return strings.Join(problems, "; ")
}

// TestAnnotations: the documents' annotations have the names that are read, and
// values that can be followed.
func TestAnnotations(t *testing.T) {
	known := []string{convert.AnnotationScheduler, convert.AnnotationSchedFlags, convert.AnnotationWeights}
	found := 0
	for _, d := range documents(t) {
		found += check(t, d, `(sluice\.io/[a-z-]*ipvs[a-z-]*)`, "annotation", func(name string) bool { return slices.Contains(known, name) })
		for _, block := range d.blocks("sh") {
			for _, m := range regexp.MustCompile(convert.AnnotationScheduler+`=([a-z]+) `+convert.AnnotationWeights+`='([^']+)'`).FindAllStringSubmatch(block, -1) {
				if problems := balanceProblems(t, m[1], m[2]); problems != "" {
					t.Errorf("%s: %s: %s", d.name, m[0], problems)
				}
			}
		}
	}
	if found < 8 {
		t.Errorf("found %d annotations only", found)
	}
}
