package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

const (
	modeIPTables = "iptables"
	modeIPVS     = "ipvs"
	modeNFTables = "nftables"
)

// mode is what is different from one proxy mode to another.
type mode struct {
	flags   []string // of the agent, besides
	answers func(*world, context.Context, *table) error
	refused []refusal
	changes []func(*world, context.Context, *table) error
	looks   []look
	see     func(*world, context.Context, *printer) error // what is in the kernel
	// written begins to watch what the agent writes into the kernel; what it returns
	// ends that, and says in words how much it was. It is an error if it was anything.
	written func(*world, context.Context) (func(*world, context.Context) (string, error), error)
	objects string // what list lists
	list    func(*world, context.Context) ([]string, error)
}

var modes = map[string]*mode{
	modeIPTables: {
		answers: (*world).localhostNodePort,
		changes: []func(*world, context.Context, *table) error{(*world).moveEndpoint, (*world).flush, (*world).kill},
		see:     (*world).showChain,
		written: bytesRestored,
		objects: "chains", list: (*world).chains,
	},
	modeIPVS: {
		answers: (*world).schedulers,
		changes: []func(*world, context.Context, *table) error{(*world).moveEndpoint, (*world).leave, (*world).cutDevice, (*world).kill},
		looks:   []look{{"/sluice/services/default/mistaken", "IGNORED: "}, {"/sluice/ipvs", "10.244.1.11:7000"}},
		see:     (*world).showServer,
		written: bytesRestored,
		objects: "chains and virtual servers", list: (*world).chainsAndServers,
	},
	modeNFTables: {
		flags:   []string{"--nftables-service-traffic=100"},
		answers: (*world).localhostNodePort,
		refused: []refusal{{"ClusterIP, unused port", "10.96.7.10:81"}, {"unallocated address", "10.96.200.1:80"}},
		changes: []func(*world, context.Context, *table) error{(*world).moveEndpoint, (*world).deleteElement, (*world).flushRuleset, (*world).kill},
		see:     (*world).showTable,
		written: tablesWritten,
		objects: "tables", list: (*world).tables,
	},
}

// modeNames lists the modes, for people.
func modeNames() string {
	var names []string
	for name := range modes {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// bytesRestored reads the agent's own metric: it counts from the agent's start.
func bytesRestored(*world, context.Context) (func(*world, context.Context) (string, error), error) {
	return func(w *world, ctx context.Context) (string, error) {
		m, err := w.metrics(ctx)
		if err != nil {
			return "?", err
		}
		n := m.sum("sluice_restore_bytes_total")
		if n != 0 {
			err = fmt.Errorf("%v bytes of rules were written where nothing had changed", n)
		}
		return fmt.Sprintf("it finds its rules: %.0f bytes rewritten", n), err
	}, nil
}
