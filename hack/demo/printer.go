package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"unicode/utf8"
)

// printer writes what people read, and remembers what went wrong.
type printer struct {
	out    io.Writer
	color  bool
	failed []string
	shown  int
}

// wantsColor follows no-color.org.
func wantsColor(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

const (
	bold  = "1"
	dim   = "2"
	green = "32"
	red   = "1;31"
)

func (p *printer) paint(color, text string) string {
	if !p.color {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}

func (p *printer) line(format string, args ...any) { fmt.Fprintf(p.out, format+"\n", args...) }

func (p *printer) heading(text string) { p.line("\n%s", p.paint(bold, text)) }

// command shows what somebody could type, and what comes then.
func (p *printer) command(command, output string) {
	p.line("\n  %s", p.paint(bold, "$ "+command))
	for line := range strings.Lines(strings.TrimRight(output, "\n") + "\n") {
		p.line("%s", strings.TrimRight("  "+line, " \n"))
	}
}

// filtered is command with grep behind it, if only is not empty; a text that must be
// there, and is not, is a failure.
func (p *printer) filtered(command, only, output, wants string) {
	if only != "" {
		pattern := regexp.MustCompile(only)
		var kept strings.Builder
		for line := range strings.Lines(output) {
			if pattern.MatchString(line) {
				kept.WriteString(line)
			}
		}
		command, output = command+" | grep '"+only+"'", kept.String()
	}
	p.command(command, output)
	if !strings.Contains(output, wants) {
		p.fail(command, fmt.Errorf("there is no %q", wants))
	}
}

// row is a line of a table: what was tried, its cells, and what is wrong with it.
type row struct {
	cells []string
	err   error
}

// table prints rows as they come: widths are given by a header whose cells are
// padded to them.
type table struct {
	p      *printer
	widths []int
}

func (p *printer) table(header ...string) *table {
	t := &table{p: p}
	for _, h := range header {
		t.widths = append(t.widths, utf8.RuneCountInString(h))
	}
	for i := range header {
		header[i] = strings.TrimRight(header[i], " ")
	}
	if strings.Join(header, "") != "" {
		p.line("      %s", p.paint(dim, t.format(header)))
	}
	return t
}

func (t *table) format(cells []string) string {
	var b strings.Builder
	for i, c := range cells {
		b.WriteString(c)
		if i < len(cells)-1 {
			b.WriteString(strings.Repeat(" ", max(0, t.widths[i]-utf8.RuneCountInString(c))+2))
		}
	}
	return strings.TrimRight(b.String(), " ")
}

// add prints a row.
func (t *table) add(r row) {
	t.p.shown++
	if r.err == nil {
		t.p.line("  %s  %s", t.p.paint(green, "ok"), t.format(r.cells))
		return
	}
	t.p.line("  %s  %s", t.p.paint(red, "NO"), t.format(r.cells))
	t.p.line("      %s", t.p.paint(red, strings.ReplaceAll(r.err.Error(), "\n", "; ")))
	t.p.fail(r.cells[0], r.err)
}

func (p *printer) fail(what string, err error) {
	p.failed = append(p.failed, fmt.Sprintf("%s: %s", what, strings.ReplaceAll(err.Error(), "\n", "; ")))
}

// failure names what went wrong; nil if nothing did.
func (p *printer) failure() error {
	if len(p.failed) == 0 {
		return nil
	}
	return errors.New("not as it should be:\n  - " +
		strings.Join(p.failed, "\n  - "))
}
