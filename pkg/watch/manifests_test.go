package watch

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/state"
)

const serviceYAML = "apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: ns}\nspec: {clusterIP: %s, ports: [{port: 80}]}\n"

func yamlService(name, ip string) string { return fmt.Sprintf(serviceYAML, name, ip) }

func modelName(name string) model.ServiceName { return model.ServiceName{Namespace: "ns", Name: name} }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// handNotifier is a notifier that the test works by hand.
type handNotifier chan string

func (n handNotifier) changed() <-chan string { return n }
func (n handNotifier) renew()                 {}
func (n handNotifier) close()                 {}

// bench is a folder of manifests that is followed in a synctest bubble.
type bench struct {
	t      *testing.T
	dir    string
	store  *state.Store
	notify handNotifier
	log    bytes.Buffer

	mu       sync.Mutex
	problems []string
}

// newBench starts following what files say. It is called within a bubble.
func newBench(t *testing.T, files map[string]string) *bench {
	b := &bench{t: t, dir: t.TempDir(), store: state.NewStore(), notify: make(handNotifier)}
	for name, text := range files {
		b.put(name, text)
	}
	m := &Manifests{Dir: b.dir, Store: b.store, NodeName: "me", Log: slog.New(slog.NewTextHandler(&b.log, nil)),
		Problems: func(object, text string) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.problems = append(b.problems, strings.TrimPrefix(object, b.dir+"/")+": "+text)
		},
		notify: func(string) notifier { return b.notify }}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	synctest.Wait()
	return b
}

func (b *bench) put(name, text string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) remove(name string) {
	b.t.Helper()
	if err := os.Remove(filepath.Join(b.dir, name)); err != nil {
		b.t.Fatal(err)
	}
}

// tell is the kernel's notice, and then time passes.
func (b *bench) tell(name string, d time.Duration) {
	b.notify <- name
	b.pass(d)
}

func (b *bench) pass(d time.Duration) {
	time.Sleep(d) // the bubble's time
	synctest.Wait()
}

func (b *bench) has(want string) {
	b.t.Helper()
	if got := summary(b.store.Current()); got != want {
		b.t.Errorf("the store has\n%s\nwant\n%s", got, want)
	}
}

func (b *bench) heard(want ...string) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	got := strings.Join(b.problems, "\n")
	b.problems = nil
	if got != strings.Join(want, "\n") {
		b.t.Errorf("heard\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}

func TestManifestsFollowFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, map[string]string{
			"a.yaml": yamlService("web", "10.96.0.1") + `---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: ns, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.0.0.1]}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: ignored}
`,
			"b.yml":        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Node\n  metadata: {name: me}\n- apiVersion: v1\n  kind: Node\n  metadata: {name: other}\n",
			".hidden.yaml": "{", "notes.txt": "{", "c.yaml~": "{",
		})
		b.has("web: [10.96.0.1] web-1[10.0.0.1]")
		shot := b.store.Current()
		if !shot.Synced() || shot.Node() == nil || shot.Node().Name != "me" {
			t.Errorf("synced %v, node %v", shot.Synced(), shot.Node())
		}
		sl := shot.Get(modelName("web")).Slices[0]
		if len(sl.Ports) != 1 || sl.Ports[0].Name != "" {
			t.Errorf("a port without a name is defaulted as by the API server: %+v", sl.Ports)
		}
		b.heard()
		if n := strings.Count(b.log.String(), "ConfigMap"); n != 1 {
			t.Errorf("ConfigMap is named %d times in the log", n)
		}

		b.put("c.json", `{"apiVersion":"v1","kind":"Service","metadata":{"name":"db","namespace":"ns"},"spec":{"clusterIP":"10.96.0.2"}}`)
		b.tell("c.json", settle)
		b.has("db: [10.96.0.2]\nweb: [10.96.0.1] web-1[10.0.0.1]")
		if b.store.Current().Get(modelName("web")) != shot.Get(modelName("web")) {
			t.Error("an entry of an untouched file is not shared")
		}
		b.remove("c.json")
		b.remove("b.yml")
		b.tell("c.json", settleGone)
		b.has("web: [10.96.0.1] web-1[10.0.0.1]")
		if b.store.Current().Node() != nil {
			t.Error("the Node is still there")
		}
		before := b.store.Current()
		b.put("a.yaml", "# a comment\n"+string(must(os.ReadFile(filepath.Join(b.dir, "a.yaml")))))
		b.tell("a.yaml", settle)
		if b.store.Current() != before {
			t.Error("a change that means nothing was published")
		}
	})
}

