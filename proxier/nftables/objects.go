package nftables

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// key finds an element of a set. Which fields count is the set's spec's to say; the
// others are zero.
type key struct {
	set      setID
	addr     netip.Addr
	protocol model.Protocol
	port     uint16
	index    uint32
	source   netip.Prefix // setSources: the range
}

// value is what a map has for a key; zero in sets.
type value struct {
	to   netip.AddrPort // maps of endpoints
	then chainName      // maps of verdicts: goto; dropAll is no chain, but that verdict
}

// element is one element of a set or map.
type element struct {
	key
	value
}

// chainName is a chain that a verdict leads to.
type chainName string

// dropAll stands for the verdict drop.
const dropAll chainName = "drop"

// String gives an element as nft prints it.
func (e element) String() string {
	text := e.key.text()
	switch {
	case e.to.IsValid():
		text += " : " + e.to.Addr().String() + fmt.Sprintf(" . %d", e.to.Port())
	case e.then == dropAll:
		text += " : drop"
	case e.then != "":
		text += " : goto " + string(e.then)
	}
	return text
}

func (k key) text() string {
	var parts []string
	for _, f := range setSpecs[k.set].key {
		switch f {
		case fieldAddr, fieldClient:
			parts = append(parts, k.addr.String())
		case fieldProtocol:
			parts = append(parts, k.protocol.String())
		case fieldPort, fieldServerPort:
			parts = append(parts, fmt.Sprint(k.port))
		case fieldIndex:
			parts = append(parts, fmt.Sprint(k.index))
		case fieldSource:
			parts = append(parts, strings.TrimSuffix(k.source.String(), fmt.Sprintf("/%d", k.source.Addr().BitLen())))
		}
	}
	return strings.Join(parts, " . ")
}

// hook is where the kernel enters a base chain.
type hook struct {
	typ      string // filter or nat
	name     string // of the hook
	number   uint32
	priority int32
	word     string // the priority, as nft prints it
}

// chain is a chain with its complete content.
type chain struct {
	name  chainName
	hook  *hook // nil: entered by rules and verdicts only
	rules []rule
}

// client is what the rules remember of a client: an element of the map of affinity.
type client struct {
	element
	from netip.Addr
}

// actual is what the kernel has of ours.
type actual struct {
	table  bool
	asleep bool                 // the table is dormant: it has all, and does nothing
	sets   map[setID]bool       // as they should be; false: there, but different
	extra  []string             // sets with names that we do not use, but for those of single rules
	chains map[chainName]uint64 // with the digest of their content
	heads  map[chainName]uint64 // with the digest of how they are entered
}

// message is one request of a transaction.
type message struct {
	what     verb
	set      setID
	elements []element
	chain    chain
	name     string // of a chain or set to delete
}

type verb uint8

// Verbs. A chain is written as a whole: what it had goes.
const (
	putTable verb = iota
	deleteTable
	putSet
	deleteSet
	writeChain
	flushChain // takes a chain's rules, before chains that they lead to can go
	deleteChain
	putElements
	deleteElements
)

func (m message) String() string {
	switch m.what {
	case putTable:
		return "add table " + table
	case deleteTable:
		return "delete table " + table
	case putSet:
		return "add set " + m.set.String()
	case deleteSet:
		return "delete set " + m.name
	case writeChain:
		return "write chain " + string(m.chain.name)
	case flushChain:
		return "flush chain " + m.name
	case deleteChain:
		return "delete chain " + m.name
	}
	what := "add"
	if m.what == deleteElements {
		what = "delete"
	}
	first := ""
	if len(m.elements) > 0 {
		first = m.elements[0].String()
	}
	if n := len(m.elements); n > 1 {
		return fmt.Sprintf("%s %d elements of %s (%s, ...)", what, n, m.set, first)
	}
	return fmt.Sprintf("%s element of %s (%s)", what, m.set, first)
}

// rolledBack is a transaction's error that left everything as it was: refused are
// messages that are to blame, by index; nil if the kernel names none.
type rolledBack struct {
	refused map[int]error
	err     error
}

// is says whether one of the refusals is such an error, or the whole if none is named.
func (r *rolledBack) is(such func(error) bool) bool {
	for _, err := range r.refused {
		if such(err) {
			return true
		}
	}
	return len(r.refused) == 0 && such(r.err)
}

func (r *rolledBack) Error() string { return r.err.Error() }
func (r *rolledBack) Unwrap() error { return r.err }

// kernel is the table of one family.
type kernel interface {
	// there says whether there is a table of ours at all.
	there(ctx context.Context) (bool, error)
	// read lists what is there, and gives each element that is not rules' own work
	// to got.
	read(ctx context.Context, got func(element) error) (*actual, error)
	// commit makes a transaction: all of it takes effect at one moment, or nothing
	// and the error is a *rolledBack. After any other error nothing is known.
	commit(ctx context.Context, t []message) error
	// room is how many bytes of messages go into one transaction, and size what one
	// message takes.
	room() int
	size(m message) int
	// clients lists what rules remember of clients, with gaps where that changes
	// meanwhile; forget deletes such elements, those that are gone already included.
	clients(ctx context.Context, got func(client)) error
	forget(ctx context.Context, list []client) error
	// counters lists the elements of a set that counts.
	counters(ctx context.Context, set setID, got func(key, Count)) error
	// disturbed says whether somebody else has changed our table since it was asked
	// the last time, as far as the kernel has told.
	disturbed() bool
	// follow hears what the kernel tells of changes by others until ctx ends, and
	// raises the alarm when our table is among what changed.
	follow(ctx context.Context, alarm func()) error
}
