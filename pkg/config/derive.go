package config

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	netutils "k8s.io/utils/net"
)

func (c *Config) warn(format string, args ...any) {
	c.Warnings = append(c.Warnings, oneLine(fmt.Sprintf(format, args...)))
}

func (c *Config) deriveMode(ps *problems) {
	k := c.KubeProxy
	c.Mode = Mode(k.Mode)
	c.ServiceTraffic = c.Sluice.NFTables.ServiceTraffic
	c.LocalhostNodePorts = c.Mode != ModeIPVS && *k.IPTables.LocalhostNodePorts
	switch c.Mode {
	case ModeIPTables, ModeIPVS:
		c.MasqueradeAll, c.MasqueradeBit = k.IPTables.MasqueradeAll, int(*k.IPTables.MasqueradeBit)
	case ModeNFTables:
		c.MasqueradeAll, c.MasqueradeBit = k.NFTables.MasqueradeAll, int(*k.NFTables.MasqueradeBit)
		checkBit("nftables.masqueradeBit", *k.NFTables.MasqueradeBit, ps)
	default:
		ps.add("mode", "%q is none of iptables, ipvs, nftables", k.Mode)
	}
	// Checked in every mode, as kube-proxy does: the marks must not clash with
	// those of a fallback either.
	checkBit("iptables.masqueradeBit", *k.IPTables.MasqueradeBit, ps)
}

func checkBit(field string, bit int32, ps *problems) {
	if bit < 0 || bit > 31 {
		ps.add(field, "%d is not a bit of the packet mark: 0 to 31", bit)
	}
}

func (c *Config) deriveNode(ps *problems) {
	k := c.KubeProxy
	name := k.HostnameOverride
	if name == "" {
		hostname := os.Hostname
		if c.flags != nil && c.flags.Hostname != nil {
			hostname = c.flags.Hostname
		}
		var err error
		if name, err = hostname(); err != nil {
			ps.add("hostnameOverride", "not set, and the machine's own name cannot be found: %v", err)
			return
		}
	}
	c.NodeName = strings.ToLower(strings.TrimSpace(name))
	if c.NodeName == "" {
		ps.add("hostnameOverride", "the node's name is empty")
	}
	if ip := netutils.ParseIPSloppy(k.BindAddress); ip != nil {
		addr, _ := netip.AddrFromSlice(ip)
		c.BindAddress = addr.Unmap()
	} else {
		ps.add("bindAddress", "%q is not an IP address", k.BindAddress)
	}
	c.OOMScoreAdj = int(*k.OOMScoreAdj)
	if c.OOMScoreAdj < -1000 || c.OOMScoreAdj > 1000 {
		ps.add("oomScoreAdj", "%d is not within -1000 to 1000", c.OOMScoreAdj)
	}
	c.NodePortAddresses = parseNodePortAddresses(k.NodePortAddresses, ps)
	if len(k.NodePortAddresses) == 0 {
		c.warn("nodePortAddresses is unset: NodePorts are served on all addresses of the node; consider --nodeport-addresses=primary")
	}
}

func (c *Config) deriveListeners(ps *problems) {
	k := c.KubeProxy
	c.HealthzAddr, c.MetricsAddr = k.HealthzBindAddress, k.MetricsBindAddress
	checkListener("healthzBindAddress", c.HealthzAddr, ps)
	checkListener("metricsBindAddress", c.MetricsAddr, ps)
	if c.HealthzAddr != "" && c.HealthzAddr == c.MetricsAddr {
		ps.add("metricsBindAddress", "%s is also healthzBindAddress: two servers cannot share it", c.MetricsAddr)
	}
}

// checkListener accepts IP:port, and nothing at all, which turns a server off.
func checkListener(field, addr string, ps *problems) {
	if addr == "" {
		return
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		ps.add(field, "%q is not IP:port", addr)
		return
	}
	if netutils.ParseIPSloppy(host) == nil {
		ps.add(field, "%q in %q is not an IP address", host, addr)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		ps.add(field, "%q in %q is not a port: 1 to 65535", port, addr)
	}
}

func (c *Config) deriveDetectLocal(ps *problems) {
	k := c.KubeProxy
	c.DetectLocal = DetectLocal{
		Mode:                LocalMode(k.DetectLocalMode),
		BridgeInterface:     k.DetectLocal.BridgeInterface,
		InterfaceNamePrefix: k.DetectLocal.InterfaceNamePrefix,
	}
	c.ClusterCIDRs = nil
	mode := c.DetectLocal.Mode
	switch {
	case !slices.Contains(localModes, mode):
		ps.add("detectLocalMode", "%q is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix", mode)
	case mode == LocalClusterCIDR:
		c.ClusterCIDRs = parseClusterCIDR(k.ClusterCIDR, ps)
	case mode == LocalBridgeInterface && c.DetectLocal.BridgeInterface == "":
		ps.add("detectLocal.bridgeInterface", "must be set for detectLocalMode BridgeInterface")
	case mode == LocalInterfaceNamePrefix && c.DetectLocal.InterfaceNamePrefix == "":
		ps.add("detectLocal.interfaceNamePrefix", "must be set for detectLocalMode InterfaceNamePrefix")
	}
}

