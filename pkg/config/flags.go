package config

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	logsapi "k8s.io/component-base/logs/api/v1"
	_ "k8s.io/component-base/logs/json/register" // --logging-format=json
	"k8s.io/kube-proxy/config/v1alpha1"
	netutils "k8s.io/utils/net"
)

// Flags is a command line: every flag of kube-proxy under its name and with its
// default, and Sluice's own. Make it with NewFlags, add it to a flag set, parse
// that, then call Load.
type Flags struct {
	// Hostname finds the name of the machine. Nil means os.Hostname.
	Hostname func() (string, error)

	fs        *pflag.FlagSet
	kubeProxy *v1alpha1.KubeProxyConfiguration // what the flags with a field of their own are bound to
	sluice    *SluiceConfiguration

	configFile, writeConfigTo, master, hostnameOverride string
	cleanup, initOnly                                   bool

	// Flags that do not map to one field.
	masqueradeAll                                bool
	iptablesSync, iptablesMin, ipvsSync, ipvsMin time.Duration
	healthzPort, metricsPort                     int32
	modeFallback                                 bool
	ipvsDrain                                    time.Duration
}

// NewFlags returns flags at their defaults.
func NewFlags() *Flags {
	f := &Flags{kubeProxy: &v1alpha1.KubeProxyConfiguration{}, sluice: &SluiceConfiguration{}}
	defaultKubeProxy(f.kubeProxy)
	defaultSluice(f.sluice)
	return f
}

// NormalizeFlag makes spellings of a flag one flag: underscores are hyphens, as
// in every Kubernetes component, and --mode is --proxy-mode.
func NormalizeFlag(_ *pflag.FlagSet, name string) pflag.NormalizedName {
	if name == "mode" {
		name = "proxy-mode"
	}
	return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
}

// AddTo registers the flags. It may be called once.
func (f *Flags) AddTo(fs *pflag.FlagSet) {
	f.fs = fs
	fs.SetNormalizeFunc(NormalizeFlag)
	f.addProcess(fs)
	f.addClientAndListeners(fs)
	f.addForwarding(fs)
	f.addIPVS(fs)
	f.addConntrack(fs)
	f.addUnused(fs)
	logsapi.AddFlags(&f.kubeProxy.Logging, fs)
	f.addSluice(fs)
}

func (f *Flags) addProcess(fs *pflag.FlagSet) {
	k := f.kubeProxy
	fs.StringVar(&f.configFile, "config", "", "The path to the configuration file. With it, flags that have a field in the file are ignored.")
	fs.StringVar(&f.writeConfigTo, "write-config-to", "", "If set, write the configuration, defaults filled in, to this file and exit.")
	fs.BoolVar(&f.cleanup, "cleanup", false, "If true, remove every rule that Sluice or kube-proxy wrote, and exit.")
	fs.BoolVar(&f.initOnly, "init-only", false, "If true, do the initialization that needs full root privileges, and exit. Afterwards the agent can run with only the CAP_NET_ADMIN capability.")
	fs.Var(&gatesFlag{&k.FeatureGates}, "feature-gates", "A set of key=value pairs that describe feature gates. Gates that have no effect here are logged and ignored.")
	fs.StringVar(&f.hostnameOverride, "hostname-override", "", "If non-empty, the name of the Node that this runs on. If unset, the node's hostname.")
	fs.Int32Var(k.OOMScoreAdj, "oom-score-adj", *k.OOMScoreAdj, "The oom-score-adj value of the process. Within the range [-1000, 1000].")
	fs.DurationVar(&k.ConfigSyncPeriod.Duration, "config-sync-period", k.ConfigSyncPeriod.Duration, "How often configuration from the apiserver is refreshed. Must be greater than 0.")
}

