package ipvs

import (
	"fmt"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// Host is what a node offers to this proxier.
type Host struct {
	Programs    xtables.Programs
	Why         string // why this variant of iptables
	RandomFully bool
	Schedulers  []string // sorted
	Version     string   // of IPVS, as ipvsadm prints it
	Inside      bool     // frontends can be mapped to packet marks; see Options
	Missing     []string // what would be used if it were there: sentences
}

// schedulers are those that some kernel has.
var schedulers = []string{"dh", "fo", "lblc", "lblcr", "lc", "mh", "nq", "ovf", "rr", "sed", "sh", "wlc", "wrr"}

// CheckScheduler tells whether a scheduler is among the offered. The error lists
// those.
func CheckScheduler(name string, offered []string) error {
	switch {
	case slices.Contains(offered, name):
		return nil
	case slices.Contains(schedulers, name):
		return fmt.Errorf("this kernel has no IPVS scheduler %q (load module ip_vs_%s); it has %s", name, name, orNone(offered))
	}
	return fmt.Errorf("there is no IPVS scheduler %q; this kernel has %s", name, orNone(offered))
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}

// versionText gives a version number as ipvsadm does.
func versionText(n uint32) string {
	return fmt.Sprintf("%d.%d.%d", n>>16, n>>8&0xff, n&0xff)
}
