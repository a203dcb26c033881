package arch

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/sluice-proxy/sluice"

// file is one Go file of the product and what it imports.
type file struct {
	path    string // relative to the root, with slashes
	imports []string
}

func (f file) dir() string { return path.Dir(f.path) }
func (f file) test() bool  { return strings.HasSuffix(f.path, "_test.go") }

// rule says what files may not import, and why. A rule that does not apply to a
// file's tests says so: tests may start programs and make Kubernetes objects.
type rule struct {
	name   string
	why    string
	tests  bool                          // applies to _test.go files too
	broken func(f file, imp string) bool // imp is without the module's path for our own packages ("pkg/plan")
}

// in tells whether p is dir or below it.
func in(p string, dirs ...string) bool {
	for _, d := range dirs {
		if p == d || strings.HasPrefix(p, d+"/") {
			return true
		}
	}
	return false
}

func own(imp string) bool {
	return in(imp, "cmd", "conntrack", "deploy", "examples", "hack", "pkg", "proxier", "test")
}

// product tells whether a file is part of what ships.
func product(f file) bool { return !in(f.dir(), "test", "hack", "examples") }

var proxiers = []string{"proxier/iptables", "proxier/ipvs", "proxier/nftables"}

// kernelImports are the ways into the kernel: netlink, system calls, programs.
// syscall is not among them: errno and signals live there.
var kernelImports = []string{
	"github.com/coreos/go-iptables",
	"github.com/google/nftables",
	"github.com/mdlayher/netlink",
	"github.com/moby/ipvs",
	"github.com/vishvananda/netlink",
	"github.com/vishvananda/netns",
	"golang.org/x/sys/unix",
	"os/exec",
}

// kernelFiles are the files that may know the kernel. A new one is a decision:
// it needs a reason here.
var kernelFiles = []struct{ pattern, why string }{
	{`^proxier/(iptables|ipvs|nftables)/kernel(_[a-z]+)?\.go$`, "the one file of a proxier that acts"},
	{`^proxier/(iptables|ipvs|nftables)/cleanup\.go$`, "probes for what other modes left behind"},
	{`^proxier/internal/xtables/[a-z_]+\.go$`, "runs iptables-restore for iptables and ipvs"},
	{`^proxier/internal/nlbatch/[a-z_]+\.go$`, "sends netlink requests in batches; it knows no objects"},
	{`^proxier/internal/ipset/[a-z_]+\.go$`, "ipsets by netlink; it decides nothing"},
	{`^conntrack/netlink\.go$`, "lists and deletes flows"},
	{`^conntrack/sysctls?\.go$`, "sets nf_conntrack sysctls"},
	{`^pkg/node/[a-z_]+\.go$`, "addresses, links and sysctls of the node"},
	{`^pkg/metrics/nfacct\.go$`, "reads the kernel's counters when metrics are scraped"},
}

// kubernetesTypes are the packages of API objects and clients. component-base,
// klog and k8s.io/utils are libraries and no objects.
var kubernetesTypes = []string{
	"k8s.io/api",
	"k8s.io/apimachinery",
	"k8s.io/client-go",
	"k8s.io/kube-proxy",
}

