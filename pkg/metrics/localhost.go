package metrics

import (
	"k8s.io/component-base/metrics"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// RejectedPackets is how many packets to localhost NodePorts were rejected.
type RejectedPackets struct {
	Family   model.Family
	Protocol string // as in the Service API: "TCP", "UDP", "SCTP"
	Packets  uint64
}

// RegisterLocalhostNodePorts makes the metrics of localhost NodePorts in
// nftables mode known (feature gate KubeProxyNFTablesLocalhostNodePorts). read
// is called at each scrape, from any goroutine; it returns what the counters in
// the kernel say, and nothing where they cannot be read.
func RegisterLocalhostNodePorts(read func() []RejectedPackets) error {
	if err := register([]metrics.Registerable{localhostListeners, localhostListenerFailures}); err != nil {
		return err
	}
	const name = "kubeproxy_nftables_localhost_nodeport_rejected_packets_total"
	return registerCollector(name, &rejectedCollector{read: read,
		desc: metrics.NewDesc(name, "Number of packets rejected on localhost NodePorts. UDP and SCTP are always rejected; "+
			"TCP is rejected when the localhost NodePort proxy is not running",
			[]string{family, "protocol"}, nil, metrics.ALPHA, "")})
}

type rejectedCollector struct {
	metrics.BaseStableCollector
	desc *metrics.Desc
	read func() []RejectedPackets
}

// DescribeWithStability implements metrics.StableCollector.
func (c *rejectedCollector) DescribeWithStability(ch chan<- *metrics.Desc) { ch <- c.desc }

// CollectWithStability implements metrics.StableCollector.
func (c *rejectedCollector) CollectWithStability(ch chan<- metrics.Metric) {
	for _, r := range c.read() {
		ch <- metrics.NewLazyConstMetric(c.desc, metrics.CounterValue, float64(r.Packets), r.Family.String(), r.Protocol)
	}
}
