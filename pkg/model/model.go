// Package model holds the nouns of a Service dataplane: Service, Slice,
// Endpoint, Node, ServiceCIDR. It knows nothing of Kubernetes' types, of policy, or of any
// kernel interface, and imports no other package of this module.
//
// Every value that leaves its maker is immutable: whoever wants a different
// Service makes a new one. "Changed" therefore means "a different pointer".
package model

import (
	"cmp"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/pkg/sharded"
)

// Protocol is a transport protocol that a Service port can have. Its value is
// the protocol's IANA number, so it can be used as the kernel's l4proto.
type Protocol uint8

// The protocols of the Service API.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// String returns the lower-case name that iptables, nft and kube-proxy's chain
// hashes use: "tcp", "udp" or "sctp".
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return "proto-" + strconv.Itoa(int(p))
}

// Family is an IP family. Everything below the store is done once per family.
type Family uint8

// The two families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns kube-proxy's metric label: "IPv4" or "IPv6".
func (f Family) String() string {
	if f == IPv6 {
		return "IPv6"
	}
	return "IPv4"
}

// FamilyOf returns the family of a valid address. IPv4-mapped IPv6 addresses
// are IPv6 here: unmap them at the border.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// ServiceName identifies a Service, and the slices that belong to it.
type ServiceName struct {
	Namespace, Name string
}

// String returns "namespace/name".
func (n ServiceName) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace, then name.
func (n ServiceName) Compare(o ServiceName) int {
	if c := strings.Compare(n.Namespace, o.Namespace); c != 0 {
		return c
	}
	return strings.Compare(n.Name, o.Name)
}

// Hash is stable over processes (see package sharded).
func (n ServiceName) Hash() uint32 { return sharded.HashStrings(n.Namespace, n.Name) }

// PortKey identifies one port of one Service: the unit that is planned and
// programmed. Port is the port's name, which may be empty.
type PortKey struct {
	Namespace, Name, Port string
	Protocol              Protocol
}

// Service returns the name of the Service that the port belongs to.
func (k PortKey) Service() ServiceName { return ServiceName{k.Namespace, k.Name} }

// String returns kube-proxy's ServicePortName: "namespace/name:port", without
// the colon when the port is unnamed. The protocol is not part of it.
func (k PortKey) String() string {
	if k.Port == "" {
		return k.Namespace + "/" + k.Name
	}
	return k.Namespace + "/" + k.Name + ":" + k.Port
}

// Compare orders keys by namespace, name, port name, protocol.
func (k PortKey) Compare(o PortKey) int {
	if c := k.Service().Compare(o.Service()); c != 0 {
		return c
	}
	if c := strings.Compare(k.Port, o.Port); c != 0 {
		return c
	}
	return cmp.Compare(k.Protocol, o.Protocol)
}

// Hash is stable over processes, and the same for all ports of a Service.
func (k PortKey) Hash() uint32 { return k.Service().Hash() }

// Service is what a node must know of a Kubernetes Service. Services that no
// node forwards for (headless, ExternalName, handled by another proxy, no
// ClusterIP yet) are not converted at all. Addresses of both families stand
// side by side; the planner takes those of its family.
type Service struct {
	ServiceName
	UID     string
	Created time.Time // decides clashes: the oldest Service keeps an address

	ClusterIPs      []netip.Addr
	ExternalIPs     []netip.Addr
	LoadBalancerIPs []netip.Addr   // status ingress IPs whose ipMode is absent or VIP
	SourceRanges    []netip.Prefix // loadBalancerSourceRanges; nil: no limit

	// Affinity is sessionAffinity ClientIP's timeout; 0 means no affinity.
	Affinity time.Duration

	InternalLocal bool // internalTrafficPolicy: Local
	ExternalLocal bool // externalTrafficPolicy: Local

	// HealthCheckNodePort is non-zero only for LoadBalancer Services with
	// externalTrafficPolicy Local.
	HealthCheckNodePort uint16

	// Balance is what the Service asks of modes that have schedulers; nil if it
	// says nothing, as most do.
	Balance *Balance

	Ports []ServicePort
}

