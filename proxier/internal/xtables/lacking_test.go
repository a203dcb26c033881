package xtables

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// exits is the error of a program that ends in a certain way.
func exits(t *testing.T, script string) error {
	t.Helper()
	err := exec.Command("/bin/sh", "-c", script).Run()
	if err == nil {
		t.Fatalf("%q ended well", script)
	}
	return err
}

// TestLacking: what is an answer about the host, and what may be gone the next
// time.
func TestLacking(t *testing.T) {
	exit1, exit4, killed := exits(t, "exit 1"), exits(t, "exit 4"), exits(t, "kill -9 $$")
	for _, c := range []struct {
		err  error
		want bool
	}{
		{fmt.Errorf("%w: ip6tables", ErrNotFound), true},
		{&RestoreError{`Couldn't load match "set":No such file or directory`, exits(t, "exit 2")}, true},
		{&RestoreError{`unknown option "--map-mark"`, exits(t, "exit 2")}, true},
		{&RestoreError{"line 3: RULE_APPEND failed (No such file or directory): rule in chain X", exit4}, true},
		{&RestoreError{"iptables-restore: line 3 failed", exit1}, true}, // before 1.8.3 it gave no reason
		{fmt.Errorf("wrapped: %w", &RestoreError{"No chain/target/match by that name", exit1}), true},
		{&RestoreError{"Another app is currently holding the xtables lock.", exit4}, false},
		{&RestoreError{"line 3: CHAIN_ADD failed (Device or resource busy)", exit4}, false},
		{&RestoreError{"line 4 failed: Cannot allocate memory.", exit1}, false},
		{&RestoreError{"line 4 failed: Memory allocation problem.", exit1}, false},
		{&RestoreError{"sendmsg: No buffer space available", exit4}, false},
		{&RestoreError{"netlink: Interrupted system call", exit4}, false},
		{&RestoreError{"Could not fetch rule set generation id: Permission denied (you must be root)", exit4}, false},
		{&RestoreError{"", killed}, false},
		{&RestoreError{"", exits(t, "exit 137")}, false},
		{&RestoreError{"", context.DeadlineExceeded}, false},
		{&SaveError{"nat", "Cannot initialize: Table does not exist (do you need to insmod?)", exit1}, true},
		{&SaveError{"nat", "Could not fetch rule set generation id: Invalid argument", exit4}, true},
		{&SaveError{"nat", "Cannot initialize: Permission denied (you must be root)", exit1}, false},
		{&SaveError{"nat", "iptables-save: Unable to parse", exit1}, false},
		{&SaveError{"nat", "Table does not exist", killed}, false},
		{fmt.Errorf("start iptables-restore: %w", unix.ENOMEM), false},
		{context.Canceled, false},
		{errors.New("something"), false},
	} {
		if got := Lacking(c.err); got != c.want {
			t.Errorf("%v: %t", c.err, got)
		}
	}
}
