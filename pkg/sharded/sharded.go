// Package sharded holds an immutable sorted table whose versions share what
// did not change, so that a change copies little and two versions are compared
// in time proportional to their difference.
//
// It is the shape of state.Snapshot and of plan.Set, and knows neither.
package sharded

import "slices"

// parts is how many pieces a table has. A change copies one piece (n/256
// values) and the array of pieces (6 KiB).
const parts = 256

// Key is what values are found and ordered by.
type Key[K any] interface {
	Compare(K) int
	Hash() uint32 // must be the same in every process: it decides the order of All
}

// Value is an immutable thing with a key; usually a pointer. Two values are the
// same only if they are ==.
type Value[K any] interface {
	comparable
	Key() K
}

// Table is one version. The zero Table is empty. It is immutable and safe for
// concurrent use.
type Table[K Key[K], V Value[K]] struct {
	parts [parts][]V // each sorted by key
	count int
}

// Len returns the number of values.
func (t *Table[K, V]) Len() int { return t.count }

// Get returns the value of a key, or V's zero value.
func (t *Table[K, V]) Get(k K) V {
	p := t.parts[k.Hash()%parts]
	if i, ok := find(p, k); ok {
		return p[i]
	}
	var none V
	return none
}

// All yields every value, in an order that depends on the keys only.
func (t *Table[K, V]) All(yield func(V) bool) {
	for i := range t.parts {
		for _, v := range t.parts[i] {
			if !yield(v) {
				return
			}
		}
	}
}

// Changes yields each key's old and new value where they differ, with V's zero
// value for "was not there" and "is gone". Either table may be nil: empty.
func Changes[K Key[K], V Value[K]](old, new *Table[K, V], yield func(old, new V) bool) {
	var empty Table[K, V]
	if old == nil {
		old = &empty
	}
	if new == nil {
		new = &empty
	}
	for i := range new.parts {
		a, b := old.parts[i], new.parts[i]
		if len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0]) {
			continue // the same piece of memory
		}
		if !merge(a, b, yield) {
			return
		}
	}
}

func merge[K Key[K], V Value[K]](a, b []V, yield func(old, new V) bool) bool {
	for len(a) > 0 || len(b) > 0 {
		var x, y V
		order := 0
		switch {
		case len(a) == 0:
			order = 1
		case len(b) == 0:
			order = -1
		case a[0] != b[0]:
			order = a[0].Key().Compare(b[0].Key())
		}
		if order <= 0 {
			x, a = a[0], a[1:]
		}
		if order >= 0 {
			y, b = b[0], b[1:]
		}
		if x != y && !yield(x, y) {
			return false
		}
	}
	return true
}

func find[K Key[K], V Value[K]](p []V, k K) (int, bool) {
	return slices.BinarySearchFunc(p, k, func(v V, k K) int { return v.Key().Compare(k) })
}

// Builder makes the next version of a table. It belongs to one goroutine.
type Builder[K Key[K], V Value[K]] struct {
	next  Table[K, V]
	own   [parts]bool // pieces of next that no published version shares
	dirty bool
}

// Get returns the value that the next version has for a key.
func (b *Builder[K, V]) Get(k K) V { return b.next.Get(k) }

// Len returns the number of values of the next version.
func (b *Builder[K, V]) Len() int { return b.next.count }

// Put adds v, or replaces the value that has its key.
func (b *Builder[K, V]) Put(v V) {
	n := v.Key().Hash() % parts
	i, found := find(b.next.parts[n], v.Key())
	if found && b.next.parts[n][i] == v {
		return
	}
	p := b.piece(n)
	if found {
		p[i] = v
	} else {
		p = slices.Insert(p, i, v)
		b.next.count++
	}
	b.next.parts[n] = p
}

// Delete removes the value of a key, if there is one.
func (b *Builder[K, V]) Delete(k K) {
	n := k.Hash() % parts
	i, found := find(b.next.parts[n], k)
	if !found {
		return
	}
	b.next.parts[n] = slices.Delete(b.piece(n), i, i+1)
	b.next.count--
}

func (b *Builder[K, V]) piece(n uint32) []V {
	b.dirty = true
	p := b.next.parts[n]
	if !b.own[n] {
		p = slices.Clone(p)
		b.own[n] = true
	}
	return p
}

// Dirty says whether anything changed since the last Build.
func (b *Builder[K, V]) Dirty() bool { return b.dirty }

// Build returns the next version, which the builder never changes again.
func (b *Builder[K, V]) Build() *Table[K, V] {
	t := b.next
	b.own = [parts]bool{}
	b.dirty = false
	return &t
}

// HashStrings is FNV-1a over the strings with a zero byte after each.
func HashStrings(list ...string) uint32 {
	h := uint32(2166136261)
	for _, s := range list {
		for i := 0; i < len(s); i++ {
			h = (h ^ uint32(s[i])) * 16777619
		}
		h *= 16777619
	}
	return h
}