var rules = []rule{
	{
		name:  "nobody imports app but cmd",
		why:   "app wires everything; whoever imports it depends on everything",
		tests: true,
		broken: func(f file, imp string) bool {
			return in(imp, "pkg/app") && !in(f.dir(), "cmd", "pkg/app")
		},
	},
	{
		name:  "nobody imports cmd",
		why:   "a main package decides nothing that another could need",
		tests: true,
		broken: func(f file, imp string) bool {
			return in(imp, "cmd") && !in(f.dir(), "cmd")
		},
	},
	{
		name: "model imports only sharded",
		why:  "the nouns are at the bottom: everybody may know them, they know nobody",
		broken: func(f file, imp string) bool {
			return in(f.dir(), "pkg/model") && (own(imp) || strings.Contains(imp, ".")) && !in(imp, "pkg/sharded")
		},
	},
	{
		name: "sharded imports the standard library only",
		why:  "a data structure knows nothing of what is stored in it",
		broken: func(f file, imp string) bool {
			return in(f.dir(), "pkg/sharded") && (own(imp) || strings.Contains(imp, "."))
		},
	},
	{
		name: "plan imports model and sharded only",
		why:  "policy is pure: no kernel, no Kubernetes, no clock, no logger",
		broken: func(f file, imp string) bool {
			pure := !own(imp) && !strings.Contains(imp, ".") && !in(imp, "os", "net/http", "log", "syscall")
			return in(f.dir(), "pkg/plan") && !pure && !in(imp, "pkg/model", "pkg/sharded")
		},
	},
	{
		name: "only the border knows Kubernetes",
		why:  "objects become model values in watch and convert; config reads kube-proxy's file, app and cmd make clients and Events, metrics serves component-base's registry",
		broken: func(f file, imp string) bool {
			return in(imp, kubernetesTypes...) && product(f) &&
				!in(f.dir(), "pkg/watch", "pkg/convert", "pkg/config", "pkg/app", "pkg/events", "cmd") &&
				!metricsMayKnow(f, imp)
		},
	},
	{
		name: "only kernel.go, netlink.go and pkg/node know the kernel",
		why:  "decisions stay pure and testable where they cannot act; see kernelFiles",
		broken: func(f file, imp string) bool {
			return in(imp, kernelImports...) && product(f) && !mayKnowKernel(f.path)
		},
	},
	{
		name:  "proxiers never know each other",
		why:   "a mode can be read, replaced and deleted alone; what two share is in proxier/internal",
		tests: true,
		broken: func(f file, imp string) bool {
			for _, p := range proxiers {
				if in(f.dir(), p) && in(imp, proxiers...) && !in(imp, p) {
					return true
				}
			}
			return false
		},
	},
	{
		name: "proxiers know plan and model, never where they come from",
		why:  "a proxier renders plans; state, watch, convert and client-go are the path of an event, not of a rule",
		broken: func(f file, imp string) bool {
			return in(f.dir(), "proxier") && (in(imp, "k8s.io/client-go", "k8s.io/api") ||
				own(imp) && !in(imp, "pkg/plan", "pkg/model", "pkg/sharded", "proxier"))
		},
	},
	{
		name:  "proxier.go knows no proxier",
		why:   "the interface is declared for all, also for those that do not exist yet",
		tests: true,
		broken: func(f file, imp string) bool {
			return f.dir() == "proxier" && in(imp, "proxier")
		},
	},
	{
		name: "reconcile does not know the proxiers",
		why:  "it declares the Sink it needs; conntrack and health ports are sinks as well",
		broken: func(f file, imp string) bool {
			return in(f.dir(), "pkg/reconcile") && in(imp, "proxier", "conntrack", "pkg/watch", "pkg/convert")
		},
	},
	{
		name:  "no package named util, common or helper",
		why:   "such a name says nothing, so everything ends up there",
		tests: true,
		broken: func(f file, _ string) bool {
			return regexp.MustCompile(`^(utils?|commons?|helpers?|misc|shared)$`).MatchString(path.Base(f.dir()))
		},
	},
	{
		name: "what ships does not import test or hack",
		why:  "test code has no contract and no owner in production",
		broken: func(f file, imp string) bool {
			return product(f) && in(imp, "test", "hack", "testing")
		},
	},
	{
		name:  "nobody imports k8s.io/kubernetes",
		why:   "its packages are internal to Kubernetes and move freely; tools are built from hack/tools",
		tests: true,
		broken: func(_ file, imp string) bool {
			return in(imp, "k8s.io/kubernetes")
		},
	},
}

// metricsMayKnow allows what registering metrics needs: component-base hands out
// label sets and versions of apimachinery, never objects.
func metricsMayKnow(f file, imp string) bool {
	return in(f.dir(), "pkg/metrics") && in(imp, "k8s.io/apimachinery/pkg/util", "k8s.io/apimachinery/pkg/version")
}

func mayKnowKernel(p string) bool {
	return slices.ContainsFunc(kernelFiles, func(k struct{ pattern, why string }) bool {
		return regexp.MustCompile(k.pattern).MatchString(p)
	})
}

func TestImports(t *testing.T) {
	files := load(t, os.DirFS(root(t)))
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, v := range violations(r, files) {
				t.Errorf("%s\n\trule: %s, because %s", v, r.name, r.why)
			}
		})
	}
}

