package kernel

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/sluice-proxy/sluice/test/scenarios"
)

// dialled by the hash of their address.
var manyAddrs = []string{"203.0.113.1", "203.0.113.2", "203.0.113.3", "203.0.113.4", "203.0.113.5", "203.0.113.6", "203.0.113.7", "203.0.113.8"}

// schedulerTests has each scheduler of the kernel and how it shares out real
// connections among a, b and c. Each has a Service of its own, with annotations;
// so all of them are in force beside one another.
var schedulerTests = []struct {
	service
	test func(t *testing.T, w *world, s service)
}{
	// Each in turn.
	{service{name: "rr", scheduler: "rr"}, func(t *testing.T, w *world, s service) {
		wantTally(t, "12 connections", w.short(12, sources(1)[0], vip(s.addrs[0])), tally{"a": 4, "b": 4, "c": 4})
	}},
	// Each in turn, as often as its weight says.
	{service{name: "wrr", scheduler: "wrr", weights: "a=3,b=2,c=1"}, func(t *testing.T, w *world, s service) {
		wantTally(t, "weights 3 2 1, 12 connections", w.short(12, sources(1)[0], vip(s.addrs[0])), tally{"a": 6, "b": 4, "c": 2})
	}},
	// The one with the fewest open connections.
	{service{name: "lc", scheduler: "lc"}, func(t *testing.T, w *world, s service) {
		h := w.hold(6, sources(1)[0], vip(s.addrs[0]))
		wantTally(t, "6 held", h.tally(), tally{"a": 2, "b": 2, "c": 2})
		h.release("b")
		wantTally(t, "2 more, b empty", w.hold(2, sources(1)[0], vip(s.addrs[0])).tally(), tally{"b": 2})
	}},
	// The one with the fewest open connections for its weight.
	{service{name: "wlc", scheduler: "wlc", weights: "a=4,b=2,c=1"}, func(t *testing.T, w *world, s service) {
		h := w.hold(7, sources(1)[0], vip(s.addrs[0]))
		wantTally(t, "weights 4 2 1, 7 held", h.tally(), tally{"a": 4, "b": 2, "c": 1})
		h.release("b")
		wantTally(t, "2 more, b empty", w.hold(2, sources(1)[0], vip(s.addrs[0])).tally(), tally{"b": 2})
	}},
	// The one that would have the fewest for its weight with one more: a heavy
	// one is used although others have nothing to do.
	{service{name: "sed", scheduler: "sed", weights: "a=10,b=1,c=1"}, func(t *testing.T, w *world, s service) {
		h := w.hold(3, sources(1)[0], vip(s.addrs[0]))
		wantTally(t, "weights 10 1 1, 3 held", h.tally(), tally{"a": 3})
		more := w.hold(9, sources(1)[0], vip(s.addrs[0]))
		wantTally(t, "9 more", more.tally(), tally{"a": 7, "b": 1, "c": 1})
		more.release("b")
		wantTally(t, "1 more, b empty", w.hold(1, sources(1)[0], vip(s.addrs[0])).tally(), tally{"b": 1})
	}},
	// Like sed, but none waits while another has nothing to do.
	{service{name: "nq", scheduler: "nq", weights: "a=10,b=1,c=1"}, func(t *testing.T, w *world, s service) {
		wantTally(t, "weights 10 1 1, 3 held", w.hold(3, sources(1)[0], vip(s.addrs[0])).tally(), tally{"a": 1, "b": 1, "c": 1})
		wantTally(t, "3 more", w.hold(3, sources(1)[0], vip(s.addrs[0])).tally(), tally{"a": 3})
	}},
	// By the address that is dialled, whoever dials it.
	{service{name: "dh", scheduler: "dh", addrs: manyAddrs}, func(t *testing.T, w *world, s service) {
		all := tally{}
		for _, a := range s.addrs {
			all[theOne(t, a, w.perSource(t, sources(3), 1, vip(a)))]++
		}
		t.Logf("addresses: %s", all)
		wantSpread(t, all, 2)
	}},
	// All that dial one address go to one endpoint, until that has more than its
	// weight; the next then takes its place.
	{service{name: "lblc", scheduler: "lblc"}, func(t *testing.T, w *world, s service) {
		first := theOne(t, "6 clients", w.perSource(t, sources(6), 1, vip(s.addrs[0])))
		wantTally(t, "2 held", w.hold(2, sources(1)[0], vip(s.addrs[0])).tally(), tally{first: 2})
		second := theOne(t, "then", w.perSource(t, sources(6), 1, vip(s.addrs[0])))
		if first == second {
			t.Errorf("still %s, which has 2 connections and weight 1", first)
		}
	}},
	// The same, but each that has been added stays: clients are spread over them.
	{service{name: "lblcr", scheduler: "lblcr"}, func(t *testing.T, w *world, s service) {
		first := theOne(t, "6 clients", w.perSource(t, sources(6), 1, vip(s.addrs[0])))
		h := w.hold(2, sources(1)[0], vip(s.addrs[0]))
		wantTally(t, "2 held", h.tally(), tally{first: 2})
		more := w.hold(6, sources(1)[0], vip(s.addrs[0]))
		t.Logf("6 more held: %s", more.tally())
		wantSpread(t, more.tally(), 2)
		h.release("")
		more.release("")
		after := w.short(12, sources(1)[0], vip(s.addrs[0]))
		t.Logf("12 when all are closed: %s", after)
		wantSpread(t, after, 2)
	}},
	// By the client's address.
	{service{name: "sh", scheduler: "sh", flags: "none"}, sticky},
	{service{name: "mh", scheduler: "mh", flags: "none"}, sticky},
	// By the client's address and port.
	{service{name: "sh-port", scheduler: "sh", flags: "sh-port"}, spread},
	{service{name: "mh-port", scheduler: "mh", flags: "mh-port"}, spread},
	{service{name: "mh-default", scheduler: "mh"}, spread},
	// The one with the highest weight, however many it has.
	{service{name: "fo", scheduler: "fo", weights: "a=3,b=2,c=1"}, func(t *testing.T, w *world, s service) {
		at := vip(s.addrs[0])
		kept := w.hold(3, sources(1)[0], at)
		wantTally(t, "weights 3 2 1, 3 held", kept.tally(), tally{"a": 3})
		wantTally(t, "6 more", w.short(6, sources(1)[0], at), tally{"a": 6})
		w.syncWeights(s.name, "a=0,b=2,c=1")
		wantTally(t, "weights 0 2 1, 6 connections", w.short(6, sources(1)[0], at), tally{"b": 6})
		kept.wantAlive(t)
		w.syncWeights(s.name, "a=3,b=2,c=1")
		wantTally(t, "weights 3 2 1 again, 2 connections", w.short(2, sources(1)[0], at), tally{"a": 2})
	}},
	// The one with the highest weight that does not have more connections than
	// that (one more than its weight, as the kernel counts); then nobody.
	{service{name: "ovf", scheduler: "ovf", weights: "a=3,b=2,c=1"}, func(t *testing.T, w *world, s service) {
		at := vip(s.addrs[0])
		h := w.hold(4, sources(1)[0], at)
		wantTally(t, "weights 3 2 1, 4 held", h.tally(), tally{"a": 4})
		wantTally(t, "3 more", w.hold(3, sources(1)[0], at).tally(), tally{"b": 3})
		wantTally(t, "2 more", w.hold(2, sources(1)[0], at).tally(), tally{"c": 2})
		if c, err := w.open(sources(1)[0], at); err == nil {
			t.Errorf("one more went to %s, which has its share", c.Server)
		}
		h.release("a")
		wantTally(t, "1 more, a empty", w.hold(1, sources(1)[0], at).tally(), tally{"a": 1})
	}},
}

