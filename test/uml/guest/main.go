// Command guest is the first process of a User-Mode Linux kernel that package
// uml boots on the host's root file system: it makes the guest's own mounts,
// loads modules, runs one command and switches the machine off. What the command
// writes, and then its exit status, goes to the first serial line; what init has
// to say goes to the console.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/uml/internal/boot"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: this is the init of package uml's machines")
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Println("guest:", err)
	}
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Println("guest: switch off:", err) // and panic, for init ends
}

func run() error {
	data, err := os.ReadFile(os.Getenv(boot.Variable))
	if err != nil {
		return fmt.Errorf("read what to do: %w", err)
	}
	var s boot.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("read what to do: %w", err)
	}
	for _, e := range s.Env {
		if path, ok := strings.CutPrefix(e, "PATH="); ok {
			os.Setenv("PATH", path)
		}
	}
	for _, step := range []struct {
		what string
		do   func(*boot.Spec) error
	}{
		{"mount", mount},
		{"link programs", links},
		{"load modules", modules},
		{"set up the network", network},
	} {
		if err := step.do(&s); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	out, err := serialLine("/dev/ttyS0")
	if err != nil {
		return err
	}
	code, err := command(&s, out)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s %d\n", s.Tag, code)
	return unix.IoctlSetInt(int(out.Fd()), unix.TCSBRK, 1) // until it is all sent
}

func mount(s *boot.Spec) error {
	for _, m := range []struct{ at, kind, data string }{
		{"/proc", "proc", ""},
		{"/sys", "sysfs", ""},
		{"/dev", "devtmpfs", ""},
		{"/dev/pts", "devpts", "ptmxmode=0666"},
		{"/dev/shm", "tmpfs", "mode=1777"},
		{"/run", "tmpfs", "mode=755"},
		{"/tmp", "tmpfs", "mode=1777"},
		{"/var/tmp", "tmpfs", "mode=1777"},
	} {
		_ = os.Mkdir(m.at, 0o755) // in /dev; elsewhere it is there
		err := unix.Mount(m.kind, m.at, m.kind, 0, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) { // the kernel mounts /dev itself
			return fmt.Errorf("%s: %w", m.at, err)
		}
	}
	for _, d := range []string{"/run/lock", "/run/netns", boot.Bin} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, dir := range s.Shared {
		if err := share(dir, unix.MS_RDONLY); err != nil {
			return err
		}
	}
	if s.Writable == "" {
		return nil
	}
	return share(s.Writable, 0)
}

// share shows a folder of the host at its own path.
func share(dir string, flags uintptr) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("none", dir, "hostfs", flags, dir); err != nil {
		return fmt.Errorf("%s of the host: %w", dir, err)
	}
	return nil
}

func links(s *boot.Spec) error {
	for name, target := range s.Links {
		if err := os.Symlink(target, filepath.Join(boot.Bin, name)); err != nil {
			return err
		}
	}
	// kmod looks for modules under /lib/modules only, where Debian's package of
	// the kernel does not put them.
	versions := filepath.Join(s.ModulesRoot, "lib/modules")
	if err := os.MkdirAll(versions, 0o755); err != nil {
		return err
	}
	if err := os.Symlink(s.ModulesFrom, filepath.Join(versions, filepath.Base(s.ModulesFrom))); err != nil {
		return err
	}
	modprobe := filepath.Join(boot.Bin, "modprobe")
	script := fmt.Sprintf("#!/bin/sh\nexec /sbin/modprobe -d %s \"$@\"\n", s.ModulesRoot)
	if err := os.WriteFile(modprobe, []byte(script), 0o755); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/kernel/modprobe", []byte(modprobe), 0)
}

func modules(s *boot.Spec) error {
	if len(s.Modules) == 0 {
		return nil
	}
	cmd := exec.Command(filepath.Join(boot.Bin, "modprobe"), append([]string{"-a"}, s.Modules...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func network(s *boot.Spec) error {
	if err := unix.Sethostname([]byte("uml")); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return err
	}
	for from, to := range s.Rename {
		link, err := netlink.LinkByName(from)
		if err == nil {
			err = netlink.LinkSetName(link, to)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
	}
	return nil
}

// serialLine opens a terminal that changes nothing of what is written.
func serialLine(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err == nil {
		t.Oflag &^= unix.OPOST
		t.Iflag = 0
		t.Lflag = 0
		err = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
	}
	if err != nil {
		return nil, fmt.Errorf("make %s raw: %w", path, err)
	}
	return f, nil
}

// command runs the command to its end, and waits for whatever loses its parent
// meanwhile. It returns the exit status as a shell gives it.
func command(s *boot.Spec, out *os.File) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	path := s.Args[0]
	if !strings.Contains(path, "/") {
		if path, err = exec.LookPath(path); err != nil {
			return 0, err
		}
	}
	p, err := os.StartProcess(path, s.Args, &os.ProcAttr{
		Dir: s.Dir, Env: s.Env, Files: []*os.File{null, out, out}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, err
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait for %s: %w", path, err)
		case pid != p.Pid:
		case ws.Signaled():
			return 128 + int(ws.Signal()), nil
		default:
			return ws.ExitStatus(), nil
		}
	}
}
