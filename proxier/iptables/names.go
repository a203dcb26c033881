package iptables

import (
	"crypto/sha256"
	"encoding/base32"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Names are kube-proxy's, because people, tools and kube-proxy's own --cleanup
// look for them.
const (
	tableNAT    = "nat"
	tableFilter = "filter"

	chainServices         = "KUBE-SERVICES"
	chainExternalServices = "KUBE-EXTERNAL-SERVICES"
	chainNodePorts        = "KUBE-NODEPORTS"
	chainPostrouting      = "KUBE-POSTROUTING"
	chainMarkMasq         = "KUBE-MARK-MASQ"
	chainForward          = "KUBE-FORWARD"
	chainProxyFirewall    = "KUBE-PROXY-FIREWALL"
	chainFirewall         = "KUBE-FIREWALL" // shared with the kubelet, never removed
	chainCanary           = "KUBE-PROXY-CANARY"

	// chainTrial is where rules are tried. It is there for a moment only, or after
	// a kill in that moment.
	chainTrial = "KUBE-SLUICE-TRY"

	prefixCluster  = "KUBE-SVC-" // the Cluster set
	prefixLocal    = "KUBE-SVL-" // the Local set
	prefixExternal = "KUBE-EXT-" // entry for external frontends
	prefixSources  = "KUBE-FW-"  // loadBalancerSourceRanges
	prefixEndpoint = "KUBE-SEP-"

	// maxChainName is what x_tables allows (XT_EXTENSION_MAXNAMELEN less the NUL).
	maxChainName = 28
)

// objectPrefixes are those of chains that belong to one Service or one part of
// the dispatch trees. kube-proxy removes unknown chains with these prefixes from
// the nat table at its first sync, which makes going back to it clean.
var objectPrefixes = []string{prefixCluster, prefixLocal, prefixExternal, prefixSources, prefixEndpoint}

// hash is kube-proxy's: 16 characters of the base32 of a SHA-256.
func hash(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		_, _ = h.Write([]byte(p))
	}
	return base32.StdEncoding.EncodeToString(h.Sum(nil))[:16]
}

// portNames are the chain names of one Service port.
type portNames struct {
	name, protocol string // what is hashed: "ns/svc:port" and "tcp"
	suffix         string
}

func namesOf(p *plan.Plan) portNames {
	n := portNames{name: p.PortKey.String(), protocol: p.Protocol.String()}
	n.suffix = hash(n.name, n.protocol)
	return n
}

func (n portNames) cluster() string  { return prefixCluster + n.suffix }
func (n portNames) local() string    { return prefixLocal + n.suffix }
func (n portNames) external() string { return prefixExternal + n.suffix }
func (n portNames) sources() string  { return prefixSources + n.suffix }

func (n portNames) endpoint(e plan.Endpoint) string {
	return prefixEndpoint + hash(n.name, n.protocol, e.String())
}

// group names a part of a large endpoint set. parent is the set's own prefix.
func (n portNames) group(parent, path string) string {
	return parent + hash(n.name, n.protocol, "group", parent, path)
}

// ours says whether a chain of a table is one that this proxier, or kube-proxy
// in iptables mode, writes and may remove.
func ours(table, chain string) bool {
	switch chain {
	case chainServices, chainNodePorts, chainTrial:
		return true
	case chainPostrouting, chainMarkMasq:
		return table == tableNAT
	case chainExternalServices, chainForward, chainProxyFirewall:
		return table == tableFilter
	}
	return isObjectChain(chain)
}

func isObjectChain(chain string) bool {
	for _, p := range objectPrefixes {
		if strings.HasPrefix(chain, p) {
			return true
		}
	}
	return false
}
