package nftables

import (
	"hash/maphash"
	"slices"
)

// fewMost is how many elements that are there are kept. A start finds nothing, or the
// important Services.
const fewMost = 2048

// present holds what is there against what is wanted, element by element. Where little
// is there, that is kept, and what is wanted looked up in it. Where there is more, the
// hashes of what is wanted are, and what is there looked up in them: elements themselves
// would take ten times the memory.
type present struct {
	few  map[key]kept
	most int
	at   map[dialled]bool // the frontends of few

	seed   maphash.Seed
	hashed bool
	wanted []uint64 // hashes, sorted once they are complete
	seen   []bool   // which of them are there

	// stale is what is there and not wanted, staleRanges the ranges among it, by frontend:
	// a range can be put only when those that overlap it are gone.
	stale       map[key]element
	staleRanges map[key][]element
}

type kept struct {
	value
	wanted bool
}

func newPresent(most int) present {
	return present{few: map[key]kept{}, most: most, at: map[dialled]bool{}, seed: maphash.MakeSeed(),
		stale: map[key]element{}, staleRanges: map[key][]element{}}
}

func (p *present) hash(e element) uint64 { return maphash.Comparable(p.seed, e) }

// retain notes an element that is there, unless there are too many already.
func (p *present) retain(e element) bool {
	if p.hashed || len(p.few) == p.most {
		return false
	}
	p.few[e.key] = kept{value: e.value}
	p.at[dialled{e.addr, e.protocol, e.port}] = true
	return true
}

// expect notes an element that is wanted.
func (p *present) expect(e element) {
	if p.hashed {
		p.wanted = append(p.wanted, p.hash(e))
	} else if old, ok := p.few[e.key]; ok && old.value == e.value {
		old.wanted = true
		p.few[e.key] = old
	}
}

// complete says that all that is wanted has been noted.
func (p *present) complete() {
	slices.Sort(p.wanted)
	p.wanted = slices.Compact(p.wanted)
	p.seen = make([]bool, len(p.wanted))
	for k, old := range p.few {
		if p.hashed {
			p.judge(element{k, old.value})
		} else if !old.wanted {
			p.unwanted(element{k, old.value})
		}
	}
}

// judge notes an element that is there, once what is wanted is known.
func (p *present) judge(e element) {
	if i, ok := slices.BinarySearch(p.wanted, p.hash(e)); ok {
		p.seen[i] = true
	} else {
		p.unwanted(e)
	}
}

func (p *present) unwanted(e element) {
	p.stale[e.key] = e
	if e.set == setSources {
		at := frontendOf(e.key)
		p.staleRanges[at] = append(p.staleRanges[at], e)
	}
}

// lacks says whether an element that is wanted is missing.
func (p *present) lacks(e element) bool {
	if !p.hashed {
		return len(p.few) == 0 || !p.few[e.key].wanted
	}
	i, _ := slices.BinarySearch(p.wanted, p.hash(e))
	return !p.seen[i]
}

// nothing notes that all that was there has been taken away.
func (p *present) nothing() {
	clear(p.few)
	clear(p.at)
	clear(p.seen)
	clear(p.stale)
	clear(p.staleRanges)
}

// mayHave says whether something of a frontend may be there.
func (p *present) mayHave(at dialled) bool { return p.hashed || p.at[at] }
