// Package config turns what an operator writes (kube-proxy's flags, kube-proxy's
// KubeProxyConfiguration file, and a SluiceConfiguration document beside it) into
// one validated Config, or into an error that names the field. It also says which
// part of a changed file can be applied to a running agent.
//
// It must not know what the settings do: it reads no kernel state, no API server
// and no Node object, and imports none of the packages that it configures.
package config

import (
	"crypto/sha256"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/kube-proxy/config/v1alpha1"
)

// Mode is the proxier that forwards.
type Mode string

// Modes.
const (
	ModeIPTables Mode = "iptables"
	ModeIPVS     Mode = "ipvs"
	ModeNFTables Mode = "nftables"
)

// LocalMode is the way to tell this node's pods from everybody else.
type LocalMode string

// Ways to detect local traffic.
const (
	LocalClusterCIDR         LocalMode = "ClusterCIDR"
	LocalNodeCIDR            LocalMode = "NodeCIDR"
	LocalBridgeInterface     LocalMode = "BridgeInterface"
	LocalInterfaceNamePrefix LocalMode = "InterfaceNamePrefix"
)

var localModes = []LocalMode{LocalClusterCIDR, LocalNodeCIDR, LocalBridgeInterface, LocalInterfaceNamePrefix}

// Config is the whole configuration of a process: defaulted, validated, parsed.
// It is never changed after it was made; a changed file makes a new one.
type Config struct {
	// KubeProxy and Sluice are the two documents with every default filled in,
	// as /configz and --write-config-to show them.
	KubeProxy *v1alpha1.KubeProxyConfiguration
	Sluice    *SluiceConfiguration

	// Settings of the process, from flags only.
	ConfigFile    string // "" if there is none
	WriteConfigTo string
	Master        string // address of the API server; wins over the kubeconfig's
	Cleanup       bool
	InitOnly      bool

	Mode          Mode
	ModeDefaulted bool   // nobody chose the mode
	NodeName      string // the name of the Node object: lower case, no blanks

	// BindAddress is the node's address if an operator fixed it. Unspecified
	// (0.0.0.0, ::) leaves the choice to the Node object, and only says which
	// family comes first.
	BindAddress netip.Addr
	HealthzAddr string // IP:port to listen on; "" is off
	MetricsAddr string // the same

	DetectLocal       DetectLocal
	ClusterCIDRs      []netip.Prefix // at most one of each family; empty unless DetectLocal uses them
	NodePortAddresses NodePortAddresses

	// SyncPeriod is kube-proxy's: how long after a failure to try again, and
	// half the age at which pending changes make the agent unhealthy.
	SyncPeriod time.Duration
	// MinSyncPeriod is the shortest time between two syncs, as kube-proxy would
	// apply it. It is to be imposed only if MinSyncExplicit: kube-proxy's
	// implied second protects it from its own cost, which Sluice does not have.
	MinSyncPeriod   time.Duration
	MinSyncExplicit bool // an operator asked, by flag or file, for more than 0

	MasqueradeBit      int // of the packet mark, 0 to 31
	MasqueradeAll      bool
	LocalhostNodePorts bool // NodePorts on 127.0.0.1; never true in ipvs mode
	OOMScoreAdj        int

	IPVS           IPVS
	ServiceTraffic int // in nftables mode, how many Service ports are counted at the most
	Conntrack      Conntrack

	// FeatureGates holds the gates that Sluice knows, with their defaults.
	FeatureGates map[string]bool

	Manifests       string // folder to follow in place of an API server; "" is none
	IPTablesVariant string // VariantAuto, VariantLegacy or VariantNFT
	ModeFallback    bool
	CheckPeriod     time.Duration
	ResyncPeriod    time.Duration

	// Warnings are to be logged once, in this order.
	Warnings []string

	written  written           // what KubeProxy and Sluice were made of
	flags    *Flags            // for Reload
	fileSum  [sha256.Size]byte // of the file that was read, for Watch
	implied  impliedMinSync
	fromFile bool // KubeProxy is a file's, not the flags'
	chosen   Mode // the mode before WithMode; "" if that was not called
}

// DetectLocal says how local pods are recognised.
type DetectLocal struct {
	Mode                LocalMode
	BridgeInterface     string
	InterfaceNamePrefix string
}