// TestRulesCanFail has for every rule a file that breaks it and one that does not.
func TestRulesCanFail(t *testing.T) {
	cases := map[string]struct{ bad, good file }{
		"nobody imports app but cmd":                               {src("pkg/dns/a.go", "pkg/app"), src("cmd/sluice/main.go", "pkg/app")},
		"nobody imports cmd":                                       {src("pkg/app/a.go", "cmd/sluice"), src("cmd/sluice/a.go", "cmd/sluice/x")},
		"model imports only sharded":                               {src("pkg/model/a.go", "k8s.io/api/core/v1"), src("pkg/model/a.go", "pkg/sharded")},
		"sharded imports the standard library only":                {src("pkg/sharded/a.go", "pkg/model"), src("pkg/sharded/a.go", "iter")},
		"plan imports model and sharded only":                      {src("pkg/plan/a.go", "log/slog"), src("pkg/plan/a.go", "pkg/model")},
		"only the border knows Kubernetes":                         {src("pkg/dns/a.go", "k8s.io/api/core/v1"), src("pkg/convert/a.go", "k8s.io/api/core/v1")},
		"only kernel.go, netlink.go and pkg/node know the kernel":  {src("proxier/iptables/compile.go", "os/exec"), src("proxier/iptables/kernel.go", "os/exec")},
		"proxiers never know each other":                           {src("proxier/ipvs/a.go", "proxier/iptables"), src("proxier/ipvs/a.go", "proxier/internal/xtables")},
		"proxiers know plan and model, never where they come from": {src("proxier/ipvs/a.go", "pkg/state"), src("proxier/ipvs/a.go", "pkg/plan")},
		"proxier.go knows no proxier":                              {src("proxier/proxier.go", "proxier/ipvs"), src("proxier/proxier.go", "pkg/plan")},
		"reconcile does not know the proxiers":                     {src("pkg/reconcile/a.go", "proxier/ipvs"), src("pkg/reconcile/a.go", "pkg/state")},
		"no package named util, common or helper":                  {src("pkg/util/a.go"), src("pkg/node/a.go", "fmt")},
		"what ships does not import test or hack":                  {src("pkg/node/a.go", "test/netlab"), src("test/kernel/a.go", "test/netlab")},
		"nobody imports k8s.io/kubernetes":                         {src("test/e2e/a.go", "k8s.io/kubernetes/pkg/proxy"), src("test/e2e/a.go", "k8s.io/client-go/rest")},
	}
	for _, r := range rules {
		c, ok := cases[r.name]
		if !ok {
			t.Errorf("rule %q has no case here", r.name)
			continue
		}
		if len(violations(r, []file{c.bad})) == 0 {
			t.Errorf("rule %q: %s importing %q is not found", r.name, c.bad.path, c.bad.imports)
		}
		if v := violations(r, []file{c.good}); len(v) > 0 {
			t.Errorf("rule %q: %s", r.name, v)
		}
	}
}

// TestModuleGraph keeps Kubernetes itself out of the product's go.mod, and every
// replace directive, which go install PACKAGE@VERSION refuses.
func TestModuleGraph(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root(t), "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		for _, f := range fields {
			if in(f, "k8s.io/kubernetes", "honnef.co/go/tools") || strings.HasPrefix(f, "go.etcd.io/etcd/server") {
				t.Errorf("go.mod: %s: tools belong in hack/tools", strings.TrimSpace(line))
			}
		}
		if len(fields) > 0 && fields[0] == "replace" {
			t.Errorf("go.mod: %s: go install refuses a module with replace", strings.TrimSpace(line))
		}
	}
}

func src(p string, imports ...string) file { return file{p, imports} }

func violations(r rule, files []file) []string {
	var found []string
	for _, f := range files {
		if f.test() && !r.tests {
			continue
		}
		for _, imp := range append(slices.Clone(f.imports), "") { // "": rules about the file alone
			if r.broken(f, imp) {
				found = append(found, fmt.Sprintf("%s imports %q", f.path, imp))
			}
		}
	}
	return found
}

// load reads the import lines of every Go file of the module.
func load(t *testing.T, fsys fs.FS) []file {
	t.Helper()
	var files []file
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "out" || nestedModule(fsys, p)) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		data, err := fs.ReadFile(fsys, p)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, data, parser.ImportsOnly)
		if err != nil {
			return fmt.Errorf("parse %s: %w", p, err)
		}
		imports := []string{}
		for _, spec := range f.Imports {
			imp, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return fmt.Errorf("parse %s: %w", p, err)
			}
			imports = append(imports, strings.TrimPrefix(imp, module+"/"))
		}
		files = append(files, file{p, imports})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 10 {
		t.Fatalf("found %d Go files: this is not the whole tree", len(files))
	}
	return files
}

func nestedModule(fsys fs.FS, dir string) bool {
	_, err := fs.Stat(fsys, path.Join(dir, "go.mod"))
	return err == nil
}

// root is the folder of the module's go.mod.
func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(data), "module "+module+"\n") {
		t.Fatalf("%s is not the module %s", dir, module)
	}
	return dir
}
