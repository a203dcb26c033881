package convert

import (
	"strings"
	"sync"
)

// internLimit is how many strings one generation holds.
const internLimit = 1 << 16

// interner makes equal strings share their memory. It holds at most two
// generations of strings and drops the older one when the younger is full, so
// that names of Services long gone do not pile up. (Package unique would forget
// a string at the next garbage collection, since the model keeps plain strings
// and no handles.)
type interner struct {
	mu         sync.Mutex
	young, old map[string]string
}

// get returns a string equal to s. It never retains s itself, which may be part
// of a larger buffer.
func (n *interner) get(s string) string {
	if s == "" {
		return ""
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if known, ok := n.young[s]; ok {
		return known
	}
	known, ok := n.old[s]
	if !ok {
		known = strings.Clone(s)
	}
	if n.young == nil || len(n.young) >= internLimit {
		n.old = n.young
		n.young = map[string]string{}
	}
	n.young[known] = known
	return known
}
