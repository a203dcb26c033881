package kernel

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/proxier/ipvs"
)

// crowd is how many connections are open when an endpoint goes.
const crowd = 100

func web(endpoints string) []service {
	return []service{{name: "web", addrs: []string{"10.96.3.1"}, endpoints: endpoints}}
}

// TestTermination: an endpoint that is removed keeps its connections, gets no new
// one, and leaves when the last has ended.
func TestTermination(t *testing.T) {
	w := newWorld(t, web("a b c"))
	at := vip("10.96.3.1")
	w.sync(web("a"))
	crowded := w.hold(crowd, sources(1)[0], at)
	wantTally(t, "held", crowded.tally(), tally{"a": crowd})

	w.sync(web("b c"))
	crowded.wantAlive(t)
	wantTally(t, "12 new ones, a removed", w.short(12, sources(2)[1], at), tally{"b": 6, "c": 6})
	for range 3 {
		w.check()
	}
	w.wantDestination(at, "a", 0, crowd)
	w.wantDraining("a")
	crowded.wantAlive(t)

	w.run("agent restart", func(t *testing.T) {
		w.restart()
		w.sync(web("b c"))
		w.check()
		w.wantDestination(at, "a", 0, crowd)
		w.wantDraining("a")
		crowded.wantAlive(t)
		wantTally(t, "12 new ones", w.short(12, sources(2)[1], at), tally{"b": 6, "c": 6})
	})
	w.run("comes back", func(t *testing.T) {
		w.sync(web("a b c"))
		w.wantDestination(at, "a", 1, crowd)
		w.wantDraining()
		wantSpread(t, w.short(12, sources(2)[1], at), 3)
		crowded.wantAlive(t)
	})
	w.run("leaves when the last connection has ended", func(t *testing.T) {
		w.sync(web("b c"))
		last := crowded.conns[0]
		for _, c := range crowded.conns[1:] {
			if err := c.Reset(); err != nil {
				t.Error(err)
			}
		}
		crowded.conns = crowded.conns[:1]
		w.until(func() bool { return w.destinations(at)["a"].active == 1 })
		w.check()
		w.wantDestination(at, "a", 0, 1)
		crowded.wantAlive(t)
		if err := last.Reset(); err != nil {
			t.Error(err)
		}
		w.until(func() bool { // IPVS remembers a connection for ten seconds after a reset
			w.check()
			_, there := w.destinations(at)["a"]
			return !there
		})
		w.wantDraining()
	})
}

// TestDrain: a drain that is bounded ends at its time, also if the process has
// changed in between; what is still there for its endpoint's sake does not end.
func TestDrain(t *testing.T) {
	limit := time.Hour
	bounded := func(o *ipvs.Options) { o.Drain = func() time.Duration { return limit } }
	w := newWorld(t, web("a b"), bounded)
	at := vip("10.96.3.1")
	w.sync(web("a"))
	h := w.hold(3, sources(1)[0], at)
	w.sync(web("b"))
	w.check()
	w.wantDestination(at, "a", 0, 3)
	h.wantAlive(t)
	w.restart(bounded)
	w.sync(web("b"))
	w.check()
	w.wantDestination(at, "a", 0, 3)
	limit = time.Nanosecond // as if an hour were over
	w.check()
	if d, there := w.destinations(at)["a"]; there {
		t.Errorf("a is still there: %+v", d)
	}
	w.wantDraining()
	wantTally(t, "new ones", w.short(3, sources(2)[1], at), tally{"b": 3})
	if err := h.conns[0].Echo(silence); err == nil {
		t.Error("a connection goes on after its time")
	}
}

// restart replaces the proxier by another that knows nothing.
func (w *world) restart(options ...func(*ipvs.Options)) { w.p = w.newProxier(options...) }

func (w *world) wantDestination(of netip.AddrPort, host string, weight, active int) {
	w.t.Helper()
	d, there := w.destinations(of)[host]
	if !there || d.weight != weight || d.active != active {
		w.t.Errorf("destination %s of %s is %+v (there: %v), want weight %d and %d open connections", host, of, d, there, weight, active)
	}
}

// wantDraining compares what the proxier says of itself.
func (w *world) wantDraining(want ...string) {
	w.t.Helper()
	var got []string
	for _, d := range w.p.Draining() {
		got = append(got, w.hostAt(d.Endpoint.Addr()))
	}
	if len(got) != len(want) || len(got) > 0 && got[0] != want[0] {
		w.t.Errorf("draining are %v, want %v", got, want)
	}
}
