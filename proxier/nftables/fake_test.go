package nftables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// fakeKernel keeps a table in memory by the kernel's rules: a transaction takes
// effect as a whole or not at all, a key has one value, what is deleted must be there,
// and a chain that something leads to cannot be deleted.
type fakeKernel struct {
	table    *fakeTable
	dirty    bool
	affinity []client

	commits, reads int
	most           int // room; 0: plenty

	fail   func() bool         // a call fails, and nobody knows whether before or after
	refuse func(element) error // the kernel refuses an element
	mute   bool                // without saying which
	onRead func()
	seen   func(*fakeTable) // told of every state that packets can meet
}

type fakeTable struct {
	sets   map[setID]map[key]value
	chains map[chainName]chain
}

var _ kernel = (*fakeKernel)(nil)

func newFake() *fakeKernel { return &fakeKernel{} }

var errFake = errors.New("fake: no")

func (f *fakeKernel) failing() bool { return f.fail != nil && f.fail() }

func (t *fakeTable) clone() *fakeTable {
	c := &fakeTable{map[setID]map[key]value{}, maps.Clone(t.chains)}
	for id, set := range t.sets {
		c.sets[id] = maps.Clone(set)
	}
	return c
}

func (f *fakeKernel) there(context.Context) (bool, error) {
	if f.failing() {
		return false, errFake
	}
	return f.table != nil, nil
}

func (f *fakeKernel) read(_ context.Context, got func(element) error) (*actual, error) {
	f.reads++
	if f.onRead != nil {
		f.onRead()
	}
	if f.failing() {
		return nil, errFake
	}
	a := &actual{sets: map[setID]bool{}, chains: map[chainName]uint64{}, heads: map[chainName]uint64{}}
	if f.table == nil {
		return a, nil
	}
	a.table = true
	for id, set := range f.table.sets {
		a.sets[id] = true
		for k, v := range set {
			if err := got(element{k, v}); err != nil {
				return nil, err
			}
		}
	}
	for name, ch := range f.table.chains {
		a.chains[name], a.heads[name] = ch.digestOf(), ch.head()
	}
	return a, nil
}

func (f *fakeKernel) commit(_ context.Context, t []message) error {
	if f.failing() {
		return errFake
	}
	size := 0
	for _, m := range t {
		size += f.size(m)
	}
	if size > max(f.room(), 900*70) { // what must be in one transaction goes there in any case
		return &rolledBack{err: nlbatch.ErrTooLarge}
	}
	f.commits++
	next := &fakeTable{sets: map[setID]map[key]value{}, chains: map[chainName]chain{}}
	if f.table != nil {
		next = f.table.clone()
	}
	exists := f.table != nil
	back := &rolledBack{refused: map[int]error{}}
	for i, m := range t {
		if m.what == putTable || m.what == deleteTable {
			exists = m.what == putTable
			if !exists {
				next = &fakeTable{sets: map[setID]map[key]value{}, chains: map[chainName]chain{}}
			}
			continue
		}
		err := f.do(next, m)
		if !exists {
			err = unix.ENOENT
		}
		if err != nil {
			back.refused[i] = fmt.Errorf("%s: %w", m, err)
			back.err = back.refused[i]
		}
	}
	if len(back.refused) > 0 {
		if f.mute {
			back.refused = nil
		}
		return back
	}
	f.table = next
	if !exists {
		f.table = nil
	}
	if f.seen != nil && f.table != nil {
		f.seen(f.table)
	}
	if f.failing() {
		return errFake
	}
	return nil
}

func (f *fakeKernel) do(t *fakeTable, m message) error {
	switch m.what {
	case putSet:
		if t.sets[m.set] == nil {
			t.sets[m.set] = map[key]value{}
		}
	case writeChain:
		for _, r := range m.chain.rules {
			for _, to := range targets(r) {
				if _, ok := t.chains[to]; !ok {
					return fmt.Errorf("to %s: %w", to, unix.ENOENT)
				}
			}
		}
		t.chains[m.chain.name] = m.chain
	case flushChain:
		ch, ok := t.chains[chainName(m.name)]
		if !ok {
			return unix.ENOENT
		}
		ch.rules = nil
		t.chains[ch.name] = ch
	case deleteChain:
		return t.deleteChain(chainName(m.name))
	case putElements, deleteElements:
		return f.change(t, m)
	default:
		return errors.New("BUG: unknown verb")
	}
	return nil
}

