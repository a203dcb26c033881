package docs

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestManifestsCommands runs what the README and the examples tell to type for
// the agent on manifests, word by word; only the last command is tried again
// until the agent, which a person gives a moment, has started.
func TestManifestsCommands(t *testing.T) {
	for _, program := range []string{"unshare", "nsenter", "ip", "curl", "iptables"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	if out, err := exec.Command("unshare", "-Urn", "true").CombinedOutput(); err != nil {
		t.Skipf("unshare -Urn: %v: %s", err, out)
	}
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", filepath.Join(dir, "bin/sluice"), root+"/cmd/sluice").CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	examples, err := filepath.Abs(filepath.Join(root, "examples"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("ln", "-s", examples, filepath.Join(dir, "examples")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, name := range []string{"README.md", "examples/README.md"} {
		t.Run(name, func(t *testing.T) { runCommands(t, dir, manifestsBlock(t, name)) })
	}
}

func manifestsBlock(t *testing.T, name string) string {
	t.Helper()
	for _, block := range (document{name, read(t, name)}).blocks("sh") {
		if strings.Contains(block, "--manifests=examples") {
			return strings.TrimPrefix(block, "make build\n")
		}
	}
	t.Fatalf("%s does not say how to run the agent on manifests", name)
	return ""
}

func runCommands(t *testing.T, dir, block string) {
	start, ask, ok := strings.Cut(strings.TrimSpace(block), "\n")
	if !ok || strings.Contains(ask, "\n") {
		t.Fatalf("two commands are expected: %s", block)
	}
	// A private xtables lock: /run may be somebody else's.
	cmd := exec.Command("sh", "-c", "export XTABLES_LOCKFILE=$PWD/lock\n"+start+`
		for try in $(seq 200); do `+ask+` >page 2>&1; grep -q "^default/web:http " page && break; sleep 0.05; done
		cat page
		kill $!; wait`)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "default/web:http ") {
		t.Errorf("%v:\n%s", err, out)
	}
}
