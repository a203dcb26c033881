package ipvs

import (
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// ruleset is what one plan compiles to.
type ruleset struct {
	servers []server
	addrs   []netip.Addr // to hold on kube-ipvs0
	entries []placed
}

// placed is an entry and the set it belongs to.
type placed struct {
	set setID
	entry
}

// compiler turns plans into rulesets. It is a value: the same compiler, plan and
// mark always give the same ruleset.
type compiler struct {
	facts     *plan.Facts
	scheduler string // of Services that name none
	maglev    bool   // the kernel has mh
	inside    bool   // the kernel can map frontends to marks
}

// frontend is one address of a Frontend: a NodePort has several.
type frontend struct {
	*plan.Frontend
	addr netip.Addr
}

// compile gives a plan's ruleset. mark is the packet mark that the plan has for
// clients inside, 0 if it needs none (see insideServer).
func (c compiler) compile(p *plan.Plan, mark uint32) ruleset {
	var rs ruleset
	for i := range p.Frontends {
		f := &p.Frontends[i]
		for _, a := range c.addresses(f) {
			c.frontend(&rs, p, frontend{f, a}, mark)
		}
	}
	if mark != 0 {
		rs.servers = append(rs.servers, c.insideServer(p, mark))
	}
	if p.HealthPort != 0 {
		rs.entries = append(rs.entries, placed{setHealthCheckNodePort, entry{port: p.HealthPort}})
	}
	c.loopBack(&rs, p)
	return rs
}

// addresses are where a frontend is served. NodePorts are not served on loopback
// addresses: the kernel does not let IPVS send a packet with a loopback source
// to another host (crosses_local_route_boundary).
func (c compiler) addresses(f *plan.Frontend) []netip.Addr {
	if f.Kind != plan.NodePort {
		return []netip.Addr{f.Addr}
	}
	if c.facts.NodePorts.All {
		return c.facts.OwnAddrs
	}
	return slices.DeleteFunc(slices.Clone(c.facts.NodePorts.Addrs), netip.Addr.IsLoopback)
}

func (c compiler) frontend(rs *ruleset, p *plan.Plan, f frontend, mark uint32) {
	here := entry{addr: f.addr, protocol: p.Protocol, port: f.Port}
	put := func(set setID) { rs.entries = append(rs.entries, placed{set, here}) }
	own := slices.Contains(c.facts.OwnAddrs, f.addr)
	if f.Kind != plan.NodePort && !own {
		rs.addrs = append(rs.addrs, f.addr)
		rs.entries = append(rs.entries, placed{setIPs, entry{addr: f.addr}})
	}
	c.kind(rs, p, f, here)
	c.sources(rs, f, here)
	outside, inside := f.FromOutside, f.FromNode
	switch {
	case outside.To == plan.Drop && inside.To == plan.Drop:
		put(setDrop) // the virtual server is for the connections that are open
	case outside.To == plan.Drop:
		put(setDropOutside)
		outside = inside // for packets of the inside whose mark somebody else has changed
	}
	if mark != 0 && split(p, f.Frontend) {
		marked := here
		marked.mark = mark
		rs.entries = append(rs.entries, placed{setInside, marked})
	}
	rs.servers = append(rs.servers, server{
		serverKey:    serverKey{addr: f.addr, port: f.Port, protocol: p.Protocol},
		settings:     c.settings(p),
		destinations: destinations(targets(p, outside.To)),
	})
}

// kind puts a frontend into the sets that say what it is: they masquerade, let
// through, and tell a later start which virtual servers are ours.
func (c compiler) kind(rs *ruleset, p *plan.Plan, f frontend, here entry) {
	put := func(set setID, e entry) { rs.entries = append(rs.entries, placed{set, e}) }
	masquerade := !split(p, f.Frontend)
	switch f.Kind {
	case plan.ClusterIP:
		put(setClusterIP, here)
	case plan.ExternalIP:
		if masquerade {
			put(setExternalIP, here)
		} else {
			put(setExternalIPLocal, here)
		}
	case plan.LoadBalancer:
		put(setLoadBalancer, here)
		if !masquerade {
			put(setLoadBalancerLocal, here)
		}
	case plan.NodePort:
		put(setNodePortServers, here)
		c.nodePort(rs, p, here, masquerade)
	}
}

// nodePort puts a node port into the sets that are there for its protocol. For
// TCP and UDP they hold ports without addresses, so that entries of several
// addresses are one.
func (c compiler) nodePort(rs *ruleset, p *plan.Plan, here entry, masquerade bool) {
	any := entry{port: here.port}
	var all, local placed
	switch p.Protocol {
	case model.TCP:
		all, local = placed{setNodePortTCP, any}, placed{setNodePortLocalTCP, any}
	case model.UDP:
		all, local = placed{setNodePortUDP, any}, placed{setNodePortLocalUDP, any}
	default:
		all, local = placed{setNodePortSCTP, here}, placed{setNodePortLocalSCTP, here}
	}
	add := func(x placed) {
		if !slices.Contains(rs.entries, x) {
			rs.entries = append(rs.entries, x)
		}
	}
	add(all)
	if !masquerade {
		add(local)
	}
}

// sources limits a frontend to those who may use it.
func (c compiler) sources(rs *ruleset, f frontend, here entry) {
	if f.Sources == nil || f.Refused() {
		return
	}
	rs.entries = append(rs.entries, placed{setLoadBalancerFW, here})
	for _, s := range f.Sources {
		e := here
		e.with = s
		rs.entries = append(rs.entries, placed{setLoadBalancerSourceCIDR, e})
	}
}

// split says whether a frontend sends clients inside elsewhere than clients
// outside: it has externalTrafficPolicy Local. Whether there is a difference now
// depends on the endpoints, and must not matter: a virtual server that comes and
// goes with them would end connections.
func split(p *plan.Plan, f *plan.Frontend) bool {
	return f.Kind != plan.ClusterIP && p.Why&plan.ExternalLocal != 0
}

// needsInside says whether a plan needs a mark.
func (c compiler) needsInside(p *plan.Plan) bool {
	if !c.inside || p.Why&plan.ExternalLocal == 0 {
		return false
	}
	for i := range p.Frontends {
		if f := &p.Frontends[i]; split(p, f) && len(c.addresses(f)) > 0 {
			return true
		}
	}
	return false
}

// insideServer is the virtual server of the packets that carry a plan's mark: the
// node's own and, if they can be told, those of its pods. Persistence cannot be
// used: with a mark it does not translate ports (ip_vs_sched_persist), so
// affinity is by a hash of the client's address.
func (c compiler) insideServer(p *plan.Plan, mark uint32) server {
	set := c.settings(p)
	if p.Affinity > 0 {
		set = settings{scheduler: "sh", flags: flagSched1}
		if c.maglev {
			set.scheduler = "mh" // fewer clients move when endpoints change
		}
	}
	return server{serverKey: serverKey{mark: mark}, settings: set, destinations: destinations(p.Cluster)}
}

// defaultFlags are the flags of schedulers where a Service does not say. Without
// fallback, a client whose endpoint takes no new connections is refused, as long
// as the endpoint drains. mh-port is kube-proxy's default.
var defaultFlags = map[string]uint32{"sh": flagSched1, "mh": flagSched1 | flagSched2}

// settings are those of a plan's virtual servers.
func (c compiler) settings(p *plan.Plan) settings {
	s := settings{scheduler: p.Balance.Scheduler}
	if s.scheduler == "" {
		s.scheduler = c.scheduler
	}
	switch {
	case !p.Balance.FlagsSet:
		s.flags = defaultFlags[s.scheduler]
	default:
		if p.Balance.Flags&plan.SchedFallback != 0 {
			s.flags |= flagSched1
		}
		if p.Balance.Flags&plan.SchedPort != 0 {
			s.flags |= flagSched2
		}
	}
	if p.Affinity > 0 {
		s.flags |= flagPersistent
		s.timeout = uint32(min(max(p.Affinity.Seconds(), 1), math.MaxInt32))
	}
	return s
}

func targets(p *plan.Plan, to plan.Target) []plan.Endpoint {
	switch to {
	case plan.Cluster:
		return p.Cluster
	case plan.Local:
		return p.Local
	}
	return nil
}

func destinations(list []plan.Endpoint) []destination {
	out := make([]destination, 0, len(list))
	for _, e := range list {
		out = append(out, destination{e.AddrPort, uint32(e.Weight)})
	}
	return out
}

// loopBack masquerades connections of an endpoint to itself.
func (c compiler) loopBack(rs *ruleset, p *plan.Plan) {
	seen := map[netip.AddrPort]bool{}
	for _, list := range [][]plan.Endpoint{p.Cluster, p.Local} {
		for _, e := range list {
			if !e.Local || seen[e.AddrPort] {
				continue
			}
			seen[e.AddrPort] = true
			rs.entries = append(rs.entries, placed{setLoopBack, entry{addr: e.Addr(), protocol: p.Protocol, port: e.Port(),
				with: netip.PrefixFrom(e.Addr(), e.Addr().BitLen())}})
		}
	}
}

// String names a virtual server as ipvsadm does.
func (k serverKey) String() string {
	if k.mark != 0 {
		return "FWM " + hex(k.mark)
	}
	return strings.ToUpper(k.protocol.String()) + " " + netip.AddrPortFrom(k.addr, k.port).String()
}