func TestManifestsWithServiceCIDRs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const cidr = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: %s}\nspec: {cidrs: [%s]}\n"
		b := newBench(t, map[string]string{
			"a.yaml": yamlService("web", "10.96.0.1") + "---\n" + fmt.Sprintf(cidr, "kubernetes", "10.96.0.0/16, 'fd00:10:96::/112'"),
			"b.yaml": "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDRList\nitems:\n" +
				"- {apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: more}, spec: {cidrs: [10.97.0.0/16]}}\n",
		})
		b.has("web: [10.96.0.1]\nServiceCIDRs: [10.96.0.0/16 10.97.0.0/16 fd00:10:96::/112]")
		b.heard()
		before := b.store.Current()
		b.put("b.yaml", fmt.Sprintf(cidr, "more", "10.97.0.1/16")) // means the same
		b.tell("b.yaml", settle)
		if b.store.Current() != before {
			t.Error("a change that means nothing was published")
		}
		b.put("b.yaml", fmt.Sprintf(cidr, "more", "10.98.0.0/16, x")+"---\n"+fmt.Sprintf(cidr, "", "10.99.0.0/16")+
			"---\n"+fmt.Sprintf(cidr, "kubernetes", "10.99.0.0/16"))
		b.tell("b.yaml", settle)
		b.has("web: [10.96.0.1]\nServiceCIDRs: [10.96.0.0/16 10.98.0.0/16 fd00:10:96::/112]")
		b.heard(`b.yaml:1: ServiceCIDR more: spec.cidrs[1]: "x" is not a CIDR`,
			"b.yaml:6: ServiceCIDR without metadata.name is ignored",
			"b.yaml:11: ServiceCIDR kubernetes is ignored: it is already in a.yaml:6")
		b.remove("b.yaml")
		b.put("a.yaml", yamlService("web", "10.96.0.1"))
		b.tell("a.yaml", settleGone)
		b.has("web: [10.96.0.1]")
	})
}

// TestManifestsWithoutNotice: what nobody tells is found by polling.
func TestManifestsWithoutNotice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, map[string]string{"a.yaml": yamlService("web", "10.96.0.1")})
		b.put("b.yaml", yamlService("db", "10.96.0.2"))
		b.pass(pollEvery + settle)
		b.has("db: [10.96.0.2]\nweb: [10.96.0.1]")
	})
}

func TestManifestsHalfWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		whole := yamlService("web", "10.96.0.1") + "---\n" + yamlService("db", "10.96.0.2")
		b := newBench(t, map[string]string{"a.yaml": whole})
		const both = "db: [10.96.0.2]\nweb: [10.96.0.1]"
		b.has(both)
		before := b.store.Current()

		// Truncate, write a part that parses, write the rest, 15 ms apart.
		b.put("a.yaml", "")
		b.tell("a.yaml", 15*time.Millisecond)
		b.put("a.yaml", yamlService("web", "10.96.0.1"))
		b.tell("a.yaml", 15*time.Millisecond)
		b.put("a.yaml", whole)
		b.tell("a.yaml", time.Second)
		// Truncate, and write only after a while.
		b.put("a.yaml", "")
		b.tell("a.yaml", settleEmpty/2)
		b.put("a.yaml", whole)
		b.tell("a.yaml", time.Second)
		// Rename away and write anew.
		b.remove("a.yaml")
		b.tell("a.yaml", settleGone/2)
		b.put("a.yaml", whole)
		b.tell("a.yaml", time.Second)
		if b.store.Current() != before {
			t.Error("an editor's steps were seen")
		}
		b.has(both)

		b.put("a.yaml", "") // emptied in earnest
		b.tell("a.yaml", settleEmpty)
		b.has("")
	})
}

