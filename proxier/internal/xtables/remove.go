package xtables

import (
	"bufio"
	"bytes"
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
}

// Remove removes chains and the jumps into them, and says whether there were any.
// A chain that somebody else's rule leads to stays, with the chains that it
// leads to itself: the kernel would refuse to delete them, and everything else
// with them.
func (r *Runner) Remove(ctx context.Context, s Scope) (bool, error) {
	did := false
	var errs []error
	for _, table := range s.Tables {
		left, err := r.leftovers(ctx, table, s)
		if err == nil && len(left.jumps)+len(left.gone) > 0 {
			err = r.Restore(ctx, func(w *bufio.Writer) { left.write(w, table) })
			did = did || err == nil
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("clean up table %s: %w", table, err))
		}
	}
	return did, errors.Join(errs...)
}

func (r *Runner) leftovers(ctx context.Context, table string, s Scope) (leftovers, error) {
	var left leftovers
	builtin := map[string]bool{}
	var chains []string
	var needed []string // by rules that are not ours
	leads := map[string][]string{}
	err := r.Save(ctx, table, func(c Chain) {
		if c.Builtin {
			builtin[c.Name] = true
		} else if s.Chain(table, c.Name) {
			chains = append(chains, c.Name)
		}
	}, func(name, text []byte) {
		from, to := string(name), JumpTarget(string(text))
		switch {
		case builtin[from] && s.Jump != nil && s.Jump(to, string(text)):
			left.jumps = append(left.jumps, from+" "+string(bytes.Clone(text)))
		case !s.Chain(table, to):
		case s.Chain(table, from):
			leads[from] = append(leads[from], to)
		case builtin[from] && s.Entry(table, to):
			left.jumps = append(left.jumps, from+" "+string(bytes.Clone(text)))
		default:
			needed = append(needed, to)
		}
	})
	stay := map[string]bool{}
	for len(needed) > 0 {
		c := needed[0]
		needed = needed[1:]
		if !stay[c] {
			stay[c] = true
			needed = append(needed, leads[c]...)
		}
	}
	for _, c := range chains {
		if !stay[c] {
			left.gone = append(left.gone, c)
		}
	}
	return left, err
}

func (l leftovers) write(w *bufio.Writer, table string) {
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
