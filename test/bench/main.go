// Command bench measures Sluice and kube-proxy side by side: one after the other,
// on the same machine, against the same API server with the same Services, each
// on a node (a network namespace) of its own. README.md says how each figure is
// taken.
//
// It starts the two as black boxes and judges them by connections that it makes
// and by what the kernel says of their processes. It must not use anything of
// the product: what it imported it could not compare.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// settings are what the flags say.
type settings struct {
	mode      string
	variants  []string
	programs  []string // names of peers, in the order they run
	services  int
	endpoints int
	paths     map[string]string // program -> binary
	tools     string
	jsonFile  string
	strace    bool
	self      string   // this program, to run in a virtual machine
	args      []string // of this program
	profiles  string
	latency   sizes // empty: everything, at one size

	coldLimit   time.Duration
	changes     int
	changeLimit time.Duration // for all changes together
	followLimit time.Duration // for one
	burst       int
	burstRate   int
	connections int
	rest        time.Duration
	repairLimit time.Duration
}

const (
	peer = "kube-proxy"
	ours = "sluice"

	modeIPTables = "iptables"
	modeIPVS     = "ipvs"
	modeNFTables = "nftables"
)

var modes = []string{modeIPTables, modeIPVS, modeNFTables}

func main() {
	s, err := parse(os.Args[1:])
	if err == nil {
		s.self, err = os.Executable()
	}
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		err = run(ctx, s, os.Stdout)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (*settings, error) {
	s := &settings{args: args}
	f, agent := s.flags()
	_ = f.Parse(args) // exits
	given := map[string]bool{}
	f.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	if err := s.complete(given); err != nil {
		return nil, err
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	return s, s.find(*agent)
}

// flags defines them, and returns where the agent's path will be.
func (s *settings) flags() (f *flag.FlagSet, agent *string) {
	f = flag.NewFlagSet("bench", flag.ExitOnError)
	list := func(to *[]string, name, usage string) {
		f.Func(name, usage, func(v string) error {
			*to = strings.Split(v, ",")
			return nil
		})
	}
	f.StringVar(&s.mode, "mode", modeIPTables, "proxy mode to measure: "+strings.Join(modes, ", "))
	list(&s.variants, "variants", "iptables variants to measure (default \"legacy,nft\", in ipvs mode \"legacy\"; nftables mode has none)")
	list(&s.programs, "programs", "what to measure, in this order (default \""+peer+","+ours+"\")")
	f.IntVar(&s.services, "services", 10000, "number of Services (2000 by default where ipvs mode needs a virtual machine)")
	f.IntVar(&s.endpoints, "endpoints", 10, "endpoints of each Service")
	agent = f.String("sluice", "bin/sluice", "binary of the agent")
	f.StringVar(&s.tools, "tools", "", "folder of etcd, kube-apiserver and kube-proxy (default $SLUICE_TOOLS, ~/.cache/sluice-tools)")
	f.Func("latency", "numbers of Services, like 10,1000,10000: only time new connections, with each (nftables mode)", func(v string) (err error) {
		s.latency, err = parseSizes(v)
		return err
	})
	f.StringVar(&s.jsonFile, "json", "", "also write the results to this file")
	f.BoolVar(&s.strace, "strace", false, "also count system calls, with strace, at the end")
	f.StringVar(&s.profiles, "profiles", "", "write Go profiles, metrics and logs of the programs to this folder (they cost a little time)")
	f.DurationVar(&s.coldLimit, "cold-limit", 10*time.Minute, "give up a cold start after this")
	f.IntVar(&s.changes, "changes", 40, "endpoint changes to time, one after the other")
	f.DurationVar(&s.changeLimit, "change-limit", 2*time.Minute, "begin no further change after this")
	f.DurationVar(&s.followLimit, "follow-limit", 2*time.Minute, "give up waiting until traffic follows a change after this")
	f.IntVar(&s.burst, "burst", 200, "endpoint changes for the CPU figure")
	f.IntVar(&s.burstRate, "burst-rate", 20, "endpoint changes a second for the CPU figure")
	f.IntVar(&s.connections, "connections", 6000, "connections of each kind to time")
	f.DurationVar(&s.rest, "rest", time.Minute, "how long to watch the program when nothing changes")
	f.DurationVar(&s.repairLimit, "repair-limit", time.Minute, "give up waiting until rules that were flushed are back after this")
	return f, agent
}

// complete fills in what depends on other flags.
func (s *settings) complete(given map[string]bool) error {
	if !slices.Contains(modes, s.mode) {
		return fmt.Errorf("-mode %s: it is none of %s", s.mode, strings.Join(modes, ", "))
	}
	switch {
	case s.mode == modeNFTables && given["variants"]:
		return errors.New("-variants: nftables mode has none")
	case s.mode == modeNFTables:
		s.variants = []string{modeNFTables} // stands in names
	case !given["variants"] && s.mode == modeIPVS:
		s.variants = []string{"legacy"} // it needs few rules
	case !given["variants"]:
		s.variants = []string{"legacy", "nft"}
	}
	if !given["programs"] {
		s.programs = []string{peer, ours}
	}
	if needsMachine(s) {
		s.small(given)
	}
	if len(s.latency) > 0 {
		return s.completeLatency(given)
	}
	return nil
}

func (s *settings) check() error {
	for _, v := range s.variants {
		if v != "legacy" && v != "nft" && s.mode != modeNFTables {
			return fmt.Errorf("-variants: %q is neither legacy nor nft", v)
		}
	}
	for _, p := range s.programs {
		if p != peer && p != ours {
			return fmt.Errorf("-programs: %q is neither %s nor %s", p, peer, ours)
		}
	}
	if s.services < 1 || s.services > maxServices || s.endpoints < 1 || s.endpoints > maxEndpoints {
		return fmt.Errorf("-services must be 1 to %d, -endpoints 1 to %d", maxServices, maxEndpoints)
	}
	if !s.layout().fits() {
		return fmt.Errorf("-services %d with -endpoints %d: there are not so many addresses", s.services, s.endpoints)
	}
	for name, n := range map[string]int{"changes": s.changes, "burst": s.burst, "burst-rate": s.burstRate, "connections": s.connections} {
		if n < 1 {
			return fmt.Errorf("-%s must be at least 1", name)
		}
	}
	if s.rest < time.Second {
		return errors.New("-rest must be at least 1s")
	}
	return nil
}

func (s *settings) layout() layout { return layout{s.services, s.endpoints} }

// small takes other defaults for a machine on which kube-proxy needs more than
// twenty minutes for the usual ones, most of them to start ipset 10,000 times.
func (s *settings) small(given map[string]bool) {
	if !given["services"] {
		s.services = 2000
	}
	if !given["cold-limit"] {
		s.coldLimit = 15 * time.Minute
	}
	if !given["changes"] {
		s.changes = 20
	}
	if !given["change-limit"] {
		s.changeLimit = 5 * time.Minute
	}
}

// find locates every program before anything is started.
func (s *settings) find(agent string) error {
	if s.tools == "" {
		s.tools = os.Getenv("SLUICE_TOOLS")
	}
	if s.tools == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return fmt.Errorf("find the tools: %w", err)
		}
		s.tools = filepath.Join(cache, "sluice-tools")
	}
	s.paths = map[string]string{}
	needed := []string{filepath.Join(s.tools, "etcd"), filepath.Join(s.tools, "kube-apiserver")}
	if os.Getenv(insideVariable) != "" {
		needed = nil // they run outside
	}
	s.paths[peer] = filepath.Join(s.tools, "kube-proxy")
	var err error
	if s.paths[ours], err = filepath.Abs(agent); err != nil {
		return err
	}
	for _, p := range s.programs {
		needed = append(needed, s.paths[p])
	}
	for _, path := range needed {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%w (make bench builds what is needed)", err)
		}
	}
	return netlab.Supported()
}

