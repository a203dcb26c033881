package config

import (
	"fmt"
	"strings"
)

// Problem is one thing that is wrong with a configuration, in words for the
// person who wrote it.
type Problem struct {
	Field   string // path in the file (iptables.masqueradeBit) or a flag (--iptables-masquerade-bit); "" for the whole
	Message string
}

func (p Problem) String() string {
	if p.Field == "" {
		return p.Message
	}
	return p.Field + ": " + p.Message
}

// Error says why a configuration was refused. All problems that could be found
// in one go are in it, one line each.
type Error struct {
	Source   string // the file; "" for the command line
	Problems []Problem
}

func (e *Error) Error() string {
	var b strings.Builder
	for i, p := range e.Problems {
		if i > 0 {
			b.WriteByte('\n')
		}
		if e.Source != "" && !strings.HasPrefix(p.Field, "--") {
			b.WriteString(oneLine(e.Source) + ": ")
		}
		b.WriteString(oneLine(p.String()))
	}
	return b.String()
}

// problems collects what is wrong, in the order in which it is found.
type problems []Problem

func (ps *problems) add(field, format string, args ...any) {
	*ps = append(*ps, Problem{Field: field, Message: fmt.Sprintf(format, args...)})
}

// oneLine keeps text that people or libraries wrote from breaking the promise
// of one line per problem.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return r == '\n' || r == '\r' || r == '\v' || r == '\f' || r == '\u0085' || r == '\u2028' || r == '\u2029'
	}), " ")
}
