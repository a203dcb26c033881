package proxier

import "net/netip"

// Detector tells pods of this node from everybody else, for one family. At most
// one field is set; none means that they cannot be told apart.
type Detector struct {
	CIDR            netip.Prefix // ClusterCIDR and NodeCIDR
	BridgeInterface string
	InterfacePrefix string
}

// Detects says whether the detector can tell anything.
func (d Detector) Detects() bool { return d != Detector{} }

// Match returns what an iptables rule compares for the sources that the detector
// means: the source address or the input interface, as iptables-save prints it;
// both are empty if it detects nothing.
func (d Detector) Match() (src, in string) {
	switch {
	case d.CIDR.IsValid():
		return d.CIDR.Masked().String(), ""
	case d.BridgeInterface != "":
		return "", d.BridgeInterface
	case d.InterfacePrefix != "":
		return "", d.InterfacePrefix + "+"
	}
	return "", ""
}
