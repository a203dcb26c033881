package config

import "testing"

func TestSuggest(t *testing.T) {
	known := newDecoder(NewFlags().kubeProxy, "", nil).paths
	for unknown, want := range map[string]string{
		"iptables.masqueradeal":   "iptables.masqueradeAll",
		"nftables.masqueradeal":   "nftables.masqueradeAll",
		"masqueradeBits":          "iptables.masqueradeBit",
		"conntrack.maxPerCores":   "conntrack.maxPerCore",
		"metricBindAdress":        "metricsBindAddress",
		"kubeconfig":              "clientConnection.kubeconfig",
		"ipvs.excludeCidrs":       "ipvs.excludeCIDRs",
		"iptables.schedule":       "ipvs.scheduler",
		"dns":                     "",
		"a":                       "",
		"somethingQuiteDifferent": "",
	} {
		if got := suggest(unknown, known); got != want {
			t.Errorf("%s: %q, want %q", unknown, got, want)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "ab", 2}, {"mode", "mode", 0}, {"mode", "mod", 1}, {"kitten", "sitting", 3}, {"ab", "ba", 2}} {
		if got := distance(tc.a, tc.b); got != tc.want {
			t.Errorf("distance(%q, %q) = %d, want %d", tc.a, tc.b, got, tc.want)
		}
		if got := distance(tc.b, tc.a); got != tc.want {
			t.Errorf("distance(%q, %q) = %d, want %d", tc.b, tc.a, got, tc.want)
		}
	}
}
