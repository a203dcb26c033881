// Package watch is where objects come from: an API server (API) or a folder of
// manifests (Manifests). Either converts objects by pkg/convert the moment they
// are decoded, and writes them to a state.Store from one goroutine, so that
// Kubernetes objects are never kept.
//
// Whatever happens to the source (connection lost, history expired, a file that
// does not parse), the last known state stays in force. It knows nothing of
// what the state is used for.
package watch

import (
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Stats is what the sources count. The zero Stats is ready; all of it is safe
// for concurrent use. Counters only grow.
type Stats struct {
	ServiceChanges     atomic.Uint64 // Services added, changed or removed
	SliceChanges       atomic.Uint64 // EndpointSlices added, changed or removed
	NodeChanges        atomic.Uint64 // own Node added, changed or removed
	ServiceCIDRChanges atomic.Uint64 // ServiceCIDRs added, changed or removed
	Stale              atomic.Uint64 // events not applied: repeated, or older than what is known
	Relists            atomic.Uint64 // complete lists received, per kind
	Problems           atomic.Uint64 // problems reported (see ProblemFunc)
	WatchErrors        atomic.Uint64 // requests to the API server that failed; not those for a kind that it withholds

	lostSince atomic.Int64 // Unix nanoseconds; 0: connected
}

// LostSince says whether the API server is out of reach, and since when. The
// zero time means that it is not.
func (s *Stats) LostSince() time.Time {
	if n := s.lostSince.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}

// ProblemFunc hears of something that cannot be used and is left out. object is
// like "Service default/web", or "FILE:LINE" for a manifest. The same text about
// the same object is reported once, until the object has come without it. It is
// called by the goroutine that decodes, and must not block.
type ProblemFunc func(object, text string)

// problem is one call of a ProblemFunc.
type problem struct{ object, text string }

// reporter reports problems once. Without a ProblemFunc it logs them.
type reporter struct {
	to    ProblemFunc
	log   *slog.Logger
	stats *Stats

	mu    sync.Mutex
	known map[string][]problem
}

// maxReported bounds the reporter's memory; beyond it, it starts afresh and
// problems may be reported again.
const maxReported = 4096

// report says what problems a source (an object, a file) has now, if any.
func (r *reporter) report(source string, list []problem) {
	r.mu.Lock()
	before := r.known[source]
	switch {
	case len(list) == 0:
		delete(r.known, source)
	default:
		if r.known == nil || len(r.known) >= maxReported {
			r.known = map[string][]problem{}
		}
		r.known[source] = list
	}
	r.mu.Unlock()
	for _, p := range list {
		if slices.Contains(before, p) {
			continue
		}
		r.stats.Problems.Add(1)
		if r.to != nil {
			r.to(p.object, p.text)
		} else {
			r.log.Warn("object has a problem", "object", p.object, "problem", p.text)
		}
	}
}

// reportObject is report for an object that is its own source.
func (r *reporter) reportObject(object string, texts []string) {
	var list []problem
	for _, text := range texts {
		list = append(list, problem{object, text})
	}
	r.report(object, list)
}
