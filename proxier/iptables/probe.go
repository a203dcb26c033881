package iptables

import (
	"context"
	"fmt"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// Programs and Stats are the runner's; see there.
type (
	Programs = xtables.Programs
	Stats    = xtables.Stats
)

// Host is what a node offers to this proxier.
type Host struct {
	Programs    Programs
	Why         string // why this variant
	RandomFully bool
}

// Probe finds the iptables programs of a variant ("legacy", "nft" or "auto": the
// one that the host uses) and what they can do. It fails if there are none, or
// if the kernel does not have the tables of the family.
func Probe(ctx context.Context, family model.Family, variant string) (Host, error) {
	h := Host{Why: "it is configured"}
	v := xtables.Variant(variant)
	if v == xtables.Auto || v == "" {
		var err error
		if v, h.Why, err = xtables.Detect(ctx, family); err != nil {
			return Host{}, err
		}
	}
	programs, err := xtables.Find(v, family)
	if err != nil {
		return Host{}, err
	}
	h.Programs = programs
	run := xtables.Runner{Programs: programs}
	if err := run.Save(ctx, tableNAT, func(xtables.Chain) {}, func(_, _ []byte) {}); err != nil {
		return Host{}, fmt.Errorf("the %s iptables do not work for %s: %w", v, family, err)
	}
	h.RandomFully = true // every multi-call binary has it
	if t, err := programs.Probe(); err == nil {
		h.RandomFully = t.HasRandomFully()
	}
	return h, nil
}

// CleanupHost removes what Cleanup removes, in every variant that is installed
// and in use: kube-proxy may have used another one than we would.
func CleanupHost(ctx context.Context, family model.Family) error {
	_, err := removeHost(ctx, family, all)
	return err
}

// RemoveObjects removes, in the same variants, what iptables mode has and ipvs
// mode has not, for a change to that mode: the chains that both have must be the
// other's by then. It says whether there was anything.
func RemoveObjects(ctx context.Context, family model.Family) (bool, error) {
	return removeHost(ctx, family, notShared)
}

func removeHost(ctx context.Context, family model.Family, what scope) (bool, error) {
	did := false
	for _, v := range []xtables.Variant{xtables.NFT, xtables.Legacy} {
		if v == xtables.Legacy && !xtables.LegacyInUse(family) {
			continue
		}
		programs, err := xtables.Find(v, family)
		if err != nil {
			continue // not installed
		}
		removed, err := remove(ctx, &xtables.Runner{Programs: programs}, what)
		did = did || removed
		if err != nil {
			return did, fmt.Errorf("variant %s: %w", v, err)
		}
	}
	return did, nil
}
