package convert

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

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
		checkBalance(t, &obj, svc.Balance)
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
		c := Converter{KeepOrigins: len(data)%2 == 0}
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
		if n := len(sl.Origins); n != 0 && (!c.KeepOrigins || n != len(sl.Endpoints)) {
			t.Errorf("%d origins of %d endpoints, asked for: %t", n, len(sl.Endpoints), c.KeepOrigins)
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

// FuzzServiceCIDR is FuzzService for ServiceCIDRs.
func FuzzServiceCIDR(f *testing.F) {
	f.Add([]byte(`{"metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/16","fd00:10:96::/112"]}}`))
	f.Add([]byte(`{"spec":{"cidrs":["10.96.0.1/16","::ffff:10.96.0.0/112","::ffff:0:0/95","fe80::%eth0/64","010.0.0.0/8",""]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var obj networkingv1.ServiceCIDR
		if json.Unmarshal(data, &obj) != nil {
			return
		}
		var c Converter
		cidr, problems := c.ServiceCIDR(&obj)
		for i, r := range cidr.Prefixes {
			if !r.IsValid() || r.Masked() != r || r.Addr().Is4In6() || r.Addr().Zone() != "" {
				t.Errorf("prefix %s", r)
			}
			for _, o := range cidr.Prefixes[:i] {
				if o == r {
					t.Errorf("%s is there twice", r)
				}
			}
		}
		if len(problems) == 0 && len(cidr.Prefixes) != len(obj.Spec.CIDRs) {
			t.Error("a CIDR was dropped silently")
		}
	})
}

// checkBalance: an annotation is followed whole, or said to be wrong, or blank.
func checkBalance(t *testing.T, obj *corev1.Service, b *model.Balance) {
	given := 0
	for _, name := range []string{AnnotationScheduler, AnnotationSchedFlags, AnnotationWeights} {
		if strings.TrimSpace(obj.Annotations[name]) != "" {
			given++
		}
	}
	if (b == nil) != (given == 0) {
		t.Fatalf("balance %+v of %d annotations", b, given)
	}
	if b == nil {
		return
	}
	for _, said := range []bool{b.Scheduler != "", b.FlagsSet, b.Weights != nil} {
		if said {
			given--
		}
	}
	if given < 0 || given > 0 && len(b.Problems) == 0 || given == 0 && len(b.Problems) > 0 {
		t.Errorf("%d annotations are not followed, and these are the problems: %q", given, b.Problems)
	}
	if !b.FlagsSet && b.SchedFlags != nil || len(b.Problems) > 3*maxProblems+1 {
		t.Errorf("flags %q, %d problems", b.SchedFlags, len(b.Problems))
	}
	for _, text := range b.Problems {
		if len(text) > 400 || !utf8.ValidString(text) || strings.ContainsAny(text, "\n\x00") {
			t.Errorf("problem %q", text)
		}
	}
	if b.Weights == nil {
		return
	}
	for _, keys := range []map[string]uint16{b.Weights.Names, b.Weights.Zones} {
		if _, ok := keys[""]; ok {
			t.Error("a weight for what has no name")
		}
	}
}

// FuzzBalance is checkBalance for whatever annotations say.
func FuzzBalance(f *testing.F) {
	f.Add("mh", "mh-port, mh-fallback", "zone/eu-1a=3, zone/eu-1b=1, web-0=5, *=2")
	f.Add("a-name-that-is-too-long", "none,mh-port", "a=1,a=1")
	f.Add(" ", "none", "zone/=1,=,*=65536,\n")
	f.Add("", "sh-port,sh-port,", "*=0,\n web-1 = 007 ,")
	f.Fuzz(func(t *testing.T, scheduler, flags, weights string) {
		obj := &corev1.Service{}
		obj.Annotations = map[string]string{AnnotationScheduler: scheduler, AnnotationSchedFlags: flags, AnnotationWeights: weights}
		var c Converter
		checkBalance(t, obj, c.balance(obj.Annotations))
	})
}
