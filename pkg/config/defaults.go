package config

import (
	"net"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	netutils "k8s.io/utils/net"
)

const (
	healthzPort = 10256
	metricsPort = 10249

	defaultSyncPeriod    = 30 * time.Second
	defaultMinSyncPeriod = time.Second

	// defaultDrain is as long as the kernel's IPVS remembers an idle TCP
	// connection (IP_VS_TCP_S_ESTABLISHED in ip_vs_proto_tcp.c).
	defaultDrain = 15 * time.Minute
)

// defaultKubeProxy fills in kube-proxy's defaults. A zero means "unset" for most
// fields, as it does there; pointers tell a zero from unset.
func defaultKubeProxy(c *v1alpha1.KubeProxyConfiguration) {
	c.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.SchemeGroupVersion.String(), Kind: kubeProxyKind}
	setIfZero(&c.BindAddress, "0.0.0.0")
	healthz, metrics := listenDefaults(c.BindAddress)
	setIfZero(&c.HealthzBindAddress, healthz)
	setIfZero(&c.MetricsBindAddress, metrics)
	c.HealthzBindAddress = withPort(c.HealthzBindAddress, healthzPort)
	c.MetricsBindAddress = withPort(c.MetricsBindAddress, metricsPort)

	setIfNil(&c.OOMScoreAdj, -999)
	setIfNil(&c.IPTables.MasqueradeBit, 14)
	setIfNil(&c.NFTables.MasqueradeBit, 14)
	setIfNil(&c.IPTables.LocalhostNodePorts, true)
	setIfZero(&c.IPTables.SyncPeriod.Duration, defaultSyncPeriod)
	setIfZero(&c.IPTables.MinSyncPeriod.Duration, defaultMinSyncPeriod)
	setIfZero(&c.IPVS.SyncPeriod.Duration, defaultSyncPeriod)
	setIfZero(&c.NFTables.SyncPeriod.Duration, defaultSyncPeriod)
	setIfZero(&c.NFTables.MinSyncPeriod.Duration, defaultMinSyncPeriod)
	setIfZero(&c.ConfigSyncPeriod.Duration, 15*time.Minute)

	setIfNil(&c.Conntrack.MaxPerCore, 32*1024)
	setIfNil(&c.Conntrack.Min, 128*1024)
	setIfNil(&c.Conntrack.TCPEstablishedTimeout, metav1.Duration{Duration: 24 * time.Hour})
	// A half-closed connection whose entry expires loses its SNAT, and the FIN
	// that ends it never arrives (kubernetes/kubernetes#32551). Hence an hour.
	setIfNil(&c.Conntrack.TCPCloseWaitTimeout, metav1.Duration{Duration: time.Hour})

	setIfZero(&c.ClientConnection.ContentType, "application/vnd.kubernetes.protobuf")
	setIfZero(&c.ClientConnection.QPS, 5)
	setIfZero(&c.ClientConnection.Burst, 10)
	if c.FeatureGates == nil {
		c.FeatureGates = map[string]bool{}
	}
	logsapi.SetRecommendedLoggingConfiguration(&c.Logging)
}

// defaultForMode fills in what depends on the mode that was chosen. It runs last,
// after flags, as in kube-proxy.
func defaultForMode(c *v1alpha1.KubeProxyConfiguration) {
	setIfZero(&c.Mode, v1alpha1.ProxyMode(ModeIPTables))
	setIfZero(&c.DetectLocalMode, v1alpha1.LocalMode(LocalClusterCIDR))
	if Mode(c.Mode) == ModeNFTables && len(c.NodePortAddresses) == 0 {
		c.NodePortAddresses = []string{keywordPrimary}
		// What works on 127.0.0.1 in iptables mode works here (kubernetes 132955).
		if *c.IPTables.LocalhostNodePorts {
			c.NodePortAddresses = append(c.NodePortAddresses, keywordLocalhost)
		}
	}
}

// listenDefaults gives the listeners the family of the bind address.
func listenDefaults(bindAddress string) (healthz, metrics string) {
	if netutils.ParseIPSloppy(bindAddress).To4() != nil {
		return "0.0.0.0:10256", "127.0.0.1:10249"
	}
	return "[::]:10256", "[::1]:10249"
}

// withPort adds the port to a bare IP address. Anything else is returned as it
// is, for validation to judge.
func withPort(addr string, port int32) string {
	if _, _, err := net.SplitHostPort(addr); err == nil || netutils.ParseIPSloppy(addr) == nil {
		return addr
	}
	return net.JoinHostPort(addr, strconv.Itoa(int(port)))
}

func setIfZero[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func setIfNil[T any](p **T, v T) {
	if *p == nil {
		*p = &v
	}
}
