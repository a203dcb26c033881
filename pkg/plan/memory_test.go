package plan

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// BenchmarkBytesPerEndpoint plans 10,000 Services of 10 endpoints each, in a
// mode without schedulers, and reports what a Planner keeps of them besides the
// model. Measured (Go 1.26, amd64): 102 B per endpoint.
func BenchmarkBytesPerEndpoint(b *testing.B) {
	const count, each = 10000, 10
	services, epSlices := make([]*model.Service, count), make([][]*model.Slice, count)
	for i := range services {
		services[i] = service(clusterIPOnly, func(s *model.Service) {
			s.Name = fmt.Sprint("svc-", i)
			s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}
		})
		sl := slice()
		for j := range each {
			n := i*each + j
			sl.Endpoints = append(sl.Endpoints, model.Endpoint{Addr: netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}),
				Node: "node-1", Ready: true, Serving: true})
		}
		epSlices[i] = []*model.Slice{sl}
	}
	for b.Loop() {
		before := heap()
		p := NewPlanner(factsWith())
		for i, s := range services {
			p.Update(s.ServiceName, s, epSlices[i])
		}
		set := p.Set()
		b.ReportMetric(float64(heap()-before)/(count*each), "B/endpoint")
		runtime.KeepAlive(p)
		runtime.KeepAlive(set)
	}
	runtime.KeepAlive(services)
	runtime.KeepAlive(epSlices)
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