// IPVS holds settings that only the ipvs mode has.
type IPVS struct {
	Scheduler    string         // "" is the proxier's default
	ExcludeCIDRs []netip.Prefix // virtual servers in them are foreign
	StrictARP    bool
	// Timeouts, in ipvs mode whole seconds; 0 leaves the kernel's.
	TCPTimeout, TCPFinTimeout, UDPTimeout time.Duration
	// Drain is how long a removed endpoint may keep its connections at the most;
	// 0: without bound.
	Drain time.Duration
}

// Conntrack holds settings of the kernel's connection tracking. Zero leaves the
// kernel's value alone.
type Conntrack struct {
	MaxPerCore int // entries for each CPU core, but in all no less than Min
	Min        int

	TCPEstablishedTimeout, TCPCloseWaitTimeout time.Duration
	UDPTimeout, UDPStreamTimeout               time.Duration

	TCPBeLiberal bool
	Cleanup      bool // delete flows to endpoints that are gone
}

// written is the outcome of reading file and flags, before what follows from the
// mode is filled in.
type written struct {
	kubeProxy *v1alpha1.KubeProxyConfiguration
	sluice    *SluiceConfiguration
	warnings  []string
}

// impliedMinSync says for which modes nobody chose a minSyncPeriod above 0.
type impliedMinSync struct{ iptables, ipvs, nftables bool }

func (i impliedMinSync) of(m Mode) bool {
	switch m {
	case ModeIPVS:
		return i.ipvs
	case ModeNFTables:
		return i.nftables
	}
	return i.iptables
}

// WithMode returns the configuration as it would be had this mode been chosen:
// what an agent that must fall back from one mode to another goes on with.
func (c *Config) WithMode(m Mode) (*Config, error) {
	next := *c
	next.written.kubeProxy = c.written.kubeProxy.DeepCopy()
	next.written.kubeProxy.Mode = v1alpha1.ProxyMode(m)
	if err := next.derive(); err != nil {
		return nil, err
	}
	next.ModeDefaulted = c.ModeDefaulted
	next.chosen = c.Mode
	return &next, nil
}

// Reload reads the file again, under the same flags, and returns the new
// configuration. The old one stays as it is.
func (c *Config) Reload() (*Config, error) { return c.flags.Load() }

// derive validates the written documents and fills in everything that follows
// from them.
func (c *Config) derive() error {
	k, s := c.written.kubeProxy.DeepCopy(), c.written.sluice.deepCopy()
	c.ModeDefaulted = k.Mode == ""
	defaultForMode(k)
	c.KubeProxy, c.Sluice = k, s
	c.Warnings = slices.Clone(c.written.warnings)

	var ps problems
	c.deriveMode(&ps)
	c.deriveNode(&ps)
	c.deriveListeners(&ps)
	c.deriveDetectLocal(&ps)
	c.deriveConntrack(&ps)
	c.deriveIPVS(&ps)
	c.derivePeriods(&ps)
	c.deriveGates(&ps)
	if k.ClientConnection.Burst < 0 {
		ps.add("clientConnection.burst", "%d must be 0 or greater", k.ClientConnection.Burst)
	}
	checkMinorVersion("showHiddenMetricsForVersion", k.ShowHiddenMetricsForVersion, &ps)
	validateSluice(s, &ps)
	c.Manifests = s.Manifests
	c.IPTablesVariant = s.IPTables.Variant
	c.ModeFallback = *s.ModeFallback
	c.CheckPeriod = s.CheckPeriod.Duration
	c.ResyncPeriod = s.ResyncPeriod.Duration
	c.warnUnused()
	if len(ps) > 0 {
		return c.refuse(ps)
	}
	return nil
}

// refuse names what is wrong by the thing that the operator wrote: a field of
// the file, or a flag.
func (c *Config) refuse(ps problems) error {
	for i, p := range ps {
		flag := flagOfField(p.Field, c.Mode)
		ours := strings.HasPrefix(p.Field, SluiceKind+".") // whose flags count beside a file
		if flag != "" && (!c.fromFile && !ours || c.flags.overrides(flag)) {
			ps[i].Field = "--" + flag
		}
	}
	return &Error{Source: c.ConfigFile, Problems: ps}
}
