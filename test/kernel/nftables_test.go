package kernel

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/nftables"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
	"github.com/sluice-proxy/sluice/test/uml"
)

// nftablesNode makes a scenario's cluster and gives what opens a proxier on its
// node. It skips where the machine has no nf_tables.
func nftablesNode(t *testing.T, s *scenarios.Scenario) (*netlab.Lab, func(nftables.Options) *nftables.Proxier) {
	t.Helper()
	if err := netlab.Supported(); err != nil || uml.Inside() {
		t.Skip("SKIPPED, nf_tables not tested: ", err)
	}
	lab := build(t, s)
	return lab, func(o nftables.Options) *nftables.Proxier {
		t.Helper()
		o.Family, o.MasqueradeBit, o.Detector = model.IPv4, 14, proxier.Detector(s.Detector(model.IPv4))
		var x *nftables.Proxier
		if err := lab.Host(scenarios.NodeName).Do(func() (err error) {
			if _, err = nftables.Probe(context.Background(), o.Family); err == nil {
				x, err = nftables.New(o)
			}
			return err
		}); err != nil {
			t.Skip("SKIPPED, nf_tables not tested: ", err)
		}
		return x
	}
}

func load(t *testing.T, name string) *scenarios.Scenario {
	t.Helper()
	s, err := scenarios.Load("../scenarios/" + name + ".txtar")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestTableGoes: where another mode serves the same Services, nobody notices that
// the table is taken away. A kernel that deletes a table at once runs its rules for
// a moment longer than it finds the elements that they look for.
func TestTableGoes(t *testing.T) {
	s := load(t, "cluster-ip")
	lab, open := nftablesNode(t, s)
	node := lab.Host(scenarios.NodeName)
	other, err := newIPTables("nft")(s, model.IPv4)
	if err != nil {
		t.Skip("SKIPPED, nothing else can serve: ", err)
	}
	program(t, node, other, s.SetIn("iptables", model.IPv4))
	x := open(nftables.Options{})

	at, stop := netip.MustParseAddrPort("10.96.0.10:80"), make(chan struct{})
	var clients sync.WaitGroup
	for _, from := range []string{"shell", scenarios.NodeName} {
		clients.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					t.Logf("%d connections from %s", n, from)
					return
				default:
				}
				if a, err := lab.Host(from).Ask(t.Context(), "tcp", netip.Addr{}, at, patience); err != nil || a.Result != netlab.Answered {
					t.Errorf("from %s: %v, %v", from, a, err)
					return
				}
			}
		})
	}
	for range 40 {
		x.Forget()
		program(t, node, x, s.SetIn("nftables", model.IPv4))
		if err := node.Do(func() error {
			_, err := nftables.RemoveObjects(model.IPv4)
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	clients.Wait()
	tables, err := node.Run(t.Context(), "nft", "list", "tables")
	if err != nil || slices.Contains(strings.Split(tables, "\n"), "table ip sluice") {
		t.Errorf("the table is still there: %v\n%s", err, tables)
	}
}
