package config

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

// The flags of kube-proxy 1.37 with their defaults, and ours.
var wantFlags = map[string]string{
	"config":                            "",
	"write-config-to":                   "",
	"cleanup":                           "false",
	"init-only":                         "false",
	"feature-gates":                     "",
	"kubeconfig":                        "",
	"master":                            "",
	"kube-api-content-type":             "application/vnd.kubernetes.protobuf",
	"kube-api-qps":                      "5",
	"kube-api-burst":                    "10",
	"hostname-override":                 "",
	"bind-address":                      "0.0.0.0",
	"bind-address-hard-fail":            "false",
	"healthz-bind-address":              "0.0.0.0:10256",
	"healthz-port":                      "10256",
	"metrics-bind-address":              "127.0.0.1:10249",
	"metrics-port":                      "10249",
	"profiling":                         "false",
	"show-hidden-metrics-for-version":   "",
	"proxy-mode":                        "",
	"iptables-masquerade-bit":           "14",
	"masquerade-all":                    "false",
	"iptables-localhost-nodeports":      "true",
	"iptables-sync-period":              "30s",
	"iptables-min-sync-period":          "1s",
	"ipvs-sync-period":                  "30s",
	"ipvs-min-sync-period":              "1s",
	"ipvs-scheduler":                    "",
	"ipvs-exclude-cidrs":                "[]",
	"ipvs-strict-arp":                   "false",
	"ipvs-tcp-timeout":                  "0s",
	"ipvs-tcpfin-timeout":               "0s",
	"ipvs-udp-timeout":                  "0s",
	"detect-local-mode":                 "",
	"cluster-cidr":                      "",
	"pod-bridge-interface":              "",
	"pod-interface-name-prefix":         "",
	"nodeport-addresses":                "[]",
	"oom-score-adj":                     "-999",
	"conntrack-max-per-core":            "32768",
	"conntrack-min":                     "131072",
	"conntrack-tcp-timeout-established": "24h0m0s",
	"conntrack-tcp-timeout-close-wait":  "1h0m0s",
	"conntrack-tcp-be-liberal":          "false",
	"conntrack-udp-timeout":             "0s",
	"conntrack-udp-timeout-stream":      "0s",
	"config-sync-period":                "15m0s",
	"logging-format":                    "text",
	"v":                                 "0",
	"vmodule":                           "",
	"log-flush-frequency":               "5s",
	"log-text-split-stream":             "false",
	"log-text-info-buffer-size":         "0",
	"log-json-split-stream":             "false",
	"log-json-info-buffer-size":         "0",
	"boot-id-file":                      "/proc/sys/kernel/random/boot_id",
	"machine-id-file":                   "/etc/machine-id,/var/lib/dbus/machine-id",
	// Windows.
	"windows-service":         "false",
	"network-name":            "",
	"source-vip":              "",
	"enable-dsr":              "false",
	"root-hnsendpoint-name":   "cbr0",
	"forward-healthcheck-vip": "false",
	// The userspace mode, gone since 1.26.
	"proxy-port-range": "",
	"udp-timeout":      "250ms",
	// Not in kube-proxy.
	"manifests":                "",
	"iptables-variant":         "auto",
	"mode-fallback":            "true",
	"ipvs-drain":               "15m0s",
	"nftables-service-traffic": "0",
}

func TestFlagDefaults(t *testing.T) {
	f := parse(t)
	got := map[string]string{}
	f.fs.VisitAll(func(flag *pflag.Flag) {
		got[flag.Name] = flag.DefValue
		if flag.Usage == "" {
			t.Errorf("--%s has no help text", flag.Name)
		}
	})
	if diff := cmp.Diff(wantFlags, got); diff != "" {
		t.Errorf("flags differ (-want +got):\n%s", diff)
	}
	if short := f.fs.ShorthandLookup("v"); short == nil || short.Name != "v" {
		t.Errorf("-v is not --v")
	}
}

