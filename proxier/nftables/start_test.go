package nftables

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// watched looks at the fake after each transaction.
type watched struct {
	*fakeKernel
	look func(*fakeTable)
}

func (w *watched) commit(ctx context.Context, t []message) error {
	err := w.fakeKernel.commit(ctx, t)
	w.look(w.fakeKernel.table)
	return err
}

// TestStartRefusesNobody: until all are there, a port of a ClusterIP that is still
// missing is no unused one: another mode may serve it. Ports of one Service can go in
// different transactions.
func TestStartRefusesNobody(t *testing.T) {
	set := web(t, model.IPv4, 3, func(svc *model.Service) {
		for port := range uint16(9) {
			svc.Ports = append(svc.Ports, model.ServicePort{Name: fmt.Sprint(port), Protocol: model.TCP, Port: 81 + port})
		}
	})
	k := newFake()
	k.most = 800
	looks := 0
	x, _ := clocked(Options{Family: model.IPv4, MasqueradeBit: 14}, &watched{k, func(table *fakeTable) {
		looks++
		refuses := slices.ContainsFunc(table.chains[chainServices].rules, func(r rule) bool { return strings.Contains(r.text, "@cluster-ips") })
		if n := len(table.sets[setServices]); refuses && n < set.Len() && len(table.sets[setClusterIPs]) > 0 {
			t.Errorf("after transaction %d, %d of %d ports are there, and all others are refused", looks, n, set.Len())
		}
	}})
	if err := x.Sync(t.Context(), set); err != nil {
		t.Fatal(err)
	}
	if looks < 4 {
		t.Errorf("only %d transactions: not what is tested", looks)
	}
	if !strings.Contains(k.text(), "@cluster-ips goto reject-all") {
		t.Errorf("unused ports are not refused in the end:\n%s", k.text())
	}
}
