package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/yaml"

	"github.com/sluice-proxy/sluice/pkg/config"
)

const root = "../.."

// document is a Markdown file.
type document struct {
	name string // from the root
	text string
}

// documents are all of the project's, but those of nested modules.
func documents(t *testing.T) []document {
	t.Helper()
	var out []document
	for _, pattern := range []string{"*.md", "*/*.md", "*/*/*.md", "*/*/*/*.md"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			name, _ := filepath.Rel(root, f)
			if !strings.HasPrefix(name, "out/") {
				out = append(out, document{name, read(t, name)})
			}
		}
	}
	if len(out) < 15 {
		t.Fatalf("found %d documents: this is not the whole tree", len(out))
	}
	return out
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func exists(name string) bool {
	_, err := os.Stat(filepath.Join(root, name))
	return err == nil
}

// blocks returns the code blocks of a language ("" for those without).
func (d document) blocks(language string) (out []string) {
	var block []string
	inside, wanted := false, false
	for line := range strings.Lines(d.text) {
		fence, is := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case is && !inside:
			inside, wanted, block = true, fence == language, nil
		case is:
			if wanted {
				out = append(out, strings.Join(block, ""))
			}
			inside = false
		case inside:
			block = append(block, line)
		}
	}
	return out
}

// check reports every match of a pattern (its last group) that is not good.
func check(t *testing.T, d document, pattern, what string, good func(string) bool) (found int) {
	t.Helper()
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(d.text, -1) {
		found++
		if s := m[len(m)-1]; !good(s) {
			t.Errorf("%s: there is no %s %q", d.name, what, s)
		}
	}
	return found
}

// foreignFlags are flags of other programs that documents show.
var foreignFlags = []string{
	"help", "version", // cobra's and component-base's; see cmd/sluice
	"server-side", "skip-phases", "type", // kubectl, kubeadm
	"preserve-credentials", // nsenter
	"noflush", "random-fully", "ctstate", "set-xmark", "dport", "comment",
	"match-set", "map-set", "map-mark", "reject-with", "stats", // iptables's, ipvsadm's
	"mode", "probability", "mark", "src-type", "dst-type", "to-destination", // iptables; mode is ours as well
	"token-auth-file", "profiles",
}

func TestFlags(t *testing.T) {
	flags := pflag.NewFlagSet("sluice", pflag.ContinueOnError)
	config.NewFlags().AddTo(flags)
	found := 0
	for _, d := range documents(t) {
		if strings.HasPrefix(d.name, "test/bench/") {
			continue // that program's flags are others
		}
		found += check(t, d, "(?:^|[\\s`(])--([a-z][a-z-]+[a-z])", "flag", func(name string) bool {
			return flags.Lookup(name) != nil || slices.Contains(foreignFlags, name)
		})
	}
	if found < 30 {
		t.Errorf("found %d flags only", found)
	}
	if flags.Lookup("no-such-flag") != nil {
		t.Error("every flag is there")
	}
	// What the README claims of flags that it does not name one by one.
	for _, name := range []string{"windows-service", "network-name", "source-vip", "enable-dsr", "healthz-port", "boot-id-file", "ipvs-scheduler"} {
		if flags.Lookup(name) == nil {
			t.Errorf("the README says that kube-proxy's --%s is there", name)
		}
	}
}

func TestTargets(t *testing.T) {
	makefile := read(t, "Makefile")
	found := 0
	for _, d := range documents(t) {
		found += check(t, d, "(?m)(?:`make |^make )([a-z]+)(?:`|\\s*$|\\s+#|\\s+[A-Z]+=)", "target", func(name string) bool {
			return regexp.MustCompile("(?m)^" + name + ":").MatchString(makefile)
		})
	}
	if found < 5 {
		t.Errorf("found %d targets only", found)
	}
}

func TestMetrics(t *testing.T) {
	known := map[string]bool{}
	for line := range strings.Lines(read(t, "pkg/metrics/testdata/metrics.txt")) {
		known[strings.Fields(line)[0]] = true
	}
	found := 0
	for _, d := range documents(t) {
		found += check(t, d, `\b((?:sluice|kubeproxy)_[a-z_]+[a-z])`, "metric", func(name string) bool { return known[name] })
	}
	if found < 8 {
		t.Errorf("found %d metrics only", found)
	}
}

// TestPages looks for the pages' paths in the sources of who serves them.
func TestPages(t *testing.T) {
	var sources string
	for _, dir := range []string{"pkg/debug", "pkg/health"} {
		files, _ := filepath.Glob(filepath.Join(root, dir, "*.go"))
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			sources += string(text)
		}
	}
	found := 0
	for _, d := range documents(t) {
		found += check(t, d, "(?:localhost)?:(?:10249|10256)(/[a-zA-Z/]+)", "page", func(p string) bool {
			p = strings.TrimSuffix(p, "/")
			for _, variable := range []string{"/NAMESPACE/NAME", "/default/front"} {
				p = strings.TrimSuffix(p, variable)
			}
			return strings.Contains(sources, p)
		})
	}
	if found < 8 {
		t.Errorf("found %d pages only", found)
	}
}

