// Package state is the store: what the cluster wants, as the last events told
// it, published as one immutable Snapshot behind an atomic pointer.
//
// The store knows the model and nothing else: neither where objects come from
// nor what is done with them. One goroutine writes (pkg/watch); any number
// read.
package state

import (
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/sharded"
)

// Entry is everything known of one Service name: the Service, if there is one,
// and the slices that name it, sorted by slice name. It is immutable.
type Entry struct {
	Name    model.ServiceName
	Service *model.Service // nil: slices arrived before (or outlived) the Service
	Slices  []*model.Slice
}

// Key returns the entry's name.
func (e *Entry) Key() model.ServiceName { return e.Name }

type table = sharded.Table[model.ServiceName, *Entry]

// Snapshot is the state at one moment. It is immutable, and entries that did
// not change are shared with earlier Snapshots: same pointer, same content.
type Snapshot struct {
	entries *table
	node    *model.Node
	cidrs   []netip.Prefix
	early   bool
	synced  bool
}

// Node returns the own Node, nil while it is unknown or after it was deleted.
func (s *Snapshot) Node() *model.Node { return s.node }

// ServiceCIDRs returns the prefixes of all ServiceCIDRs, of both families, sorted
// and none inside another; nil if there are none, or if they are unknown. The
// slice is immutable, and the same in Snapshots between which nothing of it
// changed.
func (s *Snapshot) ServiceCIDRs() []netip.Prefix { return s.cidrs }

// Synced says whether a first complete list of Services and of EndpointSlices
// has been received. Before that nothing may be programmed. ServiceCIDRs are not
// waited for: an API server before Kubernetes 1.33 has none.
func (s *Snapshot) Synced() bool { return s.synced }

// Early says that the important Services (default/kubernetes and those of
// kube-system) are in, while the rest may be missing: a node that has no rules
// at all may begin with them. It says nothing once Synced does.
func (s *Snapshot) Early() bool { return s.early }

// Len returns the number of entries.
func (s *Snapshot) Len() int { return s.entries.Len() }

// Get returns the entry of a name, or nil.
func (s *Snapshot) Get(name model.ServiceName) *Entry { return s.entries.Get(name) }

// All yields every entry, in an order that depends on names only.
func (s *Snapshot) All(yield func(*Entry) bool) { s.entries.All(yield) }

// Changes yields for every name whose entry differs between two Snapshots its
// old and new entry, nil for "none". A nil old Snapshot is an empty one. The
// cost is proportional to the difference.
func Changes(old, new *Snapshot, yield func(old, new *Entry) bool) {
	var before *table
	if old != nil {
		before = old.entries
	}
	sharded.Changes(before, new.entries, yield)
}

type sliceKey struct{ namespace, name string }

// Store collects events into Snapshots. Its Set and Delete methods are for one
// goroutine at a time; Current and Subscribe are for everybody.
//
// Events may come twice or in any order: a Set replaces whatever was there, a
// Delete of something unknown is nothing, and a slice that names another
// Service than before leaves the old one.
type Store struct {
	current atomic.Pointer[Snapshot]

	// What follows belongs to the writing goroutine.
	entries sharded.Builder[model.ServiceName, *Entry]
	node    *model.Node
	cidrs   map[string]*model.ServiceCIDR
	early   bool
	synced  bool
	dirty   bool // something other than entries changed
	ranges  bool // cidrs changed; perhaps not in what they add up to
	owners  map[sliceKey]model.ServiceName

	mu   sync.Mutex
	subs []chan struct{}
}

// NewStore returns an empty store, not synced.
func NewStore() *Store {
	s := &Store{owners: map[sliceKey]model.ServiceName{}, cidrs: map[string]*model.ServiceCIDR{}}
	s.current.Store(&Snapshot{entries: &table{}})
	return s
}

// Current returns the last published Snapshot; never nil.
func (s *Store) Current() *Snapshot { return s.current.Load() }

// Subscribe returns a channel that receives after every Publish that changed
// something. It holds one signal: who is busy finds one waiting, whatever
// happened meanwhile, and reads Current.
func (s *Store) Subscribe() <-chan struct{} {
	ch := make(chan struct{}, 1)
	s.mu.Lock()
	s.subs = append(s.subs, ch)
	s.mu.Unlock()
	return ch
}

// SetService adds or replaces a Service.
func (s *Store) SetService(svc *model.Service) {
	s.update(svc.ServiceName, func(e *Entry) { e.Service = svc })
}

