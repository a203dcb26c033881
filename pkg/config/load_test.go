package config

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func containsText(s, part string) bool { return strings.Contains(s, part) }

func TestKubeadmFileMeansTheDefaults(t *testing.T) {
	got := load(t, "--config=testdata/kubeadm.yaml", "--hostname-override=node-a")
	want := load(t, "--cluster-cidr=10.244.0.0/16", "--kubeconfig=/var/lib/kube-proxy/kubeconfig.conf", "--hostname-override=node-a")
	sameConfig(t, got, want)
	if diff := cmp.Diff([]string{"nodePortAddresses is unset: NodePorts are served on all addresses of the node; consider --nodeport-addresses=primary"}, got.Warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

func TestOldFileLoadsWithWarnings(t *testing.T) {
	c := load(t, "--config=testdata/kubernetes-1.9.yaml")
	if c.Mode != ModeIPVS || c.NodeName != "node-1" {
		t.Errorf("mode %q, node %q", c.Mode, c.NodeName)
	}
	want := []string{
		"conntrack.max: kube-proxy has removed this field (use conntrack.maxPerCore and conntrack.min): ignored",
		"resourceContainer: kube-proxy has removed this field (the kubelet manages cgroups): ignored",
		"udpTimeoutMilliseconds: kube-proxy has removed this field (it belonged to the userspace mode): ignored",
		"featureGates: a string is the notation of old releases: write a mapping of name: true or false",
		"nodePortAddresses is unset: NodePorts are served on all addresses of the node; consider --nodeport-addresses=primary",
		"feature gate SupportIPVSProxyMode=true has no effect here: ignored",
		"portRange belonged to the userspace mode: ignored",
	}
	if diff := cmp.Diff(want, c.Warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

func TestFileDefaults(t *testing.T) {
	for _, tc := range []struct {
		file string
		get  func(*Config) any
		want any
	}{
		{"", func(c *Config) any { return c.HealthzAddr }, "0.0.0.0:10256"},
		{"", func(c *Config) any { return c.MetricsAddr }, "127.0.0.1:10249"},
		{"bindAddress: fd00::1", func(c *Config) any { return c.HealthzAddr }, "[::]:10256"},
		{"bindAddress: fd00::1", func(c *Config) any { return c.MetricsAddr }, "[::1]:10249"},
		{"bindAddress: '::'", func(c *Config) any { return c.MetricsAddr }, "[::1]:10249"},
		{"bindAddress: ::ffff:10.0.0.1", func(c *Config) any { return c.BindAddress.String() }, "10.0.0.1"},
		{"healthzBindAddress: 10.0.0.1", func(c *Config) any { return c.HealthzAddr }, "10.0.0.1:10256"},
		{"metricsBindAddress: fd00::1", func(c *Config) any { return c.MetricsAddr }, "[fd00::1]:10249"},
		{"metricsBindAddress: 0.0.0.0:1", func(c *Config) any { return c.MetricsAddr }, "0.0.0.0:1"},
		{"", func(c *Config) any { return c.MasqueradeBit }, 14},
		{"iptables: {masqueradeBit: 0}", func(c *Config) any { return c.MasqueradeBit }, 0},
		{"mode: nftables\nnftables: {masqueradeBit: 5, masqueradeAll: true}\niptables: {masqueradeBit: 6}", func(c *Config) any { return []any{c.MasqueradeBit, c.MasqueradeAll} }, []any{5, true}},
		{"mode: ipvs\nnftables: {masqueradeBit: 5, masqueradeAll: true}\niptables: {masqueradeBit: 6}", func(c *Config) any { return []any{c.MasqueradeBit, c.MasqueradeAll} }, []any{6, false}},
		{"", func(c *Config) any { return c.KubeProxy.ClientConnection.QPS }, float32(5)},
		{"", func(c *Config) any { return c.KubeProxy.ClientConnection.Burst }, int32(10)},
		{"", func(c *Config) any { return c.KubeProxy.ClientConnection.ContentType }, "application/vnd.kubernetes.protobuf"},
		{"", func(c *Config) any { return c.KubeProxy.ConfigSyncPeriod.Duration }, 15 * time.Minute},
		{"", func(c *Config) any { return c.DetectLocal.Mode }, LocalClusterCIDR},
		{"", func(c *Config) any { return c.OOMScoreAdj }, -999},
		{"", func(c *Config) any { return c.SyncPeriod }, 30 * time.Second},
		{"", func(c *Config) any { return c.Conntrack }, Conntrack{MaxPerCore: 32768, Min: 131072, TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour, Cleanup: true}},
		{"conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s}", func(c *Config) any { return c.Conntrack }, Conntrack{Min: 131072, TCPCloseWaitTimeout: time.Hour, Cleanup: true}},
		{"", func(c *Config) any { return c.KubeProxy.Logging.Format }, "text"},
		{"", func(c *Config) any { return c.NodePortAddresses.IPv4.All }, true},
		{"mode: nftables", func(c *Config) any { return fmt.Sprint(c.NodePortAddresses) }, "{{false true [127.0.0.0/8]} {false true [::1/128]}}"},
		{"mode: nftables", func(c *Config) any { return c.KubeProxy.NodePortAddresses }, []string{"primary", "localhost"}},
		{"mode: nftables\niptables: {localhostNodePorts: false}", func(c *Config) any { return c.KubeProxy.NodePortAddresses }, []string{"primary"}},
		{"mode: nftables\nnodePortAddresses: [10.0.0.0/8]", func(c *Config) any { return c.KubeProxy.NodePortAddresses }, []string{"10.0.0.0/8"}},
		{"clusterCIDR: 010.1.0.0/16", func(c *Config) any { return c.ClusterCIDRs[0].String() }, "10.1.0.0/16"},
		{"ipvs: {excludeCIDRs: [x]}", func(c *Config) any { return len(c.IPVS.ExcludeCIDRs) }, 0},
		{"---\n" + sluiceHeader + "manifests: /m\nconntrack: {cleanup: false}\ncheckPeriod: 3s", func(c *Config) any { return []any{c.Manifests, c.Conntrack.Cleanup, c.CheckPeriod} }, []any{"/m", false, 3 * time.Second}},
		{"---\n# nothing\n---\n" + sluiceHeader + "modeFallback: false\niptables: {variant: nft}", func(c *Config) any { return []any{c.ModeFallback, c.IPTablesVariant} }, []any{false, VariantNFT}},
	} {
		if diff := cmp.Diff(tc.want, tc.get(loadFile(t, tc.file))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.file, diff)
		}
	}
}

// A file takes the place of kube-proxy's flags, except those that kube-proxy
// still honours beside it, and except ours.
func TestPrecedence(t *testing.T) {
	file := `mode: nftables
hostnameOverride: from-file
logging: {verbosity: 2, vmodule: [{filePattern: a, verbosity: 3}]}
`
	c := loadFile(t, file+"---\n"+sluiceHeader+"manifests: /from-file\niptables: {variant: nft}\n",
		"--mode=ipvs", "--masquerade-all", "--feature-gates=AllowServiceExternalIPs=false", "--kubeconfig=/k",
		"--healthz-port=0", "--cluster-cidr=10.0.0.0/8", "--conntrack-min=5",
		"--hostname-override=From-Flag", "--master=https://m", "-v=7", "--vmodule=b=9", "--cleanup", "--init-only", "--write-config-to=/w",
		"--manifests=/from-flag", "--mode-fallback=false", "--source-vip=1.2.3.4")
	got := []any{
		c.Mode, c.MasqueradeAll, c.FeatureGates[GateAllowServiceExternalIPs], c.KubeProxy.ClientConnection.Kubeconfig,
		c.HealthzAddr, len(c.ClusterCIDRs), c.Conntrack.Min,
		c.NodeName, c.Master, c.KubeProxy.Logging.Verbosity, len(c.KubeProxy.Logging.VModule), c.KubeProxy.Logging.VModule[0].FilePattern,
		c.Cleanup, c.InitOnly, c.WriteConfigTo, c.Manifests, c.ModeFallback, c.IPTablesVariant,
	}
	want := []any{
		ModeNFTables, false, true, "",
		"0.0.0.0:10256", 0, 131072,
		"from-flag", "https://m", c.KubeProxy.Logging.Verbosity, 2, "b",
		true, true, "/w", "/from-flag", false, VariantNFT,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if c.KubeProxy.Logging.Verbosity != 7 {
		t.Errorf("verbosity %d: -v must win over the file", c.KubeProxy.Logging.Verbosity)
	}
	in := " is ignored because of --config: set "
	wantWarnings := []string{
		"--source-vip is ignored: it is for Windows",
		"--feature-gates" + in + "featureGates in " + c.ConfigFile,
		"--kubeconfig" + in + "clientConnection.kubeconfig in " + c.ConfigFile,
		"--healthz-port" + in + "healthzBindAddress in " + c.ConfigFile,
		"--proxy-mode" + in + "mode in " + c.ConfigFile,
		"--masquerade-all" + in + "iptables.masqueradeAll in " + c.ConfigFile,
		"--cluster-cidr" + in + "clusterCIDR in " + c.ConfigFile,
		"--conntrack-min" + in + "conntrack.min in " + c.ConfigFile,
	}
	if diff := cmp.Diff(wantWarnings, c.Warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

func TestLoggingOptionsOfTheFileSurviveFlags(t *testing.T) {
	c := loadFile(t, "featureGates: {LoggingAlphaOptions: true}\nlogging: {options: {text: {splitStream: true}}}\n", "-v=1")
	if !c.KubeProxy.Logging.Options.Text.SplitStream {
		t.Errorf("splitStream of the file was lost")
	}
}

func TestFlagsCountIfTheFileHoldsOnlyOurDocument(t *testing.T) {
	path := writeFile(t, sluiceHeader+"resyncPeriod: 1h\n")
	c := load(t, "--config="+path, "--mode=ipvs")
	if c.Mode != ModeIPVS || c.ResyncPeriod != time.Hour {
		t.Errorf("mode %q, resync %s", c.Mode, c.ResyncPeriod)
	}
	_, err := parse(t, "--config="+path, "--mode=x").Load()
	wantErrorLines(t, err, `--proxy-mode: "x" is none of iptables, ipvs, nftables`)
}

func TestFileErrors(t *testing.T) {
	for _, tc := range []struct {
		name, file string
		want       []string
	}{
		{"empty", "", []string{"no configuration in it: wanted a document of kind KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) or SluiceConfiguration (sluice.io/v1alpha1)"}},
		{"comments", "# a\n---\n# b\n", []string{"no configuration in it: wanted a document of kind KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) or SluiceConfiguration (sluice.io/v1alpha1)"}},
		{"kind", "mode: ipvs\n", []string{`document 1: apiVersion and kind are "" and "": wanted "kubeproxy.config.k8s.io/v1alpha1" and "KubeProxyConfiguration", or "sluice.io/v1alpha1" and "SluiceConfiguration"`}},
		{"list", "- a\n", []string{"document 1: must be a mapping of fields, not a list"}},
		{"twice", kubeProxyHeader + "---\n" + kubeProxyHeader, []string{"document 2: a second KubeProxyConfiguration"}},
		{"duplicate key", kubeProxyHeader + "mode: ipvs\nmode: iptables\n", []string{`document 1: line 4: key "mode" already set in map`}},
		{"syntax", kubeProxyHeader + "mode: [", []string{"document 1: line 3: did not find expected node content"}},
		{"unknown", kubeProxyHeader + "mod: ipvs\n", []string{"mod: there is no such field: did you mean mode?"}},
		{"unknown, no idea", kubeProxyHeader + "frobnicate: 1\n", []string{"frobnicate: there is no such field"}},
		{"case", kubeProxyHeader + "ClusterCidr: 10.0.0.0/8\n", []string{"ClusterCidr: there is no such field: did you mean clusterCIDR?"}},
		{"wrong place", kubeProxyHeader + "strictARP: true\niptables: {maxPerCore: 1}\n", []string{
			"iptables.maxPerCore: there is no such field: did you mean conntrack.maxPerCore?",
			"strictARP: there is no such field: did you mean ipvs.strictARP?"}},
		{"unknown in a list", kubeProxyHeader + "logging: {vmodule: [{filePatern: a}]}\n", []string{"logging.vmodule[0].filePatern: there is no such field"}},
		{"types", kubeProxyHeader + "iptables: {masqueradeBit: '14', masqueradeAll: 1}\nnodePortAddresses: primary\nclusterCIDR: 5\nfeatureGates: {A: x}\nconntrack: []\noomScoreAdj: 99999999999\n", []string{
			"clusterCIDR: 5 is not text (put it in quotes)",
			"conntrack: must be a mapping of fields, not a list",
			`featureGates.A: "x" is not true or false`,
			"iptables.masqueradeAll: 1 is not true or false",
			`iptables.masqueradeBit: "14" is not a whole number in range`,
			"nodePortAddresses: must be a list, not text",
			"oomScoreAdj: 99999999999 is not a whole number in range"}},
		{"durations", kubeProxyHeader + "iptables: {syncPeriod: 30}\nconntrack: {tcpEstablishedTimeout: 1d}\nlogging: {flushFrequency: x}\n", []string{
			`conntrack.tcpEstablishedTimeout: "1d" is not a duration such as "30s" or "1h15m"`,
			`iptables.syncPeriod: 30 is not a duration such as "30s" or "1h15m"`,
			`logging.flushFrequency: "x" is not a duration such as "30s" or "1h15m"`}},
		{"values", kubeProxyHeader + `
mode: userspace
bindAddress: localhost
healthzBindAddress: localhost:1
metricsBindAddress: 127.0.0.1:0
clusterCIDR: 10.0.0.0/8,11.0.0.0/8
detectLocalMode: Magic
nodePortAddresses: [10.0.0.0/33, all]
oomScoreAdj: 1001
conntrack: {min: -1, udpTimeout: -1s}
configSyncPeriod: -1s
showHiddenMetricsForVersion: latest
clientConnection: {burst: -1}
iptables: {syncPeriod: 1s, minSyncPeriod: 2s, masqueradeBit: -1}
logging: {format: xml}
`, []string{
			`mode: "userspace" is none of iptables, ipvs, nftables`,
			"iptables.masqueradeBit: -1 is not a bit of the packet mark: 0 to 31",
			`bindAddress: "localhost" is not an IP address`,
			"oomScoreAdj: 1001 is not within -1000 to 1000",
			`nodePortAddresses[0]: "10.0.0.0/33" is neither a CIDR nor one of primary, localhost, all`,
			`healthzBindAddress: "localhost" in "localhost:1" is not an IP address`,
			`metricsBindAddress: "0" in "127.0.0.1:0" is not a port: 1 to 65535`,
			`detectLocalMode: "Magic" is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix`,
			"conntrack.min: -1 must be 0 or greater",
			"conntrack.udpTimeout: -1s must be 0 or greater",
			"iptables.minSyncPeriod: 2s is longer than syncPeriod, 1s",
			"configSyncPeriod: -1s must be greater than 0",
			`logging.format: Invalid value: "xml": Unsupported log format`,
			"clientConnection.burst: -1 must be 0 or greater",
			`showHiddenMetricsForVersion: "latest" is not a version such as 1.36`}},
		{"cidr pair", kubeProxyHeader + "clusterCIDR: 10.0.0.0/8,11.0.0.0/8", []string{`clusterCIDR: "10.0.0.0/8,11.0.0.0/8" holds more than one CIDR of a family: wanted one, or one IPv4 and one IPv6`}},
		{"cidr", kubeProxyHeader + "clusterCIDR: 10.0.0.0", []string{`clusterCIDR: "10.0.0.0" is not a CIDR such as 10.244.0.0/16 or fd00:10:244::/56`}},
		{"prefix", kubeProxyHeader + "detectLocalMode: InterfaceNamePrefix", []string{"detectLocal.interfaceNamePrefix: must be set for detectLocalMode InterfaceNamePrefix"}},
		{"one listener", kubeProxyHeader + "healthzBindAddress: 0.0.0.0:80\nmetricsBindAddress: 0.0.0.0:80", []string{"metricsBindAddress: 0.0.0.0:80 is also healthzBindAddress: two servers cannot share it"}},
		{"ipvs", kubeProxyHeader + "mode: ipvs\nipvs: {excludeCIDRs: [x], tcpTimeout: -1s}", []string{
			"ipvs.tcpTimeout: -1s must be 0 or greater",
			`ipvs.excludeCIDRs[0]: "x" is not a CIDR`}},
		{"nftables", kubeProxyHeader + "mode: nftables\nnftables: {masqueradeBit: 32, syncPeriod: -1s}", []string{
			"nftables.masqueradeBit: 32 is not a bit of the packet mark: 0 to 31",
			"nftables.syncPeriod: -1s must be greater than 0"}},
		{"json and vmodule", kubeProxyHeader + "logging: {format: json, vmodule: [{filePattern: a, verbosity: 1}]}", []string{"logging.vmodule: Forbidden: Only supported for text log format"}},
		{"alpha logging", kubeProxyHeader + "logging: {options: {text: {splitStream: true}}}", []string{"logging.options.text.splitStream: Forbidden: Feature LoggingAlphaOptions is disabled"}},
		{"ours", sluiceHeader + "manifest: a\niptables: {variant: nftables}\n", []string{"SluiceConfiguration.manifest: there is no such field: did you mean SluiceConfiguration.manifests?"}},
		{"our values", sluiceHeader + "checkPeriod: -1s\nresyncPeriod: -2s\niptables: {variant: nftables}\nipvs: {drain: -1s}\n", []string{
			`SluiceConfiguration.iptables.variant: "nftables" is none of auto, legacy, nft`,
			"SluiceConfiguration.checkPeriod: -1s must be greater than 0",
			"SluiceConfiguration.resyncPeriod: -2s must be greater than 0",
			"SluiceConfiguration.ipvs.drain: -1s must be 0 or greater",
			"SluiceConfiguration.checkPeriod: -1s must not be longer than resyncPeriod (-2s)"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := writeFile(t, tc.file)
			_, err := parse(t, "--config="+path).Load()
			for i := range tc.want {
				tc.want[i] = path + ": " + tc.want[i]
			}
			wantErrorLines(t, err, tc.want...)
		})
	}
}

func TestHostname(t *testing.T) {
	f := parse(t)
	f.Hostname = func() (string, error) { return " ", nil }
	_, err := f.Load()
	wantErrorLines(t, err, "--hostname-override: the node's name is empty")
	f.Hostname = func() (string, error) { return "", os.ErrPermission }
	_, err = f.Load()
	wantErrorLines(t, err, "--hostname-override: not set, and the machine's own name cannot be found: permission denied")
}

func TestWarnings(t *testing.T) {
	for _, tc := range []struct {
		file string
		args []string
		want string
	}{
		{"", []string{"--healthz-port=99"}, "--healthz-port=99 has no effect, because the address 0.0.0.0:10256 has a port: use --healthz-bind-address"},
		{"", []string{"--enable-dsr"}, "--enable-dsr is ignored: it is for Windows"},
		{"", []string{"--udp-timeout=1s"}, "--udp-timeout is ignored: it belonged to the userspace mode"},
		{"", []string{"--mode=ipvs", "--feature-gates=KubeProxyIPVS=false"}, "feature gate KubeProxyIPVS=false is ignored: mode ipvs was chosen and is always there"},
		{"winkernel: {networkName: net}", nil, "winkernel.networkName is for Windows: ignored"},
		{"windowsRunAsService: true", nil, "windowsRunAsService is for Windows: ignored"},
		{"ipvs: {scheduler: 'a b'}", nil, `ipvs.scheduler: "a b" cannot be the name of a scheduler, such as rr, wrr, lc or mh (no effect in iptables mode)`},
		{"mode: ipvs\nipvs: {udpTimeout: 500ms}", nil, "ipvs.udpTimeout: 500ms is less than a second, in which the kernel counts: its own timeout stays"},
		{"mode: ipvs\nipvs: {tcpTimeout: 1m0.5s}", nil, "ipvs.tcpTimeout: the kernel counts in seconds: 1m0.5s becomes 1m0s"},
		{"ipvs: {excludeCIDRs: [x]}", nil, `ipvs.excludeCIDRs[0]: "x" is not a CIDR (no effect in iptables mode)`},
		{"clusterCIDR: x\ndetectLocalMode: NodeCIDR", nil, "clusterCIDR has no effect with detectLocalMode NodeCIDR"},
		{"udpIdleTimeout: 1s", nil, "udpIdleTimeout: kube-proxy has removed this field (it belonged to the userspace mode): ignored"},
		{"featureGates: 'A, B=true'", nil, `featureGates: "A" is not a name=true or name=false pair: ignored`},
	} {
		var c *Config
		if tc.file == "" {
			c = load(t, tc.args...)
		} else {
			c = loadFile(t, tc.file)
		}
		if !containsText("\n"+strings.Join(c.Warnings, "\n")+"\n", "\n"+tc.want+"\n") {
			t.Errorf("%s %q: warnings %q lack %q", tc.file, tc.args, c.Warnings, tc.want)
		}
	}
}

func TestWithMode(t *testing.T) {
	c := loadFile(t, "mode: nftables\nnftables: {masqueradeBit: 3, syncPeriod: 9s}\niptables: {masqueradeBit: 4, syncPeriod: 8s}\n")
	got, err := c.WithMode(ModeIPTables)
	if err != nil {
		t.Fatal(err)
	}
	sameConfig(t, got, loadFile(t, "mode: iptables\nnftables: {masqueradeBit: 3, syncPeriod: 9s}\niptables: {masqueradeBit: 4, syncPeriod: 8s}\n"))
	if c.Mode != ModeNFTables || c.SyncPeriod != 9*time.Second || len(c.KubeProxy.NodePortAddresses) != 2 {
		t.Errorf("WithMode changed the configuration that it was called on")
	}
	if _, err := c.WithMode("userspace"); err == nil {
		t.Errorf("an unknown mode was accepted")
	}
}

func TestWrittenConfigurationLoadsToTheSame(t *testing.T) {
	for _, args := range [][]string{
		nil,
		{"--mode=ipvs", "--ipvs-scheduler=wrr", "--ipvs-exclude-cidrs=10.0.0.0/8", "--ipvs-min-sync-period=3s"},
		{"--mode=nftables", "--masquerade-all", "--iptables-min-sync-period=1s", "--nodeport-addresses=10.0.0.0/8,localhost"},
		{"--cluster-cidr=10.0.0.0/8,fd00::/8", "--feature-gates=AllowServiceExternalIPs=false,Foo=true", "--bind-address=fd00::1", "--conntrack-max-per-core=0", "--logging-format=json", "-v=3"},
		{"--manifests=/m", "--iptables-variant=nft", "--mode-fallback=false", "--ipvs-drain=0", "--nftables-service-traffic=7", "--hostname-override=x", "--vmodule=a=1,b*=2"},
		{"--config=testdata/kubeadm.yaml"},
		{"--config=testdata/kubernetes-1.9.yaml"},
	} {
		want := load(t, args...)
		text, err := want.YAML()
		if err != nil {
			t.Fatal(err)
		}
		got := load(t, "--config="+writeFile(t, string(text)))
		hot, restart := Diff(want, got)
		if len(hot)+len(restart) > 0 {
			t.Errorf("%q: changed: %q %q", args, hot, restart)
		}
		sameConfig(t, got, want)
		again, err := got.YAML()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(text), string(again)); diff != "" {
			t.Errorf("%q: written again (-first +second):\n%s", args, diff)
		}
	}
}

func FuzzLoad(f *testing.F) {
	for _, name := range []string{"testdata/kubeadm.yaml", "testdata/kubernetes-1.9.yaml"} {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		f.Add(append(append(data, "---\n"...), sluiceHeader+"iptables: {variant: nft}\n"...))
	}
	f.Add([]byte(kubeProxyHeader + "mode: [\n"))
	f.Add([]byte(`{"apiVersion":"kubeproxy.config.k8s.io/v1alpha1","kind":"KubeProxyConfiguration","iptables":{"syncPeriod":"1ns"}}`))
	flags := parse(f, "--config=file")
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := flags.load(data)
		if err != nil {
			e, ok := err.(*Error)
			if !ok || len(e.Problems) == 0 {
				t.Fatalf("not an *Error with problems: %#v", err)
			}
			if lines := strings.Count(err.Error(), "\n") + 1; lines != len(e.Problems) {
				t.Fatalf("%d lines for %d problems:\n%s", lines, len(e.Problems), err)
			}
			return
		}
		text, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		again, err := flags.load(text)
		if err != nil {
			t.Fatalf("written configuration is refused: %v\n%s", err, text)
		}
		if hot, restart := Diff(c, again); len(hot)+len(restart) > 0 {
			t.Fatalf("written configuration differs: %q %q\n%s", hot, restart, text)
		}
	})
}
