package watch

import (
	"context"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/state"
)

// kind is a kind of object that is watched.
type kind uint8

const (
	services kind = iota
	endpointSlices
	nodes
	serviceCIDRs
	kinds
)

func (k kind) String() string {
	return [...]string{"Service", "EndpointSlice", "Node", "ServiceCIDR"}[k]
}

// key is an object's name within its kind.
type key struct{ namespace, name string }

func (k key) String() string {
	if k.namespace == "" {
		return k.name
	}
	return k.namespace + "/" + k.name
}

// record is one version of one object, converted. At most one of service, slice,
// node and serviceCIDR is set; none means that the object exists but has no place
// in the model, which for the store is the same as not existing.
type record struct {
	key
	// version orders the versions of an object and tells them apart: 0 is
	// unknown, and then every event counts. Resource versions of the API server
	// are such numbers (KEP-5504).
	version     uint64
	service     *model.Service
	slice       *model.Slice
	node        *model.Node
	serviceCIDR *model.ServiceCIDR
}

func (r *record) empty() bool {
	return r.service == nil && r.slice == nil && r.node == nil && r.serviceCIDR == nil
}

// event is one thing that happened at a source.
type event struct {
	kind   kind
	early  bool    // read ahead of the complete list; without record: that was all
	gone   bool    // the object of record was deleted
	denied bool    // the server does not let us read this kind
	record *record // nil: all is the complete list of this kind
	all    []*record
}

// maxGone is how many deletions are remembered per kind, to tell an event that
// is older than a deletion from one that creates the object anew.
const maxGone = 1024

// maxBatch bounds how many events go into one Snapshot, so that an endless
// stream of them does not keep the Snapshot back.
const maxBatch = 8192

// writer is the one writer of a state.Store. Its methods belong to one
// goroutine. It takes events that come twice or out of order: an object's
// older version never replaces a newer one.
type writer struct {
	store *state.Store
	stats *Stats

	known  [kinds]map[key]uint64 // what the store has, by version
	gone   [kinds]map[key]uint64 // recent deletions, by version
	listed [kinds]bool
	awaits []kind // without these there is no complete picture
}

func newWriter(store *state.Store, stats *Stats) *writer {
	w := &writer{store: store, stats: stats, awaits: []kind{services, endpointSlices}}
	for k := range w.known {
		w.known[k] = map[key]uint64{}
		w.gone[k] = map[key]uint64{}
	}
	return w
}

// run applies events until the context ends. Everything that waits goes into
// one Snapshot; when nothing waits it is published at once.
func (w *writer) run(ctx context.Context, events <-chan event) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-events:
			w.apply(e)
			w.drain(events)
			w.store.Publish()
		}
	}
}

func (w *writer) drain(events <-chan event) {
	for range maxBatch {
		select {
		case e := <-events:
			w.apply(e)
		default:
			return
		}
	}
}

func (w *writer) apply(e event) {
	switch {
	case e.denied:
		w.awaits = slices.DeleteFunc(w.awaits, func(k kind) bool { return k == e.kind })
		w.settle()
	case e.early && e.record == nil:
		w.store.SetEarly()
	case e.early && (w.listed[e.kind] || e.record.empty()):
		// The complete list is newer: what it lacks must not come back.
	case e.record == nil:
		w.replace(e.kind, e.all)
	case e.gone || e.record.empty():
		w.remove(e.kind, e.record)
	default:
		w.put(e.kind, e.record)
	}
}

// replace makes the store hold exactly the given objects of a kind. What
// vanished while nobody watched is removed in the same Snapshot in which the
// new arrives: there is no moment without either. A complete list is the truth
// even where its versions are lower (etcd restored from a backup).
func (w *writer) replace(k kind, all []*record) {
	w.stats.Relists.Add(1)
	clear(w.gone[k])
	present := make(map[key]uint64, len(all))
	for _, r := range all {
		if r.empty() {
			continue
		}
		before, ok := w.known[k][r.key]
		if !ok || r.version == 0 || r.version != before {
			w.set(k, r)
		}
		present[r.key] = r.version
	}
	for name := range w.known[k] {
		if _, ok := present[name]; !ok {
			w.unset(k, name)
		}
	}
	w.known[k] = present
	w.listed[k] = true
	w.settle()
}

// settle marks the store synced when all is there that must be.
func (w *writer) settle() {
	for _, k := range w.awaits {
		if !w.listed[k] {
			return
		}
	}
	w.store.SetSynced()
}

func (w *writer) put(k kind, r *record) {
	if r.version != 0 {
		if r.version <= w.known[k][r.key] || r.version <= w.gone[k][r.key] {
			w.stats.Stale.Add(1)
			return
		}
	}
	delete(w.gone[k], r.key)
	w.known[k][r.key] = r.version
	w.set(k, r)
}

func (w *writer) remove(k kind, r *record) {
	before, ok := w.known[k][r.key]
	if ok && r.version != 0 && r.version < before {
		w.stats.Stale.Add(1)
		return
	}
	if version := max(r.version, w.gone[k][r.key]); version != 0 {
		if len(w.gone[k]) >= maxGone {
			clear(w.gone[k])
		}
		w.gone[k][r.key] = version
	}
	if !ok {
		return
	}
	delete(w.known[k], r.key)
	w.unset(k, r.key)
}

func (w *writer) set(k kind, r *record) {
	switch k {
	case services:
		w.stats.ServiceChanges.Add(1)
		w.store.SetService(r.service)
	case endpointSlices:
		w.stats.SliceChanges.Add(1)
		w.store.SetSlice(r.slice)
	case nodes:
		w.stats.NodeChanges.Add(1)
		w.store.SetNode(r.node)
	case serviceCIDRs:
		w.stats.ServiceCIDRChanges.Add(1)
		w.store.SetServiceCIDR(r.serviceCIDR)
	}
}

func (w *writer) unset(k kind, name key) {
	switch k {
	case services:
		w.stats.ServiceChanges.Add(1)
		w.store.DeleteService(model.ServiceName{Namespace: name.namespace, Name: name.name})
	case endpointSlices:
		w.stats.SliceChanges.Add(1)
		w.store.DeleteSlice(name.namespace, name.name)
	case nodes:
		w.stats.NodeChanges.Add(1)
		w.store.SetNode(nil)
	case serviceCIDRs:
		w.stats.ServiceCIDRChanges.Add(1)
		w.store.DeleteServiceCIDR(name.name)
	}
}