// DeleteService forgets a Service. Its slices stay until they are deleted.
func (s *Store) DeleteService(name model.ServiceName) {
	s.update(name, func(e *Entry) { e.Service = nil })
}

// SetSlice adds or replaces a slice, moving it if it now names another Service.
func (s *Store) SetSlice(sl *model.Slice) {
	key := sliceKey{sl.Namespace, sl.Name}
	owner := model.ServiceName{Namespace: sl.Namespace, Name: sl.Service}
	if was, ok := s.owners[key]; ok && was != owner {
		s.dropSlice(was, sl.Name)
	}
	s.owners[key] = owner
	s.update(owner, func(e *Entry) {
		i, found := findSlice(e.Slices, sl.Name)
		e.Slices = slices.Clone(e.Slices)
		if found {
			e.Slices[i] = sl
		} else {
			e.Slices = slices.Insert(e.Slices, i, sl)
		}
	})
}

// DeleteSlice forgets a slice, whichever Service it belonged to.
func (s *Store) DeleteSlice(namespace, name string) {
	key := sliceKey{namespace, name}
	owner, ok := s.owners[key]
	if !ok {
		return
	}
	delete(s.owners, key)
	s.dropSlice(owner, name)
}

// SetNode replaces the own Node; nil says that it was deleted.
func (s *Store) SetNode(n *model.Node) {
	s.node = n
	s.dirty = true
}

// SetServiceCIDR adds or replaces a ServiceCIDR.
func (s *Store) SetServiceCIDR(c *model.ServiceCIDR) {
	s.cidrs[c.Name] = c
	s.ranges = true
}

// DeleteServiceCIDR forgets a ServiceCIDR.
func (s *Store) DeleteServiceCIDR(name string) {
	delete(s.cidrs, name)
	s.ranges = true
}

// SetSynced says that first complete lists have been received. It is never
// taken back: a lost connection leaves the last known state in force.
func (s *Store) SetSynced() {
	if !s.synced {
		s.synced = true
		s.dirty = true
	}
}

// SetEarly says that the important Services have been received.
func (s *Store) SetEarly() {
	if !s.early {
		s.early = true
		s.dirty = true
	}
}

// Publish makes everything since the last Publish visible as one Snapshot and
// wakes the subscribers. Without changes it does nothing.
func (s *Store) Publish() {
	cidrs := s.serviceCIDRs()
	if !s.dirty && !s.entries.Dirty() {
		return
	}
	s.dirty = false
	s.current.Store(&Snapshot{entries: s.entries.Build(), node: s.node, cidrs: cidrs, early: s.early, synced: s.synced})
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ch := range s.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

// serviceCIDRs returns what the next Snapshot says: the last one's slice if it is
// still right.
func (s *Store) serviceCIDRs() []netip.Prefix {
	last := s.Current().cidrs
	if !s.ranges {
		return last
	}
	s.ranges = false
	next := outermost(maps.Values(s.cidrs))
	if slices.Equal(last, next) {
		return last
	}
	s.dirty = true
	return next
}

// outermost returns the prefixes that no other one covers, sorted. ServiceCIDRs
// may overlap (KEP-1880), the intervals of a kernel's set may not.
func outermost(list iter.Seq[*model.ServiceCIDR]) []netip.Prefix {
	var all, out []netip.Prefix
	for c := range list {
		all = append(all, c.Prefixes...)
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	for _, p := range all {
		// What covers p is sorted before it, and everything in between is inside
		// of that as well.
		if n := len(out); n == 0 || !out[n-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

func findSlice(list []*model.Slice, name string) (int, bool) {
	return slices.BinarySearchFunc(list, name, func(sl *model.Slice, n string) int { return strings.Compare(sl.Name, n) })
}

func (s *Store) dropSlice(owner model.ServiceName, name string) {
	s.update(owner, func(e *Entry) {
		if i, found := findSlice(e.Slices, name); found {
			e.Slices = slices.Delete(slices.Clone(e.Slices), i, i+1)
		}
	})
}

// update replaces the entry of a name by a changed copy. An entry that ends
// without Service and slices is removed.
func (s *Store) update(name model.ServiceName, change func(*Entry)) {
	e := &Entry{Name: name}
	if was := s.entries.Get(name); was != nil {
		*e = *was
	}
	change(e)
	if e.Service == nil && len(e.Slices) == 0 {
		s.entries.Delete(name)
		return
	}
	s.entries.Put(e)
}
