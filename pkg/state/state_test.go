package state

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// twin is the simplest thing that holds the same as a Store.
type twin struct {
	services map[model.ServiceName]*model.Service
	slices   map[sliceKey]*model.Slice
}

// entries groups the twin's content as Snapshots do.
func (w *twin) entries() map[model.ServiceName]*Entry {
	out := map[model.ServiceName]*Entry{}
	get := func(n model.ServiceName) *Entry {
		if out[n] == nil {
			out[n] = &Entry{Name: n}
		}
		return out[n]
	}
	for n, s := range w.services {
		get(n).Service = s
	}
	for _, sl := range w.slices {
		e := get(model.ServiceName{Namespace: sl.Namespace, Name: sl.Service})
		e.Slices = append(e.Slices, sl)
	}
	for _, e := range out {
		slices.SortFunc(e.Slices, func(a, b *model.Slice) int {
			if a.Name < b.Name {
				return -1
			}
			return 1
		})
	}
	return out
}

// deep copies what a Snapshot says, to see later that it still says so.
func deep(s *Snapshot) map[model.ServiceName]Entry {
	out := map[model.ServiceName]Entry{}
	s.All(func(e *Entry) bool {
		c := Entry{Name: e.Name, Service: e.Service, Slices: slices.Clone(e.Slices)}
		out[e.Name] = c
		return true
	})
	return out
}

func same(a, b *Entry) bool {
	return a.Name == b.Name && a.Service == b.Service && slices.Equal(a.Slices, b.Slices)
}

// step does one random thing to both.
func step(rnd *rand.Rand, s *Store, w *twin) {
	name := model.ServiceName{Namespace: fmt.Sprint("ns", rnd.IntN(2)), Name: fmt.Sprint("svc", rnd.IntN(12))}
	slice := fmt.Sprint("slice", rnd.IntN(20))
	switch rnd.IntN(6) {
	case 0, 1:
		svc := &model.Service{ServiceName: name, UID: fmt.Sprint(rnd.Int())}
		s.SetService(svc)
		w.services[name] = svc
	case 2:
		s.DeleteService(name)
		delete(w.services, name)
	case 3, 4: // often moves the slice to another Service
		sl := &model.Slice{Namespace: name.Namespace, Name: slice, Service: name.Name}
		s.SetSlice(sl)
		w.slices[sliceKey{name.Namespace, slice}] = sl
	case 5:
		s.DeleteSlice(name.Namespace, slice)
		delete(w.slices, sliceKey{name.Namespace, slice})
	}
}

// TestRandom: after any sequence of events a Snapshot holds what the last event
// of every object said; earlier Snapshots never change; Changes between any two
// is the difference of their entries; what did not change is shared.
func TestRandom(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		s := NewStore()
		w := &twin{map[model.ServiceName]*model.Service{}, map[sliceKey]*model.Slice{}}
		shots := []*Snapshot{s.Current()}
		copies := []map[model.ServiceName]Entry{deep(s.Current())}
		for range 15 {
			for range rnd.IntN(10) {
				step(rnd, s, w)
			}
			s.Publish()
			shots, copies = append(shots, s.Current()), append(copies, deep(s.Current()))

			want := w.entries()
			got := map[model.ServiceName]*Entry{}
			s.Current().All(func(e *Entry) bool { got[e.Name] = e; return true })
			if !maps.EqualFunc(got, want, same) || s.Current().Len() != len(want) {
				t.Fatalf("seed %d: got %v\nwant %v", seed, got, want)
			}
			checkChanges(t, shots[rnd.IntN(len(shots))], s.Current())
		}
		for i, shot := range shots {
			if !reflect.DeepEqual(deep(shot), copies[i]) {
				t.Fatalf("seed %d: Snapshot %d has changed after it was published", seed, i)
			}
		}
	}
}

