package convert

import (
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Slice converts an EndpointSlice. It returns nil and the reason for one that
// is not used, and otherwise what could not be used of it.
//
// Unset conditions read as the API says: ready and serving unless told
// otherwise, and not terminating. Only an endpoint's first address counts.
func (c *Converter) Slice(s *discoveryv1.EndpointSlice) (*model.Slice, Skip, []string) {
	if _, ok := s.Labels[corev1.IsHeadlessService]; ok {
		return nil, SkipHeadlessSlice, nil
	}
	var family model.Family
	switch s.AddressType {
	case discoveryv1.AddressTypeIPv4:
		family = model.IPv4
	case discoveryv1.AddressTypeIPv6:
		family = model.IPv6
	case discoveryv1.AddressTypeFQDN:
		return nil, SkipFQDN, nil
	default:
		return nil, SkipAddressType, nil
	}
	service := s.Labels[discoveryv1.LabelServiceName]
	if service == "" {
		return nil, SkipNoService, nil
	}
	var p problems
	sl := &model.Slice{
		Namespace: c.names.get(s.Namespace),
		Name:      s.Name,
		Service:   c.names.get(service),
		Family:    family,
		Ports:     c.slicePorts(s.Ports, &p),
		Triggered: triggered(s.Annotations, &p),
	}
	sl.Endpoints, sl.Origins = c.endpoints(s.Endpoints, family, &p)
	return sl, "", p.all()
}

func (c *Converter) slicePorts(list []discoveryv1.EndpointPort, p *problems) []model.SlicePort {
	out := make([]model.SlicePort, 0, len(list))
	for i := range list {
		ep := &list[i]
		if ep.Name == nil || ep.Port == nil || *ep.Port == 0 {
			// kube-proxy ignores such ports; a nil number means "all ports", which
			// only consumers other than a Service proxy can use.
			continue
		}
		number, ok := parsePort(*ep.Port)
		if !ok {
			p.add("ports[%d].port: %d is not a port", i, *ep.Port)
			continue
		}
		var name corev1.Protocol
		if ep.Protocol != nil {
			name = *ep.Protocol
		}
		proto, ok := parseProtocol(name)
		if !ok {
			p.add("ports[%d].protocol: unknown protocol %q", i, name)
			continue
		}
		port := model.SlicePort{Name: c.names.get(*ep.Name), Protocol: proto, Port: number}
		if slices.Contains(out, port) {
			p.add("ports[%d]: %s port %q %d is there twice", i, proto, port.Name, number)
			continue
		}
		out = append(out, port)
	}
	return out
}

func (c *Converter) endpoints(list []discoveryv1.Endpoint, family model.Family, p *problems) ([]model.Endpoint, []model.Origin) {
	out := make([]model.Endpoint, 0, len(list))
	var origins []model.Origin
	if c.KeepOrigins {
		origins = make([]model.Origin, 0, len(list))
	}
	var known []*model.Hints // of this slice; usually one per zone
	for i := range list {
		e := &list[i]
		addr, ok := endpointAddr(i, e, family, p)
		if !ok {
			continue
		}
		me := model.Endpoint{
			Addr:        addr,
			Ready:       e.Conditions.Ready == nil || *e.Conditions.Ready,
			Serving:     e.Conditions.Serving == nil || *e.Conditions.Serving,
			Terminating: e.Conditions.Terminating != nil && *e.Conditions.Terminating,
		}
		if e.NodeName != nil {
			me.Node = c.names.get(*e.NodeName)
		}
		me.Hints, known = c.hints(e.Hints, known)
		out = append(out, me)
		if c.KeepOrigins {
			origins = append(origins, c.origin(e))
		}
	}
	if !slices.ContainsFunc(origins, func(o model.Origin) bool { return o != (model.Origin{}) }) {
		origins = nil
	}
	return slices.Clip(out), slices.Clip(origins)
}

// endpointAddr refuses what the API server's validation refuses: traffic to a
// loopback or link-local endpoint could reach services of the node itself.
func endpointAddr(i int, e *discoveryv1.Endpoint, family model.Family, p *problems) (netip.Addr, bool) {
	if len(e.Addresses) == 0 {
		p.add("endpoints[%d]: no address", i)
		return netip.Addr{}, false
	}
	s := e.Addresses[0]
	a, ok := parseAddr(s)
	switch {
	case !ok:
		p.add("endpoints[%d]: %q is not an IP address", i, s)
	case model.FamilyOf(a) != family:
		p.add("endpoints[%d]: %s is not an %s address", i, s, family)
	case special(a):
		p.add("endpoints[%d]: %s is not an address that an endpoint can have", i, s)
	default:
		return a, true
	}
	return netip.Addr{}, false
}

// hints converts an endpoint's hints, or finds equal ones among those already
// converted: endpoints of one zone share them.
func (c *Converter) hints(h *discoveryv1.EndpointHints, known []*model.Hints) (*model.Hints, []*model.Hints) {
	if h == nil || (len(h.ForZones) == 0 && len(h.ForNodes) == 0) {
		return nil, known
	}
	for _, k := range known {
		if slices.EqualFunc(k.Zones, h.ForZones, func(a string, b discoveryv1.ForZone) bool { return a == b.Name }) &&
			slices.EqualFunc(k.Nodes, h.ForNodes, func(a string, b discoveryv1.ForNode) bool { return a == b.Name }) {
			return k, known
		}
	}
	m := &model.Hints{}
	for _, z := range h.ForZones {
		m.Zones = append(m.Zones, c.names.get(z.Name))
	}
	for _, n := range h.ForNodes {
		m.Nodes = append(m.Nodes, c.names.get(n.Name))
	}
	if len(known) >= 16 {
		known = known[1:] // a search must not cost more than it saves (a hint per node)
	}
	return m, append(known, m)
}

func triggered(annotations map[string]string, p *problems) time.Time {
	s, ok := annotations[corev1.EndpointsLastChangeTriggerTime]
	if !ok {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		p.add("annotation %s: %q is not a time", corev1.EndpointsLastChangeTriggerTime, s)
		return time.Time{}
	}
	return t
}
