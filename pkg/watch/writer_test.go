package watch

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"
	"testing/synctest"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/state"
)

func serviceAt(name string, version uint64) *record {
	k := key{"ns", name}
	return &record{key: k, version: version, service: &model.Service{
		ServiceName: model.ServiceName{Namespace: "ns", Name: name}, UID: fmt.Sprint(version)}}
}

func sliceAt(name, service string, version uint64) *record {
	return &record{key: key{"ns", name}, version: version,
		slice: &model.Slice{Namespace: "ns", Name: name, Service: service, Ports: []model.SlicePort{{Port: uint16(version)}}}}
}

// contents are the versions that a Snapshot has of every object.
func contents(s *state.Snapshot) map[string]string {
	out := map[string]string{}
	s.All(func(e *state.Entry) bool {
		if e.Service != nil {
			out["Service "+e.Name.Name] = e.Service.UID
		}
		for _, sl := range e.Slices {
			out["EndpointSlice "+sl.Name] = fmt.Sprint(sl.Service, " ", sl.Ports[0].Port)
		}
		return true
	})
	return out
}

// world is an API server's truth, and the history of how it came about.
type world struct {
	version uint64
	objects [2]map[string]*record
	history []event
}

func (w *world) step(rnd *rand.Rand) {
	k := kind(rnd.IntN(2))
	name := fmt.Sprint("o", rnd.IntN(6))
	w.version++
	var r *record
	gone := rnd.IntN(4) == 0
	switch {
	case gone:
		if w.objects[k][name] == nil {
			return
		}
		r = &record{key: key{"ns", name}, version: w.version}
		delete(w.objects[k], name)
	case k == services && rnd.IntN(5) == 0: // turned into something that is not forwarded
		r = &record{key: key{"ns", name}, version: w.version}
		w.objects[k][name] = r
	case k == services:
		r = serviceAt(name, w.version)
		w.objects[k][name] = r
	default:
		r = sliceAt(name, fmt.Sprint("o", rnd.IntN(6)), w.version)
		w.objects[k][name] = r
	}
	w.history = append(w.history, event{kind: k, gone: gone, record: r})
}

func (w *world) list(k kind) event {
	e := event{kind: k, all: []*record{}}
	for _, r := range w.objects[k] {
		e.all = append(e.all, r)
	}
	return e
}

func (w *world) contents() map[string]string {
	s := state.NewStore()
	for _, r := range w.objects[services] {
		if r.service != nil {
			s.SetService(r.service)
		}
	}
	for _, r := range w.objects[endpointSlices] {
		s.SetSlice(r.slice)
	}
	s.Publish()
	return contents(s.Current())
}

// TestRandomEvents: events that come in order, twice, late, or not at all until
// the next complete list, leave what a start from the final objects gives.
func TestRandomEvents(t *testing.T) {
	for seed := range uint64(1000) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		truth := &world{objects: [2]map[string]*record{{}, {}}}
		store := state.NewStore()
		w := newWriter(store, &Stats{})
		sent, listed := 0, 0
		for range 60 {
			truth.step(rnd)
			switch rnd.IntN(10) {
			case 0: // away for a while, then a complete list
				for range rnd.IntN(10) {
					truth.step(rnd)
				}
				w.apply(truth.list(services))
				w.apply(truth.list(endpointSlices))
				sent = len(truth.history)
				listed = sent // no watch from there sends what was before
			case 1: // nothing yet
			default:
				for ; sent < len(truth.history); sent++ {
					w.apply(truth.history[sent])
				}
			}
			for range rnd.IntN(3) { // something old once more
				if sent > listed {
					w.apply(truth.history[listed+rnd.IntN(sent-listed)])
				}
			}
			store.Publish()
		}
		for ; sent < len(truth.history); sent++ {
			w.apply(truth.history[sent])
		}
		store.Publish()
		if got, want := contents(store.Current()), truth.contents(); !maps.Equal(got, want) {
			t.Fatalf("seed %d:\ngot  %v\nwant %v", seed, got, want)
		}
	}
}

func TestReplace(t *testing.T) {
	store := state.NewStore()
	stats := &Stats{}
	w := newWriter(store, stats)
	w.apply(event{kind: services, all: []*record{serviceAt("a", 1), serviceAt("b", 2)}})
	store.Publish()
	if store.Current().Synced() {
		t.Error("synced without EndpointSlices")
	}
	w.apply(event{kind: endpointSlices, all: []*record{}})
	store.Publish()
	if !store.Current().Synced() {
		t.Error("not synced")
	}
	a := store.Current().Get(model.ServiceName{Namespace: "ns", Name: "a"})

	// b is gone, c came, a is as before: one Snapshot, and a's entry shared.
	w.apply(event{kind: services, all: []*record{serviceAt("a", 1), serviceAt("c", 3)}})
	if got := contents(store.Current()); len(got) != 2 || got["Service b"] != "2" {
		t.Errorf("something is seen before it is complete: %v", got)
	}
	store.Publish()
	if got := contents(store.Current()); !maps.Equal(got, map[string]string{"Service a": "1", "Service c": "3"}) {
		t.Errorf("got %v", got)
	}
	if store.Current().Get(a.Name) != a {
		t.Error("an object of the same version was replaced")
	}
	// A list is the truth even where versions went back.
	w.apply(event{kind: services, all: []*record{serviceAt("c", 2)}})
	w.apply(event{kind: services, record: serviceAt("a", 1)})
	store.Publish()
	if got := contents(store.Current()); !maps.Equal(got, map[string]string{"Service a": "1", "Service c": "2"}) {
		t.Errorf("after going back: %v", got)
	}
	if n := stats.ServiceChanges.Load(); n != 7 {
		t.Errorf("%d changes counted, want 7 (2 added; 1 removed, 1 added; 1 removed, 1 changed; 1 added)", n)
	}
}