// run measures everything and prints the table.
func run(ctx context.Context, s *settings, out io.Writer) error {
	if dir := os.Getenv(insideVariable); dir != "" {
		return runInside(ctx, s, dir)
	}
	dir, err := os.MkdirTemp("", "sluice-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if s.profiles != "" {
		if err := os.MkdirAll(s.profiles, 0o755); err != nil {
			return err
		}
	}
	if err := s.copyPrograms(dir); err != nil {
		return err
	}
	report := newReport(s)
	if needsMachine(s) {
		err = runInMachine(ctx, s, dir, report)
	} else {
		err = runHere(ctx, s, dir, report)
	}
	if err != nil {
		return err
	}
	complete := report.complete(s.programs)
	if len(s.latency) > 0 {
		complete = report.completeLatency(s.programs, s.latency)
		report.printLatency(out, s.programs)
	} else {
		report.print(out)
	}
	report.printSkipped(out)
	if s.jsonFile != "" {
		if err := report.write(s.jsonFile); err != nil {
			return fmt.Errorf("write results: %w", err)
		}
	}
	if !complete {
		return fmt.Errorf("some figures could not be taken: see above")
	}
	return nil
}

// runHere measures on the machine's own kernel.
func runHere(ctx context.Context, s *settings, dir string, r *report) error {
	c, err := newCluster(s, dir, controlHost)
	if err != nil {
		return err
	}
	defer c.lab.Close()
	control, err := newControl(ctx, s, dir, c.lab.Host(controlHost.Name))
	if err != nil {
		return err
	}
	defer control.close()
	c.writer = control
	if len(s.latency) > 0 {
		return measureLatency(ctx, c, r, control.fill)
	}
	if err := control.fill(ctx, s.services); err != nil {
		return err
	}
	return measureAll(ctx, c, r, func() error { return nil })
}

// measureAll runs each program with each variant, and calls done after each.
func measureAll(ctx context.Context, c *cluster, r *report, done func() error) error {
	var err error
	if c.starts, err = newStarts(); err != nil {
		progress("the processes that are started are not counted: %v", err)
	}
	for _, v := range c.s.variants {
		for _, p := range c.s.programs {
			if ctx.Err() != nil {
				r.skip("%s, %s: interrupted", p, v)
				continue
			}
			t := newTrial(c, c.s, p, v)
			r.add(t.result)
			r.skipAll(t, t.run(ctx, t.phases()))
			if err := done(); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyPrograms keeps the programs under test from being replaced meanwhile.
func (s *settings) copyPrograms(dir string) error {
	for _, p := range s.programs {
		to := filepath.Join(dir, p)
		if err := copyFile(s.paths[p], to); err != nil {
			return fmt.Errorf("copy %s: %w", p, err)
		}
		s.paths[p] = to
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

var began = time.Now()

// progress tells whoever waits what is going on.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%7.1fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}
