package plan

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// chosen is what a plan chooses, as text.
type chosen struct {
	Cluster, Local, Serving string
	ClusterIP, External     string // "" if nobody outside can reach the port
}

// rules restates, as plainly as it can be said and one endpoint at a time, how
// kube-proxy chooses endpoints: KEP-1669 (terminating endpoints), KEP-2086
// (internalTrafficPolicy), KEP-2433 and KEP-3015 (hints).
func rules(svc *model.Service, name string, protocol model.Protocol, nodePort bool, epSlices []*model.Slice, f *Facts) chosen {
	// One entry for each address; the version that does not terminate wins, of two
	// such the one that is of more use.
	pool := map[netip.AddrPort]model.Endpoint{}
	for _, sl := range epSlices {
		for _, port := range sl.Ports {
			for _, e := range sl.Endpoints {
				if sl.Family != f.Family || port.Name != name || port.Protocol != protocol {
					continue
				}
				at := netip.AddrPortFrom(e.Addr, port.Port)
				was, there := pool[at]
				if !there || was.Terminating && !e.Terminating ||
					was.Terminating == e.Terminating && (e.Ready && !was.Ready || e.Ready == was.Ready && e.Serving && !was.Serving) {
					pool[at] = e
				}
			}
		}
	}
	external := nodePort
	for _, a := range append(slices.Clone(svc.LoadBalancerIPs), svc.ExternalIPs...) {
		external = external || a.Is4() == (f.Family == model.IPv4)
	}
	usesCluster := !svc.InternalLocal || external
	usesLocal := svc.InternalLocal || svc.ExternalLocal && external

	var ready, draining, readyHere, drainingHere, serving []netip.AddrPort
	nodeHints, zoneHints := true, true
	for at, e := range pool {
		if e.Ready || e.Serving && e.Terminating {
			serving = append(serving, at)
		}
		if e.Ready {
			ready = append(ready, at)
			nodeHints = nodeHints && e.Hints != nil && len(e.Hints.Nodes) > 0
			zoneHints = zoneHints && e.Hints != nil && len(e.Hints.Zones) > 0
			if e.Node == f.NodeName {
				readyHere = append(readyHere, at)
			}
		}
		if e.Serving && e.Terminating {
			draining = append(draining, at)
			if e.Node == f.NodeName {
				drainingHere = append(drainingHere, at)
			}
		}
	}
	var sameNode, sameZone []netip.AddrPort
	for _, at := range ready {
		if nodeHints && slices.Contains(pool[at].Hints.Nodes, f.NodeName) {
			sameNode = append(sameNode, at)
		}
		if zoneHints && f.Zone != "" && slices.Contains(pool[at].Hints.Zones, f.Zone) {
			sameZone = append(sameZone, at)
		}
	}
	firstNotEmpty := func(lists ...[]netip.AddrPort) []netip.AddrPort {
		for _, l := range lists {
			if len(l) > 0 {
				return l
			}
		}
		return nil
	}
	var cluster, local []netip.AddrPort
	if usesCluster {
		cluster = firstNotEmpty(sameNode, sameZone, ready, draining)
	}
	if usesLocal {
		local = firstNotEmpty(readyHere, drainingHere)
	}
	verdict := func(wantsLocal bool, set []netip.AddrPort) string {
		switch {
		case len(ready)+len(draining) == 0:
			return "reject"
		case len(set) == 0:
			return "drop"
		case wantsLocal:
			return "local"
		}
		return "cluster"
	}
	text := func(l []netip.AddrPort) string {
		var out []string
		for _, at := range l {
			out = append(out, at.String())
		}
		sort.Strings(out)
		return strings.Join(out, " ")
	}
	c := chosen{Cluster: text(cluster), Local: text(local), Serving: text(serving)}
	if c.ClusterIP = verdict(false, cluster); svc.InternalLocal {
		c.ClusterIP = verdict(true, local)
	}
	if external {
		if c.External = verdict(false, cluster); svc.ExternalLocal {
			c.External = verdict(true, local)
		}
	}
	return c
}

func chosenBy(p *Plan) chosen {
	text := func(l []Endpoint) string {
		var out []string
		for _, e := range l {
			out = append(out, e.AddrPort.String())
		}
		sort.Strings(out)
		return strings.Join(out, " ")
	}
	c := chosen{Cluster: text(p.Cluster), Local: text(p.Local), Serving: text(p.Serving)}
	for _, f := range p.Frontends {
		if f.Kind == ClusterIP {
			c.ClusterIP = f.FromOutside.To.String()
		} else {
			c.External = f.FromOutside.To.String()
		}
	}
	return c
}

// draw makes random Services and slices in which every rule has its turn.
type draw struct{ *rand.Rand }

func (d draw) chance(n int) bool { return d.IntN(n) == 0 }

