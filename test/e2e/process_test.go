package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// process is a program that runs in a namespace until it is stopped. It dies
// with the test binary, however that ends: a test that times out leaves nothing.
type process struct {
	name string
	log  string // file of what it writes
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of its end; valid when done is closed
}

// spawn passes commands to the one thread that starts them. The kernel sends
// the death signal when the thread ends that started a process, so that thread
// has to live as long as the tests.
var spawn = func() chan<- func() {
	calls := make(chan func())
	go func() {
		runtime.LockOSThread()
		for call := range calls {
			call()
		}
	}()
	return calls
}()

// start runs a program in a namespace. Its output is appended to logFile.
func start(ns *netlab.Namespace, logFile string, env []string, program string, args ...string) (*process, error) {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p := &process{name: program, log: logFile, done: make(chan struct{})}
	p.cmd = exec.Command("nsenter", append([]string{"--net=" + ns.Path(), "--", program}, args...)...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	spawn <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// stop sends a signal and waits for the end.
func (p *process) stop(sig syscall.Signal) {
	_ = p.cmd.Process.Signal(sig) // it may have ended
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// ended returns an error if the process does not run any more.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %v\n%s", p.name, p.err, p.tail())
	default:
		return nil
	}
}

// output is what the process has written, and its predecessors to the same file.
func (p *process) output() string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

func (p *process) tail() string {
	lines := strings.Split(strings.TrimSpace(p.output()), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// patience is how long anything may take on a machine that is busy with other
// work. Nothing is expected to take that long.
const patience = 90 * time.Second

// until calls f until it returns nil.
func until(t *testing.T, what string, f func() error) {
	t.Helper()
	if err := try(f); err != nil {
		t.Fatalf("gave up waiting until %s: %v", what, err)
	}
}

func try(f func() error) error {
	deadline := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-deadline:
			return err
		case <-tick.C:
		}
	}
}