// TestFiles follows links, and looks for what stands in backquotes and looks like
// a file of ours.
func TestFiles(t *testing.T) {
	links, quoted := 0, 0
	for _, d := range documents(t) {
		dir := path.Dir(d.name)
		links += check(t, d, `\]\(([^)#:]+)(?:#[^)]*)?\)`, "file", func(to string) bool { return exists(path.Join(dir, to)) })
		quoted += check(t, d, "`((?:cmd|pkg|proxier|conntrack|test|hack|deploy|docs|examples)/[a-z0-9/_.-]+)`", "file", func(name string) bool {
			return exists(name)
		})
	}
	if links < 20 || quoted < 30 {
		t.Errorf("found %d links and %d names of files only", links, quoted)
	}
}

// TestAnchors checks links within a document.
func TestAnchors(t *testing.T) {
	for _, d := range documents(t) {
		check(t, d, `\]\(#([^)]+)\)`, "heading", func(anchor string) bool {
			for line := range strings.Lines(d.text) {
				if title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
					if strings.ReplaceAll(strings.ToLower(strings.TrimSpace(title)), " ", "-") == anchor {
						return true
					}
				}
			}
			return false
		})
	}
}

// TestNames looks for exported names that documents mention as package.Name.
func TestNames(t *testing.T) {
	packages := map[string]string{"app": "pkg/app", "state": "pkg/state", "plan": "pkg/plan", "model": "pkg/model",
		"reconcile": "pkg/reconcile", "watch": "pkg/watch", "convert": "pkg/convert", "iptables": "proxier/iptables", "ipvs": "proxier/ipvs"}
	names := map[string]bool{}
	for short, dir := range packages {
		for _, name := range exported(t, dir) {
			names[short+"."+name] = true
		}
	}
	found := 0
	for _, d := range documents(t) {
		found += check(t, d, "`((?:app|state|plan|model|reconcile|watch|convert|iptables|ipvs)\\.[A-Z][A-Za-z]+)`", "name", func(name string) bool { return names[name] })
	}
	if found < 5 {
		t.Errorf("found %d names only", found)
	}
}

func exported(t *testing.T, dir string) (out []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no sources in %s: %v", dir, err)
	}
	for _, f := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), f, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for name := range parsed.Scope.Objects {
			if ast.IsExported(name) {
				out = append(out, name)
			}
		}
	}
	return out
}

// TestQuotedRules compares the rules in the iptables proxier's README with the
// scenario whose link stands last before them.
func TestQuotedRules(t *testing.T) {
	const name = "proxier/iptables/README.md"
	scenario, rules := "", 0
	link := regexp.MustCompile(`\.\./\.\./(test/scenarios/[a-z0-9-]+\.txtar)`)
	for line := range strings.Lines(read(t, name)) {
		if m := link.FindStringSubmatch(line); m != nil {
			scenario = read(t, m[1])
		}
		if !strings.HasPrefix(line, "-A ") {
			continue
		}
		rules++
		if !strings.Contains(scenario, "\n"+line) {
			t.Errorf("%s: the scenario has no rule %s", name, line)
		}
	}
	if rules < 20 {
		t.Errorf("found %d rules only", rules)
	}
}

// TestQuotedTables compares what blocks of nft's language in the nftables proxier's
// README show with the scenario whose link stands last before them. What the README
// has of kernels is test/kernel's to compare.
func TestQuotedTables(t *testing.T) {
	const name = "proxier/nftables/README.md"
	scenario, inside, found := "", false, 0
	link := regexp.MustCompile(`\.\./\.\./(test/scenarios/[a-z0-9-]+\.txtar)`)
	for line := range strings.Lines(read(t, name)) {
		if m := link.FindStringSubmatch(line); m != nil {
			_, scenario, _ = strings.Cut(read(t, m[1]), "-- nftables-ipv4 --\n")
		}
		switch {
		case line == "```nft\n":
			inside = true
		case strings.HasPrefix(line, "```"):
			inside = false
		case inside:
			found++
			if !strings.Contains("\n"+scenario, "\n"+line) {
				t.Errorf("%s: the scenario's table does not have %s", name, line)
			}
		}
	}
	if found < 5 {
		t.Errorf("found %d lines only", found)
	}
}

// TestQuotedCommands keeps the README's way into a cluster and back the one that
// deploy/README.md explains.
func TestQuotedCommands(t *testing.T) {
	long := read(t, "deploy/README.md")
	found := 0
	for _, block := range (document{"README.md", read(t, "README.md")}).blocks("sh") {
		for line := range strings.Lines(block) {
			if strings.HasPrefix(line, "kubectl ") && !strings.HasPrefix(line, "kubectl annotate ") {
				found++
				if !strings.Contains(long, line) {
					t.Errorf("README.md: deploy/README.md does not have %s", line)
				}
			}
		}
	}
	if found < 5 {
		t.Errorf("found %d commands only", found)
	}
	if n := strings.Count(read(t, "deploy/sluice.yaml"), " image: "); n != 2 {
		t.Errorf("README.md says that the image's name stands twice in deploy/sluice.yaml; it does %d times", n)
	}
}

