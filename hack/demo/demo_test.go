package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/uml"
)

// asDemo makes this test binary be the demo, for tests that need a process.
const asDemo = "SLUICE_TEST_AS_DEMO"

func TestMain(m *testing.M) {
	if os.Getenv(asDemo) != "" {
		main()
	}
	os.Exit(m.Run())
}

// agentProgram builds the agent.
func agentProgram(t *testing.T) string {
	t.Helper()
	if err := netlab.Supported(); err != nil {
		t.Skip(err)
	}
	for _, program := range []string{"iptables", "ip6tables-save", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	path := filepath.Join(t.TempDir(), "sluice")
	if out, err := exec.Command("go", "build", "-race=false", "-o", path, "../../cmd/sluice").CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	return path
}

func TestDemo(t *testing.T) {
	agent := agentProgram(t)
	t.Setenv("TMPDIR", t.TempDir())
	var out, errs bytes.Buffer
	status := execute(options{agent: agent, manifests: "../../examples", mode: "iptables", limit: 10 * time.Minute}, &out, &errs)
	if status != allWell {
		t.Fatalf("status %d\n%s\n%s", status, errs.String(), out.String())
	}
	wantLines(t, out.String(),
		`(?m)^  ok  ClusterIP .* web-1 \d+  web-2 \d+  web-3 \d+ +kept$`,
		`(?m)^  ok  NodePort.* masqueraded: 172\.18\.0\.11$`,
		`(?m)^  ok  externalTrafficPolicy: Local .* web-1 \d+  web-2 \d+ +kept$`,
		`(?m)^  ok  NodePort, on the node itself +127\.0\.0\.1:30080`,
		`(?m)^  ok  sessionAffinity`, `(?m)^  ok  no endpoints .* refused after \d+ µs$`,
		`(?m)^  ok  an endpoint moves.* \d+ ms`, `(?m)^  ok  iptables -t nat -F KUBE-SERVICES`,
		`(?m)^  \$ curl -s localhost:10249/proxyMode\n  iptables$`, `-A KUBE-SVC-[A-Z2-7]{16} `,
		`(?m)^  ok  sluice --cleanup`)
	if strings.Contains(out.String(), "\x1b") {
		t.Error("colour without a terminal")
	}
	compareREADME(t, out.String())
	leavesNothing(t)
}

// TestDemoNFTables shows the mode, with what only it has.
func TestDemoNFTables(t *testing.T) {
	agent := agentProgram(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("SKIPPED, mode nftables is not shown: ", err)
	}
	t.Setenv("TMPDIR", t.TempDir())
	var out, errs bytes.Buffer
	status := execute(options{agent: agent, manifests: "../../examples", extra: "manifests", mode: modeNFTables, limit: 10 * time.Minute}, &out, &errs)
	if status != allWell {
		t.Fatalf("status %d\n%s\n%s", status, errs.String(), out.String())
	}
	wantLines(t, out.String(),
		`(?m)^  ok  ClusterIP .* web-1 \d+  web-2 \d+  web-3 \d+ +kept$`,
		`(?m)^  ok  NodePort, from outside .* masqueraded: 172\.18\.0\.11$`,
		`(?m)^  ok  NodePort, on the node itself +127\.0\.0\.1:30080 `,
		`(?m)^  ok  ClusterIP, unused port +10\.96\.7\.10:81 .* refused after \d+ µs$`,
		`(?m)^  ok  unallocated address +10\.96\.200\.1:80 .* refused after \d+ µs$`,
		`(?m)^  ok  an endpoint moves.* \d+ ms`, `(?m)^  ok  the same for a UDP flow`,
		`(?m)^  ok  nft delete element of a Service, by hand .* sluice_drift_repaired_total 1;`,
		`(?m)^  ok  nft flush ruleset, by hand .* sluice_drift_repaired_total 2;`,
		`(?m)^  ok  the agent starts again .* 0 failed; it finds its tables: 0 changes of them$`,
		`(?m)^  \$ curl -s localhost:10249/proxyMode\n  nftables$`,
		`10\.96\.7\.10 \. tcp \. 80 : goto to-`, `(?m)^ +\d+ \t\tdnat ip to .* map @endpoints$`,
		`(?m)^  sluice_service_packets_total\{.*service="web"\} [1-9]`,
		`(?m)^  ok  SIGTERM: the agent stops, its rules stay +2 tables before, 2 after$`,
		`(?m)^  ok  sluice --cleanup: they go +0 tables$`)
	leavesNothing(t)
}

// wantLines fails, and shows the demo, where a pattern matches nothing.
func wantLines(t *testing.T, text string, patterns ...string) {
	t.Helper()
	for _, want := range patterns {
		if !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("nothing matches %s", want)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
}

// TestDemoIPVS shows the mode on a kernel that has it, which takes a while.
func TestDemoIPVS(t *testing.T) {
	if !uml.Native() {
		if err := uml.Supported(); err != nil {
			t.Skip("SKIPPED, mode ipvs is not shown: this machine's kernel has no IPVS, and ", err)
		}
	}
	agent := agentProgram(t)
	// The race detector does not run in User-Mode Linux.
	self := filepath.Join(filepath.Dir(agent), "demo")
	if out, err := exec.Command("go", "build", "-race=false", "-o", self, ".").CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	var out, errs bytes.Buffer
	status := execute(options{agent: agent, manifests: "../../examples", extra: "manifests", mode: modeIPVS, limit: 15 * time.Minute, self: self}, &out, &errs)
	if status != allWell {
		t.Fatalf("status %d\n%s\n%s", status, errs.String(), out.String())
	}
	text := strings.ReplaceAll(out.String(), "\r", "")
	wantLines(t, text,
		`(?m)^  ok  ClusterIP .* web-1 \d+  web-2 \d+  web-3 \d+ +kept$`,
		`(?m)^  ok  externalTrafficPolicy: Local .* web-1 \d+  web-2 \d+ +kept$`,
		`(?m)^  ok  scheduler wrr, weights 3 1 1 .* web-1 180  web-2 60  web-3 60 `,
		`(?m)^  ok  scheduler sh: by source .* web-\d 100 `,
		`(?m)^  ok  an endpoint with open connections is removed`, `(?m)^  ok  ip link del kube-ipvs0, by hand`,
		`(?m)^  \$ curl -s localhost:10249/proxyMode\n  ipvs$`, `10\.96\.7\.70:80 wrr`,
		`(?m)^  ok  sluice --cleanup`)
}

// compareREADME looks for every line of the demo that the README shows, numbers
// and blanks aside: they differ from run to run.
func compareREADME(t *testing.T, out string) {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, ok := strings.Cut(string(text), "```\nWho answers\n")
	block, _, end := strings.Cut(block, "```")
	if !ok || !end {
		t.Fatal("the README does not show the demo")
	}
	number, blanks := regexp.MustCompile(`\d+`), regexp.MustCompile(` +`)
	plain := func(line string) string {
		line = blanks.ReplaceAllString(strings.TrimSpace(line), " ")
		if head, _, ok := strings.Cut(line, "sessionAffinity"); ok {
			return head // one endpoint of three, whichever
		}
		return number.ReplaceAllString(line, "0")
	}
	shown := map[string]bool{}
	for line := range strings.Lines(out) {
		shown[plain(line)] = true
	}
	for line := range strings.Lines(block) {
		if !shown[plain(line)] {
			t.Errorf("the README shows a line that the demo does not: %s", line)
		}
	}
}

// leavesNothing looks into TMPDIR, which the test has made its own. An agent
// that still runs would have its folder there.
func leavesNothing(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %s %v", left, err)
	}
}

func TestBrokenManifestsFail(t *testing.T) {
	agent := agentProgram(t)
	t.Setenv("TMPDIR", t.TempDir())
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../../examples")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "local-policy.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	broken := bytes.Replace(text, []byte("externalTrafficPolicy: Local\n"), []byte("externalTrafficPolicy: Cluster\n"), 1)
	if err := os.WriteFile(path, broken, 0o644); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	status := execute(options{agent: agent, manifests: dir, mode: "iptables", limit: 10 * time.Minute}, &out, &errs)
	if status != notAsWanted {
		t.Errorf("status %d\n%s\n%s", status, errs.String(), out.String())
	}
	for _, want := range []string{"not as it should be:", "externalTrafficPolicy: Local: ", "the end of the agent's log"} {
		if !strings.Contains(errs.String(), want) {
			t.Errorf("the message does not say %q:\n%s", want, errs.String())
		}
	}
	leavesNothing(t)
}

func TestAgentThatDoesNotStart(t *testing.T) {
	if err := netlab.Supported(); err != nil {
		t.Skip(err)
	}
	t.Setenv("TMPDIR", t.TempDir())
	program := filepath.Join(t.TempDir(), "sluice")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho no such flag >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	status := execute(options{agent: program, manifests: "../../examples", mode: "iptables", limit: time.Minute}, &out, &errs)
	if status != notAsWanted || !strings.Contains(errs.String(), "the agent ended") || !strings.Contains(errs.String(), "no such flag") {
		t.Errorf("status %d: %s", status, errs.String())
	}
	leavesNothing(t)
}

// TestInterrupted stops the demo with Ctrl-C when its first table is there, and
// another one by kill -9: of that one only the temporary folder may remain.
func TestInterrupted(t *testing.T) {
	agent := agentProgram(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Setenv("TMPDIR", t.TempDir())
			cmd := exec.Command(self, "--agent", agent, "--manifests", "../../examples", "--limit", "2m")
			cmd.Env = append(os.Environ(), asDemo+"=1")
			out := &trigger{text: "Who answers", at: make(chan struct{})}
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			select {
			case <-out.at:
				_ = cmd.Process.Signal(sig)
				err = <-ended
			case err = <-ended:
			}
			var exit *exec.ExitError
			switch {
			case sig == syscall.SIGKILL:
				dirs, _ := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "sluice-demo-*"))
				if len(dirs) != 1 {
					t.Errorf("folders of the killed demo: %s", dirs)
				}
			case !errors.As(err, &exit) || exit.ExitCode() != interrupted:
				t.Errorf("ended with %v, not status %d:\n%s", err, interrupted, out.all.String())
			default:
				leavesNothing(t)
			}
			agentGone(t, agent)
		})
	}
}