// TestSyncedWithNode: the own Node is waited for where it is followed and may be
// read; that there is none is an answer, too.
func TestSyncedWithNode(t *testing.T) {
	for name, last := range map[string]event{
		"the Node":  {kind: nodes, all: []*record{{key: key{"", "me"}, version: 1, node: &model.Node{Name: "me"}}}},
		"no Node":   {kind: nodes, all: []*record{}},
		"forbidden": {kind: nodes, denied: true},
	} {
		store := state.NewStore()
		w := newWriter(store, &Stats{})
		w.awaits = append(w.awaits, nodes)
		for _, e := range []event{{kind: services, all: []*record{}}, {kind: endpointSlices, all: []*record{}}} {
			w.apply(e)
			store.Publish()
			if store.Current().Synced() {
				t.Errorf("%s: synced before", name)
			}
		}
		w.apply(last)
		store.Publish()
		if !store.Current().Synced() {
			t.Errorf("%s: not synced", name)
		}
	}
}

// TestServiceCIDREvents: ServiceCIDRs take the way of all kinds, and the store is
// synced with them or without.
func TestServiceCIDREvents(t *testing.T) {
	store := state.NewStore()
	stats := &Stats{}
	w := newWriter(store, stats)
	at := func(name, prefix string, version uint64) *record {
		return &record{key: key{"", name}, version: version,
			serviceCIDR: &model.ServiceCIDR{Name: name, Prefixes: []netip.Prefix{netip.MustParsePrefix(prefix)}}}
	}
	for _, step := range []struct {
		e    event
		want string
	}{
		{event{all: []*record{at("a", "10.96.0.0/16", 1), at("b", "fd00:10:96::/112", 2)}}, "[10.96.0.0/16 fd00:10:96::/112]"},
		{event{record: at("c", "10.97.0.0/16", 3)}, "[10.96.0.0/16 10.97.0.0/16 fd00:10:96::/112]"},
		{event{gone: true, record: at("a", "10.96.0.0/16", 4)}, "[10.97.0.0/16 fd00:10:96::/112]"},
		{event{record: at("a", "10.96.0.0/16", 1)}, "[10.97.0.0/16 fd00:10:96::/112]"}, // older than the deletion
		{event{record: at("c", "10.98.0.0/16", 5)}, "[10.98.0.0/16 fd00:10:96::/112]"},
		{event{record: at("c", "10.97.0.0/16", 3)}, "[10.98.0.0/16 fd00:10:96::/112]"}, // late
		{event{all: []*record{at("b", "fd00:10:96::/112", 2), at("d", "10.99.0.0/16", 6)}}, "[10.99.0.0/16 fd00:10:96::/112]"},
		{event{all: []*record{}}, "[]"},
	} {
		step.e.kind = serviceCIDRs
		w.apply(step.e)
		store.Publish()
		if got := fmt.Sprint(store.Current().ServiceCIDRs()); got != step.want {
			t.Errorf("after %+v: %s, want %s", step.e, got, step.want)
		}
	}
	if store.Current().Synced() {
		t.Error("synced by ServiceCIDRs alone")
	}
	if changes, stale := stats.ServiceCIDRChanges.Load(), stats.Stale.Load(); changes != 9 || stale != 2 {
		t.Errorf("%d changes counted, want 9; %d stale, want 2", changes, stale)
	}
}

func TestVersionsWithoutOrderAlwaysCount(t *testing.T) {
	store := state.NewStore()
	w := newWriter(store, &Stats{})
	for i := range 3 {
		r := serviceAt("a", 0)
		r.service.UID = fmt.Sprint(i)
		w.apply(event{kind: services, record: r})
	}
	store.Publish()
	if got := contents(store.Current())["Service a"]; got != "2" {
		t.Errorf("got %q, want the last", got)
	}
	w.apply(event{kind: services, gone: true, record: serviceAt("a", 0)})
	store.Publish()
	if store.Current().Len() != 0 {
		t.Error("still there")
	}
}

func TestManyDeletionsTakeLittleMemory(t *testing.T) {
	w := newWriter(state.NewStore(), &Stats{})
	for i := range uint64(10 * maxGone) {
		name := fmt.Sprint("s", i)
		w.apply(event{kind: services, record: serviceAt(name, 2*i+1)})
		w.apply(event{kind: services, gone: true, record: serviceAt(name, 2*i+2)})
	}
	if len(w.gone[services]) > maxGone || len(w.known[services]) != 0 {
		t.Errorf("%d deletions and %d objects are remembered", len(w.gone[services]), len(w.known[services]))
	}
}

// TestBurstIsOneSnapshot: what waits goes out together, and an event that comes
// alone goes out at once.
func TestBurstIsOneSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := state.NewStore()
		w := newWriter(store, &Stats{})
		events := make(chan event, 100)
		for i := range uint64(100) {
			events <- event{kind: services, record: serviceAt(fmt.Sprint("s", i), i+1)}
		}
		var seen []int
		wake := store.Subscribe()
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			for {
				select {
				case <-wake:
					seen = append(seen, store.Current().Len())
				case <-ctx.Done():
					return
				}
			}
		}()
		go w.run(ctx, events)
		synctest.Wait()
		events <- event{kind: services, record: serviceAt("alone", 1000)}
		synctest.Wait()
		if fmt.Sprint(seen) != "[100 101]" {
			t.Errorf("Snapshots of %v Services, want 100, then 101", seen)
		}
		cancel()
		synctest.Wait()
	})
}
