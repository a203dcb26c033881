package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sort"
	"strings"

	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// fakeKernel keeps in memory what the kernel would, with its rules: a
// destination needs its virtual server, an element its set, and a set or device
// that is not there is refused.
type fakeKernel struct {
	servers map[serverKey]*liveServer
	sets    [setCount]map[entry]bool
	addrs   map[netip.Addr]bool
	static  *static
	tables  int // changes of the tables, by anybody

	ops, reads, lookups int
	fail                func() bool    // the whole call fails, somewhere on the way
	refuse              func(op) error // the kernel refuses an op
	order               func([]op)     // told of each apply
}

var _ kernel = (*fakeKernel)(nil)

func newFake() *fakeKernel { return &fakeKernel{servers: map[serverKey]*liveServer{}} }

var errFake = errors.New("fake: no")

func (f *fakeKernel) failing() bool { return f.fail != nil && f.fail() }

func (s *liveServer) clone() *liveServer {
	return &liveServer{s.settings, maps.Clone(s.destinations)}
}

func (f *fakeKernel) read(context.Context) (*actual, error) {
	f.reads++
	if f.failing() {
		return nil, errFake
	}
	a := &actual{servers: map[serverKey]*liveServer{}, addrs: maps.Clone(f.addrs)}
	for k, s := range f.servers {
		a.servers[k] = s.clone()
	}
	for id, set := range f.sets {
		a.sets[id] = maps.Clone(set)
	}
	return a, nil
}

func (f *fakeKernel) prepare(_ context.Context, base static) (repairs, error) {
	var r repairs
	if f.failing() {
		return r, errFake
	}
	if f.addrs == nil {
		f.addrs = map[netip.Addr]bool{}
		r.devices++
	}
	for id := range f.sets {
		if f.sets[id] == nil {
			f.sets[id] = map[entry]bool{}
			r.sets++
		}
	}
	if base.chains == nil {
		return r, nil
	}
	if f.static == nil || fmt.Sprint(*f.static) != fmt.Sprint(base) {
		f.static = &base
		f.tables++
		r.chains++
	}
	return r, nil
}

func (f *fakeKernel) apply(_ context.Context, ops []op) ([]failure, error) {
	if f.order != nil {
		f.order(ops)
	}
	var failed []failure
	for _, o := range ops {
		if f.failing() {
			return nil, errFake
		}
		f.ops++
		if f.refuse != nil {
			if err := f.refuse(o); err != nil {
				failed = append(failed, failure{o, err})
				continue
			}
		}
		if err := f.do(o); err != nil {
			failed = append(failed, failure{o, err})
		}
	}
	return failed, nil
}

func (f *fakeKernel) do(o op) error {
	switch o.kind {
	case addEntry, delEntry:
		if f.sets[o.set] == nil {
			return errors.New("BUG: no such set")
		}
		if o.set == setInside { // a mark is not part of an element's identity
			maps.DeleteFunc(f.sets[o.set], func(e entry, _ bool) bool {
				e.mark = o.entry.mark
				return e == o.entry
			})
		}
		delete(f.sets[o.set], o.entry)
		if o.kind == addEntry {
			f.sets[o.set][o.entry] = true
		}
	case addAddr, delAddr:
		if f.addrs == nil {
			return errors.New("BUG: no device")
		}
		delete(f.addrs, o.addr)
		if o.kind == addAddr {
			f.addrs[o.addr] = true
		}
	case putServer:
		if s := f.servers[o.key]; s != nil {
			s.settings = o.settings
		} else {
			f.servers[o.key] = &liveServer{o.settings, map[netip.AddrPort]liveDest{}}
		}
	case delServer:
		delete(f.servers, o.key)
	case putDest, delDest:
		return f.destination(o)
	}
	return nil
}

func (f *fakeKernel) destination(o op) error {
	s := f.servers[o.key]
	if s == nil {
		if o.kind == delDest {
			return nil
		}
		return errors.New("BUG: no such virtual server")
	}
	if o.kind == delDest {
		delete(s.destinations, o.dest.at)
		return nil
	}
	d := s.destinations[o.dest.at]
	d.weight = o.dest.weight
	s.destinations[o.dest.at] = d
	return nil
}

func (f *fakeKernel) lookup(_ context.Context, keys []serverKey) (map[serverKey]*liveServer, error) {
	f.lookups++
	if f.failing() {
		return nil, errFake
	}
	out := map[serverKey]*liveServer{}
	for _, k := range keys {
		if s := f.servers[k]; s != nil {
			out[k] = s.clone()
		}
	}
	return out, nil
}

func (f *fakeKernel) addresses(context.Context) (map[netip.Addr]bool, error) {
	if f.failing() {
		return nil, errFake
	}
	return maps.Clone(f.addrs), nil
}

func (f *fakeKernel) token(context.Context) (token, error) {
	if f.failing() {
		return token{}, errFake
	}
	t := token{tables: fmt.Sprint(f.tables), device: f.addrs != nil}
	for id, set := range f.sets {
		t.elements[id] = uint32(len(set))
		if set == nil {
			t.elements[id] = ^uint32(0)
		}
	}
	return t, nil
}

func (f *fakeKernel) unrule(context.Context, xtables.Scope) (bool, error) {
	had := f.static != nil
	f.static = nil
	return had, nil
}

func (f *fakeKernel) clear(context.Context) error {
	if f.static != nil {
		return errors.New("BUG: rules name the sets")
	}
	f.sets = [setCount]map[entry]bool{}
	if len(f.addrs) == 0 {
		f.addrs = nil
	}
	return nil
}

// text prints everything, in an order of its own; with destinations that are
// only drained left out, and marks by the endpoints that they lead to: histories
// may leave different ones.
func (f *fakeKernel) text(drained bool) string {
	var lines []string
	inside := map[uint32]string{}
	for k, s := range f.servers {
		var list []string
		for at, d := range s.destinations {
			if d.weight > 0 || drained {
				list = append(list, fmt.Sprintf("%s weight %d", at, d.weight))
			}
		}
		sort.Strings(list)
		text := fmt.Sprintf("%s flags %x timeout %d -> %s", s.scheduler, s.flags, s.timeout, strings.Join(list, ", "))
		if k.mark != 0 {
			inside[k.mark] = text
			continue
		}
		lines = append(lines, k.String()+" "+text)
	}
	for id, set := range f.sets {
		for e := range set {
			line := setID(id).name(4) + " " + e.String()
			if e.mark != 0 {
				line += " marked for " + inside[e.mark]
			}
			lines = append(lines, line)
		}
	}
	for a := range f.addrs {
		lines = append(lines, "address "+a.String())
	}
	if f.static != nil {
		lines = append(lines, fmt.Sprint(f.static.chains, f.static.jumps))
	}
	lines = append(lines, fmt.Sprintf("%d marks", len(inside)))
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
