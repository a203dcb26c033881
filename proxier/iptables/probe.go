package iptables

import (
	"context"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// Programs and Stats are the runner's; see there.
type (
	Programs = xtables.Programs
	Stats    = xtables.Stats
)

// Host is what a node offers to this proxier.
type Host = xtables.Host

// Probe finds the iptables programs of a variant ("legacy", "nft" or "auto": the
// one that the host uses) and what they can do. It fails if there are none, or
// if the kernel does not have the tables of the family.
func Probe(ctx context.Context, family model.Family, variant string) (Host, error) {
	return xtables.Choose(ctx, family, variant)
}
