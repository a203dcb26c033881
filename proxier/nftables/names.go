package nftables

import "github.com/sluice-proxy/sluice/pkg/model"

// table is the name of our tables, one in each of the families ip and ip6. It is not
// kube-proxy's: both products recognise what is theirs by it.
const table = "sluice"

// kubeProxyTable is the table of kube-proxy's nftables mode, in families ip and
// ip6 (KEP-3866).
const kubeProxyTable = "kube-proxy"

// setID is one of the sets and maps.
type setID uint8

// The sets and maps. A map of endpoints has, for each frontend, its endpoints
// numbered from 0.
const (
	setServices  setID = iota // frontend: what happens to a new connection
	setNodePorts              // the same by port, for the node's own addresses

	setEndpoints
	setLocalEndpoints // endpoints on this node, where a policy is Local
	setPortEndpoints  // of node ports
	setPortLocalEndpoints

	setSticky     // frontends with affinity: how long clients are remembered
	setPortSticky // node ports with affinity
	setAffinity   // the endpoint that a client had at what it dialled; rules write it

	setSources           // who may use a load balancer address
	setClusterIPs        // every ClusterIP
	setHairpin           // endpoints on this node, as client and server of one connection
	setNodePortAddresses // where node ports are served, if not everywhere

	// Counters of frontends and of node ports, where asked for.
	setRequests
	setReplies
	setPortRequests
	setPortReplies

	setCount
)

// field is a part of a key or of a value.
type field uint8

const (
	fieldAddr     field = iota // an address of the family
	fieldProtocol              // of the transport layer
	fieldPort
	fieldIndex      // of an endpoint: 32 bits in the machine's byte order
	fieldSource     // an address that stands for a client's: the second one of a key, or a range
	fieldClient     // the client's address, first in a key
	fieldServerPort // the port that a packet comes from, where that is the frontend's
	fieldVerdict    // what happens; alone
)

// setSpec is how a set is created.
type setSpec struct {
	name    string
	key     []field
	value   []field // nil for sets
	dynamic bool    // rules write it, and elements time out
	ranges  bool    // the last field of the key is a range
	counter bool    // each element counts what is looked up
}

// frontends and node ports are how most keys begin.
var (
	frontendKey = []field{fieldAddr, fieldProtocol, fieldPort}
	nodePortKey = []field{fieldProtocol, fieldPort}
	toEndpoint  = []field{fieldAddr, fieldPort}
)

func fields(first []field, more ...field) []field {
	return append(append([]field{}, first...), more...)
}

var setSpecs = [setCount]setSpec{
	setServices:  {name: "services", key: frontendKey, value: []field{fieldVerdict}},
	setNodePorts: {name: "node-ports", key: nodePortKey, value: []field{fieldVerdict}},

	setEndpoints:          {name: "endpoints", key: fields(frontendKey, fieldIndex), value: toEndpoint},
	setLocalEndpoints:     {name: "local-endpoints", key: fields(frontendKey, fieldIndex), value: toEndpoint},
	setPortEndpoints:      {name: "node-port-endpoints", key: fields(nodePortKey, fieldIndex), value: toEndpoint},
	setPortLocalEndpoints: {name: "node-port-local-endpoints", key: fields(nodePortKey, fieldIndex), value: toEndpoint},

	setSticky:     {name: "sticky", key: frontendKey, value: []field{fieldVerdict}},
	setPortSticky: {name: "node-port-sticky", key: nodePortKey, value: []field{fieldVerdict}},
	setAffinity:   {name: "affinity", key: fields([]field{fieldClient}, frontendKey...), value: toEndpoint, dynamic: true},

	setSources:           {name: "source-ranges", key: fields(frontendKey, fieldSource), ranges: true},
	setClusterIPs:        {name: "cluster-ips", key: []field{fieldAddr}},
	setHairpin:           {name: "hairpin", key: fields([]field{fieldClient}, frontendKey...)},
	setNodePortAddresses: {name: "node-port-addresses", key: []field{fieldAddr}},

	setRequests:     {name: "requests", key: frontendKey, counter: true},
	setReplies:      {name: "replies", key: fields([]field{fieldClient}, fieldProtocol, fieldServerPort), counter: true},
	setPortRequests: {name: "node-port-requests", key: nodePortKey, counter: true},
	setPortReplies:  {name: "node-port-replies", key: []field{fieldProtocol, fieldServerPort}, counter: true},
}

func (s setID) String() string { return setSpecs[s].name }

// isEndpoints says whether a map is one of endpoints.
func (s setID) isEndpoints() bool { return setEndpoints <= s && s <= setPortLocalEndpoints }

// endpointsOf gives the map of a kind of endpoints.
func endpointsOf(port, local bool) setID {
	switch {
	case port && local:
		return setPortLocalEndpoints
	case port:
		return setPortEndpoints
	case local:
		return setLocalEndpoints
	}
	return setEndpoints
}

// mostClients bounds the map of affinity: a flood of clients, or of forged
// addresses, must take neither all memory nor, when an endpoint goes and the map is
// listed, the time of others: the kernel's lists take time with the square of their
// length, 0.3 s for so many. Clients beyond it are served, but not remembered.
const mostClients = 1 << 16

// Names of chains that are always there.
const (
	chainPrerouting  = "nat-prerouting"
	chainOutput      = "nat-output"
	chainPostrouting = "nat-postrouting"
	chainRememberOut = "remember-postrouting"
	chainRememberIn  = "remember-input"
	chainForward     = "filter-forward"
	chainInput       = "filter-input"

	chainCountIn       = "count-prerouting"
	chainCountOwn      = "count-output"
	chainCountOut      = "count-postrouting"
	chainCountReturned = "count-input"
	chainRequests      = "count-requests"
	chainReplies       = "count-replies"

	chainServices = "services"
	chainReject   = "reject-all"
	chainMartian  = "martian"
	chainRemember = "remember"
)

// word is the family as nft writes it.
func word(f model.Family) string {
	if f == model.IPv6 {
		return "ip6"
	}
	return "ip"
}
