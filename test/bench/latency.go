package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// sizes is the value of -latency: numbers of Services, in the order in which the
// API server gets them.
type sizes []int

func parseSizes(v string) (sizes, error) {
	var out sizes
	for _, field := range strings.Split(v, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q is no number of Services", field)
		}
		out = append(out, n)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// completeLatency takes other defaults: one size after the other, of Services that
// have few endpoints.
func (s *settings) completeLatency(given map[string]bool) error {
	if s.mode != modeNFTables {
		return errors.New("-latency: only in nftables mode")
	}
	for _, name := range []string{"services", "strace", "profiles"} {
		if given[name] {
			return fmt.Errorf("-latency and -%s do not go together", name)
		}
	}
	s.services = s.latency[len(s.latency)-1]
	if !given["endpoints"] {
		s.endpoints = 2
	}
	return nil
}

// measureLatency times new connections with more and more Services. Each program
// starts anew with each number of them, on a node that has been cleared; one that
// has taken too long with fewer is not tried with more.
func measureLatency(ctx context.Context, c *cluster, r *report, fill func(context.Context, int) error) error {
	for _, variant := range c.s.variants {
		tooMany := map[string]bool{}
		for _, n := range c.s.latency {
			if err := fill(ctx, n); err != nil {
				return err
			}
			s := *c.s
			s.services = n
			for _, p := range s.programs {
				if tooMany[p] || ctx.Err() != nil {
					r.skip("%s, %d Services: not tried", p, n)
					continue
				}
				t := newTrial(c, &s, p, variant)
				errs := t.run(ctx, []phase{{"new connections", t.newConnections}})
				r.add(t.result)
				r.skipAll(t, errs)
				tooMany[p] = t.gaveUp()
			}
		}
	}
	return nil
}

func (r *report) of(program string) (out []*result) {
	for _, x := range r.Results {
		if x.Program == program {
			out = append(out, x)
		}
	}
	return out
}

// completeLatency says whether every size was measured, or was too much.
func (r *report) completeLatency(programs []string, wanted sizes) bool {
	for _, p := range programs {
		results := r.of(p)
		for _, x := range results {
			if _, ok := x.reading("conn.service"); !ok && !x.gaveUp() {
				return false
			}
		}
		if n := len(results); n == 0 || n < len(wanted) && !results[n-1].gaveUp() {
			return false
		}
	}
	return true
}

// printLatency writes a table for each program.
func (r *report) printLatency(w io.Writer, programs []string) {
	fmt.Fprintf(w, "\nNew connections by the number of Services, %d endpoints each, %s mode, %s\n", r.Endpoints, r.Mode, r.Date)
	fmt.Fprintf(w, "Linux %s, %d x %s, %s\n", r.Kernel, r.CPUs, r.CPU, r.Tool)
	for _, p := range programs {
		results := r.of(p)
		if len(results) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n### %s, %s\n\n", p, results[0].Version)
		align(w, latencyRows(results))
		for _, x := range results {
			if note := x.Readings["conn.service"].Note; note != "" {
				fmt.Fprintf(w, "\nNote: %d Services: %s\n", x.Services, note)
			}
		}
	}
}

// latencyRows has the ratio of what Services add to what the fewest do.
func latencyRows(results []*result) [][]string {
	rows := [][]string{{"Services", "no rules", "through a Service", "added", "slowest of 20", "ratio", "load average"}}
	first := results[0]
	for _, x := range results {
		us := func(id, format string) string {
			v, ok := x.reading(id)
			if !ok {
				return "-"
			}
			return fmt.Sprintf(format+" us", v.Value)
		}
		ratio := ""
		if a, b := first.Readings["conn.service"].Value, x.Readings["conn.service"].Value; a > 0 && b > 0 {
			ratio = fmt.Sprintf("%.2fx", b/a)
		}
		row := []string{strconv.Itoa(x.Services), us("conn.base", "%.1f"), us("conn.through", "%.1f"),
			us("conn.service", "%+.1f"), us("conn.slowest", "%+.1f"), ratio, x.LoadBefore}
		if v, ok := x.reading("cold.all"); ok && v.Over {
			row[2] = "not in " + number(v.Value) + " s"
		}
		rows = append(rows, row)
	}
	return rows
}