func (f *Flags) addClientAndListeners(fs *pflag.FlagSet) {
	k := f.kubeProxy
	fs.StringVar(&k.ClientConnection.Kubeconfig, "kubeconfig", "", "Path to kubeconfig file with authorization information (the master location can be overridden by the master flag).")
	fs.StringVar(&f.master, "master", "", "The address of the Kubernetes API server (overrides any value in kubeconfig).")
	fs.StringVar(&k.ClientConnection.ContentType, "kube-api-content-type", k.ClientConnection.ContentType, "Content type of requests sent to apiserver.")
	fs.Float32Var(&k.ClientConnection.QPS, "kube-api-qps", k.ClientConnection.QPS, "QPS to use while talking with kubernetes apiserver.")
	fs.Int32Var(&k.ClientConnection.Burst, "kube-api-burst", k.ClientConnection.Burst, "Burst to use while talking with kubernetes apiserver.")

	fs.Var((*ipFlag)(&k.BindAddress), "bind-address", "The node's primary IP, if it is not to be taken from the Node object. No socket is bound to it; the name is historical.")
	fs.BoolVar(&k.BindAddressHardFail, "bind-address-hard-fail", false, "If true, failure to bind to a port is fatal.")
	fs.Var((*ipPortFlag)(&k.HealthzBindAddress), "healthz-bind-address", "The IP address and port of the health check server. Empty disables it.")
	fs.Var((*ipPortFlag)(&k.MetricsBindAddress), "metrics-bind-address", "The IP address and port of the metrics server (0.0.0.0:10249 or [::]:10249 to bind on all interfaces). Empty disables it.")
	fs.Int32Var(&f.healthzPort, "healthz-port", healthzPort, "The port of the health check server if its address has none. Use 0 to disable.")
	fs.Int32Var(&f.metricsPort, "metrics-port", metricsPort, "The port of the metrics server if its address has none. Use 0 to disable.")
	must(fs.MarkDeprecated("healthz-port", "use --healthz-bind-address instead."))
	must(fs.MarkDeprecated("metrics-port", "use --metrics-bind-address instead."))
	fs.BoolVar(&k.EnableProfiling, "profiling", false, "If true, serve /debug/pprof on the metrics server.")
	fs.StringVar(&k.ShowHiddenMetricsForVersion, "show-hidden-metrics-for-version", "", "The previous version, as <major>.<minor>, for which you want to show hidden metrics.")
}

func (f *Flags) addForwarding(fs *pflag.FlagSet) {
	k := f.kubeProxy
	fs.StringVar((*string)(&k.Mode), "proxy-mode", "", "Which proxy mode to use: 'iptables' (default), 'ipvs' or 'nftables'. --mode is the same flag.")
	fs.Int32Var(k.IPTables.MasqueradeBit, "iptables-masquerade-bit", *k.IPTables.MasqueradeBit, "In the iptables and ipvs modes, the bit of the fwmark space to mark packets requiring SNAT with. Within the range [0, 31].")
	fs.BoolVar(&f.masqueradeAll, "masquerade-all", false, "SNAT all traffic sent via Service cluster IPs.")
	fs.BoolVar(k.IPTables.LocalhostNodePorts, "iptables-localhost-nodeports", true, "If false, NodePort services cannot be accessed via localhost. (Applies only to the iptables and nftables modes and IPv4.)")
	fs.DurationVar(&f.iptablesSync, "iptables-sync-period", defaultSyncPeriod, "In the iptables and nftables modes, an interval (e.g. '5s', '1m', '2h22m') of re-synchronizing and cleanup. Must be greater than 0.")
	fs.DurationVar(&f.iptablesMin, "iptables-min-sync-period", defaultMinSyncPeriod, "In the iptables and nftables modes, the minimum period between syncs. Imposed only if it is set; 0 syncs every change at once.")

	fs.StringVar((*string)(&k.DetectLocalMode), "detect-local-mode", "", "How to detect local traffic: 'ClusterCIDR' (default), 'NodeCIDR', 'BridgeInterface' or 'InterfaceNamePrefix'.")
	fs.StringVar(&k.ClusterCIDR, "cluster-cidr", "", "The CIDR range of the pods in the cluster, or a comma-separated dual-stack pair of them. With --detect-local-mode=ClusterCIDR, traffic from it is local. (Otherwise it is not used.)")
	fs.StringVar(&k.DetectLocal.BridgeInterface, "pod-bridge-interface", "", "With --detect-local-mode=BridgeInterface, traffic that comes in by this bridge is local.")
	fs.StringVar(&k.DetectLocal.InterfaceNamePrefix, "pod-interface-name-prefix", "", "With --detect-local-mode=InterfaceNamePrefix, traffic that comes in by an interface whose name begins so is local.")
	fs.StringSliceVar(&k.NodePortAddresses, "nodeport-addresses", nil, "CIDR ranges and/or keywords: NodePorts are served on the node's addresses in them. Keywords: 'primary' (the Node object's primary addresses), 'localhost' (127.0.0.0/8 and ::1/128), 'all'. If unset: 'all' in the iptables and ipvs modes, 'primary' and, unless --iptables-localhost-nodeports is false, 'localhost' in the nftables mode.")
}