// Every flag is a field's, or of the process, or one that is ignored: none may be
// forgotten when a file takes the place of flags.
func TestEveryFlagHasAPlace(t *testing.T) {
	place := map[string]bool{}
	for _, name := range []string{"config", "write-config-to", "cleanup", "init-only", "master", "hostname-override",
		"logging-format", "v", "vmodule", "log-flush-frequency", "log-text-split-stream", "log-text-info-buffer-size",
		"log-json-split-stream", "log-json-info-buffer-size", "manifests", "iptables-variant", "mode-fallback", "ipvs-drain", "nftables-service-traffic"} {
		place[name] = true
	}
	for _, f := range fieldFlags {
		place[f.flag] = true
	}
	for _, u := range unusedFlags {
		place[u.name] = true
	}
	parse(t).fs.VisitAll(func(flag *pflag.Flag) {
		if !place[flag.Name] {
			t.Errorf("--%s has no place", flag.Name)
		}
	})
	paths := map[string]bool{}
	for _, path := range newDecoder(NewFlags().kubeProxy, "", nil).paths {
		paths[path] = true
	}
	for _, f := range fieldFlags {
		if !paths[f.field] {
			t.Errorf("--%s: there is no field %s", f.flag, f.field)
		}
	}
	for _, path := range hotFields {
		if !paths[path] && path != "featureGates."+GateAllowServiceExternalIPs && path[:7] != SluiceKind[:7] {
			t.Errorf("hot field %s does not exist", path)
		}
	}
}

func TestModeIsProxyMode(t *testing.T) {
	for _, args := range [][]string{
		{"--mode=nftables"}, {"--proxy-mode=nftables"}, {"--proxy_mode", "nftables"},
		{"--proxy-mode=ipvs", "--mode=nftables"}, {"--mode=ipvs", "--proxy-mode=nftables"},
	} {
		if c := load(t, args...); c.Mode != ModeNFTables {
			t.Errorf("%q: mode %q", args, c.Mode)
		}
	}
}

