package main

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// The cluster's addresses. One listener has all of endpointRange, so that each of
// up to two million endpoints has an address of its own, as pods do.
var (
	serviceRange  = netip.MustParsePrefix("10.96.0.0/12")
	clusterRange  = netip.MustParsePrefix("10.128.0.0/9") // --cluster-cidr: pods of all nodes
	nodeRange     = netip.MustParsePrefix("172.18.0.0/16")
	endpointRange = netip.MustParsePrefix("10.192.0.0/10")

	kubernetesIP = netip.MustParseAddr("10.96.0.1") // given by the API server
	dnsIP        = netip.MustParseAddr("10.96.0.10")
	canaryIP     = netip.MustParseAddr("10.96.0.100")
)

const (
	maxServices  = 100_000
	maxEndpoints = 100 // of one slice, as the controller makes them
	namespaces   = 10

	servicePort  = 80
	endpointPort = 8080

	canaryName = "canary"
)

// serviceRef is a Service and how to reach it.
type serviceRef struct {
	namespace, name string
	ip              netip.Addr
	port            int32
}

func (r serviceRef) addr() netip.AddrPort { return netip.AddrPortFrom(r.ip, uint16(r.port)) }

var (
	dns    = serviceRef{"kube-system", "kube-dns", dnsIP, 53}
	canary = serviceRef{namespaceOf(0), canaryName, canaryIP, servicePort}
)

func namespaceOf(i int) string { return fmt.Sprintf("bench-%d", i%namespaces) }

// numbered is the i-th of the many Services.
func numbered(i int) serviceRef {
	return serviceRef{namespaceOf(i), fmt.Sprintf("svc-%05d", i), plus(serviceRange.Addr(), 256+i), servicePort}
}

// layout says which addresses the endpoints of a run have: Service after Service
// without gaps, so that many with few endpoints fit as well as few with many.
type layout struct{ services, endpoints int }

// The second versions of all endpoints 0 have the upper half of endpointRange.
// Below are the canary's, then those of the numbered Services, then those of
// DNS.
const (
	secondVersions  = 1 << 21
	canaryEndpoints = 250
	firstEndpoint   = 256
	dnsEndpoints    = 2
)

func (l layout) fits() bool {
	return firstEndpoint+l.services*l.endpoints+dnsEndpoints <= secondVersions && l.services <= secondVersions
}

// endpoint is the j-th endpoint of the i-th Service. Endpoint 0 has two versions,
// which changes swap.
func (l layout) endpoint(i, j, version int) netip.Addr {
	if j == 0 && version%2 == 1 {
		return plus(endpointRange.Addr(), secondVersions+i)
	}
	return plus(endpointRange.Addr(), firstEndpoint+i*l.endpoints+j)
}

// of are the endpoints of the i-th Service in a version.
func (l layout) of(i, version int) []netip.Addr {
	var out []netip.Addr
	for j := range l.endpoints {
		out = append(out, l.endpoint(i, j, version))
	}
	return out
}

// dns are the endpoints of DNS.
func (l layout) dns() []netip.Addr {
	var out []netip.Addr
	for j := range dnsEndpoints {
		out = append(out, l.endpoint(l.services, j, 0))
	}
	return out
}

// canaryEndpoint is the only endpoint of the canary. Each version has another, so
// that a program which is several changes late is not taken for one that has
// followed the last.
func canaryEndpoint(version int) netip.Addr {
	return plus(endpointRange.Addr(), 1+version%canaryEndpoints)
}

// plus counts on from an IPv4 address.
func plus(a netip.Addr, n int) netip.Addr {
	b := a.As4()
	v := int(b[0])<<24 | int(b[1])<<16 | int(b[2])<<8 | int(b[3])
	v += n
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}

// sample picks Services whose answers stand for all: the first, the last, and n
// in even steps between.
func sample(services, n int) []int {
	var out []int
	for k := range n {
		out = append(out, k*(services-1)/max(n-1, 1))
	}
	return slices.Compact(out)
}

func serviceObject(r serviceRef) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: r.name},
		Spec: corev1.ServiceSpec{
			ClusterIP: r.ip.String(),
			Ports:     []corev1.ServicePort{{Name: "http", Port: r.port, TargetPort: intstr.FromInt32(endpointPort), Protocol: corev1.ProtocolTCP}},
		},
	}
}

func sliceName(r serviceRef) string { return r.name + "-x7k2p" }

// sliceObject is the one slice of a Service. Its endpoints are on another node.
func sliceObject(r serviceRef, addrs []netip.Addr) *discoveryv1.EndpointSlice {
	name, port, proto, ready, node := "http", int32(endpointPort), corev1.ProtocolTCP, true, "elsewhere"
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: sliceName(r),
			Labels: map[string]string{discoveryv1.LabelServiceName: r.name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &proto}},
	}
	for i, a := range addrs {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{a.String()}, NodeName: &node,
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &ready},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: r.namespace, Name: fmt.Sprintf("%s-5d8f9c7b6-%05d", r.name, i)},
		})
	}
	return s
}
