package nftables

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// backends are n endpoints as a cluster has them: pods' addresses in subnets of nodes.
func backends(n int) []plan.Endpoint {
	var out []plan.Endpoint
	for i := range n {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], 10<<24+244<<16+uint32(i%250)<<8+uint32(2+i/250))
		out = append(out, plan.Endpoint{AddrPort: netip.AddrPortFrom(netip.AddrFrom4(a), 8080)})
	}
	return out
}

// TestNumbers: each endpoint has one number below the class's size, one of them 0,
// whatever the order in which they come; and a draw that fails is rare enough.
func TestNumbers(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var all []int
	for n := 1; n < 300; n++ {
		all = append(all, n)
	}
	for _, n := range append(all, 1000, 1432, 1433, 5000, 40000) {
		most := mostOf(n)
		list := backends(n)
		got := number(list)
		byNumber := map[uint32]netip.AddrPort{}
		to := map[netip.AddrPort]bool{}
		for _, e := range got {
			byNumber[e.number], to[e.to] = e.to, true
			if int(e.number) >= most {
				t.Fatalf("%d endpoints: number %d of %d", n, e.number, most)
			}
		}
		if len(byNumber) != n || len(to) != n {
			t.Fatalf("%d endpoints: %d numbers, %d endpoints", n, len(byNumber), len(to))
		}
		if !byNumber[0].IsValid() {
			t.Fatalf("%d endpoints: none has number 0", n)
		}
		if most > inOrderMost {
			r.Shuffle(n, func(i, j int) { list[i], list[j] = list[j], list[i] })
			if again := number(list); !slices.Equal(again, got) {
				t.Fatalf("%d endpoints: the numbers depend on the order", n)
			}
		}
		if miss := math.Pow(1-float64(n)/float64(most), float64(tries(most))); n > 1 && miss > 1.1e-6 {
			t.Errorf("%d endpoints of %d: one draw in %.0f finds none", n, most, 1/miss)
		}
	}
}

// TestFewMove: an endpoint that goes, or comes, leaves nearly all others their numbers.
func TestFewMove(t *testing.T) {
	for _, n := range []int{90, 150, 177, 1000, 1432, 5732} { // 177, 1432 and 5732 fill their classes
		list := backends(n)
		was := map[netip.AddrPort]uint32{}
		for _, e := range number(list) {
			was[e.to] = e.number
		}
		r := rand.New(rand.NewPCG(uint64(n), 1))
		sum, worst, times := 0, 0, 60
		for range times {
			i := r.IntN(n)
			moved := 0
			for _, e := range number(slices.Delete(slices.Clone(list), i, i+1)) {
				if was[e.to] != e.number {
					moved++
				}
			}
			sum, worst = sum+moved, max(worst, moved)
		}
		t.Logf("%d endpoints, class of %d: one that goes moves %.1f others, %d at the most", n, mostOf(n), float64(sum)/float64(times), worst)
		if sum > 12*times || worst > n/2 {
			t.Errorf("%d endpoints: one that goes moves %d others at the most, %.1f on average", n, worst, float64(sum)/float64(times))
		}
	}
}

// TestNumbersStay: another version of the agent gives the same numbers, or it would
// write those of all large Services anew.
func TestNumbersStay(t *testing.T) {
	for to, want := range map[string]uint64{
		"10.244.0.2:8080":       0x58ffc5e8f2379d5e,
		"10.244.255.254:53":     0xe31287cb0f1c641e,
		"[fd00:10:244::2]:8080": 0x4aecbb85b6bff841,
	} {
		if got := hashOf(netip.MustParseAddrPort(to)); got != want {
			t.Errorf("%s: %#x, want %#x", to, got, want)
		}
	}
	// The hash of the last of them has its home at 108 of 109 places, from 1.
	if got := number(backends(60))[59]; got.number != 109 {
		t.Errorf("the last of 60 is %v", got)
	}
}

// TestManyEndpoints: what TestIncrementalEqualsFull shows, for one Service of so many
// that they are not numbered in order, and class boundaries.
func TestManyEndpoints(t *testing.T) {
	for _, most := range []int{0, 4000} {
		t.Run(fmt.Sprintf("room=%d", most), func(t *testing.T) {
			r := rand.New(rand.NewPCG(7, 1))
			k := newFake()
			k.most = most
			k.seen = func(table *fakeTable) {
				if err := table.broken(); err != "" {
					t.Error(err)
				}
			}
			o := Options{Family: model.IPv4, MasqueradeBit: 14}
			x, now := clocked(o, k)
			n := 700
			for range 60 {
				switch r.IntN(4) {
				case 0:
					n = 40 + r.IntN(700)
				default:
					n = max(1, n+r.IntN(7)-3)
				}
				set := web(t, model.IPv4, n, nil)
				mustSync(t, x, set)
				if r.IntN(4) == 0 { // a new agent finds the numbers that it would give
					commits := k.commits
					x, now = clocked(o, k)
					if mustSync(t, x, set); k.commits > commits {
						t.Fatalf("%d endpoints: %d transactions by a new agent", n, k.commits-commits)
					}
				}
				sweep(t, x, now)
				if d := cmp.Diff(fresh(t, o, set, nil), k.text()); d != "" {
					t.Fatalf("%d endpoints (-full +incremental):\n%s", n, d)
				}
			}
		})
	}
}
