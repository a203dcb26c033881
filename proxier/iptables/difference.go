package iptables

import (
	"cmp"
	"slices"
	"strings"
)

// difference collects what a change of some plans means for the tables.
type difference struct {
	put   map[tableRef][]string
	del   map[tableRef]bool
	order []tableRef // of put, first mentioned first

	remove, add [treeCount][]entry
	keys        treeKeys

	grown, wrote map[string]int // rules, by table
}

func newDifference() *difference {
	return &difference{put: map[tableRef][]string{}, del: map[tableRef]bool{},
		grown: map[string]int{}, wrote: map[string]int{}}
}

// write notes that a chain, which had some rules before, is to hold others.
func (d *difference) write(ref tableRef, had, rules []string) {
	delete(d.del, ref)
	if _, ok := d.put[ref]; !ok {
		d.order = append(d.order, ref)
	}
	d.put[ref] = rules
	d.grown[ref.table] += len(rules) - len(had)
	d.wrote[ref.table] += len(rules)
}

func (d *difference) drop(ref tableRef, had []string) {
	d.grown[ref.table] -= len(had)
	if _, ok := d.put[ref]; !ok {
		d.del[ref] = true
	}
}

// replace puts one ruleset in the place of another.
func (d *difference) replace(old, new ruleset) {
	had := make(map[string][]string, len(old.chains))
	for _, ch := range old.chains {
		had[ch.name] = ch.rules
	}
	for _, ch := range new.chains {
		rules, ok := had[ch.name]
		delete(had, ch.name)
		if !ok || !slices.Equal(rules, ch.rules) {
			d.write(tableRef{tableNAT, ch.name}, rules, ch.rules)
		}
	}
	for name, rules := range had {
		d.drop(tableRef{tableNAT, name}, rules)
	}
	d.entries(old.entries, new.entries)
}

func (d *difference) entries(old, new []placed) {
	for _, e := range old {
		if !slices.Contains(new, e) {
			d.remove[e.tree] = append(d.remove[e.tree], e.entry)
			d.keys[e.tree] = append(d.keys[e.tree], e.key)
		}
	}
	for _, e := range new {
		if !slices.Contains(old, e) {
			d.add[e.tree] = append(d.add[e.tree], e.entry)
			d.keys[e.tree] = append(d.keys[e.tree], e.key)
		}
	}
}

// plant returns the trees after the change.
func (d *difference) plant(f forest) forest {
	for i := range f {
		f[i] = f[i].with(d.remove[i], d.add[i])
		slices.Sort(d.keys[i])
		d.keys[i] = slices.Compact(d.keys[i])
	}
	return f
}

// compare adds what differs between the dispatch chains of two forests. keys
// limits it to what changed keys can affect; nil compares all.
func (d *difference) compare(old, new forest, was, is compiler, keys *treeKeys) {
	had := map[tableRef][]string{}
	was.dispatchChains(&old, keys, func(c tableChain) { had[tableRef{c.table, c.name}] = c.rules })
	is.dispatchChains(&new, keys, func(c tableChain) {
		ref := tableRef{c.table, c.name}
		rules, ok := had[ref]
		delete(had, ref)
		if !ok || !slices.Equal(rules, c.rules) {
			d.write(ref, rules, c.rules)
		}
	})
	for ref, rules := range had {
		d.drop(ref, rules)
	}
}

func (d *difference) compareBase(old, new []tableChain) {
	for i, c := range new {
		if !slices.Equal(old[i].rules, c.rules) {
			d.write(tableRef{c.table, c.name}, old[i].rules, c.rules)
		}
	}
}

// change is the difference as a transaction, in an order that does not depend
// on maps.
func (d *difference) change() *change {
	ch := &change{}
	for _, ref := range d.order {
		ch.list = append(ch.list, tableChain{ref.table, chain{ref.name, d.put[ref]}})
	}
	for ref := range d.del {
		ch.del = append(ch.del, ref)
	}
	sortRefs(ch.del)
	return ch
}

func sortRefs(list []tableRef) {
	slices.SortFunc(list, func(a, b tableRef) int {
		return cmp.Or(strings.Compare(a.table, b.table), strings.Compare(a.name, b.name))
	})
}
