package convert

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Affinity timeouts, as the API server validates and defaults them.
const (
	defaultAffinity = 10800 // seconds
	maxAffinity     = 86400
)

// nobody stands for loadBalancerSourceRanges of which not one can be read: no
// client has the unspecified address. Dropping the ranges would open a load
// balancer that somebody wanted closed.
var nobody = []netip.Prefix{
	netip.PrefixFrom(netip.IPv4Unspecified(), 32),
	netip.PrefixFrom(netip.IPv6Unspecified(), 128),
}

// Service converts a Service. It returns nil and the reason for one that no
// node forwards for, and otherwise what could not be used of it.
func (c *Converter) Service(s *corev1.Service) (*model.Service, Skip, []string) {
	if _, ok := s.Labels[LabelServiceProxyName]; ok {
		return nil, SkipOtherProxy, nil
	}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return nil, SkipExternalName, nil
	}
	if s.Spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(s.Spec.ClusterIPs, corev1.ClusterIPNone) {
		return nil, SkipHeadless, nil
	}
	var p problems
	clusterIPs := clusterIPs(&s.Spec, &p)
	if len(clusterIPs) == 0 {
		return nil, SkipNoClusterIP, p.all()
	}
	svc := &model.Service{
		ServiceName:     model.ServiceName{Namespace: c.names.get(s.Namespace), Name: c.names.get(s.Name)},
		UID:             string(s.UID),
		Created:         s.CreationTimestamp.Time,
		ClusterIPs:      clusterIPs,
		ExternalIPs:     externalIPs(&s.Spec, &p),
		LoadBalancerIPs: loadBalancerIPs(&s.Status, &p),
		SourceRanges:    sourceRanges(&s.Spec, &p),
		Affinity:        affinity(&s.Spec, &p),
		InternalLocal:   s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
		ExternalLocal:   externalLocal(&s.Spec),
		Balance:         c.balance(s.Annotations),
		Ports:           c.servicePorts(&s.Spec, &p),
	}
	svc.HealthCheckNodePort = healthCheckNodePort(&s.Spec, svc.ExternalLocal, &p)
	return svc, "", p.all()
}

// clusterIPs returns at most one address of each family, the first.
func clusterIPs(spec *corev1.ServiceSpec, p *problems) []netip.Addr {
	list := spec.ClusterIPs
	if len(list) == 0 && spec.ClusterIP != "" {
		list = []string{spec.ClusterIP}
	}
	var out []netip.Addr
	for i, s := range list {
		a, ok := parseAddr(s)
		switch {
		case !ok || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
			p.add("spec.clusterIPs[%d]: %q is not a usable IP address", i, s)
		case slices.ContainsFunc(out, func(o netip.Addr) bool { return o.Is4() == a.Is4() }):
			p.add("spec.clusterIPs[%d]: %s is a second address of its family", i, s)
		default:
			out = append(out, a)
		}
	}
	return out
}

// externalIPs refuses what the API server's validation refuses: such an address
// would divert the node's own loopback or link-local traffic.
func externalIPs(spec *corev1.ServiceSpec, p *problems) []netip.Addr {
	var out []netip.Addr
	for i, s := range spec.ExternalIPs {
		a, ok := parseAddr(s)
		switch {
		case !ok || special(a):
			p.add("spec.externalIPs[%d]: %q is not a usable IP address", i, s)
		case slices.Contains(out, a):
			p.add("spec.externalIPs[%d]: %s is there twice", i, s)
		default:
			out = append(out, a)
		}
	}
	return out
}

// loadBalancerIPs returns the ingress IPs that the node is to accept itself:
// those with ipMode VIP or none (KEP-1860). The type of the Service does not
// matter: the status says what was allocated.
func loadBalancerIPs(status *corev1.ServiceStatus, p *problems) []netip.Addr {
	var out []netip.Addr
	for i, in := range status.LoadBalancer.Ingress {
		if in.IP == "" || (in.IPMode != nil && *in.IPMode != corev1.LoadBalancerIPModeVIP) {
			continue
		}
		a, ok := parseAddr(in.IP)
		switch {
		case !ok || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
			p.add("status.loadBalancer.ingress[%d].ip: %q is not a usable IP address", i, in.IP)
		case slices.Contains(out, a):
			p.add("status.loadBalancer.ingress[%d].ip: %s is there twice", i, in.IP)
		default:
			out = append(out, a)
		}
	}
	return out
}

