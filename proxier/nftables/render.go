package nftables

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Render gives the complete table that a Set asks for as nft lists it, elements in
// order, and without sets that are empty: for people, and for tests.
func Render(set *plan.Set, o Options) string {
	c := newCompiler(&o)
	base := c.base(&o, set.Facts, true)
	elements := base.elements
	chains := base.chains
	seen := map[chainSpec]bool{}
	counted := newCensus(o.Traffic, set)
	for _, p := range set.Sorted() {
		rs := c.compile(p)
		if counted.counts(p.PortKey) {
			rs.count(p)
		}
		elements = append(append(elements, rs.elements...), rs.shared...)
		for _, s := range rs.chains {
			if !seen[s] {
				seen[s] = true
				chains = append(chains, c.chain(s))
			}
		}
	}
	return c.text(elements, chains)
}

// RenderService gives what the plans of one Service compile to, with the chains that
// they share with others. It is for people.
func RenderService(set *plan.Set, o Options, name model.ServiceName) string {
	c := newCompiler(&o)
	var elements []element
	chains := map[chainSpec]chain{}
	for _, p := range set.Sorted() {
		if p.PortKey.Service() != name {
			continue
		}
		rs := c.compile(p)
		elements = append(append(elements, rs.elements...), rs.shared...)
		for _, s := range rs.chains {
			chains[s] = c.chain(s)
		}
	}
	if len(elements) == 0 {
		return ""
	}
	return c.text(elements, slices.Collect(maps.Values(chains)))
}

func (c compiler) text(elements []element, chains []chain) string {
	slices.SortFunc(elements, func(a, b element) int { return a.compare(b.key) })
	elements = slices.Compact(elements)
	slices.SortStableFunc(chains, func(a, b chain) int { return byHook(a, b) })
	var b strings.Builder
	fmt.Fprintf(&b, "table %s %s {\n", word(c.family), table)
	for set := range setCount {
		c.renderSet(&b, set, elements)
	}
	for i, ch := range chains {
		if i > 0 {
			b.WriteByte('\n')
		}
		ch.render(&b)
	}
	b.WriteString("}\n")
	return b.String()
}

// byHook orders base chains by their way, then others by name.
func byHook(a, b chain) int {
	switch {
	case a.hook != nil && b.hook != nil:
		return 0
	case a.hook != nil:
		return -1
	case b.hook != nil:
		return 1
	}
	return strings.Compare(string(a.name), string(b.name))
}

func (c compiler) renderSet(b *strings.Builder, set setID, elements []element) {
	var list []string
	for _, e := range elements {
		if e.set == set {
			list = append(list, e.String())
		}
	}
	if list == nil {
		return
	}
	spec := setSpecs[set]
	kind := "set"
	if spec.value != nil {
		kind = "map"
	}
	fmt.Fprintf(b, "\t%s %s {\n\t\ttypeof %s\n", kind, set, spec.typeof(c.family))
	if spec.ranges {
		b.WriteString("\t\tflags interval\n")
	}
	if spec.counter {
		b.WriteString("\t\tcounter\n")
	}
	fmt.Fprintf(b, "\t\telements = { %s }\n\t}\n\n", strings.Join(list, ",\n\t\t\t     "))
}

// typeof gives a set's types in nft's words.
func (s setSpec) typeof(f model.Family) string {
	list := func(fields []field) string {
		var words []string
		for _, x := range fields {
			words = append(words, x.word(f))
		}
		return strings.Join(words, " . ")
	}
	if s.value == nil {
		return list(s.key)
	}
	return list(s.key) + " : " + list(s.value)
}

func (x field) word(f model.Family) string {
	switch x {
	case fieldAddr:
		return word(f) + " daddr"
	case fieldClient, fieldSource:
		return word(f) + " saddr"
	case fieldProtocol:
		return "meta l4proto"
	case fieldPort:
		return "th dport"
	case fieldServerPort:
		return "th sport"
	case fieldIndex:
		return "numgen random mod 65536"
	}
	return "verdict"
}

func (ch chain) render(b *strings.Builder) {
	fmt.Fprintf(b, "\tchain %s {\n", ch.name)
	if h := ch.hook; h != nil {
		fmt.Fprintf(b, "\t\ttype %s hook %s priority %s; policy accept;\n", h.typ, h.name, h.word)
	}
	for _, r := range ch.rules {
		fmt.Fprintf(b, "\t\t%s\n", r.text)
	}
	b.WriteString("\t}\n")
}
