package ipvs

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// ours says whether a virtual server was written by us or by kube-proxy: it is in
// one of the sets, or its mark has our signature. IPVS itself keeps no note of
// who wrote what. Elements are written before the virtual servers that they
// vouch for and removed after them, so that this holds whenever a process ends.
// Exclude concerns what is only guessed.
func (x *Proxier) ours(k serverKey, have *actual) bool {
	if k.mark != 0 {
		return signed(k.mark, 0) || signed(k.mark, insideHigh) // the masquerade bit may have been another
	}
	if have.vouched(k) {
		return true
	}
	return len(have.sets[setNodePortServers]) == 0 && have.kubeProxyNodePort(k) && !x.excluded(k.addr)
}

// signed says whether a packet mark has our signature, where a shift puts it.
func signed(mark uint32, shift int) bool {
	return ourMark(mark>>shift) && mark>>shift<<shift == mark
}

// vouchers are the sets that hold virtual servers by address, protocol and port.
var vouchers = []setID{setClusterIP, setExternalIP, setExternalIPLocal, setLoadBalancer, setNodePortServers, setNodePortSCTP, setNodePortLocalSCTP}

func (a *actual) vouched(k serverKey) bool {
	e := entry{addr: k.addr, protocol: k.protocol, port: k.port}
	return slices.ContainsFunc(vouchers, func(id setID) bool { return a.sets[id][e] })
}

// ourAddr says whether an address on kube-ipvs0 was put there by us or by
// kube-proxy. One that is older than the set of addresses has them in others.
func (a *actual) ourAddr(addr netip.Addr) bool {
	if len(a.sets[setIPs]) > 0 {
		return a.sets[setIPs][entry{addr: addr}]
	}
	for k := range a.servers {
		if k.addr == addr && a.vouched(k) {
			return true
		}
	}
	return false
}

func (x *Proxier) excluded(addr netip.Addr) bool {
	return slices.ContainsFunc(x.o.Exclude, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// kubeProxyNodePort says whether a virtual server can be one that kube-proxy
// wrote for a NodePort: it notes the port only.
func (a *actual) kubeProxyNodePort(k serverKey) bool {
	ports := map[model.Protocol]setID{model.TCP: setNodePortTCP, model.UDP: setNodePortUDP}
	id, ok := ports[k.protocol]
	return ok && !k.addr.IsLoopback() && a.sets[id][entry{port: k.port}]
}

// alike says whether a live virtual server can be ours, though no set says so
// (somebody flushed them while no agent ran): it sends new connections to nothing
// but what is wanted.
func (a *actual) alike(live *liveServer, s *server) bool {
	for at, d := range live.destinations {
		if d.foreign || d.weight > 0 && !s.wants(at) {
			return false
		}
	}
	return len(live.destinations) > 0 || a.addrs[s.addr]
}

// avoid leaves a virtual server alone that a plan wants and somebody else has.
func (x *Proxier) avoid(k serverKey, p *plan.Plan) {
	x.foreign[k] = p.PortKey
	x.aside.Tell(p.PortKey, fmt.Errorf("the virtual server %s belongs to somebody else and is left alone; everything else of this port is served", k))
}

// concede forgets which virtual servers of others a plan wanted, but for those
// that the plan in its place wants, too.
func (x *Proxier) concede(c compiler, old, new *plan.Plan) {
	for k, key := range x.foreign {
		if key == old.PortKey && (new == nil || c.compile(new, x.heldMark(c, new)).server(k) == nil) {
			delete(x.foreign, k)
		}
	}
}

// own leaves out of a ruleset what is about virtual servers of others: their
// elements would make them ours for the next start.
func (x *Proxier) own(rs ruleset) ruleset {
	if len(x.foreign) == 0 {
		return rs
	}
	foreign := func(e entry) bool {
		_, is := x.foreign[serverKey{addr: e.addr, port: e.port, protocol: e.protocol}]
		return is
	}
	rs.servers = slices.DeleteFunc(rs.servers, func(s server) bool { _, is := x.foreign[s.serverKey]; return is })
	rs.entries = slices.DeleteFunc(rs.entries, func(e placed) bool { return e.set != setLoopBack && foreign(e.entry) })
	return rs
}