// Balance is how a Service wants new connections shared out, where the mode has
// a choice. It is what was asked for: whether this node can do so is the
// planner's to say.
type Balance struct {
	Scheduler string // the kernel's name of it; "": not said

	// SchedFlags are the scheduler flags to set, by ipvsadm's names ("mh-port"),
	// sorted. FlagsSet tells none at all from not said.
	SchedFlags []string
	FlagsSet   bool

	Weights *Weights // nil: not said

	// Problems are sentences about what could not be read, and therefore counts
	// as not said.
	Problems []string
}

// Weights are endpoints' shares of new connections. An endpoint's name goes
// before its zone, and that before the default; neither map has the key "". 0
// means no new connections.
type Weights struct {
	Names, Zones map[string]uint16
	Default      uint16
}

// Of returns the weight of an endpoint; that of the zero Origin if nothing is
// known of it.
func (w *Weights) Of(o Origin) uint16 {
	if n, ok := w.Names[o.Name]; ok {
		return n
	}
	if n, ok := w.Zones[o.Zone]; ok {
		return n
	}
	return w.Default
}

// ServicePort is one entry of a Service's spec.ports.
type ServicePort struct {
	Name     string
	Protocol Protocol
	Port     uint16
	NodePort uint16 // 0: none
}

// Slice is what is kept of an EndpointSlice.
type Slice struct {
	Namespace, Name string
	Service         string // name of the Service it belongs to, same namespace
	Family          Family
	Ports           []SlicePort
	Endpoints       []Endpoint

	// Origins has an Origin for each of the Endpoints, in their order; nil if
	// nothing is known of any, or nothing asks for it. (It stands beside them, not
	// in them, so that modes which do not need it do not pay: a node can hold
	// 100,000 endpoints.)
	Origins []Origin

	// Triggered is the time of the change that made the slice controller write
	// this version (annotation endpoints.kubernetes.io/last-change-trigger-time),
	// zero if unknown. It serves the programming-latency metric only.
	Triggered time.Time
}

// SlicePort maps a Service port's name to the number that the slice's
// endpoints listen on.
type SlicePort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// Endpoint is one address of a Slice. It has no port: it listens on every port
// of its Slice.
type Endpoint struct {
	Addr        netip.Addr
	Node        string // node it runs on; "" if unknown
	Ready       bool
	Serving     bool
	Terminating bool
	Hints       *Hints // nil: none
}

// Origin is what an endpoint is called and where it stands: what a Service's
// Weights can tell it by.
type Origin struct {
	Name string // the Pod's, or else the hostname; "" if neither is known
	Zone string // "" if unknown
}

// OriginOf returns the Origin of the i-th endpoint; the zero Origin if it is not
// known.
func (s *Slice) OriginOf(i int) Origin {
	if i >= len(s.Origins) {
		return Origin{}
	}
	return s.Origins[i]
}

// Hints are an endpoint's topology hints (EndpointSlice hints.forZones and
// hints.forNodes). Either list may be empty.
type Hints struct {
	Zones, Nodes []string
}

// Node is what is known of the Node object of the node that we run on.
type Node struct {
	Name     string
	UID      string
	Zone     string         // label topology.kubernetes.io/zone
	Addrs    []netip.Addr   // status addresses, InternalIP before ExternalIP
	PodCIDRs []netip.Prefix // spec.podCIDRs

	// Deleting says that the Node has a deletion timestamp; Draining that it
	// carries the taint ToBeDeletedByClusterAutoscaler (KEP-3836). Either makes
	// the node ineligible for load balancer traffic.
	Deleting, Draining bool
}

// ServiceCIDR is what is kept of a ServiceCIDR: ranges that ClusterIPs are taken
// from. Prefixes are masked, and those of both families stand side by side.
type ServiceCIDR struct {
	Name     string
	Prefixes []netip.Prefix
}
