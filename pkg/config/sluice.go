package config

import (
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The second document of a configuration file.
const (
	SluiceAPIVersion = "sluice.io/v1alpha1"
	SluiceKind       = "SluiceConfiguration"
)

// SluiceConfiguration holds what kube-proxy's configuration has no field for. It
// is a YAML document of its own in the file that --config names, so that the
// document before it can be kube-proxy's, unchanged.
type SluiceConfiguration struct {
	metav1.TypeMeta `json:",inline"`

	// Manifests is a folder of Service, EndpointSlice, Node and ServiceCIDR
	// manifests that is followed instead of an API server. Empty means the API
	// server. Flag: --manifests.
	Manifests string `json:"manifests"`
	// ModeFallback lets the agent run in iptables mode, with a warning, where the
	// kernel lacks what the chosen mode needs. If false it refuses to start
	// there. Default true. Flag: --mode-fallback.
	ModeFallback *bool `json:"modeFallback"`
	// IPTables holds settings of the iptables and ipvs modes.
	IPTables SluiceIPTables `json:"iptables"`
	// IPVS holds settings of the ipvs mode that kube-proxy's ipvs section lacks.
	IPVS SluiceIPVS `json:"ipvs"`
	// NFTables holds settings of the nftables mode that kube-proxy's nftables
	// section lacks.
	NFTables SluiceNFTables `json:"nftables"`
	// CheckPeriod is how often the agent looks, by a cheap probe, whether
	// somebody else removed its rules. Default 1s.
	CheckPeriod metav1.Duration `json:"checkPeriod"`
	// ResyncPeriod is how often everything in the kernel is read back and
	// compared. Default 10m.
	ResyncPeriod metav1.Duration `json:"resyncPeriod"`
	// Conntrack holds settings of connection tracking.
	Conntrack SluiceConntrack `json:"conntrack"`
}

// SluiceIPTables says how the iptables programs are used.
type SluiceIPTables struct {
	// Variant of the iptables programs: auto, legacy or nft. auto, the default,
	// takes the one whose tables the node already uses. Flag: --iptables-variant.
	Variant string `json:"variant"`
}

// SluiceIPVS says how IPVS is used.
type SluiceIPVS struct {
	// Drain is how long a removed endpoint may keep its connections at the most;
	// new ones do not go there. 0 lets them last as long as they want. Default
	// 15m. Flag: --ipvs-drain.
	Drain *metav1.Duration `json:"drain"`
}

// SluiceNFTables says how nf_tables is used.
type SluiceNFTables struct {
	// ServiceTraffic is for how many Service ports packets and bytes are counted, at
	// the most: each is four series of metrics, and counting takes time for each
	// packet of the node. Default 0: nothing is counted. Flag:
	// --nftables-service-traffic.
	ServiceTraffic int `json:"serviceTraffic"`
}

// SluiceConntrack says what is done about tracked connections.
type SluiceConntrack struct {
	// Cleanup deletes flows that lead to endpoints which are gone. Default true.
	Cleanup *bool `json:"cleanup"`
}

// Variants of the iptables programs.
const (
	VariantAuto   = "auto"
	VariantLegacy = "legacy"
	VariantNFT    = "nft"
)

var iptablesVariants = []string{VariantAuto, VariantLegacy, VariantNFT}

func defaultSluice(c *SluiceConfiguration) {
	c.TypeMeta = metav1.TypeMeta{APIVersion: SluiceAPIVersion, Kind: SluiceKind}
	setIfZero(&c.IPTables.Variant, VariantAuto)
	setIfZero(&c.CheckPeriod.Duration, time.Second)
	setIfZero(&c.ResyncPeriod.Duration, 10*time.Minute)
	setIfNil(&c.ModeFallback, true)
	setIfNil(&c.Conntrack.Cleanup, true)
	setIfNil(&c.IPVS.Drain, metav1.Duration{Duration: defaultDrain})
}

func validateSluice(c *SluiceConfiguration, ps *problems) {
	if !slices.Contains(iptablesVariants, c.IPTables.Variant) {
		ps.add(SluiceKind+".iptables.variant", "%q is none of auto, legacy, nft", c.IPTables.Variant)
	}
	if c.CheckPeriod.Duration < 0 {
		ps.add(SluiceKind+".checkPeriod", "%s must be greater than 0", c.CheckPeriod.Duration)
	}
	if c.ResyncPeriod.Duration < 0 {
		ps.add(SluiceKind+".resyncPeriod", "%s must be greater than 0", c.ResyncPeriod.Duration)
	}
	checkNotNegative(SluiceKind+".ipvs.drain", c.IPVS.Drain.Duration, ps)
	if c.NFTables.ServiceTraffic < 0 {
		ps.add(SluiceKind+".nftables.serviceTraffic", "%d must be 0 or greater", c.NFTables.ServiceTraffic)
	}
	if c.CheckPeriod.Duration > c.ResyncPeriod.Duration {
		ps.add(SluiceKind+".checkPeriod", "%s must not be longer than resyncPeriod (%s)", c.CheckPeriod.Duration, c.ResyncPeriod.Duration)
	}
}

func (c *SluiceConfiguration) deepCopy() *SluiceConfiguration {
	out := *c
	if c.ModeFallback != nil {
		out.ModeFallback = new(*c.ModeFallback)
	}
	if c.Conntrack.Cleanup != nil {
		out.Conntrack.Cleanup = new(*c.Conntrack.Cleanup)
	}
	if c.IPVS.Drain != nil {
		out.IPVS.Drain = new(*c.IPVS.Drain)
	}
	return &out
}