// TestConfiguration loads the documents' configurations, and compares the
// README's SluiceConfiguration with the defaults that it claims to show.
func TestConfiguration(t *testing.T) {
	found := 0
	for _, d := range documents(t) {
		for _, block := range d.blocks("yaml") {
			if !strings.Contains(block, "kind: "+config.SluiceKind) {
				continue
			}
			found++
			file := filepath.Join(t.TempDir(), "config.yaml")
			text := "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n---\n"
			given := load(t, file, text+block)
			if len(given.Warnings) > len(load(t, file, text).Warnings) {
				t.Errorf("%s: %s", d.name, given.Warnings)
			}
			given.Sluice.Manifests = ""
			a, errA := yaml.Marshal(given.Sluice)
			b, errB := yaml.Marshal(load(t, file, text).Sluice)
			if errA != nil || errB != nil || string(a) != string(b) {
				t.Errorf("%s: these are not the defaults:\n%s\nthese are:\n%s", d.name, a, b)
			}
			fields := map[string]any{}
			if err := yaml.Unmarshal([]byte(block), &fields); err != nil || fmt.Sprint(keys(fields)) != fmt.Sprint(keysOf(t, b)) {
				t.Errorf("%s: shows fields %s, not all of %s", d.name, keys(fields), keysOf(t, b))
			}
		}
	}
	if found != 1 {
		t.Errorf("found %d configurations", found)
	}
}

func load(t *testing.T, file, text string) *config.Config {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	fs := pflag.NewFlagSet("sluice", pflag.ContinueOnError)
	f := config.NewFlags()
	f.AddTo(fs)
	if err := fs.Parse([]string{"--config=" + file}); err != nil {
		t.Fatal(err)
	}
	cfg, err := f.Load()
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return cfg
}

func keysOf(t *testing.T, text []byte) []string {
	t.Helper()
	m := map[string]any{}
	if err := yaml.Unmarshal(text, &m); err != nil {
		t.Fatal(err)
	}
	return keys(m)
}

func keys(m map[string]any) (out []string) {
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// TestDecisions: the list has every page, and every page the same parts.
func TestDecisions(t *testing.T) {
	list := read(t, "docs/decisions/README.md")
	pages, _ := filepath.Glob(filepath.Join(root, "docs/decisions/0*.md"))
	for i, p := range pages {
		name := filepath.Base(p)
		if !strings.HasPrefix(name, fmt.Sprintf("%04d-", i+1)) {
			t.Errorf("%s is the %dth decision", name, i+1)
		}
		if !strings.Contains(list, "]("+name+")") {
			t.Errorf("docs/decisions/README.md does not list %s", name)
		}
		for _, part := range []string{"\n## Context\n", "\n## Choice\n", "\n## What we gave up\n"} {
			if !strings.Contains(read(t, "docs/decisions/"+name), part) {
				t.Errorf("%s has no part %q", name, strings.TrimSpace(part))
			}
		}
	}
	if len(pages) < 8 {
		t.Errorf("found %d decisions only", len(pages))
	}
}

// TestExamples reads every manifest strictly, as the API server would.
func TestExamples(t *testing.T) {
	files, _ := filepath.Glob(filepath.Join(root, "examples/*.yaml"))
	list := read(t, "examples/README.md")
	kinds := map[string]int{}
	for _, f := range files {
		name := filepath.Base(f)
		if !strings.Contains(list, "`"+name+"`") {
			t.Errorf("examples/README.md does not list %s", name)
		}
		for _, doc := range strings.Split(read(t, "examples/"+name), "\n---\n") {
			var kind struct{ Kind string }
			if err := yaml.Unmarshal([]byte(doc), &kind); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			kinds[kind.Kind]++
			into := map[string]any{"Service": &corev1.Service{}, "EndpointSlice": &discoveryv1.EndpointSlice{}, "Node": &corev1.Node{}}[kind.Kind]
			if into == nil {
				t.Errorf("%s: kind %q", name, kind.Kind)
			} else if err := yaml.UnmarshalStrict([]byte(doc), into); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if kinds["Service"] < 6 || kinds["EndpointSlice"] < 6 || kinds["Node"] != 1 {
		t.Errorf("found %v", kinds)
	}
}

// TestChecksCanFail gives each pattern something that is not there.
func TestChecksCanFail(t *testing.T) {
	d := document{"x.md", "```sh\nmake nothing\n```\ntext\n```\nother\n```\n"}
	if got := d.blocks("sh"); len(got) != 1 || got[0] != "make nothing\n" {
		t.Errorf("blocks: %q", got)
	}
	var fake testing.T // only its Errorf is used
	if check(&fake, d, "(?m)^make ([a-z]+)", "target", func(string) bool { return false }) != 1 || !fake.Failed() {
		t.Error("a target that is not there is not found")
	}
}
