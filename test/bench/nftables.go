package main

import (
	"context"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// bareRuleset has the NAT hooks of a node with rules, and no rule that a packet
// passes. The one rule is in a chain that nobody calls: that a rule asks for the
// state of connections, wherever it is, is why the kernel tracks them.
const bareRuleset = `flush ruleset
table ip bench {
	chain tracking { ct state new; }
	chain prerouting { type nat hook prerouting priority -100; }
	chain input { type nat hook input priority 100; }
	chain forward { type filter hook forward priority 0; }
	chain output { type nat hook output priority -100; }
	chain postrouting { type nat hook postrouting priority 100; }
}
`

func bareNFTables(ctx context.Context, ns *netlab.Namespace) error {
	_, err := ns.RunInput(ctx, bareRuleset, "nft", "-f", "-")
	return err
}

// flushRuleset takes away all rules of a node, those of iptables' nft variant
// among them.
func flushRuleset(ctx context.Context, ns *netlab.Namespace) error {
	_, err := ns.Run(ctx, "nft", "flush", "ruleset")
	return err
}
