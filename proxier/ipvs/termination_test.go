package ipvs

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/test/history"
)

var epoch = time.Unix(1_000_000, 0)

func TestDrainNext(t *testing.T) {
	for _, c := range []struct {
		name   string
		live   liveDest
		exists bool
		limit  time.Duration
		after  time.Duration // since it was removed
		due    bool
		until  time.Duration // 0: none
	}{
		{"no connections", liveDest{}, false, time.Minute, 0, true, time.Minute},
		{"open connections", liveDest{active: 3}, false, time.Minute, 59 * time.Second, false, time.Minute},
		{"closing connections", liveDest{inactive: 3}, false, time.Minute, 59 * time.Second, false, time.Minute},
		{"time is up", liveDest{active: 3}, false, time.Minute, time.Minute, true, time.Minute},
		{"no bound", liveDest{active: 3}, false, 0, 1000 * time.Hour, false, 0},
		{"still there", liveDest{active: 3}, true, time.Minute, time.Hour, false, 0},
		{"still there, without connections", liveDest{}, true, time.Minute, time.Second, true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			next, due := drain{since: epoch}.next(c.live, c.exists, c.limit, epoch.Add(c.after))
			if due != c.due {
				t.Errorf("due %v, want %v", due, c.due)
			}
			want := epoch.Add(c.until)
			if c.until == 0 {
				want = time.Time{}
			}
			if !next.until.Equal(want) {
				t.Errorf("until %v, want %v", next.until, want)
			}
			if c.exists && !next.since.Equal(epoch.Add(c.after)) {
				t.Errorf("its time began at %v", next.since)
			}
		})
	}
}

// TestTermination follows a removed endpoint through its states.
func TestTermination(t *testing.T) {
	w := newWorld(rand.New(rand.NewPCG(1, 1)), model.IPv4, 1)
	clock := epoch
	a, b := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.1.0.2")
	w.Services["svc-0"] = &model.Service{ServiceName: model.ServiceName{Namespace: "ns", Name: "svc-0"}, ClusterIPs: []netip.Addr{w.Addr(10, 1)},
		Ports: []model.ServicePort{{Name: "p0", Protocol: model.TCP, Port: 80}, {Name: "p1", Protocol: model.UDP, Port: 80}}}
	endpoints := func(list ...model.Endpoint) {
		w.Slices["svc-0-0"] = &model.Slice{Namespace: "ns", Name: "svc-0-0", Service: "svc-0", Family: model.IPv4, Endpoints: list,
			Ports: []model.SlicePort{{Name: "p0", Protocol: model.TCP, Port: 8080}, {Name: "p1", Protocol: model.UDP, Port: 8080}}}
		w.Update("svc-0")
	}
	ready := func(a netip.Addr) model.Endpoint { return model.Endpoint{Addr: a, Ready: true, Serving: true} }
	k := newFake()
	o := options(w)
	o.Drain = func() time.Duration { return 10 * time.Minute }
	start := func() *Proxier {
		x := newProxier(o, k)
		x.now = func() time.Time { return clock }
		return x
	}
	x := start()
	server := func(p model.Protocol) *liveServer {
		return k.servers[serverKey{addr: w.Addr(10, 1), port: 80, protocol: p}]
	}
	at := netip.AddrPortFrom(b, 8080)
	expect := func(there bool, weight uint32, draining int) {
		t.Helper()
		if full, err := x.Check(context.Background(), false); full || err != nil {
			t.Fatalf("check: %v, %v", full, err)
		}
		d, ok := server(model.TCP).destinations[at]
		if ok != there || d.weight != weight || len(x.Draining()) != draining {
			t.Fatalf("there %v, weight %d, draining %v", ok, d.weight, x.Draining())
		}
	}
	endpoints(ready(a), ready(b))
	history.Insist(t, x, w.Set())
	connections := func(n uint32) {
		server(model.TCP).destinations[at] = liveDest{weight: server(model.TCP).destinations[at].weight, active: n}
	}
	connections(100)
	expect(true, 1, 0)

	terminatingB := model.Endpoint{Addr: b, Serving: true, Terminating: true}
	endpoints(ready(a), terminatingB)
	history.Insist(t, x, w.Set())
	if _, ok := server(model.UDP).destinations[at]; ok {
		t.Error("a UDP destination was not removed at once")
	}
	clock = clock.Add(time.Hour) // the pod has a long time to end
	expect(true, 0, 1)

	endpoints(ready(a), ready(b)) // it comes back
	history.Insist(t, x, w.Set())
	expect(true, 1, 0)
	if server(model.TCP).destinations[at].active != 100 {
		t.Error("coming back cost its connections")
	}

	endpoints(ready(a), model.Endpoint{Addr: b}) // it fails its probes for a while
	history.Insist(t, x, w.Set())
	clock = clock.Add(time.Hour)
	expect(true, 0, 1)

	endpoints(ready(a))
	history.Insist(t, x, w.Set())
	clock = clock.Add(9 * time.Minute)
	expect(true, 0, 1)
	x = start() // the agent is started anew
	history.Insist(t, x, w.Set())
	expect(true, 0, 1)
	connections(1)
	clock = clock.Add(9 * time.Minute)
	expect(true, 0, 1)
	connections(0)
	expect(false, 0, 0)

	endpoints(ready(a), ready(b))
	history.Insist(t, x, w.Set())
	connections(5)
	endpoints(ready(a))
	history.Insist(t, x, w.Set())
	clock = clock.Add(10*time.Minute - time.Second)
	expect(true, 0, 1)
	if d := x.Draining()[0]; d.Active != 5 || d.Until.Sub(clock) != time.Second || d.Server != "TCP 10.0.0.1:80" {
		t.Errorf("draining %+v", d)
	}
	clock = clock.Add(time.Second)
	expect(false, 0, 0)
}
