package scenarios

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/convert"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/node"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/state"
)

// Detector is how pods of the node are told from others, in one family. At most
// one field is set.
type Detector struct {
	CIDR            netip.Prefix
	BridgeInterface string
	InterfacePrefix string
}

// Detector returns the local detector of a family, as kube-proxy makes it from
// its configuration.
func (s *Scenario) Detector(f model.Family) Detector {
	first := func(cidrs []string) (d Detector) {
		for _, c := range cidrs {
			if p, err := netip.ParsePrefix(strings.TrimSpace(c)); err == nil && !d.CIDR.IsValid() && model.FamilyOf(p.Addr()) == f {
				d.CIDR = p
			}
		}
		return d
	}
	switch s.Settings.DetectLocalMode {
	case "ClusterCIDR":
		return first(strings.Split(s.Settings.ClusterCIDR, ","))
	case "NodeCIDR":
		return first(s.Node.Spec.PodCIDRs)
	case "BridgeInterface":
		return Detector{BridgeInterface: s.Settings.BridgeInterface}
	case "InterfaceNamePrefix":
		return Detector{InterfacePrefix: s.Settings.InterfaceNamePrefix}
	}
	return Detector{}
}

// Schedulers are those of a kernel with all of IPVS.
var Schedulers = []string{"dh", "fo", "lblc", "lblcr", "lc", "mh", "nq", "ovf", "rr", "sed", "sh", "wlc", "wrr"}

// FactsIn returns the node's facts for a family in a proxier's mode, as the agent
// makes them.
func (s *Scenario) FactsIn(mode string, f model.Family) *plan.Facts {
	facts := s.Facts(f)
	switch mode {
	case "ipvs":
		s.ipvsFacts(f, facts)
	case "nftables":
		facts.ServiceCIDRs = s.serviceCIDRs(f)
	}
	return facts
}

func (s *Scenario) ipvsFacts(f model.Family, facts *plan.Facts) {
	facts.LocalhostNodePorts = false // IPVS cannot
	facts.Schedulers, facts.DefaultScheduler = Schedulers, "rr"
	for _, a := range s.Cluster.Host(NodeName).Addrs {
		if model.FamilyOf(a) == f {
			facts.OwnAddrs = append(facts.OwnAddrs, a)
		}
	}
	slices.SortFunc(facts.OwnAddrs, netip.Addr.Compare)
}

func (s *Scenario) serviceCIDRs(f model.Family) (out []netip.Prefix) {
	store, _ := s.store()
	for _, p := range store.Current().ServiceCIDRs() {
		if model.FamilyOf(p.Addr()) == f {
			out = append(out, p)
		}
	}
	return out
}

// Facts returns the node's facts for a family in iptables mode.
func (s *Scenario) Facts(f model.Family) *plan.Facts {
	self, _ := new(convert.Converter).Node(s.Node)
	spec, _ := nodePortSpec(s.Settings.NodePortAddresses) // checked by Parse
	primary := func(f model.Family) netip.Addr { return node.PrimaryIP(netip.Addr{}, self, f) }
	own := append(slices.Clone(self.Addrs), netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback())
	return &plan.Facts{
		Family:             f,
		NodeName:           NodeName,
		Zone:               self.Zone,
		NodeIP:             primary(f),
		DetectLocal:        s.Detector(f) != Detector{},
		MasqueradeAll:      s.Settings.MasqueradeAll,
		RefuseExternalIPs:  s.Settings.RefuseExternalIPs,
		NodePorts:          node.Select(spec, f, own, primary(f)),
		LocalhostNodePorts: s.LocalhostNodePorts() && f == model.IPv4,
	}
}

// LocalhostNodePorts says whether node ports are served on 127.0.0.1, which
// kube-proxy does if it is allowed and nodePortAddresses does not exclude it.
func (s *Scenario) LocalhostNodePorts() bool {
	self, _ := new(convert.Converter).Node(s.Node)
	spec, _ := nodePortSpec(s.Settings.NodePortAddresses)
	return s.Settings.LocalhostNodePorts && node.IncludesLocalhost(spec, node.PrimaryIP(netip.Addr{}, self, model.IPv4))
}

// nodePortSpec reads nodePortAddresses; what is no keyword must be a CIDR.
func nodePortSpec(values []string) (node.Spec, error) {
	var spec node.Spec
	for _, v := range values {
		switch v {
		case "all":
			spec.All = true
		case "primary":
			spec.Primary = true
		case "localhost":
			spec.Localhost = true
		default:
			p, err := netip.ParsePrefix(v)
			if err != nil {
				return spec, fmt.Errorf("nodePortAddresses: %w", err)
			}
			spec.Prefixes = append(spec.Prefixes, p)
		}
	}
	return spec, nil
}

