package iptables

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// fakeKernel keeps tables in memory with the kernel's rules: a jump needs its
// chain, a chain that is jumped to cannot be deleted, and each table of a
// change takes effect as a whole or not at all.
type fakeKernel struct {
	tables  map[string]map[string][]string
	writes  int
	changes []*change
	lists   int

	fail   func() bool            // the program fails, before or after some table
	refuse func(rule string) bool // the kernel refuses a rule
	rand   *rand.Rand
}

func newFake(r *rand.Rand) *fakeKernel {
	f := &fakeKernel{tables: map[string]map[string][]string{}, rand: r}
	for table, chains := range builtins {
		f.tables[table] = map[string][]string{}
		for _, c := range chains {
			f.tables[table][c] = nil
		}
	}
	return f
}

func (f *fakeKernel) token() (string, bool) { return fmt.Sprint(f.writes), true }

func (f *fakeKernel) read(context.Context) (*actual, error) {
	f.lists++
	if f.fail != nil && f.fail() {
		return nil, errors.New("fake: cannot list")
	}
	a := &actual{chains: map[tableRef]uint64{}, rules: map[tableRef]map[string]bool{}}
	for table, chains := range f.tables {
		for name, rules := range chains {
			ref := tableRef{table, name}
			if slices.Contains(builtins[table], name) || name == chainFirewall {
				a.rules[ref] = map[string]bool{}
				for _, r := range rules {
					a.rules[ref][r] = true
				}
			} else if ours(table, name) {
				a.chains[ref] = hashRules(rules)
			}
		}
	}
	return a, nil
}

func (f *fakeKernel) apply(_ context.Context, ch *change) error {
	if ch.nothing() {
		return nil
	}
	f.writes++
	f.changes = append(f.changes, ch)
	list := ch.list
	if ch.stream != nil {
		ch.stream(func(c tableChain) { list = append(list, c) })
	}
	for _, table := range []string{tableFilter, tableNAT} {
		if f.fail != nil && f.fail() {
			return &xtables.RestoreError{Output: "fake: failed", Err: &exec.ExitError{}}
		}
		next, err := f.applied(table, list, ch)
		if err != nil {
			return &xtables.RestoreError{Output: err.Error(), Err: &exec.ExitError{}}
		}
		f.tables[table] = next
	}
	return nil
}

func (f *fakeKernel) applied(table string, list []tableChain, ch *change) (map[string][]string, error) {
	next := map[string][]string{}
	for name, rules := range f.tables[table] {
		next[name] = rules
	}
	for _, c := range list {
		if c.table != table {
			continue
		}
		next[c.name] = nil
		for _, r := range c.rules {
			if f.refuse != nil && f.refuse(r) {
				return nil, fmt.Errorf("refused: %s", r)
			}
			if to := xtables.JumpTarget(r); strings.HasPrefix(to, "KUBE-") {
				if _, ok := next[to]; !ok {
					return nil, fmt.Errorf("BUG: %s %s jumps to a chain that is not there: %s", table, c.name, r)
				}
			}
		}
		next[c.name] = c.rules
	}
	for _, d := range ch.del {
		if d.table == table {
			if _, ok := next[d.name]; !ok {
				return nil, fmt.Errorf("BUG: %s %s to delete is not there", table, d.name)
			}
			next[d.name] = nil
		}
	}
	for _, e := range ch.empty {
		if e.table == table {
			next[e.name] = nil
		}
	}
	for _, j := range ch.jumps {
		if j.table == table {
			next[j.from] = slices.Insert(slices.Clone(next[j.from]), 0, j.text)
		}
	}
	for _, c := range ch.append {
		if c.table == table {
			if _, ok := next[c.name]; !ok {
				return nil, fmt.Errorf("BUG: rules for %s %s, which is not there", table, c.name)
			}
			next[c.name] = append(slices.Clone(next[c.name]), c.rules...)
		}
	}
	gone := map[string]bool{}
	for _, d := range ch.del {
		if d.table == table {
			delete(next, d.name)
			gone[d.name] = true
		}
	}
	if len(gone) == 0 {
		return next, nil
	}
	for name, rules := range next {
		for _, r := range rules {
			if gone[xtables.JumpTarget(r)] {
				return nil, fmt.Errorf("BUG: a deleted chain is jumped to: %s %s %s", table, name, r)
			}
		}
	}
	return next, nil
}

func (f *fakeKernel) try(_ context.Context, list []tableChain) error {
	for _, c := range list {
		for _, r := range c.rules {
			if f.refuse != nil && f.refuse(r) {
				return &xtables.RestoreError{Output: "refused: " + r, Err: &exec.ExitError{}}
			}
		}
	}
	return nil
}

// text prints the tables, sorted, for comparison.
func (f *fakeKernel) text() string {
	var b strings.Builder
	for _, table := range []string{tableFilter, tableNAT} {
		var names []string
		for n := range f.tables[table] {
			names = append(names, n)
		}
		slices.Sort(names)
		for _, n := range names {
			fmt.Fprintf(&b, "%s %s\n", table, n)
			for _, r := range f.tables[table][n] {
				fmt.Fprintf(&b, "\t%s\n", r)
			}
		}
	}
	return b.String()
}