// targets are the chains that a rule leads to.
func targets(r rule) []chainName {
	var out []chainName
	words := strings.Fields(r.text)
	for i, w := range words {
		if (w == "goto" || w == "jump") && i+1 < len(words) {
			out = append(out, chainName(words[i+1]))
		}
	}
	return out
}

func (t *fakeTable) deleteChain(name chainName) error {
	if _, ok := t.chains[name]; !ok {
		return unix.ENOENT
	}
	for other, ch := range t.chains {
		for _, r := range ch.rules {
			if other != name && slices.Contains(targets(r), name) {
				return unix.EBUSY
			}
		}
	}
	for _, set := range t.sets {
		for _, v := range set {
			if v.then == name {
				return unix.EBUSY
			}
		}
	}
	delete(t.chains, name)
	return nil
}

func (f *fakeKernel) change(t *fakeTable, m message) error {
	set := t.sets[m.set]
	if set == nil || setSpecs[m.set].dynamic {
		return unix.ENOENT
	}
	for _, e := range m.elements {
		if e.set != m.set {
			return errors.New("BUG: an element of another set")
		}
		have, there := set[e.key]
		switch {
		case m.what == deleteElements && (!there || have != e.value):
			return unix.ENOENT
		case m.what == deleteElements:
			delete(set, e.key)
			continue
		case f.refuse != nil && f.refuse(e) != nil:
			return f.refuse(e)
		case there && have != e.value:
			return unix.EEXIST
		case e.then != "" && e.then != dropAll:
			if _, ok := t.chains[e.then]; !ok {
				return unix.ENOENT
			}
		}
		if m.set == setSources {
			for other := range set {
				if other.addr == e.addr && other.port == e.port && other.protocol == e.protocol && other != e.key && other.source.Overlaps(e.source) {
					return unix.EEXIST
				}
			}
		}
		set[e.key] = e.value
	}
	return nil
}

func (f *fakeKernel) room() int {
	if f.most > 0 {
		return f.most
	}
	return 6 << 20
}

func (f *fakeKernel) size(m message) int { return 50 + 70*len(m.elements) }

func (f *fakeKernel) clients(_ context.Context, got func(client)) error {
	if f.failing() {
		return errFake
	}
	for _, c := range f.affinity {
		got(c)
	}
	return nil
}

func (f *fakeKernel) forget(_ context.Context, list []client) error {
	f.affinity = slices.DeleteFunc(f.affinity, func(c client) bool { return slices.Contains(list, c) })
	if f.failing() {
		return errFake
	}
	return nil
}

func (f *fakeKernel) counters(context.Context, setID, func(key, Count)) error { return nil }

func (f *fakeKernel) disturbed() bool {
	was := f.dirty
	f.dirty = false
	return was
}

func (f *fakeKernel) follow(ctx context.Context, _ func()) error {
	<-ctx.Done()
	return nil
}

// text is everything that the table has.
func (f *fakeKernel) text() string {
	if f.table == nil {
		return "no table\n"
	}
	var lines []string
	for id := range setCount {
		set, ok := f.table.sets[id]
		if !ok {
			lines = append(lines, "no set "+id.String())
		}
		for k, v := range set {
			lines = append(lines, id.String()+" "+element{k, v}.String())
		}
	}
	for name, ch := range f.table.chains {
		lines = append(lines, ch.lines(name)...)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

// lines are a chain's rules, those that follow each other and are the same once.
func (ch chain) lines(name chainName) []string {
	out := []string{fmt.Sprintf("chain %s", name)}
	for i := 0; i < len(ch.rules); {
		n := 1
		for i+n < len(ch.rules) && ch.rules[i+n].text == ch.rules[i].text {
			n++
		}
		out = append(out, fmt.Sprintf("chain %s %d %s, %d times", name, i, ch.rules[i].text, n))
		i += n
	}
	return out
}