func (d draw) service(name string) *model.Service {
	s := service(func(s *model.Service) {
		s.Name = name
		s.Ports = []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: 80}, {Name: "dns", Protocol: model.UDP, Port: 53}}
	})
	s.InternalLocal, s.ExternalLocal = d.chance(2), d.chance(2)
	switch d.IntN(4) {
	case 0:
		s.LoadBalancerIPs, s.ExternalIPs = nil, nil
	case 1:
		s.LoadBalancerIPs, s.ExternalIPs = addrs("2001:db8::2"), nil // external in the other family only
	case 2:
		s.LoadBalancerIPs = nil
	}
	if d.chance(3) {
		s.Ports[d.IntN(2)].NodePort = 30080
	}
	return s
}

func (d draw) slices() []*model.Slice {
	var out []*model.Slice
	// What all endpoints have in common, so that "every endpoint" happens.
	hints, states := d.IntN(4), d.IntN(4)
	// Versions of one endpoint differ in their state only.
	nodes, zones, forNodes := d.Perm(9), d.Perm(9), d.Perm(9)
	for i := range d.IntN(4) {
		sl := &model.Slice{Namespace: "ns", Name: fmt.Sprint("s", i), Service: "svc", Family: model.IPv4,
			Ports: []model.SlicePort{{Name: "http", Protocol: model.TCP, Port: uint16(8080 + d.IntN(2))}, {Name: "dns", Protocol: model.UDP, Port: 53}}}
		if d.chance(8) {
			sl.Family = model.IPv6
		}
		for range d.IntN(5) {
			n := d.IntN(9)
			e := model.Endpoint{Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), Node: []string{self, "node-1", ""}[nodes[n]%3]}
			if sl.Family == model.IPv6 {
				e.Addr = netip.AddrFrom16([16]byte{0xfd, 15: byte(n)})
			}
			if states == 0 || states < 3 && d.chance(2) {
				e.Ready, e.Serving = true, true
			} else {
				e.Terminating, e.Serving = d.chance(2), d.chance(2)
			}
			if hints > 0 && zones[n] > 0 {
				e.Hints = &model.Hints{}
				if hints&1 != 0 && forNodes[n] > 0 {
					e.Hints.Zones = []string{[]string{"z0", "z1"}[zones[n]%2]}
				}
				if hints&2 != 0 {
					e.Hints.Nodes = []string{[]string{self, "node-1"}[forNodes[n]%2]}
				}
			}
			if !slices.ContainsFunc(sl.Endpoints, func(o model.Endpoint) bool { return o.Addr == e.Addr }) {
				sl.Endpoints = append(sl.Endpoints, e)
			}
		}
		out = append(out, sl)
	}
	return out
}

// What Make chooses is what the rules say, for random Services, and does not
// depend on the order of slices.
func TestChoiceFollowsTheRules(t *testing.T) {
	for seed := range uint64(20000) {
		d := draw{rand.New(rand.NewPCG(seed, 1))}
		svc, epSlices := d.service("svc"), d.slices()
		facts := factsWith(func(f *Facts) {
			if d.chance(6) {
				f.Zone = ""
			}
			f.DetectLocal = d.chance(2)
		})
		plans := Make(svc, epSlices, facts)
		for i, p := range plans {
			want := rules(svc, p.PortKey.Port, p.Protocol, svc.Ports[i].NodePort != 0, epSlices, facts)
			if got := chosenBy(p); got != want {
				t.Fatalf("seed %d, %s\n got %+v\nwant %+v\nservice %+v\nslices %s", seed, p.PortKey, got, want, svc, dump(epSlices))
			}
			checkSets(t, p, seed)
		}
		slices.Reverse(epSlices)
		for i, p := range Make(svc, epSlices, facts) {
			if !p.Equal(plans[i]) {
				t.Fatalf("seed %d: the order of slices matters: %+v and %+v", seed, p, plans[i])
			}
		}
	}
}

// checkSets checks what Plan promises of its sets and routes.
func checkSets(t *testing.T, p *Plan, seed uint64) {
	t.Helper()
	for name, set := range map[string][]Endpoint{"Cluster": p.Cluster, "Local": p.Local, "Serving": p.Serving} {
		for i := 1; i < len(set); i++ {
			if set[i-1].Compare(set[i].AddrPort) >= 0 {
				t.Fatalf("seed %d: %s is not sorted, or has one twice: %v", seed, name, set)
			}
		}
	}
	for _, e := range p.Local {
		if !e.Local {
			t.Fatalf("seed %d: %s is in the Local set and not local", seed, e)
		}
	}
	for _, f := range p.Frontends {
		for _, r := range []Route{f.FromPod, f.FromNode, f.FromOutside} {
			if r.To == Cluster && len(p.Cluster) == 0 || r.To == Local && len(p.Local) == 0 {
				t.Fatalf("seed %d: %s leads to an empty set", seed, r)
			}
			if r.Masquerade && r.To < Cluster {
				t.Fatalf("seed %d: %s", seed, r)
			}
		}
	}
}

func dump(list []*model.Slice) string {
	var b strings.Builder
	for _, sl := range list {
		fmt.Fprintf(&b, "\n%s %s %v", sl.Name, sl.Family, sl.Ports)
		for _, e := range sl.Endpoints {
			fmt.Fprintf(&b, "\n\t%+v hints %+v", e, e.Hints)
		}
	}
	return b.String()
}