func (f *Flags) addIPVS(fs *pflag.FlagSet) {
	k := f.kubeProxy
	fs.DurationVar(&f.ipvsSync, "ipvs-sync-period", defaultSyncPeriod, "In the ipvs mode, an interval (e.g. '5s', '1m', '2h22m') of re-synchronizing and cleanup. Must be greater than 0.")
	fs.DurationVar(&f.ipvsMin, "ipvs-min-sync-period", defaultMinSyncPeriod, "In the ipvs mode, the minimum period between syncs. Imposed only if it is set; 0 syncs every change at once.")
	fs.StringVar(&k.IPVS.Scheduler, "ipvs-scheduler", "", "The ipvs scheduler type when proxy mode is ipvs.")
	fs.StringSliceVar(&k.IPVS.ExcludeCIDRs, "ipvs-exclude-cidrs", nil, "CIDRs whose virtual servers the ipvs mode does not touch.")
	fs.BoolVar(&k.IPVS.StrictARP, "ipvs-strict-arp", false, "Enable strict ARP by setting arp_ignore to 1 and arp_announce to 2.")
	fs.DurationVar(&k.IPVS.TCPTimeout.Duration, "ipvs-tcp-timeout", 0, "The timeout for idle IPVS TCP connections, 0 to leave as-is.")
	fs.DurationVar(&k.IPVS.TCPFinTimeout.Duration, "ipvs-tcpfin-timeout", 0, "The timeout for IPVS TCP connections after receiving a FIN packet, 0 to leave as-is.")
	fs.DurationVar(&k.IPVS.UDPTimeout.Duration, "ipvs-udp-timeout", 0, "The timeout for IPVS UDP packets, 0 to leave as-is.")
}

func (f *Flags) addConntrack(fs *pflag.FlagSet) {
	c := &f.kubeProxy.Conntrack
	fs.Int32Var(c.MaxPerCore, "conntrack-max-per-core", *c.MaxPerCore, "Maximum number of NAT connections to track per CPU core (0 to leave the limit as-is and ignore conntrack-min).")
	fs.Int32Var(c.Min, "conntrack-min", *c.Min, "Minimum number of conntrack entries to allocate, regardless of conntrack-max-per-core (set conntrack-max-per-core=0 to leave the limit as-is).")
	fs.DurationVar(&c.TCPEstablishedTimeout.Duration, "conntrack-tcp-timeout-established", c.TCPEstablishedTimeout.Duration, "Idle timeout for established TCP connections (0 to leave as-is).")
	fs.DurationVar(&c.TCPCloseWaitTimeout.Duration, "conntrack-tcp-timeout-close-wait", c.TCPCloseWaitTimeout.Duration, "NAT timeout for TCP connections in the CLOSE_WAIT state (0 to leave as-is).")
	fs.BoolVar(&c.TCPBeLiberal, "conntrack-tcp-be-liberal", false, "Enable liberal mode for tracking TCP packets by setting nf_conntrack_tcp_be_liberal to 1.")
	fs.DurationVar(&c.UDPTimeout.Duration, "conntrack-udp-timeout", 0, "Idle timeout for UNREPLIED UDP connections (0 to leave as-is).")
	fs.DurationVar(&c.UDPStreamTimeout.Duration, "conntrack-udp-timeout-stream", 0, "Idle timeout for ASSURED UDP connections (0 to leave as-is).")
}

