package metrics

import (
	"k8s.io/component-base/metrics"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// ServiceTraffic is what passed through Service ports that are counted.
type ServiceTraffic struct {
	Ports   []PortTraffic
	LeftOut int // how many ports are not counted because there are too many
}

// PortTraffic is what passed through one port in one family: requests from clients
// and replies to them.
type PortTraffic struct {
	Family            model.Family
	Port              model.PortKey
	Requests, Replies Count
}

// Count is a number of packets, and their bytes.
type Count struct{ Packets, Bytes uint64 }

const (
	packetsName = "sluice_service_packets_total"
	bytesName   = "sluice_service_bytes_total"
	leftOutName = "sluice_service_traffic_left_out"
)

// RegisterServiceTraffic makes sluice_service_packets_total,
// sluice_service_bytes_total and sluice_service_traffic_left_out known. read is
// called at each scrape, from any goroutine. Counters begin at 0 again when the
// kernel's do: when a Service is changed, or somebody has flushed the rules.
func RegisterServiceTraffic(read func() ServiceTraffic) error {
	labels := []string{"namespace", "service", "port", "protocol", "direction", family}
	return registerCollector(packetsName, &trafficCollector{
		read: read,
		packets: metrics.NewDesc(packetsName, "Packets through a Service port's frontends on this node, from clients (request) and to them (reply).",
			labels, nil, metrics.ALPHA, ""),
		bytes: metrics.NewDesc(bytesName, "Bytes, with IP headers, through a Service port's frontends on this node, from clients (request) and to them (reply).",
			labels, nil, metrics.ALPHA, ""),
		leftOut: metrics.NewDesc(leftOutName, "Service ports that are not counted because there are more than the configured limit.",
			nil, nil, metrics.ALPHA, ""),
	})
}

type trafficCollector struct {
	metrics.BaseStableCollector
	read                    func() ServiceTraffic
	packets, bytes, leftOut *metrics.Desc
}

// DescribeWithStability implements metrics.StableCollector.
func (c *trafficCollector) DescribeWithStability(ch chan<- *metrics.Desc) {
	ch <- c.packets
	ch <- c.bytes
	ch <- c.leftOut
}

// CollectWithStability implements metrics.StableCollector.
func (c *trafficCollector) CollectWithStability(ch chan<- metrics.Metric) {
	t := c.read()
	for _, p := range t.Ports {
		for direction, n := range map[string]Count{"request": p.Requests, "reply": p.Replies} {
			labels := []string{p.Port.Namespace, p.Port.Name, p.Port.Port, p.Port.Protocol.String(), direction, p.Family.String()}
			ch <- metrics.NewLazyConstMetric(c.packets, metrics.CounterValue, float64(n.Packets), labels...)
			ch <- metrics.NewLazyConstMetric(c.bytes, metrics.CounterValue, float64(n.Bytes), labels...)
		}
	}
	ch <- metrics.NewLazyConstMetric(c.leftOut, metrics.GaugeValue, float64(t.LeftOut))
}