func checkChanges(t *testing.T, old, new *Snapshot) {
	t.Helper()
	told := map[model.ServiceName]bool{}
	Changes(old, new, func(o, n *Entry) bool {
		name := model.ServiceName{}
		if o != nil {
			name = o.Name
		}
		if n != nil {
			name = n.Name
		}
		if o != old.Get(name) || n != new.Get(name) || o == n || told[name] {
			t.Errorf("change of %s: %v to %v", name, o, n)
		}
		told[name] = true
		return true
	})
	for _, shot := range []*Snapshot{old, new} {
		shot.All(func(e *Entry) bool {
			if differs := old.Get(e.Name) != new.Get(e.Name); differs != told[e.Name] {
				t.Errorf("%s differs: %v, told: %v", e.Name, differs, told[e.Name])
			}
			return true
		})
	}
}

func TestPublish(t *testing.T) {
	s := NewStore()
	wake := s.Subscribe()
	woken := func() bool {
		select {
		case <-wake:
			return true
		default:
			return false
		}
	}
	first := s.Current()
	s.Publish()
	if s.Current() != first || woken() {
		t.Error("published though nothing changed")
	}
	a := &model.Service{ServiceName: model.ServiceName{Namespace: "n", Name: "a"}}
	b := &model.Service{ServiceName: model.ServiceName{Namespace: "n", Name: "b"}}
	s.SetService(a)
	s.SetService(b)
	if s.Current() != first {
		t.Error("seen before Publish")
	}
	s.Publish()
	s.SetService(&model.Service{ServiceName: b.ServiceName})
	entry := s.Current().Get(a.ServiceName)
	s.Publish()
	if s.Current().Get(a.ServiceName) != entry {
		t.Error("an entry that did not change is not shared")
	}
	if !woken() || woken() {
		t.Error("want one signal for two publications")
	}
	before := s.Current()
	s.DeleteService(model.ServiceName{Namespace: "n", Name: "unknown"})
	s.DeleteSlice("n", "unknown")
	s.Publish()
	if s.Current() != before {
		t.Error("deleting what is not there was published")
	}
}

func TestSyncedAndNode(t *testing.T) {
	s := NewStore()
	if s.Current().Synced() {
		t.Error("synced from the start")
	}
	s.SetSynced()
	s.SetNode(&model.Node{Name: "n"})
	s.Publish()
	shot := s.Current()
	if !shot.Synced() || shot.Node() == nil || shot.Node().Name != "n" {
		t.Errorf("%v %v", shot.Synced(), shot.Node())
	}
	s.SetSynced()
	s.Publish()
	if s.Current() != shot {
		t.Error("a second SetSynced was published")
	}
	s.SetNode(nil)
	s.Publish()
	if s.Current().Node() != nil || !s.Current().Synced() || shot.Node() == nil {
		t.Error("deletion of the Node")
	}
}

