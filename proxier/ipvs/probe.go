package ipvs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/proxier/internal/ipset"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// Host is what a node offers to this proxier.
type Host struct {
	Programs    xtables.Programs
	Why         string // why this variant of iptables
	RandomFully bool
	Schedulers  []string // sorted
	Version     string   // of IPVS, as ipvsadm prints it
	Inside      bool     // frontends can be mapped to packet marks; see Options
	Missing     []string // what would be used if it were there: sentences
}

// Unavailable is Probe's error where the kernel, or a program, answered that it
// does not have what ipvs mode takes: asking again would give the same. Where the
// answer may be another the next time, Probe's error is not of this type, and
// nothing must be concluded from it.
type Unavailable struct{ Err error }

func (u *Unavailable) Error() string { return u.Err.Error() }

// Unwrap implements errors.
func (u *Unavailable) Unwrap() error { return u.Err }

func unavailable(format string, args ...any) error {
	return &Unavailable{fmt.Errorf(format, args...)}
}

// question is what a probe asks. What an error number means depends on it.
type question uint8

const (
	askPrograms  question = iota // are there iptables programs, and tables for them
	askSockets                   // are there the netlink protocols
	askFamily                    // is there IPVS
	askScheduler                 // is there a scheduler
	askServer                    // are there virtual servers of the IP family
	askDevice                    // are there dummy devices
	askSet                       // is there a set type
	askRule                      // can rules look into sets
)

// lacking decides whether an error answers the question with no. Everything else
// (a lock that is held, no memory, a program that was killed) answers nothing.
func (q question) lacking(err error) bool {
	switch q {
	case askPrograms, askRule:
		return xtables.Lacking(err)
	case askSockets:
		return errors.Is(err, syscall.EPROTONOSUPPORT)
	case askFamily, askScheduler:
		return errors.Is(err, syscall.ENOENT)
	case askServer:
		return errors.Is(err, syscall.EAFNOSUPPORT)
	case askDevice:
		return errors.Is(err, syscall.EOPNOTSUPP)
	case askSet:
		return errors.Is(err, ipset.ErrUnsupported) || errors.Is(err, ipset.ErrNoType)
	}
	return false
}

// probePauses are between the tries of a probe that had no answer.
var probePauses = []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second}

// persist tries until there is an answer: success or Unavailable. At the end the
// error is the last one.
func persist(ctx context.Context, try func() error) error {
	for i := 0; ; i++ {
		err := try()
		if missing := (*Unavailable)(nil); err == nil || errors.As(err, &missing) || i == len(probePauses) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(probePauses[i]):
		}
	}
}

// schedulers are those that some kernel has.
var schedulers = []string{"dh", "fo", "lblc", "lblcr", "lc", "mh", "nq", "ovf", "rr", "sed", "sh", "wlc", "wrr"}

// CheckScheduler tells whether a scheduler is among the offered. The error lists
// those.
func CheckScheduler(name string, offered []string) error {
	switch {
	case slices.Contains(offered, name):
		return nil
	case slices.Contains(schedulers, name):
		return fmt.Errorf("this kernel has no IPVS scheduler %q (load module ip_vs_%s); it has %s", name, name, orNone(offered))
	}
	return fmt.Errorf("there is no IPVS scheduler %q; this kernel has %s", name, orNone(offered))
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}

// versionText gives a version number as ipvsadm does.
func versionText(n uint32) string {
	return fmt.Sprintf("%d.%d.%d", n>>16, n>>8&0xff, n&0xff)
}
