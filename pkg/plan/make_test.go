package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/pkg/model"
)

const self = "node-0"

// facts of a node in zone z0 with a local detector, changed as the test needs.
func factsWith(change ...func(*Facts)) *Facts {
	f := &Facts{Family: model.IPv4, NodeName: self, Zone: "z0", NodeIP: netip.MustParseAddr("192.168.0.1"), DetectLocal: true,
		NodePorts: NodePortAddresses{All: true}}
	for _, c := range change {
		c(f)
	}
	return f
}

func noDetector(f *Facts)    { f.DetectLocal = false }
func masqueradeAll(f *Facts) { f.MasqueradeAll = true }

// service is a LoadBalancer Service with every kind of frontend.
func service(change ...func(*model.Service)) *model.Service {
	s := &model.Service{
		ServiceName:     model.ServiceName{Namespace: "ns", Name: "svc"},
		Created:         time.Unix(100, 0),
		ClusterIPs:      addrs("10.96.0.1", "fd00::1"),
		ExternalIPs:     addrs("203.0.113.1", "2001:db8::1"),
		LoadBalancerIPs: addrs("198.51.100.1", "2001:db8::2"),
		Ports:           []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: 80, NodePort: 30080}},
	}
	for _, c := range change {
		c(s)
	}
	return s
}

func internalLocal(s *model.Service) { s.InternalLocal = true }
func externalLocal(s *model.Service) { s.ExternalLocal = true }

