// Package convert turns Kubernetes objects into the model, trimmed at the
// border: what the dataplane does not need is never stored, and what it cannot
// use (an address that does not parse, a port out of range, a duplicate) is
// dropped alone, reported as a problem, and never spoils the rest of its object.
//
// It is pure apart from the Converter's memory of strings. It knows nothing of
// where objects come from (pkg/watch) nor of policy (pkg/plan).
package convert

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	netutils "k8s.io/utils/net"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Converter converts objects and lets those that share a name of a node, zone,
// namespace or Service share its memory too. The zero Converter is ready; it is
// safe for concurrent use.
type Converter struct {
	// KeepOrigins keeps what endpoints are called and their zones
	// (model.Slice.Origins), for modes that weigh endpoints by them. It is set
	// before the first use.
	KeepOrigins bool

	names interner
}

// Skip is the reason why an object has no place in the model. The empty Skip
// means that it has one.
type Skip string

// The reasons for which an object is not converted.
const (
	SkipHeadless     Skip = "headless: clusterIP is None"
	SkipNoClusterIP  Skip = "no clusterIP yet"
	SkipExternalName Skip = "type ExternalName"
	SkipOtherProxy   Skip = "label " + LabelServiceProxyName + " gives it to another proxy"

	SkipHeadlessSlice Skip = "label " + corev1.IsHeadlessService + ": slice of a headless Service"
	SkipNoService     Skip = "no label kubernetes.io/service-name"
	SkipFQDN          Skip = "addressType FQDN"
	SkipAddressType   Skip = "unknown addressType"
)

// LabelServiceProxyName, with any value, gives a Service to another proxy
// (KEP-2447).
const LabelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// maxProblems bounds what is reported of one object: a slice can have 40,000
// bad addresses.
const maxProblems = 16

// problems collects what could not be used of one object.
type problems struct {
	list []string
	more int
}

func (p *problems) add(format string, args ...any) {
	if len(p.list) >= maxProblems {
		p.more++
		return
	}
	p.list = append(p.list, fmt.Sprintf(format, args...))
}

func (p *problems) all() []string {
	if p.more > 0 {
		return append(p.list, fmt.Sprintf("and %d more problems", p.more))
	}
	return p.list
}

// parseAddr accepts what the API server ever accepted, leading zeros of old
// objects included (read as decimal), and unmaps IPv4-mapped IPv6 addresses.
func parseAddr(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		var ok bool
		if a, ok = netip.AddrFromSlice(netutils.ParseIPSloppy(s)); !ok {
			return netip.Addr{}, false
		}
	}
	if a.Zone() != "" {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

// parsePrefix is parseAddr for CIDRs; the result is masked.
func parsePrefix(s string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		_, n, err := netutils.ParseCIDRSloppy(s)
		if err != nil {
			return netip.Prefix{}, false
		}
		a, _ := netip.AddrFromSlice(n.IP)
		bits, _ := n.Mask.Size()
		p = netip.PrefixFrom(a, bits)
	}
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, false // covers more than IPv4: no prefix of either family
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

func parseProtocol(p corev1.Protocol) (model.Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return model.TCP, true
	case corev1.ProtocolUDP:
		return model.UDP, true
	case corev1.ProtocolSCTP:
		return model.SCTP, true
	}
	return 0, false
}

func parsePort(n int32) (uint16, bool) {
	return uint16(n), n > 0 && n <= 65535
}
