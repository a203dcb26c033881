package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// reading is one figure.
type reading struct {
	Value float64 `json:"value"`
	Over  bool    `json:"over,omitempty"` // it is more: Value is where the benchmark gave up
	N     int     `json:"n,omitempty"`    // of how many samples
	Note  string  `json:"note,omitempty"`
}

// result is what was read of one program with one variant.
type result struct {
	Program    string             `json:"program"`
	Version    string             `json:"version"`
	Variant    string             `json:"variant"`
	Services   int                `json:"services"`
	LoadBefore string             `json:"loadBefore"`
	LoadAfter  string             `json:"loadAfter"`
	Readings   map[string]reading `json:"readings"`

	mu sync.Mutex
}

func (r *result) set(id string, v reading) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Readings[id] = v
}

func (r *result) get(id string) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.Readings[id].Value
}

// report is everything that one run of the benchmark has to say.
type report struct {
	Date      string    `json:"date"`
	Guest     string    `json:"guest,omitempty"` // where the nodes are, if not on the machine's own kernel
	Kernel    string    `json:"kernel"`
	CPU       string    `json:"cpu"`
	CPUs      int       `json:"cpus"`
	Tool      string    `json:"tool"` // the version of iptables or nft
	Command   string    `json:"command"`
	Mode      string    `json:"mode"`
	Services  int       `json:"services"`
	Endpoints int       `json:"endpointsEach"`
	Results   []*result `json:"results"`
	Skipped   []string  `json:"skipped,omitempty"`

	variants []string
}

func newReport(s *settings) *report {
	r := &report{Date: time.Now().UTC().Format("2006-01-02 15:04 UTC"), Command: "bench " + strings.Join(os.Args[1:], " "), CPUs: runtime.NumCPU(),
		Mode: s.mode, Services: s.services, Endpoints: s.endpoints, variants: s.variants}
	if data, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		r.Kernel = strings.TrimSpace(string(data))
	}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				r.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	tool := "iptables"
	if s.mode == modeNFTables {
		tool = "nft"
	}
	if out, err := exec.Command(tool, "--version").Output(); err == nil {
		r.Tool, _, _ = strings.Cut(strings.TrimSpace(string(out)), " (")
	}
	return r
}

func (r *report) add(x *result) { r.Results = append(r.Results, x) }

func (r *report) write(file string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}

func (r *report) skip(format string, args ...any) {
	r.Skipped = append(r.Skipped, fmt.Sprintf(format, args...))
}

func (r *report) skipAll(t *trial, errs []error) {
	for _, err := range errs {
		r.skip("%s, %s: %v", t.program, t.variant, err)
		progress("%s, %s: %v", t.program, t.variant, err)
	}
}

// metric is a row of the table.
type metric struct {
	id, title, unit string
	target          map[string]float64 // by mode and variant, or by mode; "" for all others
	optional        bool               // there are kernels on which it cannot be taken
	modes           []string           // that have it; nil if all have
}

func (m metric) targetOf(mode, variant string) (float64, bool) {
	for _, key := range []string{mode + "/" + variant, mode, ""} {
		if v, ok := m.target[key]; ok {
			return v, true
		}
	}
	return 0, false
}

func (m metric) in(mode string) bool { return m.modes == nil || slices.Contains(m.modes, mode) }

func all(v float64) map[string]float64 { return map[string]float64{"": v} }

// repairing are the modes that have all in rules.
var repairing = []string{modeIPTables, modeNFTables}