func TestManifestsThatDoNotParse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, map[string]string{"a.yaml": yamlService("web", "10.96.0.1"), "b.yaml": "apiVersion: v1\nkind: Service\nspec:\n  ports: 3\n"})
		b.has("web: [10.96.0.1]")
		if !b.store.Current().Synced() {
			t.Error("one bad file keeps the rest from being served")
		}
		b.heard("b.yaml:4: cannot unmarshal number into Go struct field ServiceSpec.spec.ports of type []v1.ServicePort")
		b.put("a.yaml", yamlService("web", "10.96.0.9")+"---\n{")
		b.tell("a.yaml", settle)
		b.has("web: [10.96.0.1]")
		b.heard("a.yaml:6: did not find expected node content; the file's last good content stays in force")
		b.tell("a.yaml", settle)
		b.heard() // once is enough
		b.put("a.yaml", yamlService("web", "10.96.0.9"))
		b.tell("a.yaml", settle)
		b.has("web: [10.96.0.9]")
		b.heard()
	})
}

func TestManifestsWithProblems(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, map[string]string{
			"a.yaml": "---\n" + yamlService("web", "10.96.0.1"),
			"b.yaml": yamlService("web", "10.96.0.2") + "---\n" + yamlService("db", "''") + "---\napiVersion: v1\nkind: Service\nspec:\n  clusterIP: 10.96.0.3\n",
			"c.yaml": "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: ns}\nspec:\n  clusterIP: 10.96.0.4\n  clusterIPS: []\n  externalIPs: [127.0.0.1]\n",
		})
		b.has("web: [10.96.0.1]\nx: [10.96.0.4]")
		b.heard(
			"b.yaml:6: Service ns/db is ignored: no clusterIP yet",
			"b.yaml:11: Service without metadata.name is ignored",
			"c.yaml:6: unknown field \"spec.clusterIPS\"",
			"c.yaml:1: Service ns/x: spec.externalIPs[0]: \"127.0.0.1\" is not a usable IP address",
			"b.yaml:1: Service ns/web is ignored: it is already in a.yaml:2",
		)
		b.remove("a.yaml") // now the second one counts
		b.tell("a.yaml", settleGone)
		b.has("web: [10.96.0.2]\nx: [10.96.0.4]")
	})
}

func TestManifestsFolder(t *testing.T) {
	m := &Manifests{Dir: filepath.Join(t.TempDir(), "none"), Store: state.NewStore(), Log: slog.New(slog.DiscardHandler)}
	if err := m.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "read manifests") {
		t.Errorf("a folder that is not there: %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, map[string]string{"a.yaml": yamlService("web", "10.96.0.1")})
		if err := os.Rename(b.dir, b.dir+"-away"); err != nil {
			t.Fatal(err)
		}
		b.pass(3 * pollEvery)
		b.has("web: [10.96.0.1]")
		if err := os.Rename(b.dir+"-away", b.dir); err != nil {
			t.Fatal(err)
		}
		b.put("a.yaml", yamlService("web", "10.96.0.2"))
		b.pass(pollEvery + settle)
		b.has("web: [10.96.0.2]")
		if n := strings.Count(b.log.String(), "cannot be read"); n != 1 {
			t.Errorf("told %d times:\n%s", n, &b.log)
		}
	})
}

// TestManifestsByTheKernel uses the real fsnotify, with a ConfigMap's way of
// swapping a folder, too.
func TestManifestsByTheKernel(t *testing.T) {
	dir := t.TempDir()
	at := func(parts ...string) string { return filepath.Join(append([]string{dir}, parts...)...) }
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Mkdir(at("..1"), 0o700))
	check(os.WriteFile(at("..1", "web.yaml"), []byte(yamlService("web", "10.96.0.1")), 0o600))
	check(os.Symlink("..1", at("..data")))
	check(os.Symlink("..data/web.yaml", at("web.yaml")))
	store := state.NewStore()
	m := &Manifests{Dir: dir, Store: store, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.Run(ctx) }()
	sees(t, store, "web: [10.96.0.1]")

	start := time.Now()
	check(os.WriteFile(at("tmp"), []byte(yamlService("db", "10.96.0.2")), 0o600))
	check(os.Rename(at("tmp"), at("db.yaml")))
	sees(t, store, "db: [10.96.0.2]\nweb: [10.96.0.1]")

	check(os.Mkdir(at("..2"), 0o700))
	check(os.WriteFile(at("..2", "web.yaml"), []byte(yamlService("web", "10.96.0.3")), 0o600))
	check(os.Symlink("..2", at("..tmp")))
	check(os.Rename(at("..tmp"), at("..data")))
	sees(t, store, "db: [10.96.0.2]\nweb: [10.96.0.3]")
	t.Logf("two changes seen after %s (polling alone would take up to %s)", time.Since(start), 2*pollEvery)
	cancel()
	check(<-done)
}

