package main

import (
	"strings"
	"testing"
)

// run feeds events to a report and returns what it prints and says.
func run(t *testing.T, events ...string) (string, bool) {
	t.Helper()
	var out strings.Builder
	r := &report{out: &out, output: map[string]map[string][]string{}}
	if err := r.read(strings.NewReader(strings.Join(events, "\n"))); err != nil {
		t.Fatal(err)
	}
	ok := r.summary()
	return out.String(), ok
}

func TestReport(t *testing.T) {
	pass := []string{
		`{"Action":"output","Package":"p","Test":"A","Output":"noise\n"}`,
		`{"Action":"pass","Package":"p","Test":"A"}`,
		`{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}`,
		`{"Action":"pass","Package":"p"}`,
	}
	skip := []string{
		`{"Action":"output","Package":"q","Test":"B","Output":"=== RUN   B\n"}`,
		`{"Action":"output","Package":"q","Test":"B","Output":"    b_test.go:3: needs root\n"}`,
		`{"Action":"output","Package":"q","Test":"B","Output":"--- SKIP: B (0.00s)\n"}`,
		`{"Action":"skip","Package":"q","Test":"B"}`,
	}
	fail := []string{
		`{"Action":"output","Package":"r","Test":"C","Output":"    c_test.go:3: broken\n"}`,
		`{"Action":"fail","Package":"r","Test":"C"}`,
		`{"Action":"output","Package":"r","Output":"FAIL\tr\t0.1s\n"}`,
		`{"Action":"fail","Package":"r"}`,
	}
	build := []string{
		`{"ImportPath":"s","Action":"build-output","Output":"s.go:1: syntax error\n"}`,
		`{"ImportPath":"s","Action":"build-fail"}`,
	}
	for _, c := range []struct {
		name   string
		events []string
		ok     bool
		want   []string
		not    string
	}{
		{"pass", pass, true, []string{"ok  \tp\t0.1s", "all 1 packages with tests passed"}, "noise"},
		{"skip", skip, true, []string{"skipped: 1", "q B: b_test.go:3: needs root"}, "=== RUN"},
		{"fail", append(slicesOf(pass), fail...), false, []string{"broken", "FAIL\tr", "failed: 2"}, "passed"},
		{"build", build, false, []string{"syntax error", "s (build)"}, "passed"},
		{"not json", []string{"go: no such module"}, true, []string{"go: no such module"}, "failed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, ok := run(t, c.events...)
			if ok != c.ok {
				t.Errorf("ok = %v, want %v", ok, c.ok)
			}
			for _, want := range c.want {
				if !strings.Contains(got, want) {
					t.Errorf("no %q in:\n%s", want, got)
				}
			}
			if strings.Contains(got, c.not) {
				t.Errorf("%q in:\n%s", c.not, got)
			}
		})
	}
}

func slicesOf(s []string) []string { return append([]string(nil), s...) }
