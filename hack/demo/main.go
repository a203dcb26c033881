// Command demo shows the agent at work: it builds a node, a client and pods out of
// network namespaces, runs the real agent on a copy of examples/, lets clients
// dial every kind of Service, changes and breaks things, and prints what was seen
// against what should be. It is for people, and a test as well: it exits with a
// status other than 0 if anything is not as it should be.
//
// It knows the agent from outside only: its command line, its pages and the
// kernel's tables. Nothing that it makes outlives it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

func main() {
	var o options
	flag.StringVar(&o.agent, "agent", "bin/sluice", "the agent's program")
	flag.StringVar(&o.manifests, "manifests", "examples", "the folder of manifests; a copy is used")
	flag.StringVar(&o.mode, "mode", "iptables", "the agent's proxy mode")
	flag.StringVar(&o.extra, "extra", "hack/demo/manifests", "the folder of manifests besides, in one of its folders for each mode")
	flag.DurationVar(&o.limit, "limit", 2*time.Minute, "how long the whole may take")
	flag.Parse()
	o.color = wantsColor(os.Stdout)
	if color, ok := os.LookupEnv(colorEnv); ok {
		o.color = color == "yes"
	}
	os.Exit(execute(o, os.Stdout, os.Stderr))
}

// options are what a demo needs to know.
type options struct {
	agent, manifests, mode string
	extra                  string // manifests of modes
	limit                  time.Duration
	color                  bool
	self                   string // this program, to start it elsewhere; "": that of this process
}

// Exit statuses.
const (
	allWell     = 0
	notAsWanted = 1
	cannotRun   = 2 // the demo could not be shown here
	interrupted = 130
)

func execute(o options, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if modes[o.mode] == nil {
		fmt.Fprintf(stderr, "demo: there is no mode %q, but: %s\n", o.mode, modeNames())
		return cannotRun
	}
	if needsMachine(o) {
		return inMachine(ctx, o, stdout, stderr)
	}
	if err := netlab.Supported(); err != nil {
		inUserNamespace(stderr) // returns only if it cannot
		fmt.Fprintf(stderr, "demo: %v\n", err)
		fmt.Fprintln(stderr, "demo: it needs root, or a kernel that gives plain users namespaces (sysctl kernel.unprivileged_userns_clone=1; on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0)")
		return cannotRun
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("it took longer than %s", o.limit))
	defer cancel()
	err := show(ctx, o, stdout)
	switch {
	case err == nil:
		return allWell
	case errors.Is(context.Cause(ctx), context.Canceled):
		fmt.Fprintln(stderr, "\ndemo: interrupted; everything is taken away")
		return interrupted
	case ctx.Err() != nil:
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	fmt.Fprintf(stderr, "\ndemo: %v\n", err)
	return notAsWanted
}

// What a demo tells the one that it starts in its place.
const (
	insideEnv = "SLUICE_DEMO_INSIDE" // keeps it from starting itself anew for ever
	colorEnv  = "SLUICE_DEMO_COLOR"  // "yes" or "no": the terminal, or file, is at the other end
)

// inUserNamespace replaces this process by one that is root in namespaces of its
// own, and may build others. It returns only if that is not possible.
func inUserNamespace(stderr io.Writer) {
	if os.Geteuid() == 0 || os.Getenv(insideEnv) != "" {
		return
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		fmt.Fprintln(stderr, "demo: not root, and the program unshare (Debian: util-linux) is not there")
		return
	}
	if exec.Command(unshare, "-Urnm", "true").Run() != nil {
		fmt.Fprintln(stderr, "demo: not root, and this kernel gives plain users no namespaces")
		return
	}
	self, err := os.Executable()
	if err != nil {
		return
	}
	args := append([]string{"unshare", "-Urnm", "--", self}, os.Args[1:]...)
	_ = syscall.Exec(unshare, args, append(os.Environ(), insideEnv+"=1"))
}

// show runs the demo. It returns an error if anything is not as it should be.
func show(ctx context.Context, o options, out io.Writer) error {
	p := &printer{out: out, color: o.color}
	w, err := build(o)
	if err != nil {
		return err
	}
	err = w.run(ctx, p)
	if err = errors.Join(err, w.close()); err == nil {
		p.line("\n%s The namespaces and all that was in them are gone; this machine is as before.",
			p.paint(green, fmt.Sprintf("All %d as it should be.", p.shown)))
	}
	return err
}

func (w *world) run(ctx context.Context, p *printer) error {
	took, err := w.startAgent(ctx)
	if err != nil {
		return err
	}
	w.introduce(ctx, p, took)
	for _, part := range []func(context.Context, *printer) error{w.whoAnswers, w.whatChanges, w.whatToSee, w.end} {
		if err := part(ctx, p); err != nil {
			return err
		}
	}
	if err := p.failure(); err != nil {
		return fmt.Errorf("%w%s", err, w.agentLog())
	}
	return nil
}
