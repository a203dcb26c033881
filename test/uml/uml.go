// Package uml runs programs on a Linux kernel that has IPVS, where the machine's
// own has none: it boots User-Mode Linux, a kernel that is a plain program, on
// the machine's own root file system, and runs a command in it. Rerun does so
// with the tests of the calling package.
//
// The guest sees the host's files and cannot write them; /tmp, /run and /dev are
// its own. It needs no root and no image: the Debian package user-mode-linux and
// some memory in /dev/shm or TMPDIR. Processes of the guest are root in there,
// and have the rights of the calling user on the host's files.
//
// It knows nothing of Services or proxiers.
package uml

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/uml/internal/boot"
)

// The kernel program, and where its modules are, one folder a version.
const (
	kernelProgram = "linux.uml"
	modulesDir    = "/usr/lib/uml/modules"
)

// Machine is a guest. The zero value is good for tests of proxiers.
type Machine struct {
	Memory  int      // MiB; 1024 if 0
	Modules []string // loaded before the command starts; DefaultModules if nil
	Env     []string // added to the command's environment, which is small otherwise
	Dir     string   // working directory; / if empty

	// Writable is a folder of the host that the guest can write; none if empty.
	Writable string

	// Readable are folders of the host that the guest sees although they are
	// below /tmp, /run or /dev, which are its own. Dir and the command's folder
	// are always among them.
	Readable []string

	Net []Tap
}

// Tap is a network interface of the guest, joined to a tap device that exists on
// the host in the network namespace of Run's caller.
type Tap struct {
	Host  string // the tap device
	Guest string // the name in the guest
	MAC   string // of the guest's end; any if empty
}

// DefaultModules are those that the proxiers and the tests' networks need.
func DefaultModules() []string {
	return strings.Fields(`veth bridge br_netfilter dummy
		nf_conntrack nf_nat nf_conntrack_netlink
		ip_tables iptable_nat iptable_filter iptable_mangle iptable_raw
		ip6_tables ip6table_nat ip6table_filter ip6table_mangle ip6table_raw
		xt_comment xt_conntrack xt_mark xt_MASQUERADE xt_addrtype xt_statistic xt_recent
		xt_set xt_nat xt_tcpudp xt_multiport xt_physdev xt_limit ipt_REJECT ip6t_REJECT
		ip_set ip_set_hash_ip ip_set_hash_ipport ip_set_hash_ipportip ip_set_hash_ipportnet ip_set_hash_net ip_set_bitmap_port
		ip_vs ip_vs_rr ip_vs_wrr ip_vs_lc ip_vs_wlc ip_vs_dh ip_vs_sh ip_vs_sed ip_vs_nq ip_vs_lblc ip_vs_lblcr ip_vs_mh ip_vs_fo ip_vs_ovf`)
}

// Supported returns nil if Run can work here, and else why not, for a test's
// Skip.
func Supported() error {
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return fmt.Errorf("User-Mode Linux is for linux/amd64, this is %s/%s", runtime.GOOS, runtime.GOARCH)
	}
	if _, err := kernelPath(); err != nil {
		return err
	}
	if _, err := modulesFrom(); err != nil {
		return err
	}
	if _, err := exec.LookPath("go"); err != nil {
		return fmt.Errorf("no go command, which builds the guest's init: %w", err)
	}
	if scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil && strings.TrimSpace(string(scope)) == "3" {
		return errors.New("ptrace, by which User-Mode Linux works, is switched off (kernel.yama.ptrace_scope=3)")
	}
	return nil
}

