package config

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDiff(t *testing.T) {
	for _, tc := range []struct {
		name, from, to string
		hot, restart   []string
	}{
		{"same", "mode: ipvs", "mode: ipvs", nil, nil},
		{"defaults written out", "", "mode: iptables\nbindAddress: 0.0.0.0\niptables: {masqueradeBit: 14, syncPeriod: 30s}\nnodePortAddresses: []\nfeatureGates: {}\nlogging: {flushFrequency: 5000000000, options: {text: {infoBufferSize: '0'}}}", nil, nil},
		{"hot", "", "clusterCIDR: 10.0.0.0/8\ndetectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: br0}\nnodePortAddresses: [primary]\nlogging: {verbosity: 3, vmodule: [{filePattern: a, verbosity: 1}]}\niptables: {masqueradeAll: true, syncPeriod: 10s, minSyncPeriod: 2s, localhostNodePorts: false}\nconntrack: {maxPerCore: 1, tcpBeLiberal: true, udpTimeout: 3s, tcpCloseWaitTimeout: 1s}\nfeatureGates: {AllowServiceExternalIPs: false}",
			[]string{"clusterCIDR", "conntrack.maxPerCore", "conntrack.tcpBeLiberal", "conntrack.tcpCloseWaitTimeout", "conntrack.udpTimeout", "detectLocal.bridgeInterface", "detectLocalMode", "featureGates.AllowServiceExternalIPs",
				"iptables.localhostNodePorts", "iptables.masqueradeAll", "iptables.minSyncPeriod", "iptables.syncPeriod", "logging.verbosity", "logging.vmodule", "nodePortAddresses"}, nil},
		{"restart", "", "mode: nftables\nnodePortAddresses: [all]\nbindAddress: 10.0.0.1\nhealthzBindAddress: 10.0.0.1\niptables: {masqueradeBit: 3}\nlogging: {format: json, flushFrequency: 6s}\nclientConnection: {qps: 6}\nhostnameOverride: x\noomScoreAdj: 1\nfeatureGates: {LoggingAlphaOptions: true}",
			[]string{"nodePortAddresses"},
			[]string{"bindAddress", "clientConnection.qps", "featureGates.LoggingAlphaOptions", "healthzBindAddress", "hostnameOverride", "iptables.masqueradeBit", "logging.flushFrequency", "logging.format", "mode", "oomScoreAdj"}},
		{"no effect", "portRange: 1-2\nwinkernel: {enableDSR: true}", "windowsRunAsService: true", nil, nil},
		{"ours", "---\n" + sluiceHeader, "---\n" + sluiceHeader + "manifests: /m\nmodeFallback: false\niptables: {variant: nft}\nipvs: {drain: 0s}\ncheckPeriod: 2s\nresyncPeriod: 1h\nconntrack: {cleanup: false}",
			[]string{"SluiceConfiguration.checkPeriod", "SluiceConfiguration.conntrack.cleanup", "SluiceConfiguration.ipvs.drain", "SluiceConfiguration.resyncPeriod"},
			[]string{"SluiceConfiguration.iptables.variant", "SluiceConfiguration.manifests", "SluiceConfiguration.modeFallback"}},
		{"our default written out", "---\n" + sluiceHeader, "---\n" + sluiceHeader + "ipvs: {drain: 900s}", nil, nil},
		{"our document is added", "", "---\n" + sluiceHeader, nil, nil},
		{"a default is asked for", "", "iptables: {minSyncPeriod: 1s}", []string{"iptables.minSyncPeriod"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			from, to := loadFile(t, tc.from), loadFile(t, tc.to)
			hot, restart := Diff(from, to)
			if diff := cmp.Diff([][]string{tc.hot, tc.restart}, [][]string{hot, restart}); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			hotBack, restartBack := Diff(to, from)
			if tc.name != "a default is asked for" && (!cmp.Equal(hot, hotBack) || !cmp.Equal(restart, restartBack)) {
				t.Errorf("the other way round: %q, %q", hotBack, restartBack)
			}
		})
	}
}
