// Package plan decides, for one node and one IP family, what the dataplane must
// do: which addresses clients may dial, which endpoints answer, whose source
// address is rewritten, who is refused and how. Everything here is pure; no
// renderer decides any of it again, so all proxiers have the same semantics.
//
// It knows the model and nothing of Kubernetes' types, kernel objects, or where
// objects come from.
package plan

import (
	"net/netip"
	"slices"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Target is where a Route leads.
type Target uint8

// Targets. The zero Target is Reject, the answer to a Service without endpoints.
const (
	Reject  Target = iota // refuse: ICMP port unreachable, or a TCP reset
	Drop                  // say nothing: endpoints exist, but none that policy lets this node use
	Cluster               // one of Plan.Cluster
	Local                 // one of Plan.Local
)

func (t Target) String() string { return [...]string{"reject", "drop", "cluster", "local"}[t] }

// Route is what happens to a new connection from one kind of client.
type Route struct {
	To         Target
	Masquerade bool // rewrite the source to the node's, so that replies come back through it
}

func (r Route) String() string {
	if r.Masquerade {
		return r.To.String() + "+masquerade"
	}
	return r.To.String()
}

// Kind says which field of a Service a frontend comes from.
type Kind uint8

// Kinds, in the order in which they win if one Service claims an address twice.
const (
	ClusterIP Kind = iota
	ExternalIP
	LoadBalancer
	NodePort
)

func (k Kind) String() string {
	return [...]string{"clusterIP", "externalIP", "loadBalancer", "nodePort"}[k]
}

// Frontend is an address that clients dial, with the traffic policy of its
// Service worked out as three routes. FromPod is for pods of this node as the
// local detector knows them (Facts.DetectLocal); FromNode for the node's own
// addresses; FromOutside for the rest. Without a detector pods are not told
// from the outside, and FromPod equals FromOutside.
type Frontend struct {
	Kind Kind
	Addr netip.Addr // invalid for a NodePort: see Facts.NodePorts
	Port uint16

	// Sources, if not nil, are the only clients let in (sorted): the family's
	// loadBalancerSourceRanges, and the load balancer's own addresses where a
	// range covers the node, which then dials with such a source.
	Sources []netip.Prefix

	FromPod, FromNode, FromOutside Route
}

// Refused says that no client is served through the frontend.
func (f *Frontend) Refused() bool {
	return !f.FromPod.served() && !f.FromNode.served() && !f.FromOutside.served()
}

func (r Route) served() bool { return r.To >= Cluster }

// Equal compares by content.
func (f Frontend) Equal(o Frontend) bool {
	return f.Kind == o.Kind && f.Addr == o.Addr && f.Port == o.Port &&
		f.FromPod == o.FromPod && f.FromNode == o.FromNode && f.FromOutside == o.FromOutside &&
		(f.Sources == nil) == (o.Sources == nil) && slices.Equal(f.Sources, o.Sources)
}

// Endpoint is where a connection can end.
type Endpoint struct {
	netip.AddrPort
	// Local says that it is, or may be, on this node, so that it can be client
	// and endpoint of one connection (hairpin). An endpoint whose node is
	// unknown counts as one that may be.
	Local bool
	// Weight is the endpoint's share of new connections against that of others: 1
	// if nothing is said, and in every mode without schedulers. 0 means that it
	// gets none, though it keeps those it has.
	Weight uint16
}

// Plan is what this node must do for one Service port. It is immutable.
type Plan struct {
	PortKey  model.PortKey
	Protocol model.Protocol

	// Important Services are programmed first after a start from nothing.
	Important bool

	// Why explains the choice of Cluster, Local and the verdicts.
	Why Reason

	// HealthPort is the Service's healthCheckNodePort (0: none) and HealthLocal
	// how many distinct ready endpoint addresses of the Service this node has.
	HealthPort  uint16
	HealthLocal int

	Frontends []Frontend

	// Cluster are the endpoints for routes to Cluster, Local those for routes to
	// Local; sorted by address, without duplicates; nil if no route needs them.
	Cluster, Local []Endpoint

	// Serving are all endpoints that may have connections: ready or terminating,
	// whatever policy and topology say. A UDP flow to anywhere else is stale.
	Serving []Endpoint

	// Unready are the other endpoints that there are: they get no new connections,
	// but may still have some. Sorted; nil in modes without schedulers, where
	// nobody asks.
	Unready []netip.AddrPort

	Affinity time.Duration // sessionAffinity ClientIP's timeout, 0: none

	Balance Balance // how an endpoint is chosen; zero in modes without schedulers

	// Problems are sentences for people about settings of the Service that cannot
	// be followed here; for each the default is in force. All plans of a Service
	// have the same.
	Problems []string

	// Lost are frontends that an older Service already has.
	Lost []Clash

	created time.Time // decides clashes
	uid     string
}

// Clash is a frontend that a Service does not get because an older one has it.
type Clash struct {
	Frontend Frontend
	Winner   model.PortKey
}

// Key returns the plan's port key.
func (p *Plan) Key() model.PortKey { return p.PortKey }

// UID returns the Service's UID, for Events.
func (p *Plan) UID() string { return p.uid }

// Equal says whether two plans ask for the same, reasons included.
func (p *Plan) Equal(o *Plan) bool {
	return p.PortKey == o.PortKey && p.Affinity == o.Affinity && p.Balance == o.Balance &&
		p.HealthPort == o.HealthPort && p.HealthLocal == o.HealthLocal &&
		p.Why == o.Why && p.Important == o.Important &&
		p.created.Equal(o.created) && p.uid == o.uid &&
		slices.EqualFunc(p.Frontends, o.Frontends, Frontend.Equal) &&
		slices.Equal(p.Cluster, o.Cluster) &&
		slices.Equal(p.Local, o.Local) &&
		slices.Equal(p.Serving, o.Serving) &&
		slices.Equal(p.Unready, o.Unready) &&
		slices.Equal(p.Problems, o.Problems) &&
		slices.EqualFunc(p.Lost, o.Lost, func(a, b Clash) bool {
			return a.Winner == b.Winner && a.Frontend.Equal(b.Frontend)
		})
}

// Facts are what a plan depends on besides the Service: node and settings. A
// Facts value is immutable; a changed node means a new pointer.
type Facts struct {
	Family   model.Family
	NodeName string
	Zone     string     // "" if unknown
	NodeIP   netip.Addr // this family's primary node address; invalid if none

	DetectLocal        bool // pods of this node can be told from others
	MasqueradeAll      bool // rewrite the source of all ClusterIP traffic
	RefuseExternalIPs  bool // feature gate AllowServiceExternalIPs is off
	NodePorts          NodePortAddresses
	LocalhostNodePorts bool // NodePorts on 127.0.0.1 (IPv4 only)

	// Schedulers are the kernel's, sorted. Nil says that the mode has none, and
	// that what Services ask of schedulers is not looked at.
	Schedulers []string
	// DefaultScheduler is what a Balance without a Scheduler stands for.
	DefaultScheduler string

	// OwnAddrs are the node's own addresses of the family, sorted, in modes that
	// need a kernel object for each (ipvs); nil in others. Where they are given,
	// NodePorts.All means these.
	OwnAddrs []netip.Addr

	// ServiceCIDRs are those of the family, sorted and none inside another, in
	// modes that refuse unallocated addresses (nftables); nil in others.
	ServiceCIDRs []netip.Prefix
}

// NodePortAddresses says on which of the node's addresses NodePorts are served.
// kube-proxy's nodePortAddresses, worked out for one family.
type NodePortAddresses struct {
	All   bool         // every local address, also ones that come later: see Facts.OwnAddrs
	Addrs []netip.Addr // otherwise these, sorted
}

// Equal compares by content.
func (f *Facts) Equal(o *Facts) bool {
	return f.Family == o.Family && f.NodeName == o.NodeName && f.Zone == o.Zone && f.NodeIP == o.NodeIP &&
		f.DetectLocal == o.DetectLocal && f.MasqueradeAll == o.MasqueradeAll &&
		f.RefuseExternalIPs == o.RefuseExternalIPs && f.LocalhostNodePorts == o.LocalhostNodePorts &&
		f.NodePorts.All == o.NodePorts.All && slices.Equal(f.NodePorts.Addrs, o.NodePorts.Addrs) &&
		(f.Schedulers == nil) == (o.Schedulers == nil) && slices.Equal(f.Schedulers, o.Schedulers) &&
		f.DefaultScheduler == o.DefaultScheduler && slices.Equal(f.OwnAddrs, o.OwnAddrs) &&
		slices.Equal(f.ServiceCIDRs, o.ServiceCIDRs)
}

// Reason explains a plan in words that an operator understands. It is a set of
// flags because several reasons can hold at once.
type Reason uint16

// Reasons.
const (
	NoEndpoints      Reason = 1 << iota // no usable endpoint anywhere
	NoLocalEndpoints                    // policy Local, and none on this node
	OnlyTerminating                     // no ready endpoint: serving, terminating ones are used
	OnlyTerminatingLocal
	SameNode // topology: hints keep traffic on this node
	SameZone // topology: hints keep traffic in this zone
	HintMissing
	HintElsewhere
	InternalLocal // internalTrafficPolicy Local
	ExternalLocal // externalTrafficPolicy Local
)

var reasonText = []string{
	"no endpoints",
	"no endpoint on this node",
	"no ready endpoint, serving terminating ones are used",
	"no ready endpoint on this node, serving terminating ones are used",
	"topology hints keep traffic on this node",
	"topology hints keep traffic in this zone",
	"topology ignored: an endpoint has no hint",
	"topology ignored: no hint for this zone or node",
	"internalTrafficPolicy Local",
	"externalTrafficPolicy Local",
}

// Texts returns one sentence for each reason.
func (r Reason) Texts() []string {
	var out []string
	for i, t := range reasonText {
		if r&(1<<i) != 0 {
			out = append(out, t)
		}
	}
	return out
}