func kernelPath() (string, error) {
	for _, p := range []string{kernelProgram, "/usr/bin/" + kernelProgram} {
		if path, err := exec.LookPath(p); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed (Debian package user-mode-linux)", kernelProgram)
}

func modulesFrom() (string, error) {
	found, _ := filepath.Glob(modulesDir + "/*/modules.dep")
	if len(found) != 1 {
		return "", fmt.Errorf("%d sets of modules in %s (Debian package user-mode-linux), want one", len(found), modulesDir)
	}
	return filepath.Dir(found[0]), nil
}

// Run boots a machine, runs a command in it, gives what the command writes to
// out, and returns its exit status (128 and more: ended by a signal). Where the
// context ends first, the machine is killed. Any other end than that of the
// command is an error, which has the last lines of the machine's console.
func Run(ctx context.Context, m Machine, argv []string, out io.Writer) (int, error) {
	if err := Supported(); err != nil {
		return 0, err
	}
	if len(argv) == 0 {
		return 0, errors.New("run in User-Mode Linux: no command")
	}
	dir, err := os.MkdirTemp("", "uml")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	spec, err := m.spec(argv)
	if err != nil {
		return 0, err
	}
	specFile := filepath.Join(dir, "spec")
	data, err := json.Marshal(spec)
	if err == nil {
		err = os.WriteFile(specFile, data, 0o600)
	}
	if err != nil {
		return 0, err
	}
	init, err := buildInit(ctx)
	if err != nil {
		return 0, err
	}
	cmd, err := m.kernel(dir, init, specFile)
	if err != nil {
		return 0, err
	}
	code, err := run(ctx, cmd, spec.Tag, out)
	if err != nil {
		return 0, fmt.Errorf("run %s in User-Mode Linux: %w", argv[0], err)
	}
	return code, nil
}

func (m *Machine) spec(argv []string) (*boot.Spec, error) {
	from, err := modulesFrom()
	if err != nil {
		return nil, err
	}
	s := &boot.Spec{
		Writable:    m.Writable,
		ModulesRoot: "/run/uml/modules",
		ModulesFrom: from,
		Modules:     m.Modules,
		Links:       map[string]string{},
		Rename:      map[string]string{},
		Args:        argv,
		Dir:         m.Dir,
		Tag:         "uml-" + rand.Text(),
	}
	if s.Modules == nil {
		s.Modules = DefaultModules()
	}
	if s.Dir == "" {
		s.Dir = "/"
	}
	s.Shared = shared(append(slices.Clone(m.Readable), filepath.Dir(argv[0]), s.Dir))
	legacyLinks(s.Links)
	for i, t := range m.Net {
		s.Rename[fmt.Sprintf("vec%d", i)] = t.Guest
	}
	s.Env = append([]string{
		"PATH=" + boot.Bin + ":/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/tmp", "TMPDIR=/tmp", "XTABLES_LOCKFILE=/run/xtables.lock",
		// The signals by which Go interrupts goroutines get lost, or lose others.
		"GODEBUG=asyncpreemptoff=1",
	}, m.Env...)
	return s, nil
}

// legacyLinks makes plain iptables the legacy variant: the kernel has no nat for
// the other.
func legacyLinks(links map[string]string) {
	for _, p := range []string{"xtables-legacy-multi", "/usr/sbin/xtables-legacy-multi"} {
		path, err := exec.LookPath(p)
		if err != nil {
			continue
		}
		for _, name := range []string{"iptables", "ip6tables"} {
			for _, suffix := range []string{"", "-save", "-restore"} {
				links[name+suffix] = path
			}
		}
		return
	}
}

// shared are those of the folders that must be shared for all to be seen: those
// that are hidden, and not in another.
func shared(folders []string) []string {
	slices.Sort(folders)
	var list []string
	for _, f := range folders {
		inside := func(dir string) bool { return f == dir || strings.HasPrefix(f, dir+"/") }
		if hidden(f) && !slices.ContainsFunc(list, inside) {
			list = append(list, f)
		}
	}
	return list
}

// hidden says whether a path of the host lies under a file system of the guest.
func hidden(path string) bool {
	for _, own := range []string{"/tmp", "/var/tmp", "/run", "/var/run", "/dev"} {
		if path == own || strings.HasPrefix(path, own+"/") {
			return true
		}
	}
	return false
}

// kernel returns the command that boots the machine. The console is its stdout,
// the first serial line its file descriptor 3.
func (m *Machine) kernel(dir, init, specFile string) (*exec.Cmd, error) {
	path, err := kernelPath()
	if err != nil {
		return nil, err
	}
	memory := m.Memory
	if memory == 0 {
		memory = 1024
	}
	args := []string{
		fmt.Sprintf("mem=%dM", memory),
		"uml_dir=" + dir, "umid=m",
		"root=/dev/root", "rootfstype=hostfs", "ro", "init=" + init,
		"con=null", "con0=null,fd:1", "ssl=null", "ssl0=null,fd:3",
		"loglevel=4", "panic=-1",
		boot.Variable + "=" + specFile,
	}
	for i, t := range m.Net {
		arg := fmt.Sprintf("vec%d:transport=tap,ifname=%s,depth=128,gro=1", i, t.Host)
		if t.MAC != "" {
			arg += ",mac=" + t.MAC
		}
		args = append(args, arg)
	}
	cmd := exec.Command(path, args...)
	env := map[string]string{}
	for _, e := range os.Environ() {
		name, value, _ := strings.Cut(e, "=")
		env[name] = value
	}
	for _, name := range []string{"TMP", "TEMP", "TMPDIR"} {
		delete(env, name)
	}
	env["TMPDIR"] = memoryDir(memory)
	for _, name := range slices.Sorted(maps.Keys(env)) {
		cmd.Env = append(cmd.Env, name+"="+env[name])
	}
	cmd.SysProcAttr = ownProcesses()
	return cmd, nil
}

// ownProcesses puts the machine into a PID namespace, where one may: so none of
// its processes outlives it, and it does not outlive this one, even if that is
// killed. It is in a process group of its own in any case.
func ownProcesses() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: syscall.CLONE_NEWPID}
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
	}
	probe := exec.Command("/bin/true")
	probe.SysProcAttr = a
	if probe.Run() == nil {
		return a
	}
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// memoryDir is where the guest's memory is kept, as a file without a name.
func memoryDir(megabytes int) string {
	const shm = "/dev/shm"
	var fs unix.Statfs_t
	if unix.Statfs(shm, &fs) == nil && unix.Access(shm, unix.W_OK) == nil &&
		fs.Flags&unix.ST_NOEXEC == 0 && int64(fs.Bavail)*fs.Bsize > int64(megabytes)<<20 {
		return shm
	}
	return os.TempDir()
}

