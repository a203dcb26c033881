package uml

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

func supported(t *testing.T) {
	t.Helper()
	if err := Supported(); err != nil {
		t.Skip("SKIPPED, User-Mode Linux not tested: ", err)
	}
}

// TestRun: output and exit status are the command's, the host's files can be
// read and, but for one folder, not be written.
func TestRun(t *testing.T) {
	supported(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("of the host\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Three megabytes without a line break, for what is lost when a buffer is full.
	name := filepath.Base(filepath.Dir(dir))
	script := `cat in && echo of the guest >out && ! touch /usr/x 2>/dev/null && ! touch /etc/x 2>/dev/null && touch /tmp/` + name + `.x &&
		head -c 3000000 /dev/zero | tr '\0' x && echo && echo $EXTRA && iptables -V && exit 7`
	var out bytes.Buffer
	code, err := Run(t.Context(), Machine{Dir: dir, Writable: dir, Env: []string{"EXTRA=extra"}}, []string{"sh", "-c", script}, &out)
	if err != nil || code != 7 {
		t.Errorf("exit status %d, %v; want 7", code, err)
	}
	lines := strings.SplitN(out.String(), "\n", 4)
	if len(lines) != 4 || lines[0] != "of the host" || lines[1] != strings.Repeat("x", 3000000) || lines[2] != "extra" ||
		!strings.Contains(lines[3], "legacy") {
		t.Errorf("%d bytes of output, not what the command wrote: %.300s", out.Len(), out.String())
	}
	if got, err := os.ReadFile(filepath.Join(dir, "out")); err != nil || string(got) != "of the guest\n" {
		t.Errorf("the guest's file: %q, %v", got, err)
	}
	if _, err := os.Stat("/tmp/" + name + ".x"); err == nil {
		t.Error("the guest wrote into the host's /tmp")
	}
}

func TestShared(t *testing.T) {
	got := shared([]string{"/tmp/a/b", "/usr/x", "/tmp/a", "/tmpx", "/tmp/ab", "/tmp/a"})
	if want := []string{"/tmp/a", "/tmp/ab"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestKilled: a machine whose command does not end lives no longer than the
// context, and nothing of it remains.
func TestKilled(t *testing.T) {
	supported(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	out := writerFunc(func(p []byte) {
		if bytes.Contains(p, []byte("hanging")) {
			cancel(why)
		}
	})
	_, err := Run(ctx, Machine{Memory: 256, Modules: []string{}}, []string{"sh", "-c", "echo hanging; sleep 1000"}, out)
	if !errors.Is(err, why) {
		t.Errorf("error %v, want %v", err, why)
	}
}

// TestNoBoot: a machine that does not come up says why.
func TestNoBoot(t *testing.T) {
	supported(t)
	for what, want := range map[string]struct {
		m    Machine
		argv string
		text string
	}{
		"module":  {Machine{Memory: 256, Modules: []string{"no_such_module"}}, "true", "no_such_module"},
		"program": {Machine{Memory: 256, Modules: []string{}}, "no-such-program", "no-such-program"},
		"memory":  {Machine{Memory: 1, Modules: []string{}}, "true", "ended before"},
	} {
		_, err := Run(t.Context(), want.m, []string{want.argv}, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want.text) {
			t.Errorf("bad %s: error %v, want one with %q", what, err, want.text)
		}
	}
}

// TestRerun: this package's tests run inside, in their own names.
func TestRerun(t *testing.T) {
	Rerun(t, "^TestInside$")
}

func TestInside(t *testing.T) {
	if !Inside() {
		t.Skip("run by TestRerun, on a kernel with IPVS")
	}
	t.Run("ip_vs", func(t *testing.T) {
		data, err := os.ReadFile("/proc/net/ip_vs")
		if err != nil || !strings.HasPrefix(string(data), "IP Virtual Server") {
			t.Errorf("/proc/net/ip_vs: %q, %v", data, err)
		}
		if !Native() {
			t.Error("Native does not see it")
		}
	})
	t.Run("dummy", func(t *testing.T) {
		d := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "test0"}}
		if err := netlink.LinkAdd(d); err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkDel(d); err != nil {
			t.Error(err)
		}
	})
	t.Run("modprobe", func(t *testing.T) {
		if out, err := exec.Command("modprobe", "ip_vs_rr").CombinedOutput(); err != nil {
			t.Errorf("modprobe: %v: %s", err, out)
		}
	})
	t.Run("folder", func(t *testing.T) {
		for _, file := range []string{"uml_test.go", "../../go.mod"} {
			if _, err := os.Stat(file); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("iptables", func(t *testing.T) {
		out, err := exec.Command("iptables", "-V").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "legacy") {
			t.Errorf("iptables -V: %v: %s", err, out)
		}
	})
}

// mustFail lists tests that fail, by names that are patterns for Rerun. They
// are run in a process of its own, which is to fail.
const failVariable = "SLUICE_UML_FAIL"

// TestRerunFails: what goes wrong inside fails outside.
func TestRerunFails(t *testing.T) {
	supported(t)
	out, err := again(t, "TestFailing", "yes")
	if err == nil {
		t.Error("the run succeeded")
	}
	wantText(t, out,
		"--- PASS: TestFailing/TestInsideFails/passes (",
		"--- FAIL: TestFailing/TestInsideFails/fails (",
		"this is why",
		"--- SKIP: TestFailing/TestInsideFails/skips (",
		"not here",
		"--- FAIL: TestFailing/TestInsideFails/panics (",
		"panic: at the end",
	)
}

func TestFailing(t *testing.T) {
	if os.Getenv(failVariable) == "" {
		t.Skip("run by TestRerunFails")
	}
	RerunIn(t, Machine{Memory: 256, Modules: []string{"ip_vs"}}, "^TestInsideFails$")
}

func TestInsideFails(t *testing.T) {
	if !Inside() {
		t.Skip("run by TestRerunFails, on a kernel with IPVS")
	}
	t.Run("passes", func(*testing.T) {})
	t.Run("fails", func(t *testing.T) { t.Error("this is why") })
	t.Run("skips", func(t *testing.T) { t.Skip("not here") })
	t.Run("panics", func(*testing.T) { panic("at the end") })
}

// again runs a test of this package in a process of its own.
func again(t *testing.T, name, value string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.run=^"+name+"$")
	cmd.Env = append(os.Environ(), failVariable+"="+value)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func wantText(t *testing.T, out string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(out, text) {
			t.Errorf("no %q in the output:\n%s", text, out)
		}
	}
}

// replays are runs of a test binary, and what must come of them.
var replays = map[string]struct {
	out  string
	code int
	err  error

	ok   bool
	want []string
}{
	"good": {out: "%=== RUN   TestA\n    a.go:1: hello\n%--- PASS: TestA (0.00s)\nPASS\n", ok: true,
		want: []string{"--- PASS: TestReplayed/TestA (", "hello"}},
	"parallel": {out: "%=== RUN   TestA\n%=== RUN   TestA/x\n%=== PAUSE TestA/x\n%=== RUN   TestA/y\n%=== PAUSE TestA/y\n" +
		"%=== CONT  TestA/x\n%=== CONT  TestA/y\nfrom y\n%=== NAME  TestA/x\nfrom x\n" +
		"%    --- FAIL: TestA/y (0.00s)\n%    --- SKIP: TestA/x (0.00s)\n%--- FAIL: TestA (0.00s)\nFAIL\n", code: 1,
		want: []string{"--- SKIP: TestReplayed/TestA/x (", "--- FAIL: TestReplayed/TestA/y ("}},
	"half a line": {out: "%=== RUN   TestA\nhalf%--- FAIL: TestA (0.00s)\nFAIL\n", code: 1,
		want: []string{"half", "--- FAIL: TestReplayed/TestA ("}},
	"like a result": {out: "%=== RUN   TestA\n--- PASS: TestA (0.00s)\n%--- FAIL: TestA (0.00s)\nFAIL\n", code: 1,
		want: []string{"--- FAIL: TestReplayed/TestA ("}},
	"no end": {out: "%=== RUN   TestA\n%=== RUN   TestA/x\nlast words", err: errors.New("went away"),
		want: []string{"--- FAIL: TestReplayed/TestA/x (", "last words", "before this test did", "went away"}},
	"no tests":       {out: "testing: warning: no tests to run\nPASS\n", want: []string{"no test was run"}},
	"nothing":        {want: []string{"no test was run"}},
	"exit status":    {out: "%=== RUN   TestA\n%--- PASS: TestA (0.00s)\nPASS\nexit in TestMain\n", code: 3, want: []string{"exit status 3"}},
	"died in a test": {out: "%=== RUN   TestA\n", code: 2, want: []string{"before this test did"}},
}

func TestReplay(t *testing.T) {
	for name, r := range replays {
		t.Run(name, func(t *testing.T) {
			out, err := again(t, "TestReplayed", name)
			if (err == nil) != r.ok {
				t.Errorf("%v", err)
			}
			wantText(t, out, r.want...)
		})
	}
}

func TestReplayed(t *testing.T) {
	r, ok := replays[os.Getenv(failVariable)]
	if !ok {
		t.Skip("run by TestReplay")
	}
	replay(t, func(w io.Writer) (int, error) {
		_, err := fmt.Fprint(w, strings.ReplaceAll(r.out, "%", string(rune(mark))))
		return r.code, errors.Join(r.err, err)
	})
}

type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}