// parseClusterCIDR reads one CIDR, or one of each family with a comma between.
func parseClusterCIDR(text string, ps *problems) []netip.Prefix {
	if strings.TrimSpace(text) == "" {
		return nil
	}
	var cidrs []netip.Prefix
	for part := range strings.SplitSeq(text, ",") {
		cidr, ok := parseCIDR(strings.TrimSpace(part))
		if !ok {
			ps.add("clusterCIDR", "%q is not a CIDR such as 10.244.0.0/16 or fd00:10:244::/56", part)
			continue
		}
		cidrs = append(cidrs, cidr)
	}
	if len(cidrs) > 2 || len(cidrs) == 2 && cidrs[0].Addr().Is4() == cidrs[1].Addr().Is4() {
		ps.add("clusterCIDR", "%q holds more than one CIDR of a family: wanted one, or one IPv4 and one IPv6", text)
	}
	return cidrs
}

// parseCIDR is as forgiving as kube-proxy: leading zeros in IPv4 numbers and bits
// behind the mask are accepted, and dropped.
func parseCIDR(s string) (netip.Prefix, bool) {
	_, network, err := netutils.ParseCIDRSloppy(s)
	if err != nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(network.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ones, total := network.Mask.Size()
	if addr = addr.Unmap(); addr.Is4() && total == 128 { // ::ffff:10.0.0.0/104
		ones -= 96
	}
	prefix, err := addr.Prefix(ones)
	return prefix, err == nil
}

func (c *Config) deriveConntrack(ps *problems) {
	k := c.KubeProxy.Conntrack
	c.Conntrack = Conntrack{
		MaxPerCore:            int(*k.MaxPerCore),
		Min:                   int(*k.Min),
		TCPEstablishedTimeout: k.TCPEstablishedTimeout.Duration,
		TCPCloseWaitTimeout:   k.TCPCloseWaitTimeout.Duration,
		UDPTimeout:            k.UDPTimeout.Duration,
		UDPStreamTimeout:      k.UDPStreamTimeout.Duration,
		TCPBeLiberal:          k.TCPBeLiberal,
		Cleanup:               *c.Sluice.Conntrack.Cleanup,
	}
	checkNotNegative("conntrack.maxPerCore", c.Conntrack.MaxPerCore, ps)
	checkNotNegative("conntrack.min", c.Conntrack.Min, ps)
	checkNotNegative("conntrack.tcpEstablishedTimeout", c.Conntrack.TCPEstablishedTimeout, ps)
	checkNotNegative("conntrack.tcpCloseWaitTimeout", c.Conntrack.TCPCloseWaitTimeout, ps)
	checkNotNegative("conntrack.udpTimeout", c.Conntrack.UDPTimeout, ps)
	checkNotNegative("conntrack.udpStreamTimeout", c.Conntrack.UDPStreamTimeout, ps)
}

// schedulerName matches what a kernel can call a scheduler (linux/ip_vs.h gives
// it 15 bytes), and nothing at all. Which of them it has is not known here.
var schedulerName = regexp.MustCompile(`^[!-~]{0,15}$`)

// deriveIPVS reads the ipvs settings. kube-proxy judges them in ipvs mode only,
// so in another mode what is wrong with them becomes a warning.
func (c *Config) deriveIPVS(ps *problems) {
	k := c.KubeProxy.IPVS
	c.IPVS = IPVS{
		Scheduler:     k.Scheduler,
		StrictARP:     k.StrictARP,
		TCPTimeout:    k.TCPTimeout.Duration,
		TCPFinTimeout: k.TCPFinTimeout.Duration,
		UDPTimeout:    k.UDPTimeout.Duration,
		Drain:         c.Sluice.IPVS.Drain.Duration,
	}
	var own problems
	if !schedulerName.MatchString(c.IPVS.Scheduler) {
		own.add("ipvs.scheduler", "%q cannot be the name of a scheduler, such as rr, wrr, lc or mh", c.IPVS.Scheduler)
	}
	checkNotNegative("ipvs.tcpTimeout", c.IPVS.TCPTimeout, &own)
	checkNotNegative("ipvs.tcpFinTimeout", c.IPVS.TCPFinTimeout, &own)
	checkNotNegative("ipvs.udpTimeout", c.IPVS.UDPTimeout, &own)
	for i, text := range k.ExcludeCIDRs {
		cidr, ok := parseCIDR(text)
		if !ok {
			own.add(fmt.Sprintf("ipvs.excludeCIDRs[%d]", i), "%q is not a CIDR", text)
			continue
		}
		c.IPVS.ExcludeCIDRs = append(c.IPVS.ExcludeCIDRs, cidr)
	}
	if c.Mode == ModeIPVS {
		*ps = append(*ps, own...)
		c.cutFractions()
		return
	}
	for _, p := range own {
		c.warn("%s (no effect in %s mode)", p, c.Mode)
	}
}

// cutFractions takes off what the kernel, which counts these timeouts in whole
// seconds, cannot have. kube-proxy does so as well, and says nothing.
func (c *Config) cutFractions() {
	for _, t := range []struct {
		field string
		d     *time.Duration
	}{
		{"ipvs.tcpTimeout", &c.IPVS.TCPTimeout},
		{"ipvs.tcpFinTimeout", &c.IPVS.TCPFinTimeout},
		{"ipvs.udpTimeout", &c.IPVS.UDPTimeout},
	} {
		switch whole := t.d.Truncate(time.Second); {
		case whole == *t.d:
		case whole == 0:
			c.warn("%s: %s is less than a second, in which the kernel counts: its own timeout stays", t.field, *t.d)
		default:
			c.warn("%s: the kernel counts in seconds: %s becomes %s", t.field, *t.d, whole)
		}
		*t.d = t.d.Truncate(time.Second)
	}
}

func (c *Config) derivePeriods(ps *problems) {
	k := c.KubeProxy
	section := string(c.Mode)
	switch c.Mode {
	case ModeIPVS:
		c.SyncPeriod, c.MinSyncPeriod = k.IPVS.SyncPeriod.Duration, k.IPVS.MinSyncPeriod.Duration
	case ModeNFTables:
		c.SyncPeriod, c.MinSyncPeriod = k.NFTables.SyncPeriod.Duration, k.NFTables.MinSyncPeriod.Duration
	default:
		section = string(ModeIPTables)
		c.SyncPeriod, c.MinSyncPeriod = k.IPTables.SyncPeriod.Duration, k.IPTables.MinSyncPeriod.Duration
	}
	c.MinSyncExplicit = !c.implied.of(c.Mode)
	checkPositive(section+".syncPeriod", c.SyncPeriod, ps)
	checkNotNegative(section+".minSyncPeriod", c.MinSyncPeriod, ps)
	if c.MinSyncExplicit && c.SyncPeriod > 0 && c.MinSyncPeriod > c.SyncPeriod {
		ps.add(section+".minSyncPeriod", "%s is longer than syncPeriod, %s", c.MinSyncPeriod, c.SyncPeriod)
	}
	checkPositive("configSyncPeriod", k.ConfigSyncPeriod.Duration, ps)
}

func checkPositive(field string, d time.Duration, ps *problems) {
	if d <= 0 {
		ps.add(field, "%s must be greater than 0", d)
	}
}

func checkNotNegative[T int | time.Duration](field string, v T, ps *problems) {
	if v < 0 {
		ps.add(field, "%v must be 0 or greater", v)
	}
}

// checkMinorVersion accepts "1.36". Which minor releases make sense depends on
// the metrics library, and so is not judged here.
func checkMinorVersion(field, version string, ps *problems) {
	if version == "" {
		return
	}
	major, minor, ok := strings.Cut(version, ".")
	if _, err := strconv.ParseUint(major, 10, 16); err != nil {
		ok = false
	}
	if _, err := strconv.ParseUint(minor, 10, 16); err != nil {
		ok = false
	}
	if !ok {
		ps.add(field, "%q is not a version such as 1.36", version)
	}
}

// warnUnused names the settings that were written but have no effect here.
func (c *Config) warnUnused() {
	k := c.KubeProxy
	if k.PortRange != "" {
		c.warn("portRange belonged to the userspace mode: ignored")
	}
	windows := []struct {
		field string
		set   bool
	}{
		{"winkernel.networkName", k.Winkernel.NetworkName != ""},
		{"winkernel.sourceVip", k.Winkernel.SourceVip != ""},
		{"winkernel.enableDSR", k.Winkernel.EnableDSR},
		{"winkernel.rootHnsEndpointName", k.Winkernel.RootHnsEndpointName != ""},
		{"winkernel.forwardHealthCheckVip", k.Winkernel.ForwardHealthCheckVip},
		{"windowsRunAsService", k.WindowsRunAsService},
	}
	for _, w := range windows {
		if w.set {
			c.warn("%s is for Windows: ignored", w.field)
		}
	}
	if LocalMode(k.DetectLocalMode) != LocalClusterCIDR && k.ClusterCIDR != "" {
		c.warn("clusterCIDR has no effect with detectLocalMode %s", k.DetectLocalMode)
	}
}