// run starts the kernel and waits for its end.
func run(ctx context.Context, cmd *exec.Cmd, tag string, out io.Writer) (int, error) {
	console := &tail{}
	cmd.Stdout, cmd.Stderr = console, console
	lines, serial, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer lines.Close()
	cmd.ExtraFiles = []*os.File{serial}
	// The death signal comes when the thread that started the process ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	serial.Close()
	if err != nil {
		return 0, err
	}
	kill := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	code, ended, copyErr := pump(out, lines, tag)
	waitErr := cmd.Wait()
	stopped := !kill()
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what a crash left
	switch {
	case stopped && !ended:
		return 0, fmt.Errorf("killed: %w; its console:\n%s", context.Cause(ctx), console)
	case !ended:
		return 0, fmt.Errorf("the machine ended before the command did (%v); its console:\n%s", waitErr, console)
	}
	return code, copyErr
}

// pump copies lines until the one with the tag and the exit status.
func pump(out io.Writer, in io.Reader, tag string) (code int, ended bool, err error) {
	r := bufio.NewReader(in)
	for {
		line, rerr := r.ReadBytes('\n')
		text, status, found := bytes.Cut(line, []byte(tag))
		if _, werr := out.Write(text); werr != nil && err == nil {
			err = werr // and read on, or the guest would wait
		}
		if found && !ended {
			n, serr := fmt.Sscan(string(status), &code)
			ended = n == 1 && serr == nil
		}
		if rerr != nil {
			return code, ended, err
		}
	}
}

// tail keeps the last of what is written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailSize = 16 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if len(t.text) > 2*tailSize {
		t.text = append([]byte("..."), t.text[len(t.text)-tailSize:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.ReplaceAll(string(t.text), "\r", "")
}
