package nftables

import (
	"context"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/test/history"
)

// limited gives a Service a load balancer address for some ranges of clients.
func limited(f model.Family, ranges ...netip.Prefix) func(*model.Service) {
	return func(s *model.Service) {
		s.LoadBalancerIPs = []netip.Addr{world(f).Addr(172, 9)}
		s.SourceRanges = ranges
	}
}

// rangesOf gives n ranges of some length inside of a network.
func rangesOf(f model.Family, n, bits int) []netip.Prefix {
	if f == model.IPv6 {
		bits += 96
	}
	var out []netip.Prefix
	for i := range n {
		out = append(out, netip.PrefixFrom(world(f).Addr(11, i<<(world(f).Facts.NodeIP.BitLen()-bits)), bits))
	}
	return out
}

func world(f model.Family) *history.World { return history.New(nil, f, 1) }

// TestRangesChange: ranges give way to others that overlap them, which the kernel
// refuses to have side by side: in the life of a process, and where they changed while
// none was there.
func TestRangesChange(t *testing.T) {
	for _, f := range families {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/restart=%v", f, restart), func(t *testing.T) {
				k := kernelIn(t, f)
				report := history.NewReports()
				o := Options{Family: f, MasqueradeBit: 14, Report: report}
				x := newProxier(o, k)
				for _, ranges := range [][]netip.Prefix{rangesOf(f, 1, 16), rangesOf(f, 1, 24), rangesOf(f, 1, 16), rangesOf(f, 2, 17), rangesOf(f, 2, 18), nil, rangesOf(f, 1, 15)} {
					if restart {
						x = newProxier(o, k)
					}
					set := web(t, f, 3, limited(f, ranges...))
					if err := x.Sync(t.Context(), set); err != nil {
						t.Fatalf("%v: %v", ranges, err)
					}
					got := 0
					if _, err := k.read(t.Context(), func(e element) error {
						if e.set == setSources {
							got++
						}
						return nil
					}); err != nil || got != len(ranges) {
						t.Fatalf("%v: %d ranges, error %v", ranges, got, err)
					}
				}
				if len(report.Aside) > 0 {
					t.Errorf("set aside: %v", report.Aside)
				}
			})
		}
	}
}

// TestManyRangesChange: the same where one transaction has no room for all.
func TestManyRangesChange(t *testing.T) {
	const f = model.IPv4
	k := newFake()
	k.most = 30_000 // less than the endpoints take
	o := Options{Family: f, MasqueradeBit: 14}
	x := newProxier(o, k)
	for i, bits := range []int{25, 24, 26} {
		set := web(t, f, 1000*(i+1), limited(f, rangesOf(f, 100, bits)...))
		if err := x.Sync(context.Background(), set); err != nil {
			t.Fatal(err)
		}
		fresh := newFake()
		if err := newProxier(o, fresh).Sync(context.Background(), set); err != nil {
			t.Fatal(err)
		}
		want := elementsOf(fresh)
		if got := elementsOf(k); got != want {
			t.Fatalf("with ranges of length %d:\n%s", bits, cmp.Diff(want, got))
		}
	}
}

// elementsOf is what a fake has in sets and maps.
func elementsOf(k *fakeKernel) string {
	f := newFake()
	f.table = &fakeTable{sets: k.table.sets}
	return f.text()
}
