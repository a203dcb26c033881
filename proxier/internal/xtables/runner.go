package xtables

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockWait is how long one iptables program waits for the xtables lock. The
// nft variant has no such lock and accepts the flag.
const lockWait = "5"

// lockTries is how often a restore is tried when the lock stays taken.
const lockTries = 4

// exitResource is what iptables programs exit with when they do not get the
// lock, or when the kernel says EAGAIN (libxtables RESOURCE_PROBLEM). The nft
// variant also uses it for whatever the kernel refuses.
const exitResource = 4

// Stats is told what restores cost. Any field may be nil.
type Stats struct {
	Restored func(bytes int64)     // a payload was restored
	Waited   func(d time.Duration) // a restore had to be tried again for the lock
	Failed   func()                // a restore failed for another reason
}

// Runner runs one variant's programs for one family.
type Runner struct {
	Programs
	Stats Stats
}

// RestoreError is a payload that iptables-restore did not bring into force.
type RestoreError struct {
	Output string // what the program said
	Err    error
}

func (e *RestoreError) Error() string {
	out := strings.Join(strings.Fields(e.Output), " ")
	if len(out) > 400 {
		out = out[:400] + "..."
	}
	return fmt.Sprintf("iptables-restore: %v: %s", e.Err, out)
}

func (e *RestoreError) Unwrap() error { return e.Err }

// Refused says that the payload is to blame: the same again would fail again. It
// is not if the lock was taken, or if the program was killed.
func (e *RestoreError) Refused() bool {
	var exit *exec.ExitError
	if !errors.As(e.Err, &exit) || exit.ProcessState == nil {
		return true
	}
	return exit.Exited() && !e.busy()
}

// TooLarge says that a transaction did not fit into the netlink socket's buffer.
func (e *RestoreError) TooLarge() bool {
	return strings.Contains(e.Output, "Message too long") || strings.Contains(e.Output, "No buffer space available")
}

func (e *RestoreError) busy() bool {
	var exit *exec.ExitError
	return errors.As(e.Err, &exit) && exit.ExitCode() == exitResource &&
		(strings.Contains(e.Output, "xtables lock") || strings.Contains(e.Output, "temporarily unavailable"))
}

// Restore feeds what write writes to iptables-restore --noflush: one
// transaction per table, chains that are not named stay as they are. While
// another program holds the xtables lock it waits and tries again, with jitter,
// calling write once more for each try. The error is a *RestoreError if the
// program refused the payload.
func (r *Runner) Restore(ctx context.Context, write func(w *bufio.Writer)) error {
	for try := 1; ; try++ {
		start := time.Now()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		err := r.restoreOnce(ctx, write)
		var failed *RestoreError
		if err == nil {
			return nil
		}
		if !errors.As(err, &failed) || !failed.busy() || try == lockTries {
			if r.Stats.Failed != nil {
				r.Stats.Failed()
			}
			return err
		}
		if r.Stats.Waited != nil {
			r.Stats.Waited(time.Since(start))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Duration(50+rand.IntN(200)) * time.Millisecond):
		}
	}
}

// restoreTimeout is when a restore is given up for hung. Loading the largest
// ruleset takes seconds; the lock is waited for apart from that.
const restoreTimeout = 5 * time.Minute

// restoreOnce lets a restore that has begun finish also when ctx ends, so that a
// stop never leaves one table changed and the other not.
func (r *Runner) restoreOnce(ctx context.Context, write func(w *bufio.Writer)) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restoreTimeout)
	defer cancel()
	cmd := command(ctx, r.Programs.Restore, "-w", lockWait, "--noflush")
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // Ctrl-C is for the agent, not for a restore that has begun
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start iptables-restore: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start iptables-restore: %w", err)
	}
	count := &counter{w: stdin}
	buf := bufio.NewWriterSize(count, 64<<10)
	write(buf)
	// A program that gives up early closes the pipe; its own words matter then.
	_ = buf.Flush()
	_ = stdin.Close()
	if err := cmd.Wait(); err != nil {
		return &RestoreError{Output: output.String(), Err: err}
	}
	if r.Stats.Restored != nil {
		r.Stats.Restored(count.n)
	}
	return nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// Chain is a chain of a table as iptables-save prints it.
type Chain struct {
	Name    string
	Builtin bool
}

// Save streams one table. rule gets each line's chain and the text behind
// "-A CHAIN "; the strings are valid only during the call. A table that does
// not exist is empty.
func (r *Runner) Save(ctx context.Context, table string, chain func(Chain), rule func(chain, text []byte)) error {
	return r.save(ctx, table, func(_ string, c Chain) { chain(c) }, func(_ string, c, text []byte) { rule(c, text) })
}

// SaveAll is Save for all tables that there are, in one go.
func (r *Runner) SaveAll(ctx context.Context, chain func(table string, c Chain), rule func(table string, chain, text []byte)) error {
	return r.save(ctx, "", chain, rule)
}

func (r *Runner) save(ctx context.Context, table string, chain func(string, Chain), rule func(string, []byte, []byte)) error {
	var args []string
	if table != "" {
		args = []string{"-t", table}
	}
	cmd := command(ctx, r.Programs.Save, args...)
	var errout bytes.Buffer
	cmd.Stderr = &errout
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start iptables-save: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start iptables-save: %w", err)
	}
	scan := bufio.NewScanner(stdout)
	scan.Buffer(make([]byte, 64<<10), 1<<20)
	for scan.Scan() {
		line := scan.Bytes()
		switch {
		case bytes.HasPrefix(line, []byte("*")):
			table = string(line[1:])
		case bytes.HasPrefix(line, []byte(":")):
			name, rest, _ := bytes.Cut(line[1:], []byte(" "))
			chain(table, Chain{Name: string(name), Builtin: !bytes.HasPrefix(rest, []byte("-"))})
		case bytes.HasPrefix(line, []byte("-A ")):
			name, text, _ := bytes.Cut(line[3:], []byte(" "))
			rule(table, name, text)
		}
	}
	if err := errors.Join(scan.Err(), cmd.Wait()); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return &SaveError{Table: table, Output: errout.String(), Err: err}
	}
	return nil
}