// TestSchedulers: how each scheduler of the kernel shares out real connections,
// with the annotations that ask for it.
func TestSchedulers(t *testing.T) {
	inside(t)
	var list []service
	tested := map[string]bool{}
	for i := range schedulerTests {
		s := &schedulerTests[i].service
		if s.addrs == nil {
			s.addrs = []string{fmt.Sprintf("10.96.2.%d", i+1)}
		}
		s.endpoints = "a b c"
		list = append(list, *s)
		tested[s.scheduler] = true
	}
	if !slices.Equal(slices.Sorted(maps.Keys(tested)), scenarios.Schedulers) {
		t.Errorf("tested are %v, not all of %v", slices.Sorted(maps.Keys(tested)), scenarios.Schedulers)
	}
	w := newWorld(t, list)
	for _, tc := range schedulerTests {
		w.run(tc.name, func(t *testing.T) { tc.test(t, w, tc.service) })
	}
}

// syncWeights changes the weights of one Service.
func (w *world) syncWeights(name, weights string) {
	w.t.Helper()
	list := slices.Clone(w.services)
	i := slices.IndexFunc(list, func(s service) bool { return s.name == name })
	list[i].weights = weights
	w.sync(list)
}

func wantTally(t *testing.T, what string, got, want tally) {
	t.Helper()
	t.Logf("%s: %s", what, got)
	if !maps.Equal(got, want) {
		t.Errorf("%s: %s, want %s", what, got, want)
	}
}

// wantSpread wants some endpoints at least to have been reached.
func wantSpread(t *testing.T, got tally, least int) {
	t.Helper()
	if len(got) < least {
		t.Errorf("%s: %d endpoints, want %d", got, len(got), least)
	}
}

// perSource opens n short connections from each source and counts the endpoints
// that it reached.
func (w *world) perSource(t *testing.T, from []netip.Addr, n int, to netip.AddrPort) map[netip.Addr]tally {
	t.Helper()
	got := map[netip.Addr]tally{}
	for _, a := range from {
		got[a] = w.short(n, a, to)
	}
	return got
}

// theOne returns the endpoint that all reached.
func theOne(t *testing.T, what string, got map[netip.Addr]tally) string {
	t.Helper()
	all := tally{}
	for _, count := range got {
		for h, n := range count {
			all[h] += n
		}
	}
	t.Logf("%s: %s", what, all)
	if len(all) != 1 {
		t.Fatalf("%s: %s, want one endpoint", what, all)
	}
	return slices.Collect(maps.Keys(all))[0]
}

// sticky: a client reaches one endpoint again and again, and clients reach all.
func sticky(t *testing.T, w *world, s service) {
	all := tally{}
	for a, count := range w.perSource(t, sources(24), 3, vip(s.addrs[0])) {
		if len(count) != 1 {
			t.Errorf("%s: %s, want one endpoint", a, count)
		}
		for h := range count {
			all[h]++
		}
	}
	t.Logf("24 clients, 3 connections each: %s", all)
	wantSpread(t, all, 3)
}

// spread: a client reaches all endpoints.
func spread(t *testing.T, w *world, s service) {
	got := w.short(48, sources(1)[0], vip(s.addrs[0]))
	t.Logf("48 connections of one client: %s", got)
	wantSpread(t, got, 3)
}

// wantAlive: the connections still carry data.
func (h *held) wantAlive(t *testing.T) {
	t.Helper()
	for i, c := range h.conns {
		if err := c.Echo(patience); err != nil {
			t.Fatalf("connection %d to %s: %v", i, c.Server, err)
		}
	}
}