func TestFlagsToConfig(t *testing.T) {
	type tc struct {
		args []string
		get  func(*Config) any
		want any
	}
	for _, tc := range []tc{
		{nil, func(c *Config) any { return c.Mode }, ModeIPTables},
		{nil, func(c *Config) any { return c.ModeDefaulted }, true},
		{[]string{"--mode=iptables"}, func(c *Config) any { return c.ModeDefaulted }, false},
		{nil, func(c *Config) any { return c.NodeName }, "node-a"},
		{[]string{"--hostname-override= N2 "}, func(c *Config) any { return c.NodeName }, "n2"},
		{nil, func(c *Config) any { return c.BindAddress.String() }, "0.0.0.0"},
		{[]string{"--bind-address=fd00::1"}, func(c *Config) any { return c.BindAddress.String() }, "fd00::1"},
		// Flags alone do not flip the listeners' family, as in kube-proxy.
		{[]string{"--bind-address=fd00::1"}, func(c *Config) any { return c.HealthzAddr }, "0.0.0.0:10256"},
		{[]string{"--bind-address="}, func(c *Config) any { return c.BindAddress.String() }, "0.0.0.0"},
		{[]string{"--healthz-bind-address=10.0.0.1"}, func(c *Config) any { return c.HealthzAddr }, "10.0.0.1:10256"},
		{[]string{"--healthz-bind-address=10.0.0.1", "--healthz-port=99"}, func(c *Config) any { return c.HealthzAddr }, "10.0.0.1:99"},
		{[]string{"--healthz-bind-address=::1"}, func(c *Config) any { return c.HealthzAddr }, "[::1]:10256"},
		{[]string{"--healthz-bind-address=[::1]:99"}, func(c *Config) any { return c.HealthzAddr }, "[::1]:99"},
		{[]string{"--healthz-port=99"}, func(c *Config) any { return c.HealthzAddr }, "0.0.0.0:10256"},
		{[]string{"--healthz-port=0"}, func(c *Config) any { return c.HealthzAddr }, ""},
		{[]string{"--healthz-bind-address="}, func(c *Config) any { return c.HealthzAddr }, ""},
		{[]string{"--metrics-bind-address="}, func(c *Config) any { return c.MetricsAddr }, ""},
		{[]string{"--metrics-port=0"}, func(c *Config) any { return c.MetricsAddr }, ""},
		{[]string{"--metrics-bind-address=0.0.0.0"}, func(c *Config) any { return c.MetricsAddr }, "0.0.0.0:10249"},
		{[]string{"--cluster-cidr=10.1.2.3/16,fd00::/56"}, func(c *Config) any { return len(c.ClusterCIDRs) }, 2},
		{[]string{"--cluster-cidr=10.1.2.3/16"}, func(c *Config) any { return c.ClusterCIDRs[0].String() }, "10.1.0.0/16"},
		{[]string{"--cluster-cidr="}, func(c *Config) any { return len(c.ClusterCIDRs) }, 0},
		{[]string{"--cluster-cidr=x", "--detect-local-mode=NodeCIDR"}, func(c *Config) any { return len(c.ClusterCIDRs) }, 0},
		{[]string{"--masquerade-all", "--mode=nftables"}, func(c *Config) any { return c.MasqueradeAll }, true},
		{[]string{"--masquerade-all", "--mode=ipvs"}, func(c *Config) any { return c.MasqueradeAll }, true},
		{[]string{"--iptables-masquerade-bit=3", "--mode=ipvs"}, func(c *Config) any { return c.MasqueradeBit }, 3},
		{[]string{"--iptables-masquerade-bit=3", "--mode=nftables"}, func(c *Config) any { return c.MasqueradeBit }, 14},
		{nil, func(c *Config) any { return c.LocalhostNodePorts }, true},
		{[]string{"--iptables-localhost-nodeports=false"}, func(c *Config) any { return c.LocalhostNodePorts }, false},
		{[]string{"--mode=ipvs"}, func(c *Config) any { return c.LocalhostNodePorts }, false},
		{[]string{"--iptables-sync-period=7s", "--mode=nftables"}, func(c *Config) any { return c.SyncPeriod }, 7 * time.Second},
		{[]string{"--iptables-sync-period=7s", "--mode=ipvs"}, func(c *Config) any { return c.SyncPeriod }, 30 * time.Second},
		{[]string{"--ipvs-sync-period=7s", "--mode=ipvs"}, func(c *Config) any { return c.SyncPeriod }, 7 * time.Second},
		{[]string{"--conntrack-max-per-core=0"}, func(c *Config) any { return c.Conntrack.MaxPerCore }, 0},
		{nil, func(c *Config) any { return c.Conntrack.Min }, 131072},
		{nil, func(c *Config) any { return c.Conntrack.TCPEstablishedTimeout }, 24 * time.Hour},
		{[]string{"--conntrack-tcp-timeout-close-wait=0"}, func(c *Config) any { return c.Conntrack.TCPCloseWaitTimeout }, time.Duration(0)},
		{nil, func(c *Config) any { return c.FeatureGates[GateAllowServiceExternalIPs] }, true},
		{[]string{"--feature-gates=AllowServiceExternalIPs=false,Foo=true", "--feature-gates=NFTablesNetlink=false"}, func(c *Config) any {
			return c.FeatureGates[GateAllowServiceExternalIPs] || c.FeatureGates["NFTablesNetlink"]
		}, false},
		{[]string{"--oom-score-adj=-5"}, func(c *Config) any { return c.OOMScoreAdj }, -5},
		{[]string{"--ipvs-exclude-cidrs=10.0.0.0/8,fd00::/8"}, func(c *Config) any { return len(c.IPVS.ExcludeCIDRs) }, 2},
		{[]string{"--mode=ipvs"}, func(c *Config) any { return c.IPVS }, IPVS{Drain: 15 * time.Minute}},
		{[]string{"--mode=nftables", "--nftables-service-traffic=50"}, func(c *Config) any { return c.ServiceTraffic }, 50},
		{[]string{"--mode=ipvs", "--ipvs-scheduler=mh", "--ipvs-exclude-cidrs=10.0.0.0/8", "--ipvs-strict-arp", "--ipvs-tcp-timeout=1h", "--ipvs-tcpfin-timeout=1m", "--ipvs-udp-timeout=5s", "--ipvs-drain=0"},
			func(c *Config) any { return c.IPVS },
			IPVS{Scheduler: "mh", ExcludeCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, StrictARP: true, TCPTimeout: time.Hour, TCPFinTimeout: time.Minute, UDPTimeout: 5 * time.Second}},
		{[]string{"--mode=ipvs", "--ipvs-udp-timeout=500ms"}, func(c *Config) any { return c.IPVS.UDPTimeout }, time.Duration(0)},
		{[]string{"--mode=ipvs", "--ipvs-tcp-timeout=90500ms"}, func(c *Config) any { return c.IPVS.TCPTimeout }, 90 * time.Second},
		{[]string{"--manifests=/m"}, func(c *Config) any { return c.Manifests }, "/m"},
		{nil, func(c *Config) any { return c.IPTablesVariant }, VariantAuto},
		{[]string{"--iptables-variant=legacy"}, func(c *Config) any { return c.IPTablesVariant }, VariantLegacy},
		{nil, func(c *Config) any { return c.ModeFallback }, true},
		{[]string{"--mode-fallback=false"}, func(c *Config) any { return c.ModeFallback }, false},
		{nil, func(c *Config) any { return c.CheckPeriod }, time.Second},
		{nil, func(c *Config) any { return c.ResyncPeriod }, 10 * time.Minute},
		{[]string{"--master=https://a:1"}, func(c *Config) any { return c.Master }, "https://a:1"},
		{[]string{"--cleanup"}, func(c *Config) any { return c.Cleanup }, true},
		{[]string{"--init-only"}, func(c *Config) any { return c.InitOnly }, true},
	} {
		if diff := cmp.Diff(tc.want, tc.get(load(t, tc.args...)), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tc.args, diff)
		}
	}
}

