package e2e

import (
	"context"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// foreign is what others have in a node's kernel: names close to kube-proxy's are
// among them, a network plugin's and kubelet's own.
const foreign = `*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*nat
:FOREIGN - [0:0]
:KUBE-ROUTER-SNAT - [0:0]
-A PREROUTING -d 203.0.113.1/32 -j FOREIGN
-A POSTROUTING -j KUBE-ROUTER-SNAT
-A FOREIGN -p tcp -m tcp --dport 80 -j DNAT --to-destination 198.51.100.1:80
-A KUBE-ROUTER-SNAT -s 203.0.113.7/32 -j RETURN
COMMIT
*filter
:KUBE-NWPLCY-DEFAULT - [0:0]
-A INPUT -s 203.0.113.9/32 -j DROP
-A FORWARD -j KUBE-NWPLCY-DEFAULT
-A KUBE-NWPLCY-DEFAULT -s 203.0.113.8/32 -j ACCEPT
COMMIT
`

const foreignTable = `table inet foreign {
	chain c {
		type filter hook forward priority filter; policy accept;
		ip saddr 203.0.113.4 drop
	}
}
`

// TestCleanup: --cleanup removes all that the agent wrote, and nothing else.
func TestCleanup(t *testing.T) {
	c := newTest(t)
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run(mode, func(t *testing.T) {
			if mode == "nftables" {
				needsNFTables(t, c)
			}
			testCleanup(t, c, mode)
		})
	}
}

func testCleanup(t *testing.T, c *cluster, mode string) {
	node := c.lab.Host("node2") // no other test has run an agent there
	must := func(stdin, program string, args ...string) string {
		t.Helper()
		out, err := node.RunInput(t.Context(), stdin, program, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	must(foreign, "iptables-restore", "-w", "--noflush")
	must(foreignTable, "nft", "-f", "-")
	t.Cleanup(func() { // for the next mode
		if _, err := node.Run(context.Background(), "nft", "flush", "ruleset"); err != nil {
			t.Error(err)
		}
	})
	before := kernelState(t, node)

	name := "cleaned-" + mode
	svc := c.service(t, name)
	if err := c.endpoints(name, "pod3", "pod4"); err != nil {
		t.Fatal(err)
	}
	a := c.startAgentIn(t, "node2", mode)
	answeredBy(t, node, clusterIP(svc), "pod3", "pod4")
	a.stop(syscall.SIGTERM)
	// The dataplane outlives the agent.
	answeredBy(t, node, clusterIP(svc), "pod3", "pod4")

	if out, err := a.run("--cleanup"); err != nil {
		t.Fatalf("--cleanup: %v\n%s", err, out)
	}
	if diff := cmp.Diff(before, kernelState(t, node)); diff != "" {
		t.Errorf("the kernel's state before the agent came (-) and after --cleanup (+):\n%s", diff)
	}
	if out, err := a.run("--cleanup"); err != nil {
		t.Errorf("a second --cleanup: %v\n%s", err, out)
	}
}

var counters = regexp.MustCompile(`\[\d+:\d+\]`)

// kernelState is all netfilter rules of a node, as text without what changes by
// itself. Built-in chains without rules are left out: that a table was once
// looked at makes them appear. KUBE-FIREWALL is kubelet's as well, so kube-proxy
// leaves it in place, and so do we.
func kernelState(t *testing.T, node *netlab.Namespace) []string {
	t.Helper()
	var state []string
	for _, program := range []string{"iptables-save", "ip6tables-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		out, err := node.Run(t.Context(), program)
		if err != nil {
			t.Fatal(err)
		}
		table := ""
		for line := range strings.Lines(out) {
			line = strings.TrimSpace(counters.ReplaceAllString(line, ""))
			switch {
			case line == "", strings.HasPrefix(line, "#"), line == "COMMIT", strings.Contains(line, "KUBE-FIREWALL"):
			case strings.HasPrefix(line, "*"):
				table = program + " " + line
			case strings.HasPrefix(line, ":") && strings.HasSuffix(line, " ACCEPT"):
			default:
				state = append(state, table+" "+line)
			}
		}
	}
	out, err := node.Run(t.Context(), "nft", "list", "tables")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); !slices.Contains([]string{"filter", "nat", "mangle", "raw", "security"}, f[2]) { // those of iptables' nft variant are above
			state = append(state, strings.TrimSpace(line))
		}
	}
	out, err = node.Run(t.Context(), "nft", "list", "table", "inet", "foreign")
	if err != nil {
		t.Fatal(err)
	}
	return append(state, out)
}
