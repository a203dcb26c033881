package app

import (
	"slices"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/config"
)

func TestFieldsFixedAtStart(t *testing.T) {
	hot := []string{"clusterCIDR", "conntrack.maxPerCore", "conntrack.tcpBeLiberal", "detectLocal.bridgeInterface", "detectLocalMode",
		"iptables.masqueradeAll", config.SluiceKind + ".checkPeriod", config.SluiceKind + ".conntrack.cleanup"}
	want := []string{"clusterCIDR", "conntrack.tcpBeLiberal", "detectLocal.bridgeInterface", "detectLocalMode", config.SluiceKind + ".conntrack.cleanup"}
	if got := fixedAtStart(hot); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := fixedAtStart(nil); len(got) != 0 {
		t.Errorf("%q for nothing", got)
	}
}
