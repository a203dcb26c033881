package iptables

import (
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// everything compiles a whole Set: base chains, each plan's chains, then the
// dispatch trees. keep leaves plans out. Chains come before those that refer to
// them. It returns the trees.
func (c compiler) everything(set *plan.Set, o *Options, keep func(*plan.Plan) bool, emit func(tableChain)) forest {
	for _, ch := range c.base(o) {
		emit(ch)
	}
	var entries [treeCount][]entry
	for p := range set.All {
		if !keep(p) {
			continue
		}
		rs := c.compile(p)
		for _, ch := range rs.chains {
			emit(tableChain{tableNAT, ch})
		}
		for _, e := range rs.entries {
			entries[e.tree] = append(entries[e.tree], e.entry)
		}
	}
	f := emptyForest()
	for i := range f {
		f[i] = f[i].with(nil, entries[i])
	}
	c.dispatchChains(&f, nil, emit)
	return f
}

// wanted collects chains by table and name.
type wanted map[string]map[string][]string

func (w wanted) add(ch tableChain) {
	if w[ch.table] == nil {
		w[ch.table] = map[string][]string{}
	}
	w[ch.table][ch.name] = ch.rules
}

var builtins = map[string][]string{
	tableFilter: {"INPUT", "FORWARD", "OUTPUT"},
	tableNAT:    {"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"},
}

func (w wanted) text(c compiler) string {
	var b strings.Builder
	if martian, ok := c.martianRule(); ok {
		w.add(tableChain{tableFilter, chain{chainFirewall, []string{martian}}})
	}
	for _, table := range []string{tableFilter, tableNAT} {
		b.WriteString("*" + table + "\n")
		for _, name := range builtins[table] {
			b.WriteString(":" + name + " ACCEPT [0:0]\n")
		}
		var names []string
		for name := range w[table] {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			b.WriteString(":" + name + " - [0:0]\n")
		}
		jumps := c.jumps()
		for _, name := range builtins[table] {
			for _, j := range slices.Backward(jumps) {
				if j.table == table && j.from == name {
					b.WriteString("-A " + name + " " + j.text + "\n")
				}
			}
		}
		for _, name := range names {
			for _, r := range w[table][name] {
				b.WriteString("-A " + name + " " + r + "\n")
			}
		}
		b.WriteString("COMMIT\n")
	}
	return b.String()
}
