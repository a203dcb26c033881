package nftables

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/test/history"
)

// remembering gives each endpoint of a fake's frontends with affinity a client.
func remembering(x *Proxier, k *fakeKernel) {
	w := history.New(rand.New(rand.NewPCG(1, 1)), x.o.Family, 1)
	for p := range x.applied.All {
		for i := range p.Frontends {
			f := &p.Frontends[i]
			at := keyOf(p, f, setAffinity)
			if f.Kind == plan.NodePort {
				at.addr = x.applied.Facts.NodeIP
			}
			for e := range behind(p, f) {
				k.affinity = append(k.affinity, client{element{at, value{to: e}}, w.Addr(11, len(k.affinity))})
			}
		}
	}
}

// TestNobodyIsSentToTheDead: whatever has happened between two times of affinity, a
// client is not sent to an endpoint that has gone meanwhile.
func TestNobodyIsSentToTheDead(t *testing.T) {
	const f = model.IPv4
	sticky := func(s *model.Service) { s.Affinity = 3 * time.Hour }
	for what, between := range map[string]func(x *Proxier, k *fakeKernel) *Proxier{
		"affinity is off":     func(x *Proxier, _ *fakeKernel) *Proxier { mustSync(t, x, web(t, f, 3, nil)); return x },
		"the Service is gone": func(x *Proxier, _ *fakeKernel) *Proxier { mustSync(t, x, history.New(nil, f, 1).Set()); return x },
		"affinity is off, at first": func(x *Proxier, k *fakeKernel) *Proxier {
			x = newProxier(x.o, k)
			mustSync(t, x, web(t, f, 3, nil))
			return x
		},
		"the Service is gone, at first": func(x *Proxier, k *fakeKernel) *Proxier {
			x = newProxier(x.o, k)
			mustSync(t, x, history.New(nil, f, 1).Set())
			return x
		},
		"the kernel refuses it": func(x *Proxier, k *fakeKernel) *Proxier {
			k.refuse = func(e element) error {
				if e.to.IsValid() {
					return unix.EINVAL
				}
				return nil
			}
			mustSync(t, x, web(t, f, 4, sticky))
			k.refuse = nil
			return x
		},
		"the kernel refuses it, at first": func(x *Proxier, k *fakeKernel) *Proxier {
			k.refuse = func(e element) error {
				if e.to.IsValid() {
					return unix.EINVAL
				}
				return nil
			}
			x = newProxier(x.o, k)
			mustSync(t, x, web(t, f, 4, sticky))
			k.refuse = nil
			return x
		},
	} {
		t.Run(what, func(t *testing.T) {
			k := newFake()
			x := newProxier(Options{Family: f, MasqueradeBit: 14}, k)
			mustSync(t, x, web(t, f, 3, sticky))
			remembering(x, k)
			x = between(x, k)
			last := web(t, f, 1, sticky)
			mustSync(t, x, last)
			var right []value
			for p := range last.All {
				for _, e := range p.Cluster {
					right = append(right, value{to: e.AddrPort})
				}
			}
			for _, c := range k.affinity {
				if !slices.Contains(right, c.value) {
					t.Errorf("%s is sent to %s", c.from, c.to)
				}
			}
		})
	}
}

func mustSync(t *testing.T, x *Proxier, set *plan.Set) {
	t.Helper()
	if err := x.Sync(context.Background(), set); err != nil {
		t.Fatal(err)
	}
}

// gaps is a kernel whose first list of clients lacks every other one.
type gaps struct {
	*fakeKernel
	lists *int
}

func (g gaps) clients(ctx context.Context, got func(client)) error {
	n := 0
	*g.lists++
	return g.fakeKernel.clients(ctx, func(c client) {
		if n++; *g.lists > 1 || n%2 == 0 {
			got(c)
		}
	})
}

// TestGapsInTheList: clients that a list lacks, since others timed out while it was
// made, are forgotten as well.
func TestGapsInTheList(t *testing.T) {
	const f = model.IPv4
	sticky := func(s *model.Service) { s.Affinity = 3 * time.Hour }
	k := newFake()
	x := newProxier(Options{Family: f, MasqueradeBit: 14}, k)
	mustSync(t, x, web(t, f, 9, sticky))
	remembering(x, k)
	x.kernel = gaps{k, new(int)}
	mustSync(t, x, web(t, f, 1, sticky))
	if len(k.affinity) != 2 { // of the ClusterIP's and of the node port's
		t.Errorf("%d are remembered: %v", len(k.affinity), k.affinity)
	}
}