func TestParseManifestLines(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		line int
		want string
	}{
		"wrong type deep inside": {"# c\n---\napiVersion: v1\nkind: Service\nspec:\n  ports:\n  - port: 80\n  - name: x\n    port: \"81\"\n", 9, "cannot unmarshal string"},
		"number for a string":    {"apiVersion: v1\nkind: Service\nspec:\n  ports:\n  - name: 12\n", 5, "cannot unmarshal number"},
		"tab":                    {"apiVersion: v1\nkind: Service\nmetadata:\n\tname: x\n", 4, "cannot start any token"},
		"unclosed list":          {"apiVersion: v1\nkind: Pod\n---\na: [\nb: c\n", 4, "did not find expected"},
		"not an object":          {"\n\nhello\n", 3, "not a Kubernetes object"},
		"no kind":                {"---\nspec: {}\n", 2, "without kind"},
		"alias to itself":        {"apiVersion: v1\nkind: Service\nspec: &a\n  x: *a\n", 3, "too large or too deep"},
		"not a number of JSON":   {"apiVersion: v1\nkind: Service\nspec:\n  healthCheckNodePort: .inf\n", 4, "not a JSON number"},
		"items of a List":        {"apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  spec:\n    clusterIP: [1]\n", 7, "cannot unmarshal array"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseManifests([]byte(test.text))
			bad, ok := err.(*parseError)
			if !ok || bad.line != test.line || !strings.Contains(bad.text, test.want) {
				t.Errorf("got %+v, want line %d, %q", err, test.line, test.want)
			}
		})
	}
	p, err := parseManifests([]byte("apiVersion: v1\nkind: Service\nmetadata: &m\n  name: x\n  labels: &l {a: b}\n  annotations:\n    <<: *l\n    d: e\nspec:\n  ports:\n  - port: 1\n    prot: TCP\n  ports: []\n"))
	if err != nil || len(p.objects) != 1 || fmt.Sprint(p.warnings) != `[{12 unknown field "spec.ports[0].prot"} {13 duplicate field "spec.ports"}]` {
		t.Errorf("%v %+v", err, p)
	}
}

// FuzzManifests: any bytes either parse into objects with lines, or are refused
// with one.
func FuzzManifests(f *testing.F) {
	f.Add([]byte(yamlService("a", "10.0.0.1") + "---\napiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Node}]\n"))
	f.Add([]byte("a: &a [*a]\n<<: *a\n"))
	f.Add([]byte("apiVersion: v1\nkind: Service\nmetadata: {labels: &l {a: b}, annotations: {<<: [*l, *l], c: 1.5e3}}\n"))
	f.Add([]byte("{\"apiVersion\":\"discovery.k8s.io/v1\",\"kind\":\"EndpointSlice\",\"ports\":[{}]}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parseManifests(data)
		lines := bytes.Count(data, []byte("\n")) + bytes.Count(data, []byte("\r")) + 8
		if err != nil {
			bad, ok := err.(*parseError)
			if !ok || bad.line < 1 || bad.line > lines || bad.text == "" {
				t.Errorf("%#v of %d lines", err, lines)
			}
			return
		}
		d := newFolder("", "me", slog.New(slog.DiscardHandler), nil)
		for _, m := range p.objects {
			if m.line < 1 || m.line > lines {
				t.Errorf("line %d of %d", m.line, lines)
			}
			if o, _ := d.convert(m); o != nil && (o.name == "" || o.empty()) {
				t.Errorf("an object without name or content: %+v", o)
			}
		}
	})
}
