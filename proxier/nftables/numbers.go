package nftables

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// This file is how endpoints are numbered, so that a rule can draw one: a class says
// how many numbers there are, and a few of them have no endpoint.

// inOrderMost is the largest class whose endpoints have the numbers from 0 in order.
const inOrderMost = 54

// mostOf is the size of the smallest class that has room for n endpoints: 5, 12, 26,
// 54, ... A frontend's verdict names the class and not the number, since a verdict is
// dear to change: the kernel then looks through all verdicts of the table for loops,
// which takes a millisecond for 10,000 Services, and five for 40,000. An endpoint that
// comes or goes changes the class seldom, and costs what its element costs.
//
// Of a larger class's numbers a fifth are free at the least: see spread. About two
// fifths of a class's numbers have an endpoint at the least, but in the first class.
func mostOf(n int) int {
	most := 5
	for most < n || most > inOrderMost && 4*most < 5*n {
		most = 2*most + 2
	}
	return most
}

// tries is how often a number is drawn that may have no endpoint before number 0 is
// taken, which always has one. It makes that one's share greater by a millionth.
func tries(most int) int {
	if most <= 5 || most > inOrderMost {
		return 27 // 0.6^27; with one endpoint, who is first does not matter
	}
	return 20 // 0.5^20
}

// numbered is an endpoint with its number.
type numbered struct {
	number uint32
	to     netip.AddrPort
}

// number gives the endpoints of a sorted list their numbers; number 0 is always among
// them. They depend on nothing but who is in the list: an agent that starts gives the
// same ones that another gave change by change.
func number(list []plan.Endpoint) []numbered {
	if most := mostOf(len(list)); most > inOrderMost {
		return spread(list, most)
	}
	out := make([]numbered, len(list))
	for i, e := range list {
		out[i] = numbered{uint32(i), e.AddrPort}
	}
	return out
}

// spread numbers many endpoints so that one that comes or goes moves a few others, and
// not all that come after it. It is a hash table by linear probing whose order within a
// run is that of the hashes, which makes the table the same whoever came first (Amble
// and Knuth, Ordered hash tables, 1974). The lowest hash has number 0, outside the table.
func spread(list []plan.Endpoint, most int) []numbered {
	// A hash, and in its low bits who has it: integers are sorted faster than endpoints.
	const whoBits = 24
	sorted := make([]uint64, len(list))
	for i, e := range list {
		sorted[i] = hashOf(e.AddrPort)>>whoBits<<whoBits | uint64(i)
	}
	slices.Sort(sorted)
	who := func(i int) netip.AddrPort { return list[sorted[i]&(1<<whoBits-1)].AddrPort }

	// A hash's home is in proportion to it, so that homes are in order, too.
	places := uint64(most - 1)
	home := func(i int) uint64 { return sorted[i] >> 32 * places >> 32 }
	// The last ones may find the table's end full, and go on at its beginning, where
	// they push others on; which may push more over the end.
	out := make([]numbered, len(list))
	out[0].to = who(0)
	for over := uint64(0); ; {
		next := over
		for i := 1; i < len(list); i++ {
			at := max(next, home(i))
			next = at + 1
			out[i] = numbered{uint32(1 + at%places), who(i)}
		}
		if next <= places+over {
			return out
		}
		over = next - places
	}
}

// hashOf is the same on each machine and in each version (FNV-1a): numbers in a table
// that a new version finds are to be right.
func hashOf(to netip.AddrPort) uint64 {
	var b [18]byte
	addr := to.Addr().As16()
	copy(b[:], addr[:])
	binary.BigEndian.PutUint16(b[16:], to.Port())
	h := uint64(14695981039346656037)
	for _, c := range b {
		h = (h ^ uint64(c)) * 1099511628211
	}
	// Its high bits, which home takes, hardly depend on the last bytes.
	h ^= h >> 32
	return h * 0x9e3779b97f4a7c15
}
