package xtables

import (
	"context"
	"fmt"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Host is what a node offers.
type Host struct {
	Programs    Programs
	Why         string // why this variant
	RandomFully bool   // MASQUERADE has --random-fully
}

// Choose finds the iptables programs of a variant ("legacy", "nft" or "auto": the
// one that the host uses) and what they can do. It fails if there are none, or
// if the kernel does not have the nat table of the family.
func Choose(ctx context.Context, family model.Family, variant string) (Host, error) {
	h := Host{Why: "it is configured"}
	v := Variant(variant)
	if v == Auto || v == "" {
		var err error
		if v, h.Why, err = Detect(ctx, family); err != nil {
			return Host{}, err
		}
	}
	programs, err := Find(v, family)
	if err != nil {
		return Host{}, err
	}
	h.Programs = programs
	run := Runner{Programs: programs}
	if err := run.Save(ctx, "nat", func(Chain) {}, func(_, _ []byte) {}); err != nil {
		return Host{}, fmt.Errorf("the %s iptables do not work for %s: %w", v, family, err)
	}
	h.RandomFully = true // every multi-call binary has it
	if t, err := programs.Probe(); err == nil {
		h.RandomFully = t.HasRandomFully()
	}
	return h, nil
}