// agentGone waits until no process runs the agent's program.
func agentGone(t *testing.T, program string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		var found []string
		exes, _ := filepath.Glob("/proc/[0-9]*/exe")
		for _, exe := range exes {
			if to, err := os.Readlink(exe); err == nil && to == program {
				found = append(found, exe)
			}
		}
		if len(found) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent still runs: %s", found)
		}
	}
}

// trigger is a buffer that tells when a text has come.
type trigger struct {
	all  bytes.Buffer
	text string
	at   chan struct{}
	seen bool
}

func (b *trigger) Write(p []byte) (int, error) {
	n, err := b.all.Write(p)
	if !b.seen && strings.Contains(b.all.String(), b.text) {
		b.seen = true
		close(b.at)
	}
	return n, err
}

func TestUnknownMode(t *testing.T) {
	var out, errs bytes.Buffer
	if got := execute(options{mode: "userspace"}, &out, &errs); got != cannotRun || !strings.Contains(errs.String(), "but: iptables, ipvs, nftables") {
		t.Errorf("status %d: %s", got, errs.String())
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	p := &printer{out: &out}
	tab := p.table("WHAT   ", "WHO  ", "HOW")
	tab.add(row{[]string{"µs", "web-1", "kept"}, nil})
	tab.add(row{[]string{"longer than it", "a", ""}, errors.New("nobody came")})
	want := `      WHAT     WHO    HOW
  ok  µs       web-1  kept
  NO  longer than it  a
      nobody came
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
	if err := p.failure(); err == nil || err.Error() != "not as it should be:\n  - longer than it: nobody came" {
		t.Errorf("failure: %v", err)
	}
	if p := (&printer{out: &out, color: true}); p.paint(green, "ok") != "\x1b[32mok\x1b[0m" {
		t.Error("no colour")
	}
}

func TestJudges(t *testing.T) {
	three := tally{answered: 300, servers: map[string]int{"web-1": 100, "web-2": 90, "web-3": 110}, kept: 300}
	if err := three.even(servers); err != nil {
		t.Error(err)
	}
	for name, bad := range map[string]error{
		"one has all":      tally{answered: 300, servers: map[string]int{"web-1": 300}}.even(servers),
		"a fourth answers": three.even(local),
		"not answered":     tally{answered: 299, servers: three.servers, bad: errors.New("refused")}.even(servers),
		"source lost":      tally{answered: 2, kept: 1}.sourceKept(),
		"source not lost":  three.masqueradedBy(hosts().Clients[0].Addrs[0]),
	} {
		if bad == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
