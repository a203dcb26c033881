package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// process is a program that runs in a namespace until it is stopped. It dies with
// the benchmark, however that ends.
type process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of its end; valid when done is closed
}

// spawn passes commands to the one thread that starts them. The kernel sends the
// death signal when the thread ends that started a process.
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

// start runs a program in a namespace: nsenter becomes the program, so the
// process that we hold is the program's own.
func start(ns *netlab.Namespace, logFile string, env []string, program string, args ...string) (*process, error) {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p := &process{name: filepath.Base(program), log: logFile, done: make(chan struct{})}
	p.cmd = exec.Command("nsenter", append([]string{"--net=" + ns.Path(), "--", program}, args...)...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	spawn <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop sends a signal, waits for the end, and kills what does not end in time,
// and what it leaves: an nft at work on a large ruleset outlives who started it,
// and would take time from who is measured next.
func (p *process) stop(sig syscall.Signal, patience time.Duration) {
	_ = p.cmd.Process.Signal(sig) // it may have ended
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	_ = syscall.Kill(-p.pid(), syscall.SIGKILL) // there may be nobody
}

// ended returns an error if the process does not run any more.
func (p *process) ended() error {
	select {
	case <-p.done:
		data, _ := os.ReadFile(p.log)
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		return fmt.Errorf("%s ended: %v\n%s", p.name, p.err, strings.Join(lines[max(0, len(lines)-20):], "\n"))
	default:
		return nil
	}
}

// usage is what a process and its children have used so far.
type usage struct {
	cpu      time.Duration // user and system, of the process and all its children
	children int           // that run now
	rss      int64         // bytes, of the process now
	peak     int64         // bytes, of the process ever (VmHWM)
}

// meter watches a process: memory of children is gone when they end, so it has
// to be looked at while they run.
type meter struct {
	pid  int
	busy time.Time // when idle saw it at work last

	mu           sync.Mutex
	childPeak    int64 // the largest VmHWM seen of one child
	togetherPeak int64 // the largest sum of resident memory, process and children
}

const sampling = 50 * time.Millisecond

// run samples until ctx ends.
func (m *meter) run(ctx context.Context) {
	tick := time.NewTicker(sampling)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			m.sample()
		}
	}
}

func (m *meter) sample() {
	list := children(m.pid)
	if len(list) == 0 {
		return
	}
	sum, _ := memory(m.pid)
	var peak int64
	for _, c := range list {
		now, most := memory(c)
		sum, peak = sum+now, max(peak, most)
	}
	m.mu.Lock()
	m.childPeak, m.togetherPeak = max(m.childPeak, peak), max(m.togetherPeak, sum)
	m.mu.Unlock()
}

// peaks returns the memory peaks of children, and of all together, so far.
func (m *meter) peaks() (child, together int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.childPeak, m.togetherPeak
}

func (m *meter) usage() (usage, error) {
	cpu, err := cpuOf(m.pid)
	if err != nil {
		return usage{}, err
	}
	u := usage{cpu: cpu}
	u.rss, u.peak = memory(m.pid)
	for _, c := range children(m.pid) {
		u.children++
		if cpu, err := cpuOf(c); err == nil { // else it has ended, and is counted by its parent
			u.cpu += cpu
		}
	}
	return u, nil
}

// idle waits until a process has no children and uses next to no CPU, at least
// for least and at most for most. It says whether it became idle.
func (m *meter) idle(ctx context.Context, least, most time.Duration) bool {
	const window, quiet = 500 * time.Millisecond, 10 * time.Millisecond
	began := time.Now()
	m.busy = began
	last, err := m.usage()
	for err == nil && time.Since(began) < most {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(window):
		}
		var now usage
		now, err = m.usage()
		if now.children == 0 && last.children == 0 && now.cpu-last.cpu <= quiet {
			if time.Since(began) >= least {
				return true
			}
		} else {
			m.busy = time.Now()
		}
		last = now
	}
	return false
}

// busyUntil is when idle, which must have returned, saw the process at work last.
func (m *meter) busyUntil() time.Time { return m.busy }

// clockTick is the unit of times in /proc/PID/stat: USER_HZ, 100 on every Linux.
const clockTick = 10 * time.Millisecond

// cpuOf is the CPU time of a process and of the children it has waited for.
func cpuOf(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStat(string(data))
}

// parseStat sums utime, stime, cutime and cstime (proc_pid_stat(5), fields 14 to
// 17). The name in field 2 can contain anything, so fields count from its end.
func parseStat(text string) (time.Duration, error) {
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 15 {
		return 0, fmt.Errorf("parse %q: too few fields", text)
	}
	var ticks int64
	for _, f := range fields[11:15] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse %q: %w", text, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}

// memory is the resident memory of a process, now and at its peak; 0 if it is
// gone.
func memory(pid int) (now, peak int64) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	return parseStatus(string(data))
}

func parseStatus(text string) (now, peak int64) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		if name != "VmRSS" && name != "VmHWM" {
			continue
		}
		n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if name == "VmRSS" {
			now = n << 10
		} else {
			peak = n << 10
		}
	}
	return now, peak
}

// children lists the programs that any thread of a process has started. A child
// that has not become another program yet shares its parent's memory, and is
// left out.
func children(pid int) []int {
	own, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var out []int
	for _, f := range files {
		data, _ := os.ReadFile(f) // gone with its thread
		for _, field := range strings.Fields(string(data)) {
			n, err := strconv.Atoi(field)
			if err != nil {
				continue
			}
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", n)); exe != own {
				out = append(out, n)
			}
		}
	}
	return out
}
