package iptables

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// maxLinear is how many endpoints one chain tries one after the other. A larger
// set is split by hash of the endpoint's address into up to 16 groups, these
// again, so that a new connection passes some 10 rules a level instead of half
// of all, and a changed endpoint rewrites its own group and those above it.
const maxLinear = 32

// hashedEndpoint is an endpoint with the hash that decides its group.
type hashedEndpoint struct {
	plan.Endpoint
	hash uint64
}

// hashed orders endpoints by hash if there are too many for one chain, and
// leaves them in the order of addresses otherwise.
func hashed(list []plan.Endpoint) []hashedEndpoint {
	out := make([]hashedEndpoint, len(list))
	for i, e := range list {
		out[i].Endpoint = e
	}
	if len(list) <= maxLinear {
		return out
	}
	for i, e := range list {
		h := fnv.New64a()
		addr := e.Addr().As16()
		_, _ = h.Write(addr[:])
		_, _ = h.Write(binary.BigEndian.AppendUint16(nil, e.Port()))
		// FNV's high bits depend little on the last bytes written: mix.
		x := h.Sum64()
		x = (x ^ x>>33) * 0xff51afd7ed558ccd
		out[i].hash = x ^ x>>33
	}
	slices.SortFunc(out, func(a, b hashedEndpoint) int {
		switch {
		case a.hash < b.hash:
			return -1
		case a.hash > b.hash:
			return 1
		}
		return a.Compare(b.AddrPort)
	})
	return out
}

// grouping writes the rules of one endpoint set, and collects the chains of its
// groups.
type grouping struct {
	c      compiler
	p      *plan.Plan
	n      portNames
	prefix string
	out    []chain
}

// rules gives the rules that choose one endpoint of list with equal chances.
// path is the hash digits that all of list share.
func (g *grouping) rules(list []hashedEndpoint, path string) []string {
	var out []string
	left := len(list)
	if left <= maxLinear || len(path) == 16 {
		for _, e := range list {
			out = append(out, g.c.toEndpoint(g.p, g.n, e.Endpoint, chance(1, left)))
			left--
		}
		return out
	}
	shift := 60 - 4*len(path)
	for len(list) > 0 {
		digit := list[0].hash >> shift & 15
		n := 0
		for n < len(list) && list[n].hash>>shift&15 == digit {
			n++
		}
		group := list[:n]
		list = list[n:]
		if n == 1 {
			out = append(out, g.c.toEndpoint(g.p, g.n, group[0].Endpoint, chance(1, left)))
		} else {
			sub := path + fmt.Sprintf("%x", digit)
			ch := chain{name: g.n.group(g.prefix, sub)}
			ch.rules = g.rules(group, sub)
			g.out = append(g.out, ch)
			out = append(out, rule{match: chance(n, left), target: "-j " + ch.name}.String())
		}
		left -= n
	}
	return out
}
