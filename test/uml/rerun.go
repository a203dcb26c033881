package uml

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// insideVariable tells a test binary that Rerun has started it.
const insideVariable = "SLUICE_UML_INSIDE"

// Inside says whether this process was started by Rerun: on a kernel with IPVS,
// as root, and with nobody else's network in reach.
func Inside() bool { return os.Getenv(insideVariable) != "" }

// Native says whether the machine's own kernel has IPVS that this process may
// use. The module is loaded if it can be.
func Native() bool {
	if os.Geteuid() != 0 {
		return false
	}
	// Asking for a family makes the kernel load its module.
	if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
		return false
	}
	_, err := os.Stat("/proc/net/ip_vs")
	return err == nil
}

// Rerun runs the calling package's tests whose names match the pattern (that of
// go test -run) once more on a kernel with IPVS, and makes of each a subtest of
// t with the same name, output and result. It skips t, loudly, where there is no
// such kernel. It is an error if the pattern matches no test, or if a test does
// not come to its end.
//
// Where go test -run names subtests of t ("-run TestX/TestInner/case"), only those
// are run inside.
//
// A kernel of the machine itself that has IPVS is used directly, in namespaces of
// its own. Otherwise a User-Mode Linux of its own is booted for each call; its
// one core does best with few processes, and few calls of Rerun.
//
// The tests that are run again ask Inside, and skip themselves otherwise, or
// they would fail where they are started first.
func Rerun(t *testing.T, pattern string) {
	t.Helper()
	if Inside() {
		t.Fatal("BUG: Rerun inside of Rerun")
	}
	RerunIn(t, Machine{}, pattern)
}

// RerunIn is Rerun in a certain machine. Its Dir is ignored; its Modules and
// Memory are, where the machine's own kernel is used.
func RerunIn(t *testing.T, m Machine, pattern string) {
	t.Helper()
	native := Native()
	if f := flag.Lookup("test.run"); f != nil { // whoever asks for one subtest gets one
		if rest, ok := strings.CutPrefix(f.Value.String(), t.Name()+"/"); ok {
			pattern = rest
		}
	}
	if err := Supported(); err != nil && !native {
		t.Skip("SKIPPED, not tested on a kernel with IPVS: this machine's has none, and ", err)
	}
	ctx, cancel := t.Context(), context.CancelFunc(func() {})
	args := []string{"-test.v=test2json", "-test.run=" + pattern}
	if deadline, ok := t.Deadline(); ok {
		// The tests inside are to end, and say where they are, before the machine
		// is killed, and that before this process is.
		left := time.Until(deadline)
		args = append(args, fmt.Sprintf("-test.timeout=%s", (left*8/10).Round(time.Millisecond)))
		ctx, cancel = context.WithTimeoutCause(ctx, left*9/10, errors.New("the tests' time is over"))
	} else {
		args = append(args, "-test.timeout=0")
	}
	defer cancel()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	binary, err := buildTest(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	m.Dir = dir
	m.Readable = append(m.Readable, moduleOf(dir))
	m.Env = append(m.Env, insideVariable+"=1")
	argv := append([]string{binary}, args...)
	replay(t, func(out io.Writer) (int, error) {
		if native {
			return runNative(ctx, &m, argv, out)
		}
		return Run(ctx, m, argv, out)
	})
}

// moduleOf is the folder of the module that a folder belongs to: tests read files
// of other packages.
func moduleOf(dir string) string {
	for d := dir; d != "/"; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d
		}
	}
	return dir
}

// replay shows a run of a test binary as subtests of t while it goes on.
func replay(t *testing.T, start func(out io.Writer) (int, error)) {
	t.Helper()
	root := newNode("")
	p := newParser(root)
	var code int
	var err error
	go func() {
		code, err = start(p)
		p.close()
	}()
	tests := root.play(t)
	switch {
	case err != nil:
		t.Error(err)
	case tests == 0:
		t.Errorf("no test was run (exit status %d)", code)
	case code != 0 && !t.Failed():
		t.Errorf("exit status %d, though no test failed", code)
	}
}

// runNative runs the command on the machine's own kernel, where what it does to
// the network and to mounts disappears with it.
func runNative(ctx context.Context, m *Machine, argv []string, out io.Writer) (int, error) {
	bin, err := os.MkdirTemp("", "uml")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(bin)
	links := map[string]string{}
	legacyLinks(links)
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(bin, name)); err != nil {
			return 0, err
		}
	}
	cmd := exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", `ip link set lo up && exec "$@"`, "sh"}, argv...)...)
	cmd.Dir = m.Dir
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin", "XTABLES_LOCKFILE="+filepath.Join(bin, "xtables.lock"))
	cmd.Env = append(cmd.Env, m.Env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return 0, fmt.Errorf("killed: %w", context.Cause(ctx))
	case errors.As(err, &exit):
		return exit.ExitCode(), nil
	}
	return 0, err
}
