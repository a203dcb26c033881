package trace

import (
	"errors"
	"fmt"
	"strings"
)

// Ruleset is a parsed iptables-save text. It is immutable.
type Ruleset struct {
	tables map[string]*table
}

type table struct {
	name   string
	chains map[string]*chain
}

type chain struct {
	name   string
	policy verdictKind // of a built-in chain
	rules  []*rule
}

type rule struct {
	text      string
	matches   []match
	jump      string // user chain, "" if act is the target
	gotoChain bool
	act       action // nil: no target
}

// verdictKind is what one rule or chain says.
type verdictKind uint8

const (
	next  verdictKind = iota // go on with the next rule
	leave                    // RETURN
	accept
	drop
	reject
)

type (
	match  func(*walk) bool
	action func(*walk) (verdictKind, error)
)

// Parse reads iptables-save output, or an iptables-restore input of the same
// form (declared chains and -A lines), with or without counters. Rules of the
// tables nat and filter must be understood completely; jumps must lead to
// declared chains.
func Parse(save string) (*Ruleset, error) {
	rs := &Ruleset{tables: map[string]*table{}}
	var cur *table
	var errs []error
	for i, line := range strings.Split(save, "\n") {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '*':
			cur = rs.tables[line[1:]]
			if cur == nil {
				cur = &table{name: line[1:], chains: map[string]*chain{}}
				rs.tables[cur.name] = cur
			}
		case line == "COMMIT":
			cur = nil
		case cur == nil:
			errs = append(errs, fmt.Errorf("line %d: %q outside of a table", i+1, line))
		case !cur.followed():
		default:
			if err := cur.line(line); err != nil {
				errs = append(errs, fmt.Errorf("line %d: table %s: %q: %w", i+1, cur.name, line, err))
			}
		}
	}
	errs = append(errs, rs.resolve()...)
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("read ruleset: %w", err)
	}
	return rs, nil
}

// followed says whether the table can change where a packet of a Service goes.
func (t *table) followed() bool { return t.name == "nat" || t.name == "filter" }

func (t *table) line(line string) error {
	if line[0] == ':' {
		f := strings.Fields(line[1:])
		if len(f) < 2 {
			return errors.New("chain without policy")
		}
		c := &chain{name: f[0]}
		switch f[1] {
		case "-", "ACCEPT":
			c.policy = accept
		case "DROP":
			c.policy = drop
		default:
			return fmt.Errorf("unknown policy %s", f[1])
		}
		if t.chains[c.name] == nil {
			t.chains[c.name] = c
		}
		return nil
	}
	words, err := split(line)
	if err != nil {
		return err
	}
	if len(words) > 0 && strings.HasPrefix(words[0], "[") { // counters of iptables-save -c
		words = words[1:]
	}
	if len(words) < 2 || words[0] != "-A" {
		return errors.New("not an -A line")
	}
	c := t.chains[words[1]]
	if c == nil {
		return fmt.Errorf("chain %s is not declared", words[1])
	}
	r, err := parseRule(words[2:])
	if err != nil {
		return err
	}
	r.text = strings.TrimSpace(line[strings.Index(line, words[1])+len(words[1]):])
	c.rules = append(c.rules, r)
	return nil
}

// resolve checks jumps once all chains are known.
func (rs *Ruleset) resolve() []error {
	var errs []error
	for _, t := range rs.tables {
		for _, c := range t.chains {
			for _, r := range c.rules {
				if r.jump != "" && t.chains[r.jump] == nil {
					errs = append(errs, fmt.Errorf("table %s: -A %s %s: unknown target or undeclared chain %s", t.name, c.name, r.text, r.jump))
				}
			}
		}
	}
	return errs
}

// Chains returns how many chains a table has, for tests that bound sizes.
func (rs *Ruleset) Chains(tableName string) int {
	if t := rs.tables[tableName]; t != nil {
		return len(t.chains)
	}
	return 0
}

// split cuts a line into words as iptables-restore does: blanks separate,
// double quotes hold together, a backslash in quotes takes the next character.
func split(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	in, quoted := false, false
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case quoted && c == '\\' && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted = !quoted
			in = true
		case !quoted && (c == ' ' || c == '\t'):
			if in {
				words = append(words, word.String())
				word.Reset()
				in = false
			}
		default:
			in = true
			word.WriteByte(c)
		}
	}
	if quoted {
		return nil, errors.New("quote not closed")
	}
	if in {
		words = append(words, word.String())
	}
	return words, nil
}
