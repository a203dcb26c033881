package ipvs

import "github.com/sluice-proxy/sluice/pkg/model"

// device is the dummy interface that holds the addresses of Services, so that
// the kernel takes packets to them as its own and hands them to IPVS.
const device = "kube-ipvs0"

// setID is one of the ipsets that the static rules look into.
type setID uint8

// The sets. Names and contents are kube-proxy's, up to the last four, which it
// does not have.
const (
	setLoopBack setID = iota
	setClusterIP
	setExternalIP
	setExternalIPLocal
	setLoadBalancer
	setLoadBalancerLocal
	setLoadBalancerFW
	setLoadBalancerSourceCIDR
	setNodePortTCP
	setNodePortLocalTCP
	setNodePortUDP
	setNodePortLocalUDP
	setNodePortSCTP
	setNodePortLocalSCTP
	setHealthCheckNodePort
	setIPs // every address on kube-ipvs0

	setNodePortServers // every virtual server of a NodePort: how a later start knows ours
	setDrop            // dropped for everybody
	setDropOutside     // dropped for clients that are neither this node nor pods of it
	setInside          // frontends where node and pods get other endpoints than the outside: a mark for each
	setCount
)

// setType is an ipset type, as the kernel names it.
type setType string

const (
	hashIP        setType = "hash:ip"
	hashIPPort    setType = "hash:ip,port"
	hashIPPortIP  setType = "hash:ip,port,ip"
	hashIPPortNet setType = "hash:ip,port,net"
	bitmapPort    setType = "bitmap:port"
)

// setSpec is how a set is created.
type setSpec struct {
	name    string // IPv4's
	typ     setType
	skbinfo bool // elements carry packet marks
	comment string
}

var setSpecs = [setCount]setSpec{
	setLoopBack:               {"KUBE-LOOP-BACK", hashIPPortIP, false, "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose"},
	setClusterIP:              {"KUBE-CLUSTER-IP", hashIPPort, false, "Kubernetes service cluster ip + port for masquerade purpose"},
	setExternalIP:             {"KUBE-EXTERNAL-IP", hashIPPort, false, "Kubernetes service external ip + port for masquerade and filter purpose"},
	setExternalIPLocal:        {"KUBE-EXTERNAL-IP-LOCAL", hashIPPort, false, "Kubernetes service external ip + port with externalTrafficPolicy=local"},
	setLoadBalancer:           {"KUBE-LOAD-BALANCER", hashIPPort, false, "Kubernetes service lb portal"},
	setLoadBalancerLocal:      {"KUBE-LOAD-BALANCER-LOCAL", hashIPPort, false, "Kubernetes service load balancer ip + port with externalTrafficPolicy=local"},
	setLoadBalancerFW:         {"KUBE-LOAD-BALANCER-FW", hashIPPort, false, "Kubernetes service load balancer ip + port for load balancer with sourceRange"},
	setLoadBalancerSourceCIDR: {"KUBE-LOAD-BALANCER-SOURCE-CIDR", hashIPPortNet, false, "Kubernetes service load balancer ip + port + source cidr for packet filter purpose"},
	setNodePortTCP:            {"KUBE-NODE-PORT-TCP", bitmapPort, false, "Kubernetes nodeport TCP port for masquerade purpose"},
	setNodePortLocalTCP:       {"KUBE-NODE-PORT-LOCAL-TCP", bitmapPort, false, "Kubernetes nodeport TCP port with externalTrafficPolicy=local"},
	setNodePortUDP:            {"KUBE-NODE-PORT-UDP", bitmapPort, false, "Kubernetes nodeport UDP port for masquerade purpose"},
	setNodePortLocalUDP:       {"KUBE-NODE-PORT-LOCAL-UDP", bitmapPort, false, "Kubernetes nodeport UDP port with externalTrafficPolicy=local"},
	setNodePortSCTP:           {"KUBE-NODE-PORT-SCTP-HASH", hashIPPort, false, "Kubernetes nodeport SCTP port for masquerade purpose with type 'hash ip:port'"},
	setNodePortLocalSCTP:      {"KUBE-NODE-PORT-LOCAL-SCTP-HASH", hashIPPort, false, "Kubernetes nodeport SCTP port with externalTrafficPolicy=local with type 'hash ip:port'"},
	setHealthCheckNodePort:    {"KUBE-HEALTH-CHECK-NODE-PORT", bitmapPort, false, "Kubernetes health check node port"},
	setIPs:                    {"KUBE-IPVS-IPS", hashIP, false, "Virtual IPs which should be added to kube-ipvs0 interface"},
	setNodePortServers:        {"KUBE-IPVS-NODE-PORT", hashIPPort, false, "Virtual servers of node ports"},
	setDrop:                   {"KUBE-IPVS-DROP", hashIPPort, false, "Services that no local endpoint serves"},
	setDropOutside:            {"KUBE-IPVS-DROP-OUTSIDE", hashIPPort, false, "Services that no local endpoint serves to clients outside"},
	setInside:                 {"KUBE-IPVS-INSIDE", hashIPPort, true, "Marks that give node and pods all endpoints of a local Service"},
}

// kube-proxy has one more set; it is removed with the others.
const setLoadBalancerSourceIP = "KUBE-LOAD-BALANCER-SOURCE-IP"

// nameFor gives a set's name: IPv6 ones are KUBE-6-..., cut off at 31 characters,
// the kernel's limit (IPSET_MAXNAMELEN less the NUL), as kube-proxy does it.
func nameFor(name string, f model.Family) string {
	if f == model.IPv6 {
		name = "KUBE-6-" + name[len("KUBE-"):]
		return name[:min(len(name), 31)]
	}
	return name
}

func (s setID) name(f model.Family) string { return nameFor(setSpecs[s].name, f) }