// kube-proxy's implied second is not imposed; what an operator asked for is.
func TestMinSyncPeriod(t *testing.T) {
	for _, tc := range []struct {
		file     string
		args     []string
		want     time.Duration
		explicit bool
	}{
		{"", nil, time.Second, false},
		{"", []string{"--iptables-min-sync-period=0"}, 0, false},
		{"", []string{"--iptables-min-sync-period=1s"}, time.Second, true},
		{"", []string{"--iptables-min-sync-period=2s", "--mode=nftables"}, 2 * time.Second, true},
		{"", []string{"--iptables-min-sync-period=2s", "--mode=ipvs"}, 0, false},
		{"", []string{"--ipvs-min-sync-period=2s", "--mode=ipvs"}, 2 * time.Second, true},
		{"", []string{"--ipvs-min-sync-period=0", "--mode=ipvs"}, 0, false},
		{"mode: iptables", nil, time.Second, false},
		{"iptables: {minSyncPeriod: 0s}", nil, time.Second, false},
		{"iptables: {minSyncPeriod: 1s}", nil, time.Second, true},
		{"mode: ipvs", nil, 0, false},
		{"{mode: ipvs, ipvs: {minSyncPeriod: 5s}}", nil, 5 * time.Second, true},
		{"{mode: nftables, iptables: {minSyncPeriod: 5s}}", nil, time.Second, false},
		{"{mode: nftables, nftables: {minSyncPeriod: 5s}}", nil, 5 * time.Second, true},
	} {
		var c *Config
		if tc.file == "" {
			c = load(t, tc.args...)
		} else {
			file := tc.file
			if file[0] == '{' {
				file = "{apiVersion: kubeproxy.config.k8s.io/v1alpha1, kind: KubeProxyConfiguration, " + file[1:]
			} else {
				file = kubeProxyHeader + file
			}
			c = load(t, "--config="+writeFile(t, file))
		}
		if c.MinSyncPeriod != tc.want || c.MinSyncExplicit != tc.explicit {
			t.Errorf("%q %q: %s, explicit %t; want %s, %t", tc.file, tc.args, c.MinSyncPeriod, c.MinSyncExplicit, tc.want, tc.explicit)
		}
	}
}

