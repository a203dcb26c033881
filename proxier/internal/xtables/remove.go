package xtables

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Scope is what Remove removes.
type Scope struct {
	Tables []string
	// Chain says whether a chain goes.
	Chain func(table, name string) bool
	// Entry says of a chain that goes whether rules of built-in chains that lead to
	// it go with it. If not, such a rule is somebody else's.
	Entry func(table, name string) bool
	// Jump, if not nil, says of a rule of a built-in chain whether it goes, though
	// the chain that it leads to stays.
	Jump func(to, text string) bool
}

// leftovers are what Remove removes of one table.
type leftovers struct {
	jumps []string // rules of built-in chains: the chain and the text
	gone  []string // chains

	builtin map[string]bool
	chains  []string // that may go
	needed  []string // of them, by rules that are not ours
	leads   map[string][]string
}

// Remove removes chains and the jumps into them, and says whether there were any.
// A chain that somebody else's rule leads to stays, with the chains that it
// leads to itself: the kernel would refuse to delete them, and everything else
// with them.
func (r *Runner) Remove(ctx context.Context, s Scope) (bool, error) {
	found, err := r.leftovers(ctx, s)
	if err != nil {
		return false, fmt.Errorf("clean up: %w", err)
	}
	did := false
	var errs []error
	for _, table := range s.Tables {
		left := found[table]
		if left == nil || len(left.jumps)+len(left.gone) == 0 {
			continue
		}
		if err := r.Restore(ctx, func(w *bufio.Writer) { left.write(w, table) }); err != nil {
			errs = append(errs, fmt.Errorf("clean up table %s: %w", table, err))
			continue
		}
		did = true
	}
	return did, errors.Join(errs...)
}

func (r *Runner) leftovers(ctx context.Context, s Scope) (map[string]*leftovers, error) {
	found := map[string]*leftovers{}
	for _, table := range s.Tables {
		found[table] = &leftovers{builtin: map[string]bool{}, leads: map[string][]string{}}
	}
	err := r.SaveAll(ctx, func(table string, c Chain) {
		left := found[table]
		switch {
		case left == nil:
		case c.Builtin:
			left.builtin[c.Name] = true
		case s.Chain(table, c.Name):
			left.chains = append(left.chains, c.Name)
		}
	}, func(table string, chain, text []byte) {
		if left := found[table]; left != nil {
			left.rule(s, table, string(chain), string(text))
		}
	})
	for _, left := range found {
		left.decide()
	}
	return found, err
}

// rule looks at what a rule leads to.
func (l *leftovers) rule(s Scope, table, from, text string) {
	to := JumpTarget(text)
	switch {
	case l.builtin[from] && s.Jump != nil && s.Jump(to, text):
		l.jumps = append(l.jumps, from+" "+text)
	case !s.Chain(table, to):
	case s.Chain(table, from):
		l.leads[from] = append(l.leads[from], to)
	case l.builtin[from] && s.Entry(table, to):
		l.jumps = append(l.jumps, from+" "+text)
	default:
		l.needed = append(l.needed, to)
	}
}

// decide works out which chains can go.
func (l *leftovers) decide() {
	stay := map[string]bool{}
	for needed := l.needed; len(needed) > 0; {
		c := needed[0]
		needed = needed[1:]
		if !stay[c] {
			stay[c] = true
			needed = append(needed, l.leads[c]...)
		}
	}
	for _, c := range l.chains {
		if !stay[c] {
			l.gone = append(l.gone, c)
		}
	}
}

func (l *leftovers) write(w *bufio.Writer, table string) {
	_, _ = w.WriteString("*" + table + "\n")
	for _, j := range l.jumps {
		_, _ = w.WriteString("-D " + j + "\n")
	}
	for _, c := range l.gone {
		_, _ = w.WriteString(":" + c + " - [0:0]\n")
	}
	for _, c := range l.gone {
		_, _ = w.WriteString("-X " + c + "\n")
	}
	_, _ = w.WriteString("COMMIT\n")
}

// JumpTarget returns the chain or target that a rule's text jumps or goes to. It
// must not be used on rules whose comments contain " -j " or " -g "; none that
// Sluice or kube-proxy writes does.
func JumpTarget(text string) string {
	i := max(strings.LastIndex(text, "-j "), strings.LastIndex(text, "-g "))
	if i < 0 || i > 0 && text[i-1] != ' ' {
		return ""
	}
	to, _, _ := strings.Cut(text[i+3:], " ")
	return to
}

// RemoveHost removes from every variant that is installed and in use: another
// proxy may have used another one than we would. Asking an unused legacy variant
// would create its tables.
func RemoveHost(ctx context.Context, family model.Family, s Scope) (bool, error) {
	did := false
	for _, v := range []Variant{NFT, Legacy} {
		if v == Legacy && !LegacyInUse(family) {
			continue
		}
		programs, err := Find(v, family)
		if err != nil {
			continue // not installed
		}
		removed, err := (&Runner{Programs: programs}).Remove(ctx, s)
		did = did || removed
		if err != nil {
			return did, fmt.Errorf("variant %s: %w", v, err)
		}
	}
	return did, nil
}
