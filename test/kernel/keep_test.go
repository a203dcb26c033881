package kernel

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
)

// TestKeep: what changes about a Service besides the endpoint of a connection
// does not end it, and an endpoint that drains costs nobody else anything.
func TestKeep(t *testing.T) {
	t.Run("drain", testDrainRefusesNobody)
	t.Run("scheduler", testSchedulerChange)
	t.Run("external", testExternalLocal)
	t.Run("internal", testInternalLocal)
}

// testDrainRefusesNobody: with every scheduler, new clients are served while an
// endpoint that was removed keeps a connection.
func testDrainRefusesNobody(t *testing.T) {
	for _, scheduler := range scenarios.Schedulers {
		t.Run(scheduler, func(t *testing.T) {
			svc := func(endpoints string) []service {
				return []service{{name: "web", scheduler: scheduler, addrs: []string{"10.96.3.1"}, endpoints: endpoints}}
			}
			w := newWorld(t, svc("a b c"))
			at := vip("10.96.3.1")
			kept := w.hold(1, sources(1)[0], at)
			gone := kept.conns[0].Server
			w.sync(svc(strings.TrimSpace(strings.Replace("a b c ", gone+" ", "", 1))))
			w.check()
			for _, source := range sources(24) {
				c, err := w.open(source, at)
				if err != nil {
					t.Errorf("a new client while %s drains: %v", gone, err)
					continue
				}
				if c.Server == gone {
					t.Errorf("a new client got %s", gone)
				}
				_ = c.Reset()
			}
			if scheduler == "dh" { // see package ipvs: its endpoints do not drain
				return
			}
			kept.wantAlive(t)
		})
	}
}

// testSchedulerChange goes through all schedulers with connections open.
func testSchedulerChange(t *testing.T) {
	svc := func(scheduler string) []service {
		return []service{{name: "web", scheduler: scheduler, addrs: []string{"10.96.3.1"}, endpoints: "a b c"}}
	}
	w := newWorld(t, svc("rr"))
	kept := w.hold(9, sources(1)[0], vip("10.96.3.1"))
	for _, scheduler := range scenarios.Schedulers {
		w.sync(svc(scheduler))
		kept.wantAlive(t)
	}
	wantTally(t, "held all the time", kept.tally(), tally{"a": 3, "b": 3, "c": 3})
}

// testExternalLocal: a pod's connections to an address with
// externalTrafficPolicy Local, to an endpoint here and one elsewhere.
func testExternalLocal(t *testing.T) {
	svc := func(endpoints string) []service {
		return []service{{name: "web", local: true, addrs: []string{"10.96.3.1", "192.0.2.77"}, endpoints: endpoints}}
	}
	w := newWorld(t, svc("a d"))
	kept := &held{}
	for range 4 {
		c, err := w.lab.Host("shell").Open(t.Context(), netip.MustParseAddr("10.244.1.200"), vip("192.0.2.77"), patience)
		if err != nil {
			t.Fatal(err)
		}
		kept.conns = append(kept.conns, c)
	}
	wantTally(t, "held", kept.tally(), tally{"a": 2, "d": 2})
	for _, endpoints := range []string{"a", "d", "a d", "b", ""} {
		w.sync(svc(endpoints))
		kept.wantAlive(t)
	}
}

// testInternalLocal: connections to the last endpoint here of a Service with
// internalTrafficPolicy Local go on when it is removed; new ones are dropped if
// there are endpoints elsewhere, and refused if there are none.
func testInternalLocal(t *testing.T) {
	svc := func(endpoints string) []service {
		return []service{{name: "web", internalLocal: true, addrs: []string{"10.96.3.1"}, endpoints: endpoints}}
	}
	for _, c := range []struct {
		endpoints string
		want      netlab.Result
	}{{"d", netlab.TimedOut}, {"", netlab.Refused}} {
		w := newWorld(t, svc("a d"))
		at := vip("10.96.3.1")
		kept := w.hold(3, sources(1)[0], at)
		wantTally(t, "held", kept.tally(), tally{"a": 3})
		w.sync(svc(c.endpoints))
		kept.wantAlive(t)
		for _, host := range []string{"client", "shell", scenarios.NodeName} {
			answer, err := w.lab.Host(host).Ask(t.Context(), "tcp", netip.Addr{}, at, silence)
			if err != nil || answer.Result != c.want {
				t.Errorf("endpoints %q, new connection from %s: %v, %v, want %v", c.endpoints, host, answer, err, c.want)
			}
		}
	}
}
