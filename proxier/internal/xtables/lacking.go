package xtables

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
)

// SaveError is a table that iptables-save did not print to its end.
type SaveError struct {
	Table  string
	Output string // what the program said
	Err    error
}

func (e *SaveError) Error() string {
	return fmt.Sprintf("read table %s: %v: %s", e.Table, e.Err, strings.TrimSpace(e.Output))
}

func (e *SaveError) Unwrap() error { return e.Err }

// Lacking says of an error of this package that it is an answer about the host:
// programs are not installed, or they, or the kernel, do not know what they are
// asked for. Any other error may be gone the next time.
func Lacking(err error) bool {
	if errors.Is(err, ErrNotFound) {
		return true
	}
	if restore := (*RestoreError)(nil); errors.As(err, &restore) {
		return restore.Refused() && answered(restore.Err) && !Passing(restore.Output)
	}
	if save := (*SaveError)(nil); errors.As(err, &save) {
		return answered(save.Err) && !Passing(save.Output) && containsAny(save.Output, noTable)
	}
	return false
}

// noTable is what iptables-save says where the kernel does not have a table:
// libiptc's words, and those for the error numbers of nfnetlink.
var noTable = []string{"Table does not exist", "not supported", "Invalid argument", "No such file or directory"}

// passing is what programs, modprobe among them, say of errors that come and go.
var passing = []string{
	"xtables lock", "temporarily unavailable", // EAGAIN
	"annot allocate memory", "Memory allocation problem", "ut of memory", // ENOMEM, also libiptc's
	"No buffer space", "Message too long", // ENOBUFS, EMSGSIZE
	"Interrupted system call", "resource busy", "timed out",
	"Too many open files",
	// Not passing, and yet no answer about the kernel.
	"Permission denied", "Operation not permitted",
}

// Passing says whether a program's words name an error that is no answer about
// the kernel.
func Passing(output string) bool { return containsAny(output, passing) }

func containsAny(text string, parts []string) bool {
	return slices.ContainsFunc(parts, func(p string) bool { return strings.Contains(text, p) })
}

// answered says whether a program ended by itself, with an exit code of its own:
// those from 126 are of whoever started it.
func answered(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.ProcessState != nil && exit.Exited() && exit.ExitCode() < 126
}