func sourceRanges(spec *corev1.ServiceSpec, p *problems) []netip.Prefix {
	if len(spec.LoadBalancerSourceRanges) == 0 {
		return nil
	}
	var out []netip.Prefix
	for i, s := range spec.LoadBalancerSourceRanges {
		r, ok := parsePrefix(strings.TrimSpace(s)) // validation let blanks in
		switch {
		case !ok:
			p.add("spec.loadBalancerSourceRanges[%d]: %q is not a CIDR", i, s)
		case slices.Contains(out, r):
			p.add("spec.loadBalancerSourceRanges[%d]: %s is there twice", i, r)
		default:
			out = append(out, r)
		}
	}
	if len(out) == 0 {
		p.add("spec.loadBalancerSourceRanges: no usable range; nobody is let in")
		return nobody
	}
	return out
}

func affinity(spec *corev1.ServiceSpec, p *problems) time.Duration {
	switch spec.SessionAffinity {
	case corev1.ServiceAffinityClientIP:
	case corev1.ServiceAffinityNone, "":
		return 0
	default:
		p.add("spec.sessionAffinity: unknown value %q, read as None", spec.SessionAffinity)
		return 0
	}
	seconds := int32(defaultAffinity)
	if cfg := spec.SessionAffinityConfig; cfg != nil && cfg.ClientIP != nil && cfg.ClientIP.TimeoutSeconds != nil {
		given := *cfg.ClientIP.TimeoutSeconds
		if seconds = min(max(given, 1), maxAffinity); seconds != given {
			p.add("spec.sessionAffinityConfig.clientIP.timeoutSeconds: %d is not in 1..%d, read as %d", given, maxAffinity, seconds)
		}
	}
	return time.Duration(seconds) * time.Second
}

// externalLocal: the policy means something only where traffic can come from
// outside.
func externalLocal(spec *corev1.ServiceSpec) bool {
	if spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		return false
	}
	return spec.Type == corev1.ServiceTypeLoadBalancer || spec.Type == corev1.ServiceTypeNodePort || len(spec.ExternalIPs) > 0
}

func healthCheckNodePort(spec *corev1.ServiceSpec, externalLocal bool, p *problems) uint16 {
	if spec.Type != corev1.ServiceTypeLoadBalancer || !externalLocal {
		return 0
	}
	port, ok := parsePort(spec.HealthCheckNodePort)
	if !ok {
		p.add("spec.healthCheckNodePort: %d is not a port; no health check is served", spec.HealthCheckNodePort)
		return 0
	}
	return port
}

func (c *Converter) servicePorts(spec *corev1.ServiceSpec, p *problems) []model.ServicePort {
	out := make([]model.ServicePort, 0, len(spec.Ports))
	for i := range spec.Ports {
		sp := &spec.Ports[i]
		proto, ok := parseProtocol(sp.Protocol)
		if !ok {
			p.add("spec.ports[%d].protocol: unknown protocol %q", i, sp.Protocol)
			continue
		}
		number, ok := parsePort(sp.Port)
		if !ok {
			p.add("spec.ports[%d].port: %d is not a port", i, sp.Port)
			continue
		}
		port := model.ServicePort{Name: c.names.get(sp.Name), Protocol: proto, Port: number}
		if slices.ContainsFunc(out, func(o model.ServicePort) bool {
			return o.Protocol == proto && (o.Name == port.Name || o.Port == number)
		}) {
			p.add("spec.ports[%d]: %s port %q %d repeats an earlier name or number", i, proto, sp.Name, sp.Port)
			continue
		}
		port.NodePort = nodePort(i, sp, out, proto, p)
		out = append(out, port)
	}
	return out
}

func nodePort(i int, sp *corev1.ServicePort, earlier []model.ServicePort, proto model.Protocol, p *problems) uint16 {
	if sp.NodePort == 0 {
		return 0
	}
	number, ok := parsePort(sp.NodePort)
	if !ok {
		p.add("spec.ports[%d].nodePort: %d is not a port", i, sp.NodePort)
		return 0
	}
	if slices.ContainsFunc(earlier, func(o model.ServicePort) bool { return o.Protocol == proto && o.NodePort == number }) {
		p.add("spec.ports[%d].nodePort: %d is there twice", i, number)
		return 0
	}
	return number
}

// special addresses are those the API server refuses for endpoints and
// externalIPs (ValidateNonSpecialIP).
func special(a netip.Addr) bool {
	return a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast()
}
