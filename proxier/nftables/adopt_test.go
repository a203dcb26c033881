package nftables

import (
	"context"
	"strings"
	"testing"

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
