package plan

import (
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// choice is which endpoints a Service port uses on this node.
type choice struct {
	cluster, local, serving []Endpoint
	unready                 []netip.AddrPort // see Plan.Unready
	any                     bool             // some endpoint can be used, here or elsewhere
	why                     Reason
}

// target is where a policy leads: the set it names, or the verdict without one.
func (c choice) target(local bool) Target {
	switch {
	case !c.any:
		return Reject
	case !local && len(c.cluster) > 0:
		return Cluster
	case local && len(c.local) > 0:
		return Local
	case !local:
		return Reject
	}
	return Drop
}

// candidate is one endpoint of a Service port before policy. at points into an
// immutable Slice.
type candidate struct {
	addr   netip.AddrPort
	at     *model.Endpoint
	weight uint16
}

// candidates collects a port's endpoints over all slices, sorted by address.
// The same address can stand in two slices while it moves between them; the
// version that is not terminating wins, then a ready one, so that the result
// does not depend on the order of slices; of versions that differ in node,
// hints or origin only, which no controller writes, the first does.
//
// weights is nil where all endpoints weigh the same.
func candidates(key model.PortKey, epSlices []*model.Slice, family model.Family, weights *model.Weights) []candidate {
	n := 0
	for _, sl := range epSlices {
		n += len(sl.Endpoints)
	}
	out := make([]candidate, 0, n)
	for _, sl := range epSlices {
		if sl.Family != family {
			continue
		}
		for _, port := range sl.Ports {
			if port.Name != key.Port || port.Protocol != key.Protocol || port.Port == 0 {
				continue
			}
			for i := range sl.Endpoints {
				ep := &sl.Endpoints[i]
				if ep.Addr.IsValid() && model.FamilyOf(ep.Addr) == family {
					weight := uint16(1)
					if weights != nil {
						weight = weights.Of(sl.OriginOf(i))
					}
					out = append(out, candidate{netip.AddrPortFrom(ep.Addr, port.Port), ep, weight})
				}
			}
		}
	}
	slices.SortStableFunc(out, func(a, b candidate) int {
		if c := a.addr.Compare(b.addr); c != 0 {
			return c
		}
		return rank(b.at) - rank(a.at)
	})
	return slices.CompactFunc(out, func(a, b candidate) bool { return a.addr == b.addr })
}

func rank(e *model.Endpoint) int {
	r := 0
	if !e.Terminating {
		r += 4
	}
	if e.Ready {
		r += 2
	}
	if e.Serving {
		r++
	}
	return r
}

// chooseFor follows KEP-1669 (terminating endpoints), KEP-2433 and KEP-3015
// (topology hints) and the traffic policies: the Cluster set is needed by
// internal policy Cluster and by everything external, since pods and the node
// itself reach even policy Local frontends through it.
func chooseFor(svc *model.Service, key model.PortKey, epSlices []*model.Slice, facts *Facts, external bool) choice {
	all := candidates(key, epSlices, facts.Family, weightsOf(svc, facts))
	var c choice
	useCluster := !svc.InternalLocal || external
	useLocal := svc.InternalLocal || (svc.ExternalLocal && external)
	if svc.InternalLocal {
		c.why |= InternalLocal
	}
	if svc.ExternalLocal && external {
		c.why |= ExternalLocal
	}
	here := func(x candidate) bool { return x.at.Node != "" && x.at.Node == facts.NodeName }
	ready := func(x candidate) bool { return x.at.Ready }
	draining := func(x candidate) bool { return x.at.Serving && x.at.Terminating }

	c.serving = pick(all, facts, func(x candidate) bool { return ready(x) || draining(x) })
	if facts.Schedulers != nil {
		for _, x := range all {
			if !ready(x) && !draining(x) {
				c.unready = append(c.unready, x.addr)
			}
		}
	}
	usable, whyUsable := filterTopology(all, facts)
	cluster := usable
	if len(cluster) == 0 {
		if cluster = pick(all, facts, draining); len(cluster) > 0 {
			whyUsable = OnlyTerminating
		}
	}
	if useCluster {
		c.cluster = share(cluster, c.serving)
		c.why |= whyUsable
	}
	c.any = len(cluster) > 0
	if useLocal {
		c.local = pick(all, facts, func(x candidate) bool { return ready(x) && here(x) })
		if len(c.local) == 0 {
			if c.local = pick(all, facts, func(x candidate) bool { return draining(x) && here(x) }); len(c.local) > 0 {
				c.why |= OnlyTerminatingLocal
			}
		}
		if len(c.local) == 0 && c.any {
			c.why |= NoLocalEndpoints
		}
		c.local = share(c.local, c.serving)
	}
	if !c.any {
		c.why |= NoEndpoints
	}
	return c
}

// share returns whole where part has the same content, to keep it only once.
func share(part, whole []Endpoint) []Endpoint {
	if slices.Equal(part, whole) {
		return whole
	}
	return part
}

func pick(all []candidate, facts *Facts, keep func(candidate) bool) []Endpoint {
	n := 0
	for _, x := range all {
		if keep(x) {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	out := make([]Endpoint, 0, n)
	for _, x := range all {
		if keep(x) {
			out = append(out, Endpoint{x.addr, x.at.Node == "" || x.at.Node == facts.NodeName, x.weight})
		}
	}
	return out
}

// filterTopology returns the ready endpoints that the slices' hints leave for
// this node. Hints count only if every ready endpoint has one and at least one
// names us; nodes go before zones (PreferSameNode, then PreferSameZone). The
// Service's trafficDistribution is never read: the slice controller has turned
// it into hints.
func filterTopology(all []candidate, facts *Facts) ([]Endpoint, Reason) {
	ready := func(x candidate) bool { return x.at.Ready }
	type tally struct{ given, ours int }
	var total int
	var nodes, zones tally
	for _, x := range all {
		if !x.at.Ready {
			continue
		}
		total++
		h := x.at.Hints
		if h == nil {
			continue
		}
		if len(h.Nodes) > 0 {
			nodes.given++
			if slices.Contains(h.Nodes, facts.NodeName) {
				nodes.ours++
			}
		}
		if len(h.Zones) > 0 {
			zones.given++
			if facts.Zone != "" && slices.Contains(h.Zones, facts.Zone) {
				zones.ours++
			}
		}
	}
	switch {
	case total == 0:
		return nil, 0
	case nodes.given == total && nodes.ours > 0:
		return pick(all, facts, func(x candidate) bool {
			return x.at.Ready && slices.Contains(x.at.Hints.Nodes, facts.NodeName)
		}), SameNode
	case zones.given == total && zones.ours > 0:
		return pick(all, facts, func(x candidate) bool {
			return x.at.Ready && slices.Contains(x.at.Hints.Zones, facts.Zone)
		}), SameZone
	case nodes.given == 0 && zones.given == 0:
		return pick(all, facts, ready), 0
	case zones.given == total || nodes.given == total:
		return pick(all, facts, ready), HintElsewhere
	}
	return pick(all, facts, ready), HintMissing
}

// readyLocalAddresses counts what healthCheckNodePort reports: the distinct
// addresses of ready endpoints on this node, over all ports of the Service.
// Terminating endpoints do not count, so that load balancers leave in time.
func readyLocalAddresses(svc *model.Service, epSlices []*model.Slice, facts *Facts) int {
	seen := map[netip.Addr]bool{}
	for _, port := range svc.Ports {
		key := model.PortKey{Namespace: svc.Namespace, Name: svc.Name, Port: port.Name, Protocol: port.Protocol}
		for _, x := range candidates(key, epSlices, facts.Family, nil) {
			if x.at.Ready && x.at.Node != "" && x.at.Node == facts.NodeName {
				seen[x.addr.Addr()] = true
			}
		}
	}
	return len(seen)
}
