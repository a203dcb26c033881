package nftables

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// TestFoundChainsAreWritten: a chain that a start finds and nobody needs may be another
// version's; it is not used as it is when somebody needs one of its name.
func TestFoundChainsAreWritten(t *testing.T) {
	const f = model.IPv4
	k := newFake()
	x := newProxier(Options{Family: f, MasqueradeBit: 14}, k)
	large, small := web(t, f, 8, nil), web(t, f, 3, nil)
	want := map[chainName]int{}
	for _, set := range []*plan.Set{large, small} {
		if err := x.Sync(context.Background(), set); err != nil {
			t.Fatal(err)
		}
	}
	for name, ch := range k.table.chains {
		want[name] = len(ch.rules)
		if _, idle := x.ledger.idle[name]; idle {
			ch.rules = nil
			k.table.chains[name] = ch
		}
	}
	x = newProxier(x.o, k)
	for _, set := range []*plan.Set{small, large} {
		if err := x.Sync(context.Background(), set); err != nil {
			t.Fatal(err)
		}
	}
	for name, ch := range k.table.chains {
		if strings.Contains(string(name), "to-12") && len(ch.rules) != want[name] {
			t.Errorf("chain %s has %d rules of %d", name, len(ch.rules), want[name])
		}
	}
}

// TestAdoptOthers: what somebody else, or another version, has made of our table is put
// right, whatever it is, and not touched any more then.
func TestAdoptOthers(t *testing.T) {
	for _, f := range families {
		for what, commands := range map[string][]string{
			"another priority": {"add chain $ nat-prerouting { type nat hook prerouting priority -90; }"},
			"another type":     {"add chain $ nat-prerouting { type filter hook prerouting priority -100; }"},
			"another hook":     {"add chain $ nat-prerouting { type nat hook output priority -100; }"},
			"no hook":          {"add chain $ nat-prerouting"},
			"asleep":           {"add table $ { flags dormant; }", "add chain $ nat-prerouting { type nat hook prerouting priority -90; }"},
			"other verdicts":   {"add map $ node-ports { type inet_proto . inet_service : mark; }", "add element $ node-ports { tcp . 30080 : 1 }"},
			"other keys":       {"add map $ node-ports { type inet_proto . mark : verdict; }"},
			"a hook":           {"add chain $ services { type filter hook forward priority 0; policy drop; }"},
		} {
			t.Run(word(f)+"/"+what, func(t *testing.T) {
				k := &counting{nfKernel: kernelIn(t, f)}
				nft(t, "add table "+word(f)+" "+table)
				for _, c := range commands {
					nft(t, strings.Replace(c, "$", word(f)+" "+table, 1))
				}
				set := web(t, f, 3, nil)
				x, now := clocked(Options{Family: f, MasqueradeBit: 14}, k)
				if err := x.Sync(t.Context(), set); err != nil {
					t.Fatal(err)
				}
				sweep(t, x, now)
				fresh := newFake()
				y, later := clocked(x.o, fresh)
				if err := y.Sync(t.Context(), set); err != nil {
					t.Fatal(err)
				}
				sweep(t, y, later)
				if d := cmp.Diff(fresh.text(), kernelText(t, k.nfKernel, set, x.o)); d != "" {
					t.Errorf("differs from a start from nothing (-want +got):\n%s", d)
				}
				commits := k.commits
				if _, err := x.Check(t.Context(), true); err != nil || k.commits != commits {
					t.Errorf("written again %d times, error %v", k.commits-commits, err)
				}
			})
		}
	}
}

// TestOthersSetsGo: a set that is none of ours goes, with what uses it, and nothing of
// ours is made anew for it: what the rules remember of clients would be lost.
func TestOthersSetsGo(t *testing.T) {
	for _, f := range families {
		t.Run(f.String(), func(t *testing.T) {
			k := kernelIn(t, f)
			set := web(t, f, 3, func(s *model.Service) { s.Affinity = time.Hour })
			x, now := clocked(Options{Family: f, MasqueradeBit: 14}, k)
			if err := x.Sync(t.Context(), set); err != nil {
				t.Fatal(err)
			}
			want := kernelText(t, k, set, x.o)
			w, fam := world(f), word(f)
			nft(t, fmt.Sprintf("add element %s sluice affinity { %s . %s . tcp . 80 timeout 1h : %s . 8080 }", fam, w.Addr(11, 1), w.Addr(10, 80), w.Addr(10, 1<<20)))
			for _, c := range []string{
				"add set $ mine { type mark; }", "insert rule $ services meta mark @mine drop", "add chain $ mine", "add rule $ mine meta mark @mine drop",
				"add map $ theirs { type mark : verdict; }", "add element $ theirs { 1 : goto mine }", "insert rule $ nat-output tcp dport { 1, 2 } drop",
			} {
				nft(t, strings.Replace(c, "$", fam+" "+table, 1))
			}
			if _, err := x.Check(t.Context(), true); err != nil {
				t.Fatal(err)
			}
			sweep(t, x, now)
			if d := cmp.Diff(want, kernelText(t, k, set, x.o)); d != "" {
				t.Errorf("not repaired (-want +got):\n%s", d)
			}
			if got := nft(t, "list ruleset"); strings.Contains(got, "mine") || strings.Contains(got, "theirs") {
				t.Errorf("left behind: %s", got)
			}
			clients := 0
			if err := k.clients(t.Context(), func(client) { clients++ }); err != nil || clients != 1 {
				t.Errorf("%d clients are remembered, error %v", clients, err)
			}
		})
	}
}
