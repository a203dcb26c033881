package plan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Balance is how a proxier with schedulers chooses an endpoint for a new
// connection. The zero Balance is the node's default.
type Balance struct {
	Scheduler string // one of Facts.Schedulers; "": Facts.DefaultScheduler
	// Flags apply to the scheduler that is in force. They count if FlagsSet;
	// else the proxier has its own default for the scheduler.
	Flags    SchedFlags
	FlagsSet bool
}

// SchedFlags are flags of a scheduler. Only sh and mh have any.
type SchedFlags uint8

// Scheduler flags.
const (
	SchedFallback SchedFlags = 1 << iota // sh-fallback, mh-fallback: try another if the chosen one is not available
	SchedPort                            // sh-port, mh-port: the client's port counts, too
)

// String returns ipvsadm's names without the scheduler's: "fallback,port".
func (f SchedFlags) String() string {
	var names []string
	for i, name := range []string{"fallback", "port"} {
		if f&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, ",")
}

// flagsOf are the flags that a scheduler has, by name.
var flagsOf = map[string]map[string]SchedFlags{
	"mh": {"mh-fallback": SchedFallback, "mh-port": SchedPort},
	"sh": {"sh-fallback": SchedFallback, "sh-port": SchedPort},
}

// unweighted are the schedulers that take no notice of a weight other than 0.
var unweighted = []string{"dh", "lc", "rr"}

// balanceOf works out what a Service asks for, and says what it cannot have.
// What cannot be had leaves the default for that one setting.
func balanceOf(asked *model.Balance, facts *Facts) (Balance, []string) {
	var b Balance
	if asked == nil || facts.Schedulers == nil {
		return b, nil
	}
	problems := slices.Clone(asked.Problems)
	say := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	inForce := cmp.Or(facts.DefaultScheduler, "the default")
	if s := asked.Scheduler; s != "" {
		if slices.Contains(facts.Schedulers, s) {
			b.Scheduler, inForce = s, s
		} else {
			say("this node's kernel has no scheduler %q, %s is used: it has %s", s, inForce,
				cmp.Or(strings.Join(facts.Schedulers, ", "), "none"))
		}
	}
	if asked.FlagsSet {
		flags, wrong := flagsFor(inForce, asked.SchedFlags)
		switch len(wrong) {
		case 0:
			b.Flags, b.FlagsSet = flags, true
		case 1:
			say("scheduler %s, which is in force, has no flag %s: its default flags are used", inForce, wrong[0])
		default:
			say("scheduler %s, which is in force, has no flags %s: its default flags are used", inForce, strings.Join(wrong, ", "))
		}
	}
	if asked.Weights != nil && slices.Contains(unweighted, inForce) && differ(asked.Weights) {
		say("scheduler %s takes no notice of weights other than 0", inForce)
	}
	return b, problems
}

// flagsFor returns flags of a scheduler by name, and the names it does not have.
func flagsFor(scheduler string, names []string) (flags SchedFlags, wrong []string) {
	for _, name := range names {
		f, ok := flagsOf[scheduler][name]
		if !ok {
			wrong = append(wrong, name)
		}
		flags |= f
	}
	return flags, wrong
}

// weightsOf returns the weights that a Service asks for; nil if it asks for none,
// or the mode has none.
func weightsOf(svc *model.Service, facts *Facts) *model.Weights {
	if facts.Schedulers == nil || svc.Balance == nil {
		return nil
	}
	return svc.Balance.Weights
}

// differ says whether of two endpoints that take new connections one can be
// given more than the other.
func differ(w *model.Weights) bool {
	share := w.Default
	for _, m := range []map[string]uint16{w.Names, w.Zones} {
		for _, n := range m {
			if share == 0 {
				share = n
			}
			if n != 0 && n != share {
				return true
			}
		}
	}
	return false
}
