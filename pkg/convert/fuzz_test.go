package convert

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/sluice-proxy/sluice/pkg/model"
)

func stringData(s string) *byte { return unsafe.StringData(s) }

func plain(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.Is4In6() && !a.IsUnspecified() && !a.IsMulticast()
}

// FuzzService: whatever a Service says, what comes out holds only values that
// the planner may rely on, and an object without problems loses none of its
// addresses.
func FuzzService(f *testing.F) {
	f.Add([]byte(everything))
	f.Add([]byte(`{"spec":{"clusterIP":"None"}}`))
	f.Add([]byte(`{"spec":{"clusterIPs":["fd00::1"],"loadBalancerSourceRanges":["::/0","::ffff:0:0/95"]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var obj corev1.Service
		if json.Unmarshal(data, &obj) != nil {
			return
		}
		var c Converter
		svc, skip, problems := c.Service(&obj)
		if (svc == nil) == (skip == "") {
			t.Fatalf("%v, %q: either a Service or a reason", svc, skip)
		}
		if svc == nil {
			return
		}
		for _, list := range [][]netip.Addr{svc.ClusterIPs, svc.ExternalIPs, svc.LoadBalancerIPs} {
			for i, a := range list {
				if !plain(a) {
					t.Errorf("address %s", a)
				}
				for _, b := range list[:i] {
					if a == b {
						t.Errorf("%s is there twice", a)
					}
				}
			}
		}
		if len(obj.Spec.LoadBalancerSourceRanges) > 0 && len(svc.SourceRanges) == 0 {
			t.Error("source ranges were given and lost: everybody gets in")
		}
		for _, r := range svc.SourceRanges {
			if !r.IsValid() || r.Masked() != r || r.Addr().Is4In6() {
				t.Errorf("source range %s", r)
			}
		}
		if svc.Affinity < 0 || svc.Affinity > maxAffinity*time.Second {
			t.Errorf("affinity %s", svc.Affinity)
		}
		for _, p := range svc.Ports {
			if p.Port == 0 || (p.Protocol != model.TCP && p.Protocol != model.UDP && p.Protocol != model.SCTP) {
				t.Errorf("port %+v", p)
			}
		}
		if len(problems) == 0 && (len(svc.Ports) != len(obj.Spec.Ports) || len(svc.ExternalIPs) != len(obj.Spec.ExternalIPs)) {
			t.Error("something was dropped silently")
		}
	})
}

// FuzzSlice is FuzzService for EndpointSlices.
func FuzzSlice(f *testing.F) {
	f.Add([]byte(`{"metadata":{"labels":{"kubernetes.io/service-name":"a"}},"addressType":"IPv4","ports":[{"name":"","port":80}],"endpoints":[{"addresses":["10.0.0.1"],"conditions":{"ready":null},"hints":{"forZones":[{"name":"z"}]}},{"addresses":["::ffff:1.2.3.4"]}]}`))
	f.Add([]byte(`{"metadata":{"labels":{"kubernetes.io/service-name":"a"}},"addressType":"IPv6","endpoints":[{"addresses":["fe80::1%lo"]},{}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var obj discoveryv1.EndpointSlice
		if json.Unmarshal(data, &obj) != nil {
			return
		}
		var c Converter
		sl, skip, problems := c.Slice(&obj)
		if (sl == nil) == (skip == "") {
			t.Fatalf("%v, %q: either a Slice or a reason", sl, skip)
		}
		if sl == nil {
			return
		}
		for _, e := range sl.Endpoints {
			if !plain(e.Addr) || e.Addr.IsLoopback() || e.Addr.IsLinkLocalUnicast() || model.FamilyOf(e.Addr) != sl.Family {
				t.Errorf("address %s in a slice of %s", e.Addr, sl.Family)
			}
		}
		for _, p := range sl.Ports {
			if p.Port == 0 || (p.Protocol != model.TCP && p.Protocol != model.UDP && p.Protocol != model.SCTP) {
				t.Errorf("port %+v", p)
			}
		}
		if len(problems) == 0 && len(sl.Endpoints) != len(obj.Endpoints) {
			t.Error("an endpoint was dropped silently")
		}
	})
}
