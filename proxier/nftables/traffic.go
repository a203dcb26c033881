package nftables

import (
	"context"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// census says which Service ports are counted: the first ones in the order of keys, so
// that it does not depend on who came when.
type census struct {
	limit int
	keys  []model.PortKey // sorted; nil if the limit is 0
}

func newCensus(limit int, set *plan.Set) census {
	c := census{limit: limit}
	if limit == 0 {
		return c
	}
	for p := range set.All {
		c.keys = append(c.keys, p.PortKey)
	}
	slices.SortFunc(c.keys, model.PortKey.Compare)
	return c
}

// counts says whether a port is counted.
func (c census) counts(k model.PortKey) bool {
	if c.limit == 0 {
		return false
	}
	i, _ := slices.BinarySearchFunc(c.keys, k, model.PortKey.Compare)
	return i < c.limit
}

// leftOut is how many ports are not counted because there are too many.
func (c census) leftOut() int { return max(0, len(c.keys)-c.limit) }

// change gives the census after some ports have come and gone, and the ports that
// stay and are counted now, or are not any more.
func (c census) change(come, gone []model.PortKey) (census, []model.PortKey) {
	if c.limit == 0 || len(come)+len(gone) == 0 {
		return c, nil
	}
	next := census{c.limit, slices.Clone(c.keys)}
	for _, k := range gone {
		if i, ok := slices.BinarySearchFunc(next.keys, k, model.PortKey.Compare); ok {
			next.keys = slices.Delete(next.keys, i, i+1)
		}
	}
	for _, k := range come {
		if i, ok := slices.BinarySearchFunc(next.keys, k, model.PortKey.Compare); !ok {
			next.keys = slices.Insert(next.keys, i, k)
		}
	}
	return next, c.crossed(next, len(come)+len(gone))
}

// crossed are the ports that are on another side of the limit in another census: so
// many changes move it by no more than as many places.
func (c census) crossed(next census, changes int) []model.PortKey {
	var out []model.PortKey
	for _, keys := range [][]model.PortKey{c.keys, next.keys} {
		from, to := max(0, c.limit-changes), min(len(keys), c.limit+changes)
		for i := from; i < to; i++ {
			if k := keys[i]; c.counts(k) != next.counts(k) && !slices.Contains(out, k) {
				out = append(out, k)
			}
		}
	}
	return out
}

// count adds the counters of a plan's frontends.
func (rs *ruleset) count(p *plan.Plan) {
	for i := range p.Frontends {
		f := &p.Frontends[i]
		requests, replies := setRequests, setReplies
		if f.Kind == plan.NodePort {
			requests, replies = setPortRequests, setPortReplies
		}
		rs.elements = append(rs.elements, element{key: keyOf(p, f, requests)}, element{key: keyOf(p, f, replies)})
	}
}

// counting gives the chains that count: what clients send before it is translated,
// and what they get after it is translated back. Packets of connections that are not
// translated, most of a node's, are looked up only when they begin one.
func (c compiler) counting() []chain {
	replies := []operand{c.saddr(), l4proto(), sport()}
	requested := []rule{
		newRule(ctOriginal(), ctTranslated(), goTo(chainRequests)),
		newRule(ctNew(), goTo(chainRequests)),
	}
	replied := []rule{newRule(ctReply(), ctTranslated(), goTo(chainReplies))}
	return []chain{
		{name: chainRequests, rules: []rule{
			newRule(in(setRequests, c.frontend()...), returns()),
			newRule(isLocal("daddr"), in(setPortRequests, nodePort()...)),
		}},
		{name: chainReplies, rules: []rule{
			newRule(in(setReplies, replies...), returns()),
			newRule(isLocal("saddr"), in(setPortReplies, l4proto(), sport())),
		}},
		{name: chainCountIn, hook: hookCountIn, rules: requested},
		{name: chainCountOwn, hook: hookCountOwn, rules: requested},
		{name: chainCountOut, hook: hookCountOut, rules: replied},
		{name: chainCountReturned, hook: hookCountReturned, rules: replied},
	}
}

// Traffic is what passed through the frontends of a Service port, by the table's
// counters: since they were made, which a port's are anew when it gets them anew.
type Traffic struct {
	Port              model.PortKey
	Requests, Replies Count
}

// Count counts packets, and bytes with their headers from the network's on.
type Count struct{ Packets, Bytes uint64 }

// Traffic reads the counters of the ports that are counted, in no order, and how many
// are not because there are more than Options.Traffic. It may be called at any time
// from any goroutine, with the last Set that Sync was given.
func (x *Proxier) Traffic(ctx context.Context, set *plan.Set) (list []Traffic, leftOut int, err error) {
	c := newCensus(x.o.Traffic, set)
	owner := map[key]model.PortKey{}
	for p := range set.All {
		if c.counts(p.PortKey) {
			var rs ruleset
			rs.count(p)
			for _, e := range rs.elements {
				owner[e.key] = p.PortKey
			}
		}
	}
	sums := map[model.PortKey]*Traffic{}
	for _, set := range []setID{setRequests, setReplies, setPortRequests, setPortReplies} {
		err := x.kernel.counters(ctx, set, func(k key, n Count) {
			port, ok := owner[k]
			if !ok {
				return
			}
			t := sums[port]
			if t == nil {
				t = &Traffic{Port: port}
				sums[port] = t
			}
			if set == setRequests || set == setPortRequests {
				t.Requests.add(n)
			} else {
				t.Replies.add(n)
			}
		})
		if err != nil {
			return nil, 0, err
		}
	}
	for _, t := range sums {
		list = append(list, *t)
	}
	return list, c.leftOut(), nil
}

func (c *Count) add(n Count) { c.Packets, c.Bytes = c.Packets+n.Packets, c.Bytes+n.Bytes }