func TestServiceCIDRs(t *testing.T) {
	s := NewStore()
	cidr := func(name string, list ...string) {
		c := &model.ServiceCIDR{Name: name}
		for _, p := range list {
			c.Prefixes = append(c.Prefixes, netip.MustParsePrefix(p))
		}
		s.SetServiceCIDR(c)
	}
	last := s.Current()
	for _, step := range []struct {
		what   string
		change func()
		want   string // "": nothing is published
	}{
		{"none", func() {}, ""},
		{"an unknown one is deleted", func() { s.DeleteServiceCIDR("x") }, ""},
		{"one without prefixes", func() { cidr("empty") }, ""},
		{"the first", func() { cidr("kubernetes", "fd00:10:96::/112", "10.96.0.0/16") }, "[10.96.0.0/16 fd00:10:96::/112]"},
		{"the same again", func() { cidr("kubernetes", "10.96.0.0/16", "fd00:10:96::/112") }, ""},
		{"the same in a second one", func() { cidr("b", "10.96.0.0/16") }, ""},
		{"another takes its place", func() { s.DeleteServiceCIDR("kubernetes"); cidr("c", "fd00:10:96::/112") }, ""},
		{"there and back", func() { cidr("d", "10.1.0.0/16"); s.DeleteServiceCIDR("d") }, ""},
		{"inside another", func() { cidr("d", "10.96.7.0/24", "10.96.0.0/24", "10.96.0.0/16", "10.96.255.255/32") }, ""},
		{"disjoint", func() { cidr("d", "10.97.0.0/24", "10.95.255.0/24") }, "[10.95.255.0/24 10.96.0.0/16 10.97.0.0/24 fd00:10:96::/112]"},
		{"around all of its family", func() { cidr("d", "10.0.0.0/8", "fd00:10:97::/112") }, "[10.0.0.0/8 fd00:10:96::/112 fd00:10:97::/112]"},
		{"all but one gone", func() { s.DeleteServiceCIDR("c"); s.DeleteServiceCIDR("d") }, "[10.96.0.0/16]"},
		{"all gone", func() { s.DeleteServiceCIDR("b") }, "[]"},
	} {
		step.change()
		if s.Current() != last {
			t.Errorf("%s: seen before Publish", step.what)
		}
		before := fmt.Sprint(last.ServiceCIDRs())
		s.Publish()
		switch got := s.Current(); {
		case step.want == "" && got != last:
			t.Errorf("%s: published %v", step.what, got.ServiceCIDRs())
		case step.want != "" && fmt.Sprint(got.ServiceCIDRs()) != step.want:
			t.Errorf("%s: got %v, want %s", step.what, got.ServiceCIDRs(), step.want)
		}
		if got := fmt.Sprint(last.ServiceCIDRs()); got != before {
			t.Errorf("%s: the Snapshot before changed from %s to %s", step.what, before, got)
		}
		last = s.Current()
	}
	if last.ServiceCIDRs() != nil || last.Synced() {
		t.Errorf("none: %v, synced: %v", last.ServiceCIDRs(), last.Synced())
	}

	cidr("a", "10.96.0.0/16")
	s.Publish()
	shared := s.Current().ServiceCIDRs()
	s.SetNode(&model.Node{Name: "n"})
	cidr("a", "10.96.0.0/16")
	s.Publish()
	if got := s.Current().ServiceCIDRs(); s.Current().Node() == nil || &got[0] != &shared[0] {
		t.Error("prefixes that did not change are not shared")
	}
}

func TestSliceMovesBetweenServices(t *testing.T) {
	s := NewStore()
	s.SetSlice(&model.Slice{Namespace: "n", Name: "x", Service: "old"})
	s.Publish()
	s.SetSlice(&model.Slice{Namespace: "n", Name: "x", Service: "new"})
	s.Publish()
	if e := s.Current().Get(model.ServiceName{Namespace: "n", Name: "old"}); e != nil {
		t.Errorf("the old Service still has %v", e.Slices)
	}
	if e := s.Current().Get(model.ServiceName{Namespace: "n", Name: "new"}); e == nil || len(e.Slices) != 1 {
		t.Errorf("the new Service has %v", e)
	}
	s.DeleteSlice("n", "x")
	s.Publish()
	if s.Current().Len() != 0 {
		t.Error("the slice is still there")
	}
}

// TestReadersWhileWriting is for the race detector.
func TestReadersWhileWriting(t *testing.T) {
	s := NewStore()
	wake := s.Subscribe()
	empty := s.Current()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var last *Snapshot
		for range wake {
			shot := s.Current()
			checkChanges(t, cmp.Or(last, empty), shot)
			last = shot
			if shot.Synced() {
				return
			}
		}
	}()
	rnd := rand.New(rand.NewPCG(1, 1))
	w := &twin{map[model.ServiceName]*model.Service{}, map[sliceKey]*model.Slice{}}
	for range 2000 {
		step(rnd, s, w)
		s.Publish()
	}
	s.SetSynced()
	s.Publish()
	<-done
}
