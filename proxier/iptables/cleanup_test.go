package iptables

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
	"github.com/sluice-proxy/sluice/test/history"
)

// asIPVS is what ipvs mode makes of the tables, in short: the chains that both
// modes have hold its rules, and it has chains and jumps of its own.
const asIPVS = `*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODE-PORT - [0:0]
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-NODE-PORT -p tcp -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-IPVS-FILTER - [0:0]
-I INPUT 1 -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-I FORWARD 1 -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-I INPUT 1 -m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT
-I INPUT 1 -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER
-A KUBE-PROXY-FIREWALL -p udp -j DROP
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
`

// TestKernelRemoveObjects: after a change to ipvs mode what only iptables mode has
// goes, and nothing else.
func TestKernelRemoveObjects(t *testing.T) {
	for _, k := range kernels {
		t.Run(fmt.Sprintf("%s-%s", k.variant, k.family), func(t *testing.T) {
			inNamespace(t)
			ctx := context.Background()
			w := history.New(rand.New(rand.NewPCG(13, 14)), k.family, 30)
			for range 100 {
				w.Step()
			}
			o := options(w)
			o.Programs = programs(t, k.variant, k.family)
			shell(t, o.Programs, "-A", "INPUT", "-p", "udp", "-j", "ACCEPT")
			if err := New(o).Sync(ctx, w.Set()); err != nil {
				t.Fatal(err)
			}
			run := &xtables.Runner{Programs: o.Programs}
			if err := run.Restore(ctx, func(w *bufio.Writer) { _, _ = w.WriteString(asIPVS) }); err != nil {
				t.Fatal(err)
			}
			for _, first := range []bool{true, false} {
				did, err := run.Remove(ctx, notShared)
				if did != first || err != nil {
					t.Fatalf("removed %v, want %v; error %v", did, first, err)
				}
			}
			got := inKernel(t, o.Programs)
			for _, gone := range append([]string{chainNodePorts, chainExternalServices, commentFirewall, "filter " + chainServices}, objectPrefixes...) {
				if strings.Contains(got, gone) {
					t.Errorf("%q is still there", gone)
				}
			}
			for _, stays := range []string{
				"-p udp -j ACCEPT", `"kubernetes service portals" -j KUBE-SERVICES`, "-j KUBE-POSTROUTING", "-j KUBE-FORWARD",
				"--dst-type LOCAL -j KUBE-NODE-PORT", "-p tcp -j KUBE-MARK-MASQ", `"kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL`,
				`"kubernetes health check rules" -j KUBE-NODE-PORT`, "-j KUBE-IPVS-FILTER", "-p udp -j DROP", "RELATED,ESTABLISHED -j ACCEPT",
			} {
				if !strings.Contains(got, stays) {
					t.Errorf("%q is gone", stays)
				}
			}
			if t.Failed() {
				t.Log(got)
			}
		})
	}
}