func (f *Flags) addSluice(fs *pflag.FlagSet) {
	fs.StringVar(&f.sluice.Manifests, "manifests", "", "A folder of Service, EndpointSlice, Node and ServiceCIDR manifests to follow instead of an API server. (Not in kube-proxy.)")
	fs.Var((*variantFlag)(&f.sluice.IPTables.Variant), "iptables-variant", "Which iptables programs to use: 'auto', 'legacy' or 'nft'. (Not in kube-proxy.)")
	fs.BoolVar(&f.modeFallback, "mode-fallback", true, "If true, run in iptables mode where the kernel lacks what the chosen mode needs; if false, refuse to start there. (Not in kube-proxy.)")
	fs.IntVar(&f.sluice.NFTables.ServiceTraffic, "nftables-service-traffic", 0, "In the nftables mode, for how many Service ports packets and bytes are counted for the metrics, at the most; 0 for none. (Not in kube-proxy.)")
	fs.DurationVar(&f.ipvsDrain, "ipvs-drain", defaultDrain, "In the ipvs mode, how long a removed endpoint may keep its connections at the most, 0 for as long as they last. New connections do not go there. (Not in kube-proxy.)")
}

// unused flags are accepted because command lines in the wild have them.
var unusedFlags = []struct{ name, value, why string }{
	{"windows-service", "false", "it is for Windows"},
	{"network-name", "", "it is for Windows"},
	{"source-vip", "", "it is for Windows"},
	{"enable-dsr", "false", "it is for Windows"},
	{"root-hnsendpoint-name", "cbr0", "it is for Windows"},
	{"forward-healthcheck-vip", "false", "it is for Windows"},
	{"boot-id-file", "/proc/sys/kernel/random/boot_id", "nothing reads it"},
	{"machine-id-file", "/etc/machine-id,/var/lib/dbus/machine-id", "nothing reads it"},
	{"proxy-port-range", "", "it belonged to the userspace mode"},
	{"udp-timeout", "250ms", "it belonged to the userspace mode"},
}

func (f *Flags) addUnused(fs *pflag.FlagSet) {
	for _, u := range unusedFlags {
		if u.value == "false" {
			fs.Bool(u.name, false, "Ignored: "+u.why+".")
		} else {
			fs.String(u.name, u.value, "Ignored: "+u.why+".")
		}
		must(fs.MarkHidden(u.name))
	}
}

// fieldFlags are the flags that a file makes obsolete, and the field that
// replaces each.
var fieldFlags = []fieldFlag{
	{"feature-gates", "featureGates"},
	{"kubeconfig", "clientConnection.kubeconfig"},
	{"kube-api-content-type", "clientConnection.contentType"},
	{"kube-api-qps", "clientConnection.qps"},
	{"kube-api-burst", "clientConnection.burst"},
	{"bind-address", "bindAddress"},
	{"bind-address-hard-fail", "bindAddressHardFail"},
	{"healthz-bind-address", "healthzBindAddress"},
	{"healthz-port", "healthzBindAddress"},
	{"metrics-bind-address", "metricsBindAddress"},
	{"metrics-port", "metricsBindAddress"},
	{"profiling", "enableProfiling"},
	{"show-hidden-metrics-for-version", "showHiddenMetricsForVersion"},
	{"proxy-mode", "mode"},
	{"iptables-masquerade-bit", "iptables.masqueradeBit"},
	{"masquerade-all", "iptables.masqueradeAll"},
	{"iptables-localhost-nodeports", "iptables.localhostNodePorts"},
	{"iptables-sync-period", "iptables.syncPeriod"},
	{"iptables-min-sync-period", "iptables.minSyncPeriod"},
	{"ipvs-sync-period", "ipvs.syncPeriod"},
	{"ipvs-min-sync-period", "ipvs.minSyncPeriod"},
	{"ipvs-scheduler", "ipvs.scheduler"},
	{"ipvs-exclude-cidrs", "ipvs.excludeCIDRs"},
	{"ipvs-strict-arp", "ipvs.strictARP"},
	{"ipvs-tcp-timeout", "ipvs.tcpTimeout"},
	{"ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout"},
	{"ipvs-udp-timeout", "ipvs.udpTimeout"},
	{"detect-local-mode", "detectLocalMode"},
	{"cluster-cidr", "clusterCIDR"},
	{"pod-bridge-interface", "detectLocal.bridgeInterface"},
	{"pod-interface-name-prefix", "detectLocal.interfaceNamePrefix"},
	{"nodeport-addresses", "nodePortAddresses"},
	{"oom-score-adj", "oomScoreAdj"},
	{"conntrack-max-per-core", "conntrack.maxPerCore"},
	{"conntrack-min", "conntrack.min"},
	{"conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout"},
	{"conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout"},
	{"conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal"},
	{"conntrack-udp-timeout", "conntrack.udpTimeout"},
	{"conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout"},
	{"config-sync-period", "configSyncPeriod"},
}