func TestFlagErrors(t *testing.T) {
	for _, tc := range []struct{ arg, want string }{
		{"--bind-address=localhost", `"localhost" is not an IP address`},
		{"--healthz-bind-address=localhost:1", `"localhost:1" is neither IP nor IP:port`},
		{"--metrics-bind-address=1.2.3.4:99999", `"99999" is not a port`},
		{"--iptables-variant=nf", `must be one of auto, legacy, nft`},
		{"--feature-gates=Foo", `"Foo" is not a pair such as AllowServiceExternalIPs=true`},
		{"--feature-gates=Foo=maybe", `"Foo=maybe" is not a pair such as AllowServiceExternalIPs=true`},
	} {
		_, err := parseErr(tc.arg)
		if err == nil || !containsText(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %s", tc.arg, err, tc.want)
		}
	}
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{[]string{"--mode=userspace"}, []string{`--proxy-mode: "userspace" is none of iptables, ipvs, nftables`}},
		{[]string{"--iptables-masquerade-bit=32", "--oom-score-adj=-1001"}, []string{
			"--iptables-masquerade-bit: 32 is not a bit of the packet mark: 0 to 31",
			"--oom-score-adj: -1001 is not within -1000 to 1000"}},
		{[]string{"--hostname-override= "}, []string{"--hostname-override: must not be blank"}},
		{[]string{"--mode=nftables", "--iptables-sync-period=0"}, []string{"--iptables-sync-period: 0s must be greater than 0"}},
		{[]string{"--iptables-sync-period=1s", "--iptables-min-sync-period=2s"}, []string{"--iptables-min-sync-period: 2s is longer than syncPeriod, 1s"}},
		{[]string{"--detect-local-mode=BridgeInterface"}, []string{"--pod-bridge-interface: must be set for detectLocalMode BridgeInterface"}},
		{[]string{"--nodeport-addresses=primary,primary,1.2.3.4"}, []string{
			`--nodeport-addresses: "primary" is there twice`,
			`--nodeport-addresses: "1.2.3.4" is neither a CIDR nor one of primary, localhost, all`}},
		{[]string{"--mode=ipvs", "--ipvs-drain=-1s", "--ipvs-scheduler=Round Robin", "--ipvs-tcp-timeout=-1s", "--ipvs-tcpfin-timeout=-1s", "--ipvs-udp-timeout=-1s",
			"--ipvs-exclude-cidrs=10.0.0.0/8,10.0.0.1", "--ipvs-sync-period=0", "--ipvs-min-sync-period=-1s"}, []string{
			`--ipvs-scheduler: "Round Robin" cannot be the name of a scheduler, such as rr, wrr, lc or mh`,
			"--ipvs-tcp-timeout: -1s must be 0 or greater",
			"--ipvs-tcpfin-timeout: -1s must be 0 or greater",
			"--ipvs-udp-timeout: -1s must be 0 or greater",
			`--ipvs-exclude-cidrs: "10.0.0.1" is not a CIDR`,
			"--ipvs-sync-period: 0s must be greater than 0",
			"--ipvs-min-sync-period: -1s must be 0 or greater",
			"--ipvs-drain: -1s must be 0 or greater"}},
		{[]string{"--mode=nftables", "--nftables-service-traffic=-1"}, []string{"--nftables-service-traffic: -1 must be 0 or greater"}},
		{[]string{"--mode=ipvs", "--ipvs-sync-period=1s", "--ipvs-min-sync-period=2s"}, []string{"--ipvs-min-sync-period: 2s is longer than syncPeriod, 1s"}},
		{[]string{"--logging-format=xml"}, []string{`--logging-format: Invalid value: "xml": Unsupported log format`}},
		{[]string{"--config=/nonexistent/f"}, []string{"--config: open /nonexistent/f: no such file or directory"}},
	} {
		_, err := parse(t, tc.args...).Load()
		wantErrorLines(t, err, tc.want...)
	}
}