// clusterIPOnly takes away what can be reached from outside.
func clusterIPOnly(s *model.Service) {
	s.ExternalIPs, s.LoadBalancerIPs = nil, nil
	s.Ports = slices.Clone(s.Ports)
	for i := range s.Ports {
		s.Ports[i].NodePort = 0
	}
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(list ...string) []netip.Prefix {
	out := []netip.Prefix{}
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// slice has endpoints written as "ADDRESS@NODE STATE HINT...": the state is
// ready, draining, unready or gone (terminating and not serving), a hint is
// zone=Z or node=N.
func slice(endpoints ...string) *model.Slice {
	sl := &model.Slice{Namespace: "ns", Name: "slice", Service: "svc", Family: model.IPv4,
		Ports: []model.SlicePort{{Name: "http", Protocol: model.TCP, Port: 8080}}}
	for _, e := range endpoints {
		sl.Endpoints = append(sl.Endpoints, endpoint(e))
	}
	return sl
}

func endpoint(text string) model.Endpoint {
	words := strings.Fields(text)
	addr, node, _ := strings.Cut(words[0], "@")
	e := model.Endpoint{Addr: netip.MustParseAddr(addr), Node: node}
	for _, w := range words[1:] {
		kind, value, _ := strings.Cut(w, "=")
		if kind == "zone" || kind == "node" {
			if e.Hints == nil {
				e.Hints = &model.Hints{}
			}
		}
		switch kind {
		case "ready":
			e.Ready, e.Serving = true, true
		case "draining":
			e.Serving, e.Terminating = true, true
		case "unready":
		case "gone":
			e.Terminating = true
		case "zone":
			e.Hints.Zones = append(e.Hints.Zones, value)
		case "node":
			e.Hints.Nodes = append(e.Hints.Nodes, value)
		default:
			panic("BUG: unknown word " + w)
		}
	}
	return e
}

// list prints endpoints' addresses, those that may be local with a star.
func list(eps []Endpoint) string {
	var out []string
	for _, e := range eps {
		s := e.Addr().String()
		if e.Local {
			s += "*"
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func routesOf(t *testing.T, p *Plan, kind Kind) string {
	t.Helper()
	for _, f := range p.Frontends {
		if f.Kind == kind {
			return fmt.Sprintf("pod %s, node %s, outside %s", f.FromPod, f.FromNode, f.FromOutside)
		}
	}
	t.Fatalf("no frontend of kind %s in %+v", kind, p.Frontends)
	return ""
}

func one(t *testing.T, plans []*Plan) *Plan {
	t.Helper()
	if len(plans) != 1 {
		t.Fatalf("%d plans, want 1", len(plans))
	}
	return plans[0]
}

func TestTrafficPolicies(t *testing.T) {
	const (
		here    = "10.0.0.1@node-0"
		there   = "10.0.0.2@node-1"
		nowhere = "10.0.0.3" // no node name
	)
	for _, tc := range []struct {
		name           string
		service        []func(*model.Service)
		facts          []func(*Facts)
		endpoints      []string
		cluster, local string
		internal       string // routes of the ClusterIP
		external       string // of the node port, external and load balancer IPs; "" if there are none
		why            []string
	}{
		{
			name: "no endpoints", internal: "pod reject, node reject, outside reject", external: "pod reject, node reject, outside reject",
			why: []string{"no endpoints"},
		},
		{
			name: "only unusable endpoints", endpoints: []string{here + " unready", there + " gone"},
			internal: "pod reject, node reject, outside reject", external: "pod reject, node reject, outside reject",
			why: []string{"no endpoints"},
		},
		{
			name: "ready here and there", endpoints: []string{here + " ready", there + " ready"},
			cluster:  "10.0.0.1* 10.0.0.2",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
		},
		{
			name: "an endpoint of an unknown node can be here, but is not local", endpoints: []string{nowhere + " ready"},
			service:  []func(*model.Service){externalLocal},
			cluster:  "10.0.0.3*",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster, node cluster+masquerade, outside drop",
			why:      []string{"no endpoint on this node", "externalTrafficPolicy Local"},
		},
		{
			name: "no detector", facts: []func(*Facts){noDetector}, endpoints: []string{there + " ready"},
			cluster:  "10.0.0.2",
			internal: "pod cluster, node cluster, outside cluster",
			external: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
		},
		{
			name: "masqueradeAll", facts: []func(*Facts){masqueradeAll}, endpoints: []string{there + " ready"},
			cluster:  "10.0.0.2",
			internal: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
		},
		{
			name: "masqueradeAll needs no detector", facts: []func(*Facts){masqueradeAll, noDetector}, endpoints: []string{there + " ready"},
			cluster:  "10.0.0.2",
			internal: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
		},
		{
			name: "a refusal masquerades nothing", facts: []func(*Facts){masqueradeAll},
			internal: "pod reject, node reject, outside reject", external: "pod reject, node reject, outside reject",
			why: []string{"no endpoints"},
		},
		{
			name: "no ready endpoint, terminating ones serve", endpoints: []string{here + " unready", there + " draining"},
			cluster:  "10.0.0.2",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
			why:      []string{"no ready endpoint, serving terminating ones are used"},
		},
		{
			name: "terminating ones do not serve beside a ready one", endpoints: []string{here + " draining", there + " ready"},
			cluster:  "10.0.0.2",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
		},
		{
			name: "external Local, endpoints here and there", service: []func(*model.Service){externalLocal},
			endpoints: []string{here + " ready", there + " ready"},
			cluster:   "10.0.0.1* 10.0.0.2", local: "10.0.0.1*",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster, node cluster+masquerade, outside local",
			why:      []string{"externalTrafficPolicy Local"},
		},
		{
			name: "external Local, none here", service: []func(*model.Service){externalLocal}, endpoints: []string{there + " ready"},
			cluster:  "10.0.0.2",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster, node cluster+masquerade, outside drop",
			why:      []string{"no endpoint on this node", "externalTrafficPolicy Local"},
		},
		{
			name: "external Local, none here, no detector: pods are outside", service: []func(*model.Service){externalLocal},
			facts: []func(*Facts){noDetector}, endpoints: []string{there + " ready"},
			cluster:  "10.0.0.2",
			internal: "pod cluster, node cluster, outside cluster",
			external: "pod drop, node cluster+masquerade, outside drop",
			why:      []string{"no endpoint on this node", "externalTrafficPolicy Local"},
		},
		{
			name: "external Local with masqueradeAll keeps clients' addresses", service: []func(*model.Service){externalLocal},
			facts: []func(*Facts){masqueradeAll}, endpoints: []string{here + " ready"},
			cluster: "10.0.0.1*", local: "10.0.0.1*",
			internal: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster, node cluster+masquerade, outside local",
			why:      []string{"externalTrafficPolicy Local"},
		},
		{
			name: "external Local, draining here, ready there: each set falls back alone", service: []func(*model.Service){externalLocal},
			endpoints: []string{here + " draining", there + " ready"},
			cluster:   "10.0.0.2", local: "10.0.0.1*",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster, node cluster+masquerade, outside local",
			why:      []string{"no ready endpoint on this node, serving terminating ones are used", "externalTrafficPolicy Local"},
		},
		{
			name: "external Local, all draining", service: []func(*model.Service){externalLocal},
			endpoints: []string{here + " draining", there + " draining"},
			cluster:   "10.0.0.1* 10.0.0.2", local: "10.0.0.1*",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
			external: "pod cluster, node cluster+masquerade, outside local",
			why: []string{"no ready endpoint, serving terminating ones are used",
				"no ready endpoint on this node, serving terminating ones are used", "externalTrafficPolicy Local"},
		},
		{
			name: "external Local, no endpoints at all", service: []func(*model.Service){externalLocal},
			internal: "pod reject, node reject, outside reject", external: "pod reject, node reject, outside reject",
			why: []string{"no endpoints", "externalTrafficPolicy Local"},
		},
		{
			name: "external Local means nothing without anything external", service: []func(*model.Service){externalLocal, clusterIPOnly},
			endpoints: []string{here + " ready", there + " ready"}, cluster: "10.0.0.1* 10.0.0.2",
			internal: "pod cluster, node cluster+masquerade, outside cluster+masquerade",
		},
		{
			name: "internal Local, endpoint here", service: []func(*model.Service){internalLocal, clusterIPOnly},
			endpoints: []string{here + " ready", there + " ready"}, local: "10.0.0.1*",
			internal: "pod local, node local+masquerade, outside local+masquerade",
			why:      []string{"internalTrafficPolicy Local"},
		},
		{
			name: "internal Local, none here: dropped, not refused", service: []func(*model.Service){internalLocal, clusterIPOnly},
			endpoints: []string{there + " ready"},
			internal:  "pod drop, node drop, outside drop",
			why:       []string{"no endpoint on this node", "internalTrafficPolicy Local"},
		},
		{
			name: "internal Local, only draining ones elsewhere: dropped, too", service: []func(*model.Service){internalLocal, clusterIPOnly},
			endpoints: []string{there + " draining"},
			internal:  "pod drop, node drop, outside drop",
			why:       []string{"no endpoint on this node", "internalTrafficPolicy Local"},
		},
		{
			name: "internal Local, none anywhere: refused", service: []func(*model.Service){internalLocal, clusterIPOnly},
			internal: "pod reject, node reject, outside reject",
			why:      []string{"no endpoints", "internalTrafficPolicy Local"},
		},
		{
			name: "internal Local, external Cluster", service: []func(*model.Service){internalLocal},
			endpoints: []string{there + " ready"}, cluster: "10.0.0.2",
			internal: "pod drop, node drop, outside drop",
			external: "pod cluster+masquerade, node cluster+masquerade, outside cluster+masquerade",
			why:      []string{"no endpoint on this node", "internalTrafficPolicy Local"},
		},
		{
			name: "both Local", service: []func(*model.Service){internalLocal, externalLocal},
			endpoints: []string{here + " ready", there + " ready"}, cluster: "10.0.0.1* 10.0.0.2", local: "10.0.0.1*",
			internal: "pod local, node local+masquerade, outside local+masquerade",
			external: "pod cluster, node cluster+masquerade, outside local",
			why:      []string{"internalTrafficPolicy Local", "externalTrafficPolicy Local"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			svc := service(tc.service...)
			p := one(t, Make(svc, []*model.Slice{slice(tc.endpoints...)}, factsWith(tc.facts...)))
			if got := list(p.Cluster); got != tc.cluster {
				t.Errorf("Cluster: %q, want %q", got, tc.cluster)
			}
			if got := list(p.Local); got != tc.local {
				t.Errorf("Local: %q, want %q", got, tc.local)
			}
			if got := routesOf(t, p, ClusterIP); got != tc.internal {
				t.Errorf("ClusterIP:\n got %s\nwant %s", got, tc.internal)
			}
			kinds := []Kind{ExternalIP, LoadBalancer, NodePort}
			if tc.external == "" {
				kinds = nil
				if len(p.Frontends) != 1 {
					t.Errorf("%d frontends, want the ClusterIP only", len(p.Frontends))
				}
			}
			for _, k := range kinds {
				if got := routesOf(t, p, k); got != tc.external {
					t.Errorf("%s:\n got %s\nwant %s", k, got, tc.external)
				}
			}
			if got := p.Why.Texts(); !slices.Equal(got, tc.why) {
				t.Errorf("why %q, want %q", got, tc.why)
			}
		})
	}
}

func TestTopology(t *testing.T) {
	for _, tc := range []struct {
		name      string
		zone      string // of the node; "" for none
		service   []func(*model.Service)
		endpoints []string
		cluster   string
		why       Reason
	}{
		{"no hints", "z0", nil, []string{"10.0.0.1@a ready", "10.0.0.2@b ready"}, "10.0.0.1 10.0.0.2", 0},
		{"zone", "z0", nil, []string{"10.0.0.1@a ready zone=z0", "10.0.0.2@b ready zone=z1"}, "10.0.0.1", SameZone},
		{"several zones a hint", "z0", nil, []string{"10.0.0.1@a ready zone=z1 zone=z0", "10.0.0.2@b ready zone=z0", "10.0.0.3@c ready zone=z1"},
			"10.0.0.1 10.0.0.2", SameZone},
		{"zone, one endpoint without a hint", "z0", nil, []string{"10.0.0.1@a ready zone=z0", "10.0.0.2@b ready"}, "10.0.0.1 10.0.0.2", HintMissing},
		{"zone, none for ours", "z0", nil, []string{"10.0.0.1@a ready zone=z1", "10.0.0.2@b ready zone=z2"}, "10.0.0.1 10.0.0.2", HintElsewhere},
		{"zone, ours unknown", "", nil, []string{"10.0.0.1@a ready zone=z0", "10.0.0.2@b ready zone="}, "10.0.0.1 10.0.0.2", HintElsewhere},
		{"node", "z0", nil, []string{"10.0.0.1@node-0 ready zone=z0 node=node-0", "10.0.0.2@b ready zone=z0 node=b"}, "10.0.0.1*", SameNode},
		{"node goes before zone", "z0", nil, []string{"10.0.0.1@node-0 ready zone=z1 node=node-0", "10.0.0.2@b ready zone=z0 node=b"}, "10.0.0.1*", SameNode},
		{"node, none for us, then zone", "z0", nil, []string{"10.0.0.1@a ready zone=z0 node=a", "10.0.0.2@b ready zone=z1 node=b"}, "10.0.0.1", SameZone},
		{"node, one without, then zone", "z0", nil, []string{"10.0.0.1@node-0 ready zone=z1 node=node-0", "10.0.0.2@b ready zone=z0"}, "10.0.0.2", SameZone},
		{"node, none for us, no zones", "z0", nil, []string{"10.0.0.1@a ready node=a", "10.0.0.2@b ready node=b"}, "10.0.0.1 10.0.0.2", HintElsewhere},
		{"node, one without, no zones", "z0", nil, []string{"10.0.0.1@node-0 ready node=node-0", "10.0.0.2@b ready"}, "10.0.0.1* 10.0.0.2", HintMissing},
		{"node for one, zone for the other", "z0", nil, []string{"10.0.0.1@node-0 ready node=node-0", "10.0.0.2@b ready zone=z0"},
			"10.0.0.1* 10.0.0.2", HintMissing},
		{"hints that are there but empty", "z0", nil, []string{"10.0.0.1@a ready zone=z0", "10.0.0.2@b ready emptyhints"}, "10.0.0.1 10.0.0.2", HintMissing},
		{"endpoints that are not ready need no hint", "z0", nil,
			[]string{"10.0.0.1@a ready zone=z0", "10.0.0.2@b ready zone=z1", "10.0.0.3@c draining", "10.0.0.4@d unready"}, "10.0.0.1", SameZone},
		{"terminating ones are used without topology", "z0", nil,
			[]string{"10.0.0.1@a draining zone=z0", "10.0.0.2@b draining zone=z1"}, "10.0.0.1 10.0.0.2", OnlyTerminating},
		{"the Local set ignores topology", "z0", []func(*model.Service){externalLocal},
			[]string{"10.0.0.1@node-0 ready zone=z1", "10.0.0.2@b ready zone=z0"}, "10.0.0.2", SameZone | ExternalLocal},
		{"a port that uses the Local set only has no reason from topology", "z0", []func(*model.Service){internalLocal, clusterIPOnly},
			[]string{"10.0.0.1@node-0 ready zone=z1", "10.0.0.2@b ready zone=z0"}, "", InternalLocal},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sl := &model.Slice{Namespace: "ns", Name: "s", Service: "svc", Family: model.IPv4,
				Ports: []model.SlicePort{{Name: "http", Protocol: model.TCP, Port: 8080}}}
			for _, text := range tc.endpoints {
				text, empty := strings.CutSuffix(text, " emptyhints")
				e := endpoint(text)
				if empty {
					e.Hints = &model.Hints{}
				}
				sl.Endpoints = append(sl.Endpoints, e)
			}
			p := one(t, Make(service(tc.service...), []*model.Slice{sl}, factsWith(func(f *Facts) { f.Zone = tc.zone })))
			if got := list(p.Cluster); got != tc.cluster {
				t.Errorf("Cluster: %q, want %q", got, tc.cluster)
			}
			if p.Why != tc.why {
				t.Errorf("why %q, want %q", p.Why.Texts(), tc.why.Texts())
			}
			if (tc.service != nil) != (list(p.Local) == "10.0.0.1*") {
				t.Errorf("Local: %q", list(p.Local))
			}
		})
	}
}

func TestSourceRanges(t *testing.T) {
	v6 := func(f *Facts) { f.Family, f.NodeIP = model.IPv6, netip.MustParseAddr("fd01::1") }
	for _, tc := range []struct {
		name   string
		ranges []netip.Prefix
		facts  []func(*Facts)
		want   []netip.Prefix // nil: anybody
	}{
		{"none", nil, nil, nil},
		{"one", prefixes("10.1.0.0/16"), nil, prefixes("10.1.0.0/16")},
		{"sorted, masked, once", prefixes("10.2.3.4/16", "10.1.0.0/16", "10.2.0.0/16"), nil, prefixes("10.1.0.0/16", "10.2.0.0/16")},
		{"the node is covered: it may come from the VIP", prefixes("192.168.0.0/24"), nil, prefixes("192.168.0.0/24", "198.51.100.1/32")},
		{"covered twice", prefixes("192.168.0.0/24", "192.168.0.1/32"), nil, prefixes("192.168.0.0/24", "192.168.0.1/32", "198.51.100.1/32")},
		{"no node address", prefixes("192.168.0.0/24"), []func(*Facts){func(f *Facts) { f.NodeIP = netip.Addr{} }}, prefixes("192.168.0.0/24")},
		{"everybody", prefixes("10.1.0.0/16", "0.0.0.0/0"), nil, nil},
		{"everybody of the other family only", prefixes("10.1.0.0/16", "::/0"), nil, prefixes("10.1.0.0/16")},
		{"both families", prefixes("10.1.0.0/16", "fd02::/64"), nil, prefixes("10.1.0.0/16")},
		{"both families, seen from IPv6", prefixes("10.1.0.0/16", "fd02::/64"), []func(*Facts){v6}, prefixes("fd02::/64")},
		{"IPv6 node covered", prefixes("fd01::/64"), []func(*Facts){v6}, prefixes("2001:db8::2/128", "fd01::/64")},
		{"the other family only is no limit, as in kube-proxy", prefixes("fd02::/64"), nil, nil},
		{"nobody", prefixes("0.0.0.0/32", "::/128"), nil, prefixes("0.0.0.0/32")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := one(t, Make(service(func(s *model.Service) { s.SourceRanges = tc.ranges }), nil, factsWith(tc.facts...)))
			for _, f := range p.Frontends {
				want := tc.want
				if f.Kind != LoadBalancer {
					want = nil // ranges limit load balancer addresses only
				}
				if (f.Sources == nil) != (want == nil) || !slices.Equal(f.Sources, want) {
					t.Errorf("%s: sources %v, want %v", f.Kind, f.Sources, want)
				}
			}
		})
	}
}

func frontends(p *Plan) []string {
	var out []string
	for _, f := range p.Frontends {
		at := "any"
		if f.Addr.IsValid() {
			at = f.Addr.String()
		}
		out = append(out, fmt.Sprintf("%s %s %d", f.Kind, at, f.Port))
	}
	return out
}

func TestFrontends(t *testing.T) {
	for _, tc := range []struct {
		name    string
		service []func(*model.Service)
		facts   []func(*Facts)
		want    []string
	}{
		{"all kinds", nil, nil,
			[]string{"clusterIP 10.96.0.1 80", "externalIP 203.0.113.1 80", "loadBalancer 198.51.100.1 80", "nodePort any 30080"}},
		{"IPv6", nil, []func(*Facts){func(f *Facts) { f.Family = model.IPv6 }},
			[]string{"clusterIP fd00::1 80", "externalIP 2001:db8::1 80", "loadBalancer 2001:db8::2 80", "nodePort any 30080"}},
		{"externalIPs refused", nil, []func(*Facts){func(f *Facts) { f.RefuseExternalIPs = true }},
			[]string{"clusterIP 10.96.0.1 80", "loadBalancer 198.51.100.1 80", "nodePort any 30080"}},
		{"one address in two fields", []func(*model.Service){func(s *model.Service) {
			s.ExternalIPs = addrs("203.0.113.1", "10.96.0.1", "203.0.113.1")
			s.LoadBalancerIPs = addrs("203.0.113.1", "198.51.100.7")
		}}, nil, []string{"clusterIP 10.96.0.1 80", "externalIP 203.0.113.1 80", "loadBalancer 198.51.100.7 80", "nodePort any 30080"}},
		{"unusable addresses", []func(*model.Service){func(s *model.Service) {
			s.ExternalIPs = []netip.Addr{{}, netip.IPv4Unspecified()}
			s.LoadBalancerIPs = []netip.Addr{{}}
		}}, nil, []string{"clusterIP 10.96.0.1 80", "nodePort any 30080"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := one(t, Make(service(tc.service...), nil, factsWith(tc.facts...)))
			if diff := cmp.Diff(tc.want, frontends(p)); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("refused externalIPs do not make a Service external", func(t *testing.T) {
		svc := service(externalLocal, clusterIPOnly, func(s *model.Service) { s.ExternalIPs = addrs("203.0.113.1") })
		eps := []*model.Slice{slice("10.0.0.1@node-0 ready")}
		if p := one(t, Make(svc, eps, factsWith())); p.Why != ExternalLocal || list(p.Local) == "" {
			t.Errorf("honoured: why %q, local %q", p.Why.Texts(), list(p.Local))
		}
		if p := one(t, Make(svc, eps, factsWith(func(f *Facts) { f.RefuseExternalIPs = true }))); p.Why != 0 || p.Local != nil {
			t.Errorf("refused: why %q, local %q", p.Why.Texts(), list(p.Local))
		}
	})
	t.Run("no ClusterIP of the family", func(t *testing.T) {
		svc := service(func(s *model.Service) { s.ClusterIPs = addrs("fd00::1") })
		if got := Make(svc, nil, factsWith()); len(got) != 0 {
			t.Errorf("%d plans, want none: external addresses alone are ignored", len(got))
		}
	})
	t.Run("no Service", func(t *testing.T) {
		if got := Make(nil, []*model.Slice{slice("10.0.0.1@node-0 ready")}, factsWith()); len(got) != 0 {
			t.Errorf("%d plans, want none", len(got))
		}
	})
}

func TestPortsAreMatchedByNameAndProtocol(t *testing.T) {
	svc := service(func(s *model.Service) {
		s.Affinity = time.Hour
		s.Ports = []model.ServicePort{
			{Name: "dns", Protocol: model.UDP, Port: 53}, {Name: "dns", Protocol: model.TCP, Port: 53},
			{Name: "web", Protocol: model.TCP, Port: 80, NodePort: 30080}, {Name: "sigtran", Protocol: model.SCTP, Port: 80}, {Name: "alone", Protocol: model.TCP, Port: 1},
		}
	})
	old := slice("10.0.0.1@node-0 ready")
	old.Ports = []model.SlicePort{{Name: "dns", Protocol: model.UDP, Port: 5353}, {Name: "dns", Protocol: model.TCP, Port: 5353}, {Name: "web", Protocol: model.TCP, Port: 8080}}
	fresh := slice("10.0.0.2@node-0 ready") // a named targetPort has another number here
	fresh.Ports = []model.SlicePort{{Name: "web", Protocol: model.TCP, Port: 9090}, {Name: "sigtran", Protocol: model.SCTP, Port: 7}}
	got := map[string]string{}
	for _, p := range Make(svc, []*model.Slice{old, fresh}, factsWith()) {
		if p.Affinity != time.Hour || p.Protocol != p.PortKey.Protocol {
			t.Errorf("%s: affinity %v, protocol %v", p.PortKey, p.Affinity, p.Protocol)
		}
		got[p.PortKey.String()+" "+p.Protocol.String()] = fmt.Sprint(p.Cluster)
	}
	want := map[string]string{
		"ns/svc:dns udp":      "[10.0.0.1:5353]",
		"ns/svc:dns tcp":      "[10.0.0.1:5353]",
		"ns/svc:web tcp":      "[10.0.0.1:8080 10.0.0.2:9090]",
		"ns/svc:sigtran sctp": "[10.0.0.2:7]",
		"ns/svc:alone tcp":    "[]",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestOneAddressInTwoSlices(t *testing.T) {
	for _, tc := range []struct{ a, b, cluster string }{
		{"10.0.0.1@node-0 draining", "10.0.0.1@node-0 ready", "10.0.0.1*"},
		{"10.0.0.1@node-0 gone", "10.0.0.1@node-0 draining", "10.0.0.1*"},
		{"10.0.0.1@node-0 draining", "10.0.0.1@node-0 unready", ""}, // the version that does not terminate wins, ready or not
		{"10.0.0.1@node-0 ready", "10.0.0.1@node-0 unready", "10.0.0.1*"},
	} {
		for _, both := range [][]string{{tc.a, tc.b}, {tc.b, tc.a}} {
			p := one(t, Make(service(), []*model.Slice{slice(both[0]), slice(both[1])}, factsWith()))
			if got := list(p.Cluster); got != tc.cluster {
				t.Errorf("%q: Cluster %q, want %q", both, got, tc.cluster)
			}
		}
	}
}

func TestServing(t *testing.T) {
	svc := service(internalLocal, clusterIPOnly)
	p := one(t, Make(svc, []*model.Slice{slice("10.0.0.1@b ready zone=z9", "10.0.0.2@b draining", "10.0.0.3@node-0 unready", "10.0.0.4@node-0 gone", "10.0.0.5 ready")}, factsWith()))
	if got, want := list(p.Serving), "10.0.0.1 10.0.0.2 10.0.0.5*"; got != want {
		t.Errorf("Serving %q, want %q: policy and topology must not count", got, want)
	}
}

func TestHealth(t *testing.T) {
	lb := func(s *model.Service) {
		s.ExternalLocal, s.HealthCheckNodePort = true, 32000
		s.Ports = append(s.Ports, model.ServicePort{Name: "https", Protocol: model.TCP, Port: 443})
	}
	eps := slice("10.0.0.1@node-0 ready", "10.0.0.2@node-0 ready", "10.0.0.3@node-0 draining", "10.0.0.4@node-1 ready", "10.0.0.5 ready")
	eps.Ports = append(eps.Ports, model.SlicePort{Name: "https", Protocol: model.TCP, Port: 8443})
	plans := Make(service(lb), []*model.Slice{eps}, factsWith())
	if len(plans) != 2 {
		t.Fatalf("%d plans", len(plans))
	}
	for _, p := range plans {
		if p.HealthPort != 32000 || p.HealthLocal != 2 {
			t.Errorf("%s: port %d with %d endpoints, want 32000 with 2: each address once, ready and here", p.PortKey, p.HealthPort, p.HealthLocal)
		}
	}
	if p := one(t, Make(service(), []*model.Slice{slice("10.0.0.1@node-0 ready")}, factsWith())); p.HealthPort != 0 || p.HealthLocal != 0 {
		t.Errorf("without a health port: %d, %d", p.HealthPort, p.HealthLocal)
	}
}

func TestImportant(t *testing.T) {
	for name, want := range map[model.ServiceName]bool{
		{Namespace: "default", Name: "kubernetes"}: true, {Namespace: "kube-system", Name: "kube-dns"}: true,
		{Namespace: "default", Name: "web"}: false, {Namespace: "ns", Name: "kubernetes"}: false,
	} {
		if p := one(t, Make(service(func(s *model.Service) { s.ServiceName = name }), nil, factsWith())); p.Important != want {
			t.Errorf("%s: important %v", name, p.Important)
		}
	}
}

func TestBrokenInput(t *testing.T) {
	t.Run("ports", func(t *testing.T) {
		svc := service(func(s *model.Service) {
			s.Ports = []model.ServicePort{{Name: "zero", Protocol: model.TCP}, {Name: "http", Protocol: model.TCP, Port: 80, NodePort: 30080},
				{Name: "http", Protocol: model.TCP, Port: 81}, {Name: "http", Protocol: model.UDP, Port: 80}}
		})
		var got []string
		for _, p := range Make(svc, nil, factsWith()) {
			got = append(got, fmt.Sprint(p.PortKey, " ", p.Protocol, " ", p.Frontends[0].Port))
		}
		if want := []string{"ns/svc:http tcp 80", "ns/svc:http udp 80"}; !slices.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	})
	t.Run("slices", func(t *testing.T) {
		mixed := slice("fd00::7@node-0 ready", "10.0.0.1@node-0 ready", "::ffff:10.0.0.2@node-0 ready")
		mixed.Endpoints = append(mixed.Endpoints, model.Endpoint{Ready: true, Serving: true})
		other := slice("10.0.0.9@node-0 ready")
		other.Family = model.IPv6
		zero := slice("10.0.0.8@node-0 ready")
		zero.Ports[0].Port = 0
		p := one(t, Make(service(), []*model.Slice{mixed, other, zero, {Family: model.IPv4}}, factsWith()))
		if got, want := list(p.Cluster), "10.0.0.1*"; got != want {
			t.Errorf("Cluster %q, want %q", got, want)
		}
	})
	t.Run("the node itself", func(t *testing.T) {
		p := one(t, Make(service(), []*model.Slice{slice("192.168.0.1@node-0 ready")}, factsWith()))
		if got, want := list(p.Cluster), "192.168.0.1*"; got != want {
			t.Errorf("Cluster %q, want %q", got, want)
		}
	})
	t.Run("40,000 endpoints, each twice", func(t *testing.T) {
		sl := slice()
		for i := range 80000 {
			a := netip.AddrFrom4([4]byte{10, 1, byte(i % 40000 >> 8), byte(i % 40000)})
			sl.Endpoints = append(sl.Endpoints, model.Endpoint{Addr: a, Node: "node-1", Ready: true, Serving: true})
		}
		p := one(t, Make(service(), []*model.Slice{sl}, factsWith()))
		if len(p.Cluster) != 40000 || !slices.IsSortedFunc(p.Cluster, func(a, b Endpoint) int { return a.Compare(b.AddrPort) }) {
			t.Errorf("%d endpoints", len(p.Cluster))
		}
		if &p.Cluster[0] != &p.Serving[0] {
			t.Error("two equal sets are kept twice")
		}
	})
}

// Every field of a plan must count: a field that Equal forgets is a change that
// never reaches the kernel.
func TestEqual(t *testing.T) {
	make := func(change func(*model.Service), facts ...func(*Facts)) *Plan {
		s := service(externalLocal)
		s.UID, s.HealthCheckNodePort = "1", 32000
		if change != nil {
			change(s)
		}
		return Make(s, []*model.Slice{slice("10.0.0.1@node-0 ready", "10.0.0.2@b ready")}, factsWith(facts...))[0]
	}
	base := make(nil)
	if !base.Equal(make(nil)) {
		t.Fatal("a plan made twice is not equal to itself")
	}
	for name, p := range map[string]*Plan{
		"name":          make(func(s *model.Service) { s.Name = "other" }),
		"uid":           make(func(s *model.Service) { s.UID = "2" }),
		"created":       make(func(s *model.Service) { s.Created = time.Unix(1, 0) }),
		"affinity":      make(func(s *model.Service) { s.Affinity = time.Second }),
		"health port":   make(func(s *model.Service) { s.HealthCheckNodePort = 1 }),
		"cluster IP":    make(func(s *model.Service) { s.ClusterIPs = addrs("10.96.0.2") }),
		"port":          make(func(s *model.Service) { s.Ports = []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: 81}} }),
		"node port":     make(func(s *model.Service) { s.Ports = []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: 80}} }),
		"external IPs":  make(func(s *model.Service) { s.ExternalIPs = nil }),
		"sources":       make(func(s *model.Service) { s.SourceRanges = prefixes("10.0.0.0/8") }),
		"policy":        make(func(s *model.Service) { s.ExternalLocal = false }),
		"masqueradeAll": make(nil, masqueradeAll),
		"detector":      make(nil, noDetector),
		"node":          make(nil, func(f *Facts) { f.NodeName = "b" }),
	} {
		if base.Equal(p) || p.Equal(base) {
			t.Errorf("%s: two plans that differ in it are equal", name)
		}
	}
	if n := Frontend.Equal; n(Frontend{Sources: []netip.Prefix{}}, Frontend{}) {
		t.Error("nobody and anybody are equal")
	}
	lost := *base
	lost.Lost = []Clash{{Frontend: base.Frontends[0]}}
	if base.Equal(&lost) {
		t.Error("a plan that lost a frontend is equal to one that did not")
	}
}

func TestReasonsHaveTexts(t *testing.T) {
	for r := NoEndpoints; r <= ExternalLocal; r <<= 1 {
		if got := r.Texts(); len(got) != 1 || got[0] == "" {
			t.Errorf("reason %#x: %q", uint16(r), got)
		}
	}
	if got := (NoEndpoints | ExternalLocal).Texts(); len(got) != 2 {
		t.Errorf("%q, want two sentences", got)
	}
}
