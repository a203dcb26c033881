package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// straced is how many changes the system calls are counted for.
const straced = 50

// systemCalls counts what the program asks of the kernel for changes, made as
// quickly as strace lets it follow. It is no figure of time: nothing else is
// measured then.
func (t *trial) systemCalls(ctx context.Context) error {
	file := filepath.Join(t.c.dir, nodeName(t.program, t.variant)+".strace")
	tracer, err := start(t.node, file+".log", nil, "strace", "-f", "-c", "-o", file, "-p", strconv.Itoa(t.proc.pid()))
	if err != nil {
		return err
	}
	defer tracer.stop(syscall.SIGINT, 10*time.Second)
	err = await(ctx, time.Minute, "strace is attached", func() error {
		if err := tracer.ended(); err != nil {
			return err
		}
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.proc.pid()))
		if err == nil && strings.Contains(string(data), "TracerPid:\t0\n") {
			err = fmt.Errorf("process %d is not traced", t.proc.pid())
		}
		return err
	})
	if err != nil {
		return err
	}
	picked := sample(t.s.services, straced)
	for k := range straced {
		if err := t.c.changeOne(ctx, picked[k%len(picked)]); err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond) // one after the other, no two together
	}
	last, err := t.change(ctx)
	if err != nil {
		return err
	}
	if last.late {
		return fmt.Errorf("traffic does not follow in %s", t.s.followLimit)
	}
	tracer.stop(syscall.SIGINT, time.Minute)
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	n, most, err := parseStrace(string(data))
	if err != nil {
		return err
	}
	t.set("change.calls", reading{Value: float64(n) / (straced + 1), N: straced + 1, Note: most})
	return nil
}

// parseStrace returns the sum of a table of strace -c, and its largest lines.
func parseStrace(text string) (calls int, most string, err error) {
	var parts []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		n, err := strconv.Atoi(f[3])
		if err != nil {
			continue // the heading
		}
		if f[len(f)-1] == "total" {
			calls = n
		} else {
			parts = append(parts, fmt.Sprintf("%s %d", f[len(f)-1], n))
		}
	}
	if calls == 0 {
		return 0, "", fmt.Errorf("no total in %q", text)
	}
	return calls, strings.Join(parts[:min(len(parts), 12)], ", "), nil
}