// Set plans the scenario for a family in iptables mode.
func (s *Scenario) Set(f model.Family) *plan.Set { return s.SetIn("iptables", f) }

// SetIn plans the scenario for a family in a proxier's mode, by the way that
// events take: conversion, store, planner.
func (s *Scenario) SetIn(mode string, f model.Family) *plan.Set {
	store, _ := s.store()
	planner := plan.NewPlanner(s.FactsIn(mode, f))
	for e := range store.Current().All {
		planner.Update(e.Name, e.Service, e.Slices)
	}
	return planner.Set()
}

// store converts all objects, and says what could not be used of them.
func (s *Scenario) store() (*state.Store, []string) {
	store := state.NewStore()
	c := convert.Converter{KeepOrigins: true}
	var notes []string
	note := func(kind, name string, skip convert.Skip, problems []string) {
		if skip != "" {
			notes = append(notes, fmt.Sprintf("%s %s: skipped: %s", kind, name, skip))
		}
		for _, p := range problems {
			notes = append(notes, fmt.Sprintf("%s %s: %s", kind, name, p))
		}
	}
	for _, o := range s.Services {
		svc, skip, problems := c.Service(o)
		note("Service", o.Namespace+"/"+o.Name, skip, problems)
		if svc != nil {
			store.SetService(svc)
		}
	}
	for _, o := range s.Slices {
		sl, skip, problems := c.Slice(o)
		note("EndpointSlice", o.Namespace+"/"+o.Name, skip, problems)
		if sl != nil {
			store.SetSlice(sl)
		}
	}
	for _, o := range s.CIDRs {
		cidr, problems := c.ServiceCIDR(o)
		note("ServiceCIDR", o.Name, "", problems)
		store.SetServiceCIDR(cidr)
	}
	store.SetSynced()
	store.Publish()
	return store, notes
}

// PlanText returns the plans of all families for people to read, and before
// them what was wrong with the objects.
func (s *Scenario) PlanText() string {
	var b strings.Builder
	_, notes := s.store()
	for _, n := range notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	for _, f := range s.Families() {
		if n := s.Facts(f).NodePorts; !n.All {
			fmt.Fprintf(&b, "%s node ports are served on %v\n", f, n.Addrs)
		}
		for _, p := range s.Set(f).Sorted() {
			writePlan(&b, f, p)
		}
	}
	return b.String()
}

func writePlan(b *strings.Builder, f model.Family, p *plan.Plan) {
	fmt.Fprintf(b, "%s %s %s\n", f, p.PortKey, p.Protocol)
	for _, fe := range p.Frontends {
		fmt.Fprintf(b, "  %s: pod %s, node %s, outside %s", frontendText(&fe), fe.FromPod, fe.FromNode, fe.FromOutside)
		if fe.Sources != nil {
			fmt.Fprintf(b, ", only from %v", fe.Sources)
		}
		b.WriteString("\n")
	}
	for _, c := range p.Lost {
		fmt.Fprintf(b, "  lost to %s: %s\n", c.Winner, frontendText(&c.Frontend))
	}
	list := func(name string, eps []plan.Endpoint) {
		if len(eps) == 0 {
			return
		}
		fmt.Fprintf(b, "  %s:", name)
		for _, e := range eps {
			fmt.Fprintf(b, " %s", e.AddrPort)
			if e.Local {
				b.WriteString("(here)")
			}
		}
		b.WriteString("\n")
	}
	list("cluster", p.Cluster)
	list("local", p.Local)
	if !slices.Equal(p.Serving, p.Cluster) {
		list("serving", p.Serving)
	}
	if p.Affinity > 0 {
		fmt.Fprintf(b, "  affinity %s\n", p.Affinity)
	}
	if p.HealthPort != 0 {
		fmt.Fprintf(b, "  health check port %d: %d here\n", p.HealthPort, p.HealthLocal)
	}
	for _, t := range p.Why.Texts() {
		fmt.Fprintf(b, "  because: %s\n", t)
	}
}

func frontendText(f *plan.Frontend) string {
	if f.Kind == plan.NodePort {
		return fmt.Sprintf("%s %d", f.Kind, f.Port)
	}
	return fmt.Sprintf("%s %s", f.Kind, netip.AddrPortFrom(f.Addr, f.Port))
}
