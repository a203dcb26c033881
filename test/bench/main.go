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
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
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
	profiles  string

	coldLimit   time.Duration
	changes     int
	changeLimit time.Duration // for all changes together
	burst       int
	burstRate   int
	connections int
}

const (
	peer = "kube-proxy"
	ours = "sluice"
)

func main() {
	s, err := parse(os.Args[1:])
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
	s := &settings{paths: map[string]string{}}
	f := flag.NewFlagSet("bench", flag.ExitOnError)
	var variants, programs, agent string
	f.StringVar(&s.mode, "mode", "iptables", "proxy mode to measure; iptables is the only one yet")
	f.StringVar(&variants, "variants", "legacy,nft", "iptables variants to measure")
	f.StringVar(&programs, "programs", peer+","+ours, "what to measure, in this order")
	f.IntVar(&s.services, "services", 10000, "number of Services")
	f.IntVar(&s.endpoints, "endpoints", 10, "endpoints of each Service")
	f.StringVar(&agent, "sluice", "bin/sluice", "binary of the agent")
	f.StringVar(&s.tools, "tools", "", "folder of etcd, kube-apiserver and kube-proxy (default $SLUICE_TOOLS, ~/.cache/sluice-tools)")
	f.StringVar(&s.jsonFile, "json", "", "also write the results to this file")
	f.StringVar(&s.profiles, "profiles", "", "write Go profiles of Sluice, and the logs, to this folder (they cost a little time)")
	f.DurationVar(&s.coldLimit, "cold-limit", 10*time.Minute, "give up a cold start after this")
	f.IntVar(&s.changes, "changes", 40, "endpoint changes to time, one after the other")
	f.DurationVar(&s.changeLimit, "change-limit", 2*time.Minute, "begin no further change after this")
	f.IntVar(&s.burst, "burst", 200, "endpoint changes for the CPU figure")
	f.IntVar(&s.burstRate, "burst-rate", 20, "endpoint changes a second for the CPU figure")
	f.IntVar(&s.connections, "connections", 6000, "connections of each kind to time")
	_ = f.Parse(args) // exits
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	if s.mode != "iptables" {
		return nil, fmt.Errorf("-mode %s: only iptables can be measured yet", s.mode)
	}
	s.variants, s.programs = strings.Split(variants, ","), strings.Split(programs, ",")
	for _, v := range s.variants {
		if v != "legacy" && v != "nft" {
			return nil, fmt.Errorf("-variants: %q is neither legacy nor nft", v)
		}
	}
	for _, p := range s.programs {
		if p != peer && p != ours {
			return nil, fmt.Errorf("-programs: %q is neither %s nor %s", p, peer, ours)
		}
	}
	if s.services < 1 || s.services > maxServices || s.endpoints < 1 || s.endpoints > maxEndpoints {
		return nil, fmt.Errorf("-services must be 1 to %d, -endpoints 1 to %d", maxServices, maxEndpoints)
	}
	for name, n := range map[string]int{"changes": s.changes, "burst": s.burst, "burst-rate": s.burstRate, "connections": s.connections} {
		if n < 1 {
			return nil, fmt.Errorf("-%s must be at least 1", name)
		}
	}
	return s, s.find(agent)
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
	needed := []string{filepath.Join(s.tools, "etcd"), filepath.Join(s.tools, "kube-apiserver")}
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
	report := newReport(s)
	c, err := newCluster(ctx, s, dir)
	if err != nil {
		return err
	}
	defer c.close()
	if err := c.fill(ctx); err != nil {
		return err
	}
	for _, v := range s.variants {
		for _, p := range s.programs {
			if ctx.Err() != nil {
				report.skip("%s, %s: interrupted", p, v)
				continue
			}
			r, err := measure(ctx, c, p, v)
			report.add(r)
			if err != nil {
				report.skip("%s, %s: the rest of its figures: %v", p, v, err)
				progress("%s, %s: %v", p, v, err)
			}
		}
	}
	report.print(out)
	if s.jsonFile != "" {
		data, err := json.MarshalIndent(report, "", "  ")
		if err == nil {
			err = os.WriteFile(s.jsonFile, append(data, '\n'), 0o644)
		}
		if err != nil {
			return fmt.Errorf("write results: %w", err)
		}
	}
	if !report.complete(s.programs) {
		return fmt.Errorf("some figures could not be taken: see above")
	}
	return nil
}

var began = time.Now()

// progress tells whoever waits what is going on.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%7.1fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}
