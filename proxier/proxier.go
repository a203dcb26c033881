// Package proxier declares what the three proxiers (iptables, ipvs, nftables)
// have in common, and nothing else. Each lives in a package of its own, knows
// plan and model, and never another proxier.
package proxier

import (
	"context"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Proxier makes the kernel forward what a Set asks for, for one IP family. Its
// methods are called by one goroutine at a time.
type Proxier interface {
	// Sync makes the kernel's state equal to want. Calling it again with the
	// same Set changes nothing and costs next to nothing. It does what it can:
	// a Service whose rules the kernel refuses is set aside and reported to
	// Options.Report, the others are programmed, and Sync returns nil. It
	// returns an error if the state of the kernel is not known to be want's;
	// the caller then calls Forget, backs off, and calls Sync again.
	Sync(ctx context.Context, want *plan.Set) error

	// Forget drops everything believed about the kernel's state: the next Sync
	// reads it and writes the difference only. It touches nothing.
	Forget()

	// Cleanup removes all that the proxier, or kube-proxy in the same mode,
	// ever wrote, and nothing else. It finishes what can be finished and
	// returns the joined errors. It does not need a Sync before it.
	Cleanup(ctx context.Context) error
}

// Reporter hears of things that people should know. Its methods must not block
// for long. The calls come from the goroutine that calls Sync.
type Reporter interface {
	// SetAside says that a port's rules were refused by the kernel and are left
	// out; a nil error that they are in force (again).
	SetAside(port model.PortKey, err error)
	// DriftRepaired says that count objects (chain, jump, element, ...) of a
	// kind were not as the proxier had left them and have been put right.
	DriftRepaired(object string, count int)
}

// Silent is a Reporter that tells nobody.
type Silent struct{}

// SetAside implements Reporter.
func (Silent) SetAside(model.PortKey, error) {}

// DriftRepaired implements Reporter.
func (Silent) DriftRepaired(string, int) {}