type fieldFlag struct{ flag, field string }

// flagOfField names the flag that set a field when there was no file, "" if none
// can have.
func flagOfField(field string, mode Mode) string {
	field, _, _ = strings.Cut(field, "[")
	switch field {
	case "hostnameOverride":
		return "hostname-override"
	case SluiceKind + ".ipvs.drain":
		return "ipvs-drain"
	case SluiceKind + ".nftables.serviceTraffic":
		return "nftables-service-traffic"
	case "logging.format":
		return "logging-format"
	case "logging.flushFrequency":
		return "log-flush-frequency"
	case "nftables.syncPeriod", "nftables.minSyncPeriod":
		if mode == ModeNFTables { // the flags of iptables are nftables' too
			field = strings.Replace(field, "nftables", "iptables", 1)
		}
	}
	for _, f := range fieldFlags {
		if f.field == field {
			return f.flag
		}
	}
	return ""
}

// overrides reports whether a flag was set that counts beside a file.
func (f *Flags) overrides(flag string) bool {
	return f.changed(flag) && !slices.ContainsFunc(fieldFlags, func(ff fieldFlag) bool { return ff.flag == flag })
}

func (f *Flags) changed(name string) bool { return f.fs != nil && f.fs.Changed(name) }

// ipFlag is an IP address, kept as it was written.
type ipFlag string

func (v *ipFlag) String() string { return string(*v) }
func (v *ipFlag) Type() string   { return "ip" }
func (v *ipFlag) Set(s string) error {
	if s == "" {
		return nil // kube-proxy keeps the default
	}
	if netutils.ParseIPSloppy(s) == nil {
		return fmt.Errorf("%q is not an IP address", s)
	}
	*v = ipFlag(s)
	return nil
}

// ipPortFlag is an IP address with or without a port; empty turns a server off.
type ipPortFlag string

func (v *ipPortFlag) String() string { return string(*v) }
func (v *ipPortFlag) Type() string   { return "ipport" }
func (v *ipPortFlag) Set(s string) error {
	if s != "" && netutils.ParseIPSloppy(s) == nil {
		host, port, err := net.SplitHostPort(s)
		if err != nil || netutils.ParseIPSloppy(host) == nil {
			return fmt.Errorf("%q is neither IP nor IP:port", s)
		}
		if _, err := netutils.ParsePort(port, true); err != nil {
			return fmt.Errorf("%q is not a port", port)
		}
	}
	*v = ipPortFlag(s)
	return nil
}

type variantFlag string

func (v *variantFlag) String() string { return string(*v) }
func (v *variantFlag) Type() string   { return "variant" }
func (v *variantFlag) Set(s string) error {
	for _, variant := range iptablesVariants {
		if s == variant {
			*v = variantFlag(s)
			return nil
		}
	}
	return fmt.Errorf("must be one of %s", strings.Join(iptablesVariants, ", "))
}

// gatesFlag is name=bool pairs with commas between; later flags add to earlier.
type gatesFlag struct{ gates *map[string]bool }

func (v *gatesFlag) Type() string { return "mapStringBool" }
func (v *gatesFlag) String() string {
	if v.gates == nil {
		return ""
	}
	var pairs []string
	for _, name := range sortedKeys(*v.gates) {
		pairs = append(pairs, fmt.Sprintf("%s=%t", name, (*v.gates)[name]))
	}
	return strings.Join(pairs, ",")
}

func (v *gatesFlag) Set(s string) error {
	for pair := range strings.SplitSeq(s, ",") {
		if strings.TrimSpace(pair) == "" {
			continue
		}
		name, value, found := strings.Cut(pair, "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		on, err := strconv.ParseBool(value)
		if !found || err != nil {
			return fmt.Errorf("%q is not a pair such as %s=true", pair, GateAllowServiceExternalIPs)
		}
		(*v.gates)[name] = on
	}
	return nil
}

func must(err error) {
	if err != nil {
		panic("BUG: " + err.Error())
	}
}

func readFile(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, &Error{Problems: []Problem{{Field: "--config", Message: err.Error()}}}
	}
	return data, nil
}