// Targets are the project's, for 10,000 Services with 10 endpoints each.
var metrics = []metric{
	{id: "cold.important", title: "cold start until kubernetes.default and DNS answer", unit: "s", target: all(0.3)},
	{id: "cold.all", title: "cold start until every Service answers", unit: "s", target: map[string]float64{modeIPTables: 6, modeIPVS: 3, modeNFTables: 0.8}},
	{id: "cold.idle", title: "cold start until nothing is left to do", unit: "s"},
	{id: "cold.cpu", title: "CPU time of a cold start", unit: "s"},
	{id: "cold.starts", title: "processes started by then", optional: true},
	{id: "change.p50", title: "endpoint change until traffic follows, median", unit: "ms"},
	{id: "change.p99", title: "endpoint change until traffic follows, p99", unit: "ms",
		target: map[string]float64{"iptables/legacy": 800, "iptables/nft": 250, modeIPVS: 10, modeNFTables: 10}},
	{id: "change.failed", title: "connections lost during these changes", target: all(0)},
	{id: "change.starts", title: "processes started per change", target: map[string]float64{modeIPVS: 0}, optional: true},
	{id: "change.calls", title: "system calls per change, programs included", optional: true},
	{id: "change.cpu", title: "CPU time per 1,000 endpoint changes", unit: "s", target: map[string]float64{modeIPVS: 1, modeNFTables: 1}},
	{id: "change.behind", title: "traffic follows the last of many changes after", unit: "s"},
	{id: "rest.cpu", title: "CPU time of a minute without changes", unit: "s"},
	{id: "rest.starts", title: "processes started in that minute", optional: true},
	{id: "rss.start", title: "memory after the cold start", unit: "MiB", target: all(90)},
	{id: "rss.steady", title: "memory after all changes", unit: "MiB", target: all(90)},
	{id: "rss.peak", title: "memory, peak", unit: "MiB", target: all(130)},
	{id: "rss.children", title: "memory, peak of one program that it starts", unit: "MiB"},
	{id: "rss.together", title: "memory, peak of the process and its programs", unit: "MiB"},
	{id: "repair.one", title: "rules flushed, until a Service answers again", unit: "ms", modes: repairing},
	{id: "repair.failed", title: "connections lost until then", modes: repairing},
	{id: "repair.all", title: "rules flushed, until every Service answers again", unit: "ms", modes: repairing},
	{id: "conn.service", title: "new connection to a Service, added latency", unit: "us", target: all(15)},
	{id: "conn.slowest", title: "the same, slowest of 20 Services", unit: "us"},
	{id: "conn.other", title: "new connection to no Service, added latency", unit: "us", target: all(15)},
}

const targetServices, targetEndpoints = 10000, 10

// print writes the table for people. It is Markdown as well.
func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "\n%d Services with %d endpoints each, %s mode, %s\n", r.Services, r.Endpoints, r.Mode, r.Date)
	fmt.Fprintf(w, "Linux %s, %d x %s, %s\n", r.Kernel, r.CPUs, r.CPU, r.Tool)
	if r.Guest != "" {
		fmt.Fprintf(w, "The nodes in %s: absolute figures mean nothing there, and targets are not judged\n", r.Guest)
	}
	for _, v := range r.variants {
		p, o := r.find(peer, v), r.find(ours, v)
		fmt.Fprintf(w, "\n### %s\n\n", r.title(v))
		for _, x := range []*result{p, o} {
			if x != nil {
				fmt.Fprintf(w, "%s: %s; load average %s before, %s after\n", x.Program, x.Version, x.LoadBefore, x.LoadAfter)
			}
		}
		fmt.Fprintln(w)
		r.printTable(w, v, p, o)
		for _, x := range []*result{p, o} {
			if base, ok := x.reading("conn.base"); ok {
				fmt.Fprintf(w, "\nBeside %s, a connection took %.0f us where there are no rules.\n", x.Program, base.Value)
			}
		}
	}
}

func (r *report) printSkipped(w io.Writer) {
	for _, s := range r.Skipped {
		fmt.Fprintf(w, "\nNot measured: %s\n", s)
	}
}

func (r *report) title(variant string) string {
	if r.Mode == modeIPTables {
		return "iptables, " + variant + " variant"
	}
	return r.Mode
}

func (r *report) find(program, variant string) *result {
	for _, x := range r.Results {
		if x.Program == program && x.Variant == variant {
			return x
		}
	}
	return nil
}

