package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

// System is the machine as /proc and /sys show it. The zero System is the real
// one; tests give the root of a tree of their own.
type System struct{ Root string }

func (s System) path(name string) string { return filepath.Join("/", s.Root, name) }

func (s System) read(name string) (string, error) {
	b, err := os.ReadFile(s.path(name))
	return strings.TrimSpace(string(b)), err
}

// ReadInt reads a file that holds one number, such as
// "proc/sys/net/ipv4/ip_forward".
func (s System) ReadInt(name string) (int, error) {
	text, err := s.read(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("parse %s: %w", name, err)
	}
	return n, nil
}

// write puts a number into a file that exists. It never makes one: in a tree
// that is not the kernel's that would hide a missing setting.
func (s System) write(name string, value int) error {
	f, err := os.OpenFile(s.path(name), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(value))
	return errors.Join(err, f.Close())
}

// Apply makes the changes that are to be made and returns what went wrong, one
// error for each. None of them is a reason not to start: in a container or a
// network namespace many settings are read-only.
func (s System) Apply(changes []Change) []error {
	var errs []error
	for _, c := range changes {
		if c.Skip {
			continue
		}
		if err := s.write(c.Path, c.Want); err != nil {
			errs = append(errs, fmt.Errorf("set %s to %d: %w", c.Name(), c.Want, err))
		}
	}
	return errs
}

// OnlineCPUs returns how many CPUs the machine has online. A process's own
// allowance (runtime.NumCPU) says nothing about limits of the whole host; it is
// the answer only if the machine's cannot be read.
func (s System) OnlineCPUs() int {
	text, err := s.read("sys/devices/system/cpu/online")
	if err == nil {
		if n, err := countRanges(text); err == nil {
			return n
		}
	}
	return runtime.NumCPU()
}

// countRanges counts what a list such as "0-3,8,10-11" names.
func countRanges(list string) (int, error) {
	total := 0
	for _, part := range strings.Split(list, ",") {
		first, last, ranged := strings.Cut(part, "-")
		if !ranged {
			last = first
		}
		a, errA := strconv.ParseUint(first, 10, 16)
		b, errB := strconv.ParseUint(last, 10, 16)
		if err := errors.Join(errA, errB); err != nil {
			return 0, fmt.Errorf("parse CPU list %q: %w", list, err)
		}
		if b < a {
			return 0, fmt.Errorf("parse CPU list %q: range is upside down", list)
		}
		total += int(b-a) + 1
	}
	return total, nil
}

// IPv6 says whether the machine can do IPv6, and if not, why.
func (s System) IPv6() (ok bool, why string) {
	if _, err := os.Stat(s.path("proc/net/if_inet6")); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return false, "the kernel has no IPv6"
		}
		return false, "cannot tell whether the kernel has IPv6: " + err.Error()
	}
	if n, err := s.ReadInt("proc/sys/net/ipv6/conf/all/disable_ipv6"); err == nil && n == 1 {
		return false, "IPv6 is switched off by net.ipv6.conf.all.disable_ipv6"
	}
	return true, ""
}

// SetOOMScoreAdj tells the kernel how readily this process may be killed when
// memory is short, -1000 (never) to 1000.
func (s System) SetOOMScoreAdj(score int) error {
	if score < -1000 || score > 1000 {
		return fmt.Errorf("set oom_score_adj to %d: not between -1000 and 1000", score)
	}
	const name = "proc/self/oom_score_adj"
	if have, err := s.ReadInt(name); err == nil && have == score {
		return nil
	}
	if err := s.write(name, score); err != nil {
		return fmt.Errorf("set oom_score_adj to %d: %w", score, err)
	}
	return nil
}

// KernelVersion is a kernel's version. Versions compare by AtLeast.
type KernelVersion struct{ Major, Minor, Patch int }

func (v KernelVersion) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// AtLeast says whether the version is major.minor or later.
func (v KernelVersion) AtLeast(major, minor int) bool {
	return v.Major > major || (v.Major == major && v.Minor >= minor)
}

// KernelVersion returns the running kernel's version.
func (s System) KernelVersion() (KernelVersion, error) {
	text, err := s.read("proc/sys/kernel/osrelease")
	if err != nil {
		return KernelVersion{}, fmt.Errorf("read kernel version: %w", err)
	}
	return ParseKernelVersion(text)
}

// ParseKernelVersion reads a release such as "6.1.0-13-cloud-amd64" or "5.4-rc1".
// What distributions add is ignored.
func ParseKernelVersion(release string) (KernelVersion, error) {
	end := strings.IndexFunc(release, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if end < 0 {
		end = len(release)
	}
	parts := strings.Split(strings.TrimRight(release[:end], "."), ".")
	if len(parts) < 2 {
		return KernelVersion{}, fmt.Errorf("parse kernel version %q: no major.minor", release)
	}
	var n [3]int
	for i := range min(len(parts), len(n)) {
		v, err := strconv.Atoi(parts[i])
		if err != nil {
			return KernelVersion{}, fmt.Errorf("parse kernel version %q: %w", release, err)
		}
		n[i] = v
	}
	return KernelVersion{n[0], n[1], n[2]}, nil
}
