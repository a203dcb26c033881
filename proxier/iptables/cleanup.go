package iptables

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// leftovers are what Cleanup removes of one table.
type leftovers struct {
	jumps []jump   // rules of built-in chains that lead to ours
	gone  []string // chains of ours
}

// scope is what is to be removed of a table.
type scope struct {
	chain func(table, name string) bool // goes, with the jumps to it
	jump  func(to, text string) bool    // goes, though the chain that it leads to stays
}

// all is everything of this mode.
var all = scope{chain: removable, jump: func(string, string) bool { return false }}

// notShared is what this mode has and ipvs mode, ours or kube-proxy's, has not.
// Chains that both have by one name hold ipvs mode's rules when that is in force.
var notShared = scope{
	chain: func(table, name string) bool {
		switch name {
		case chainServices:
			return table == tableFilter
		case chainNodePorts, chainExternalServices, chainTrial, chainCanary:
			return removable(table, name)
		}
		return table != "mangle" && isObjectChain(name)
	},
	// Other chains than in ipvs mode lead there, under another comment.
	jump: func(to, text string) bool {
		return to == chainProxyFirewall && strings.Contains(text, commentFirewall)
	},
}

// Cleanup removes the chains of this proxier and of kube-proxy's iptables mode,
// and the jumps into them. KUBE-FIREWALL is the kubelet's too and stays; so does
// a chain that somebody else's rule jumps to (a host port plugin may use
// KUBE-MARK-MASQ), with the chains that it jumps to itself: the kernel would
// refuse to delete them, and everything else with them.
func (x *Proxier) Cleanup(ctx context.Context) error {
	x.Forget()
	_, err := remove(ctx, &xtables.Runner{Programs: x.o.Programs, Stats: x.o.Stats}, all)
	return err
}

// remove says whether there was anything to remove.
func remove(ctx context.Context, run *xtables.Runner, what scope) (bool, error) {
	did := false
	var errs []error
	for _, table := range []string{tableFilter, tableNAT, "mangle"} {
		left, err := findLeftovers(ctx, run, table, what)
		if err == nil && len(left.jumps)+len(left.gone) > 0 {
			err = run.Restore(ctx, func(w *bufio.Writer) { left.write(w, table) })
			did = did || err == nil
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("clean up table %s: %w", table, err))
		}
	}
	return did, errors.Join(errs...)
}

func findLeftovers(ctx context.Context, run *xtables.Runner, table string, what scope) (leftovers, error) {
	var left leftovers
	builtin := map[string]bool{}
	var chains []string
	var needed []string // by rules that are not ours
	leads := map[string][]string{}
	err := run.Save(ctx, table, func(c xtables.Chain) {
		if c.Builtin {
			builtin[c.Name] = true
		} else if what.chain(table, c.Name) {
			chains = append(chains, c.Name)
		}
	}, func(name, text []byte) {
		from, to := string(name), jumpTarget(string(text))
		switch {
		case builtin[from] && what.jump(to, string(text)):
			left.jumps = append(left.jumps, jump{table, from, string(bytes.Clone(text))})
		case !what.chain(table, to):
		case what.chain(table, from):
			leads[from] = append(leads[from], to)
		case builtin[from] && !isObjectChain(to) && to != chainMarkMasq:
			left.jumps = append(left.jumps, jump{table, from, string(bytes.Clone(text))})
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

// removable says whether a chain is one that Cleanup may remove. The canaries
// are kube-proxy's; this proxier needs none.
func removable(table, name string) bool {
	return name == chainCanary || table != "mangle" && ours(table, name)
}

func (l leftovers) write(w *bufio.Writer, table string) {
	_, _ = w.WriteString("*" + table + "\n")
	for _, j := range l.jumps {
		_, _ = w.WriteString("-D " + j.from + " " + j.text + "\n")
	}
	for _, c := range l.gone {
		_, _ = w.WriteString(":" + c + " - [0:0]\n")
	}
	for _, c := range l.gone {
		_, _ = w.WriteString("-X " + c + "\n")
	}
	_, _ = w.WriteString("COMMIT\n")
}

// jumpTarget returns the chain or target that a rule's text jumps or goes to. No
// comment that this package or kube-proxy writes contains " -j " or " -g ".
func jumpTarget(text string) string {
	i := max(strings.LastIndex(text, "-j "), strings.LastIndex(text, "-g "))
	if i < 0 || i > 0 && text[i-1] != ' ' {
		return ""
	}
	to, _, _ := strings.Cut(text[i+3:], " ")
	return to
}