func (r *report) printTable(w io.Writer, variant string, p, o *result) {
	rows := [][]string{{"", "kube-proxy", "Sluice", "ratio", "target", ""}}
	var notes []string
	for _, m := range metrics {
		if !m.in(r.Mode) {
			continue
		}
		a, aok := p.reading(m.id)
		b, bok := o.reading(m.id)
		row := []string{m.title, m.show(a, aok), m.show(b, bok), ratio(a, aok, b, bok), "", ""}
		if t, ok := m.targetOf(r.Mode, variant); ok {
			row[4] = "<= " + number(t) + unit(m.unit)
			if bok && r.Guest == "" && r.Services == targetServices && r.Endpoints == targetEndpoints {
				row[5] = "missed"
				if b.Value <= t && !b.Over {
					row[5] = "met"
				}
			}
		}
		for _, x := range []struct {
			who string
			reading
		}{{peer, a}, {ours, b}} {
			if x.Note != "" {
				notes = append(notes, fmt.Sprintf("%s, %s: %s", x.who, m.title, x.Note))
			}
		}
		rows = append(rows, row)
	}
	align(w, rows)
	for _, n := range notes {
		fmt.Fprintf(w, "\nNote: %s\n", n)
	}
}

func (r *result) reading(id string) (reading, bool) {
	if r == nil {
		return reading{}, false
	}
	v, ok := r.Readings[id]
	return v, ok
}

func (m metric) show(v reading, ok bool) string {
	switch {
	case !ok:
		return "-"
	case v.Over && m.unit == "ms" && v.Value >= 1000: // a limit
		return "> " + number(v.Value/1000) + " s"
	case v.Over:
		return "> " + number(v.Value) + unit(m.unit)
	case strings.HasPrefix(m.id, "conn."):
		return fmt.Sprintf("%+.0f", v.Value) + unit(m.unit)
	}
	return number(v.Value) + unit(m.unit)
}

func unit(u string) string {
	if u == "" {
		return ""
	}
	return " " + u
}

// number keeps about three digits.
func number(v float64) string {
	switch {
	case v == float64(int64(v)):
		return fmt.Sprintf("%d", int64(v))
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// ratio says how many times more the peer needs. Differences that are next to
// nothing, or negative by noise, have none.
func ratio(p reading, pok bool, o reading, ook bool) string {
	if !pok || !ook || p.Value <= 0 || o.Value <= 0 || o.Over {
		return ""
	}
	sign := ""
	if p.Over {
		sign = "> "
	}
	return fmt.Sprintf("%s%.1fx", sign, p.Value/o.Value)
}

func align(w io.Writer, rows [][]string) {
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for n, row := range rows {
		line := "|"
		for i, cell := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			if i == 0 || i == len(row)-1 {
				line += " " + cell + pad + " |"
			} else {
				line += " " + pad + cell + " |"
			}
		}
		fmt.Fprintln(w, line)
		if n > 0 {
			continue
		}
		line = "|"
		for i := range row {
			bar := strings.Repeat("-", width[i])
			if i == 0 || i == len(row)-1 {
				line += " " + bar + " |"
			} else {
				line += " " + bar + ":|"
			}
		}
		fmt.Fprintln(w, line)
	}
}

// complete says whether every figure was taken, but for those of a program that
// was given the time and did not make it: that is a result.
func (r *report) complete(programs []string) bool {
	for _, v := range r.variants {
		for _, p := range programs {
			x := r.find(p, v)
			if x == nil || !x.gaveUp() && !x.complete(r.Mode) {
				return false
			}
		}
	}
	return true
}

func (r *result) gaveUp() bool {
	for _, v := range r.Readings {
		if v.Over {
			return true
		}
	}
	return false
}

func (r *result) complete(mode string) bool {
	for _, m := range metrics {
		if _, ok := r.Readings[m.id]; !ok && !m.optional && m.in(mode) {
			return false
		}
	}
	return true
}
