package sharded

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

type intKey int

func (k intKey) Compare(o intKey) int { return cmp.Compare(k, o) }

// Hash puts neighbours into one piece and spreads the rest.
func (k intKey) Hash() uint32 { return uint32(k/4) * 2654435761 >> 16 }

type value struct {
	key     intKey
	content int
}

func (v *value) Key() intKey { return v.key }

type change struct{ old, new *value }

// diff is what Changes must find, by way of maps.
func diff(old, new map[intKey]*value) map[intKey]change {
	out := map[intKey]change{}
	for k, v := range old {
		if new[k] != v {
			out[k] = change{v, new[k]}
		}
	}
	for k, v := range new {
		if old[k] == nil {
			out[k] = change{nil, v}
		}
	}
	return out
}

func changes(t *testing.T, old, new *Table[intKey, *value]) map[intKey]change {
	t.Helper()
	out := map[intKey]change{}
	Changes(old, new, func(o, n *value) bool {
		k := intKey(-1)
		if o != nil {
			k = o.key
		}
		if n != nil {
			if o != nil && n.key != k {
				t.Fatalf("a change of two keys: %d and %d", k, n.key)
			}
			k = n.key
		}
		if _, ok := out[k]; ok {
			t.Fatalf("key %d is told twice", k)
		}
		out[k] = change{o, n}
		return true
	})
	return out
}

func content(t *testing.T, table *Table[intKey, *value]) map[intKey]*value {
	t.Helper()
	out := map[intKey]*value{}
	table.All(func(v *value) bool {
		out[v.key] = v
		return true
	})
	if len(out) != table.Len() {
		t.Fatalf("Len is %d, All yields %d", table.Len(), len(out))
	}
	return out
}

// TestRandom builds many versions by random steps, and checks after each that
// it equals a map built by the same steps, that no earlier version has changed,
// and that Changes between any two is the difference of their maps.
func TestRandom(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		type version struct {
			table *Table[intKey, *value]
			want  map[intKey]*value
		}
		versions := []version{{&Table[intKey, *value]{}, map[intKey]*value{}}}
		var b Builder[intKey, *value]
		have := map[intKey]*value{}
		keys := 1 + rnd.IntN(600)
		for range 20 {
			for range rnd.IntN(60) {
				k := intKey(rnd.IntN(keys))
				switch rnd.IntN(4) {
				case 0:
					b.Delete(k)
					delete(have, k)
				case 1:
					if v := have[k]; v != nil {
						b.Put(v) // the same value again
					}
				default:
					v := &value{k, rnd.Int()}
					b.Put(v)
					have[k] = v
				}
				if b.Get(k) != have[k] || b.Len() != len(have) {
					t.Fatalf("seed %d: the builder has %v of %d, want %v of %d", seed, b.Get(k), b.Len(), have[k], len(have))
				}
			}
			versions = append(versions, version{b.Build(), maps.Clone(have)})
		}
		for i, v := range versions {
			if got := content(t, v.table); !maps.Equal(got, v.want) {
				t.Fatalf("seed %d: version %d has changed", seed, i)
			}
			o := versions[rnd.IntN(len(versions))]
			if got, want := changes(t, o.table, v.table), diff(o.want, v.want); !maps.Equal(got, want) {
				t.Fatalf("seed %d: changes %v, want %v", seed, got, want)
			}
			for k := range intKey(keys) {
				if v.table.Get(k) != v.want[k] {
					t.Fatalf("seed %d: Get(%d)", seed, k)
				}
			}
		}
	}
}

func TestOrderDependsOnKeysOnly(t *testing.T) {
	keys := make([]intKey, 2000)
	for i := range keys {
		keys[i] = intKey(i)
	}
	var first []intKey
	for seed := range uint64(5) {
		rand.New(rand.NewPCG(seed, 2)).Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
		var b Builder[intKey, *value]
		for i, k := range keys {
			b.Put(&value{key: k})
			if i%100 == 0 {
				b.Build()
			}
		}
		var order []intKey
		b.Build().All(func(v *value) bool {
			order = append(order, v.key)
			return true
		})
		if first == nil {
			first = order
		}
		if !slices.Equal(order, first) {
			t.Fatalf("seed %d: another order", seed)
		}
	}
}

func TestUntouchedPiecesAreShared(t *testing.T) {
	var b Builder[intKey, *value]
	for i := range intKey(5000) {
		b.Put(&value{key: i})
	}
	old := b.Build()
	b.Put(&value{key: 17})
	new := b.Build()
	copied := 0
	for i := range old.parts {
		if len(old.parts[i]) > 0 && &old.parts[i][0] != &new.parts[i][0] {
			copied++
		}
	}
	if copied != 1 {
		t.Errorf("one change copied %d pieces", copied)
	}
	if b.Dirty() {
		t.Error("dirty after Build")
	}
	b.Put(new.Get(17))
	b.Delete(99999)
	if b.Dirty() {
		t.Error("dirty though nothing changed")
	}
}

func TestEndEarly(t *testing.T) {
	var b Builder[intKey, *value]
	for i := range intKey(1000) {
		b.Put(&value{key: i})
	}
	table := b.Build()
	for name, walk := range map[string]func(func() bool){
		"All":     func(f func() bool) { table.All(func(*value) bool { return f() }) },
		"Changes": func(f func() bool) { Changes(nil, table, func(_, _ *value) bool { return f() }) },
	} {
		calls := 0
		walk(func() bool { calls++; return calls < 3 })
		if calls != 3 {
			t.Errorf("%s goes on after false: %d calls", name, calls)
		}
	}
	Changes[intKey, *value](nil, nil, func(_, _ *value) bool { t.Error("a change between nothings"); return true })
}

// BenchmarkChanges: the cost of finding one change among 10,000 values.
func BenchmarkChanges(b *testing.B) {
	for _, n := range []int{1000, 10000, 100000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var bld Builder[intKey, *value]
			for i := range intKey(n) {
				bld.Put(&value{key: i})
			}
			old := bld.Build()
			i := 0
			for b.Loop() {
				i++
				bld.Put(&value{key: intKey(i % n)})
				next := bld.Build()
				found := 0
				Changes(old, next, func(_, _ *value) bool { found++; return true })
				if found != 1 {
					b.Fatal(found)
				}
				old = next
			}
		})
	}
}
