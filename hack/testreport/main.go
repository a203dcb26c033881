// Command testreport reads the events of `go test -json` and prints what go test
// would print: a line for each package, the output of what failed. At the end it
// names every test that was skipped and why, because a skip that nobody sees
// looks like a pass. It knows nothing of the product.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is a line of `go test -json` (go doc test2json).
type event struct {
	Action     string
	Package    string
	ImportPath string // of build events, instead of Package
	Test       string
	Output     string
}

// report gathers what is known until a package's end decides what to print.
type report struct {
	out     io.Writer
	output  map[string]map[string][]string // package, test ("" is the package itself)
	skipped []string
	failed  []string
	passed  int
}

func main() {
	r := &report{out: os.Stdout, output: map[string]map[string][]string{}}
	if err := r.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(1)
	}
	if !r.summary() {
		os.Exit(1)
	}
}

func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			var e event
			if json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
				fmt.Fprint(r.out, line) // go's own words, such as a module error
			} else {
				r.add(e)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *report) add(e event) {
	tests := r.output[e.Package]
	if tests == nil {
		tests = map[string][]string{}
		r.output[e.Package] = tests
	}
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "build-fail":
		r.failed = append(r.failed, e.ImportPath+" (build)")
	case "output":
		tests[e.Test] = append(tests[e.Test], e.Output)
	case "skip":
		if e.Test != "" {
			r.skipped = append(r.skipped, fmt.Sprintf("%s %s: %s", e.Package, e.Test, reason(tests[e.Test])))
			delete(tests, e.Test)
		}
	case "pass":
		delete(tests, e.Test)
		if e.Test == "" {
			r.passed++
		}
	case "fail":
		if e.Test != "" {
			r.failed = append(r.failed, e.Package+" "+e.Test)
		} else {
			r.failed = append(r.failed, e.Package)
		}
	}
	switch {
	case e.Action == "output" && e.Test == "" && strings.HasPrefix(e.Output, "ok "):
		fmt.Fprint(r.out, e.Output)
	case e.Action == "fail" && e.Test == "":
		// What is left is what failed, or never ended.
		names := make([]string, 0, len(tests))
		for name := range tests {
			names = append(names, name)
		}
		slices.Sort(names)
		slices.Reverse(names) // the package's own lines last
		for _, name := range names {
			fmt.Fprint(r.out, strings.Join(tests[name], ""))
		}
	}
}

// reason finds what the test said when it skipped.
func reason(output []string) string {
	var said []string
	for _, line := range output {
		text := strings.TrimSpace(line)
		if text == "" || strings.HasPrefix(text, "=== ") || strings.HasPrefix(text, "--- ") {
			continue
		}
		said = append(said, text)
	}
	if len(said) == 0 {
		return "no reason given"
	}
	return strings.Join(said, " ")
}

// summary prints the end and tells whether all is well.
func (r *report) summary() bool {
	if len(r.skipped) > 0 {
		fmt.Fprintf(r.out, "\nskipped: %d\n", len(r.skipped))
		for _, s := range r.skipped {
			fmt.Fprintln(r.out, "  "+s)
		}
	}
	if len(r.failed) > 0 {
		fmt.Fprintf(r.out, "\nfailed: %d\n", len(r.failed))
		for _, s := range r.failed {
			fmt.Fprintln(r.out, "  "+s)
		}
		return false
	}
	fmt.Fprintf(r.out, "\nall %d packages with tests passed\n", r.passed)
	return true
}
