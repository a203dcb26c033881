package nftables

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
)

// ruleset is what one plan compiles to.
type ruleset struct {
	// elements are the plan's own: no other plan has their keys.
	elements []element
	// shared are elements that other plans may need as well.
	shared []element
	// chains are what its verdicts lead to, those first that others lead to.
	chains []chainSpec
}

// compiler turns plans into rulesets. It is a value: the same compiler and plan
// always give the same ruleset.
type compiler struct {
	words
	detector proxier.Detector
	bit      uint32 // of the packet mark
}

func newCompiler(o *Options) compiler {
	return compiler{words{o.Family}, o.Detector, 1 << uint(o.MasqueradeBit)}
}

// compile gives a plan's ruleset.
func (c compiler) compile(p *plan.Plan) ruleset {
	rs := c.shared(p)
	used := usesOfAll(p)
	var cluster, local []numbered
	if used.cluster {
		cluster = number(p.Cluster)
	}
	if used.local {
		local = number(p.Local)
	}
	rs.elements = make([]element, 0, len(p.Frontends)*(2+len(cluster)+len(local)))
	for i := range p.Frontends {
		rs.frontend(p, &p.Frontends[i], cluster, local)
	}
	return rs
}

// shared gives the part of a plan's ruleset that others may need as well.
func (c compiler) shared(p *plan.Plan) ruleset {
	var rs ruleset
	for i := range p.Frontends {
		f := &p.Frontends[i]
		spec := specOf(p, f)
		rs.need(spec.closure()...)
		if spec.sticky {
			rs.need(chainSpec{remember: p.Affinity})
		}
		if f.Kind == plan.ClusterIP {
			rs.shared = append(rs.shared, element{key: key{set: setClusterIPs, addr: f.Addr}})
		}
	}
	rs.hairpins(p, usesOfAll(p))
	return rs
}

// uses says which endpoint sets some route leads to.
type uses struct{ cluster, local bool }

func usesOf(f *plan.Frontend) uses {
	var u uses
	for _, r := range [...]plan.Route{f.FromPod, f.FromNode, f.FromOutside} {
		u.cluster = u.cluster || r.To == plan.Cluster
		u.local = u.local || r.To == plan.Local
	}
	return u
}

// usesOfAll says it of all frontends of a plan.
func usesOfAll(p *plan.Plan) uses {
	var all uses
	for i := range p.Frontends {
		u := usesOf(&p.Frontends[i])
		all.cluster, all.local = all.cluster || u.cluster, all.local || u.local
	}
	return all
}

// keyOf is the frontend's key in a set: an address, or a node port.
func keyOf(p *plan.Plan, f *plan.Frontend, set setID) key {
	return key{set: set, addr: f.Addr, protocol: p.Protocol, port: f.Port}
}

// frontend adds what a frontend needs: what happens there, and those of the plan's
// endpoints that it leads to.
func (rs *ruleset) frontend(p *plan.Plan, f *plan.Frontend, cluster, local []numbered) {
	port := f.Kind == plan.NodePort
	set := setServices
	if port {
		set = setNodePorts
	}
	spec := specOf(p, f)
	rs.elements = append(rs.elements, element{keyOf(p, f, set), value{then: spec.name()}})
	if spec.sticky {
		rs.sticky(p, f)
	}
	endpoints := func(list []numbered, local bool) {
		k := keyOf(p, f, endpointsOf(port, local))
		for _, e := range list {
			k.index = e.number
			rs.elements = append(rs.elements, element{k, value{to: e.to}})
		}
	}
	u := usesOf(f)
	if u.cluster {
		endpoints(cluster, false)
	}
	if u.local {
		endpoints(local, true)
	}
	if !spec.sources {
		return
	}
	for _, r := range disjoint(f.Sources) {
		k := keyOf(p, f, setSources)
		k.source = r
		rs.elements = append(rs.elements, element{key: k})
	}
}

func (rs *ruleset) need(chains ...chainSpec) {
	for _, s := range chains {
		if !slices.Contains(rs.chains, s) {
			rs.chains = append(rs.chains, s)
		}
	}
}

// sticky has clients of a frontend remembered.
func (rs *ruleset) sticky(p *plan.Plan, f *plan.Frontend) {
	set := setSticky
	if f.Kind == plan.NodePort {
		set = setPortSticky
	}
	remember := chainSpec{remember: p.Affinity}
	rs.elements = append(rs.elements, element{keyOf(p, f, set), value{then: remember.name()}})
}

// hairpins adds the endpoints that can meet themselves: those on this node.
func (rs *ruleset) hairpins(p *plan.Plan, used uses) {
	add := func(list []plan.Endpoint) {
		for _, e := range list {
			if e.Local {
				rs.shared = append(rs.shared, element{key: key{set: setHairpin, addr: e.Addr(), protocol: p.Protocol, port: e.Port()}})
			}
		}
	}
	if used.cluster {
		add(p.Cluster)
	}
	if used.local {
		add(p.Local)
	}
	slices.SortFunc(rs.shared, func(a, b element) int { return a.compare(b.key) })
	rs.shared = slices.Compact(rs.shared)
}

// disjoint leaves out ranges that others contain: the kernel refuses elements of a
// set of ranges that overlap.
func disjoint(list []netip.Prefix) []netip.Prefix {
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		return cmp.Or(a.Masked().Addr().Compare(b.Masked().Addr()), a.Bits()-b.Bits())
	})
	out := sorted[:0]
	for _, r := range sorted { // one that contains others comes right before them
		if len(out) == 0 || !out[len(out)-1].Contains(r.Addr()) {
			out = append(out, r)
		}
	}
	return out
}

// chainSpec says what happens to new connections to a frontend: everything about it
// but its address and its endpoints'. Frontends of one spec share a chain, so that
// there are a few dozen chains however many Services there are.
type chainSpec struct {
	port               bool // reached by a node port: packets' addresses do not matter
	sources            bool // only ranges of clients are let in
	sticky             bool // a client that is remembered gets the endpoint that it had
	pod, node, outside step

	// remember, if not 0, makes it a chain of another kind: one that remembers clients
	// for so long, when their packets are translated. The rest is zero then.
	remember time.Duration
}

// step is a route, and how many endpoints it leads to at the most.
type step struct {
	plan.Route
	most int
}

func specOf(p *plan.Plan, f *plan.Frontend) chainSpec {
	at := func(r plan.Route) step {
		switch r.To {
		case plan.Cluster:
			return step{r, mostOf(len(p.Cluster))}
		case plan.Local:
			return step{r, mostOf(len(p.Local))}
		}
		return step{Route: plan.Route{To: r.To}}
	}
	s := chainSpec{port: f.Kind == plan.NodePort, pod: at(f.FromPod), node: at(f.FromNode), outside: at(f.FromOutside)}
	if !f.Refused() {
		s.sources, s.sticky = f.Sources != nil, p.Affinity > 0
	}
	return s
}

// to is the spec with one step for everybody.
func (s chainSpec) to(st step) chainSpec {
	return chainSpec{port: s.port, sticky: s.sticky, pod: st, node: st, outside: st}
}

func (s chainSpec) uniform() bool { return s.pod == s.node && s.node == s.outside }

// othersMasqueraded says that all that differs is that clients other than pods of
// this node are masqueraded, as it is with most ClusterIPs.
func (s chainSpec) othersMasqueraded() bool {
	pod := s.pod
	pod.Masquerade = true
	return !s.pod.Masquerade && pod == s.node && pod == s.outside
}

// refusal is the verdict of a spec that serves nobody.
func (s chainSpec) refusal() (chainName, bool) {
	if !s.uniform() || s.remember > 0 {
		return "", false
	}
	switch s.pod.To {
	case plan.Reject:
		return chainReject, true
	case plan.Drop:
		return dropAll, true
	}
	return "", false
}

// name is what the chain is called; for refusals the verdict.
func (s chainSpec) name() chainName {
	if s.remember > 0 {
		return chainName("remember-" + seconds(s.remember))
	}
	if v, ok := s.refusal(); ok {
		return v
	}
	name := ""
	if s.sources {
		name = "sources-"
	}
	if s.port {
		name += "port-"
	}
	switch {
	case s.uniform():
		name += "to-" + s.pod.name()
	case s.othersMasqueraded():
		name += "to-" + s.pod.name() + "-masq-others"
	default:
		name += "pods-" + s.pod.name() + "-node-" + s.node.name() + "-others-" + s.outside.name()
	}
	if s.sticky {
		name += "-sticky"
	}
	return chainName(name)
}

func (st step) name() string {
	name := ""
	switch st.To {
	case plan.Reject, plan.Drop:
		return st.To.String()
	case plan.Local:
		name = "local-"
	}
	name += fmt.Sprint(st.most)
	if st.Masquerade {
		name += "-masq"
	}
	return name
}

// closure gives the chains that a spec needs, those first that others lead to.
func (s chainSpec) closure() []chainSpec {
	if _, ok := s.refusal(); ok {
		return nil
	}
	if s.remember > 0 {
		return []chainSpec{s}
	}
	var out []chainSpec
	switch {
	case s.sources:
		inner := s
		inner.sources = false
		out = inner.closure()
	case s.uniform(), s.othersMasqueraded():
	default:
		for _, st := range s.steps() {
			for _, d := range s.to(st.step).closure() {
				if !slices.Contains(out, d) {
					out = append(out, d)
				}
			}
		}
	}
	return append(out, s)
}

// who are clients that a step is for.
type who uint8

const (
	everybody who = iota
	podsHere
	thisNode
)

type stepFor struct {
	who who
	step
}

// steps are the steps in the order in which they are tried; the last is for
// everybody who is left.
func (s chainSpec) steps() []stepFor {
	var out []stepFor
	if s.pod != s.outside {
		out = append(out, stepFor{podsHere, s.pod})
	}
	if s.node != s.outside || s.pod != s.outside {
		out = append(out, stepFor{thisNode, s.node})
	}
	return append(out, stepFor{everybody, s.outside})
}

// chain gives a spec's content.
func (c compiler) chain(s chainSpec) chain {
	ch := chain{name: s.name()}
	frontend := c.frontend()
	if s.port {
		frontend = nodePort()
	}
	switch {
	case s.remember > 0:
		ch.rules = []rule{c.update(s.remember)}
	case s.sources:
		inner := s
		inner.sources = false
		ch.rules = []rule{newRule(in(setSources, append(frontend, c.saddr())...), then(inner.name())), newRule(drop())}
	case s.uniform():
		if s.pod.Masquerade {
			ch.rules = append(ch.rules, newRule(mark(c.bit)))
		}
		ch.rules = append(ch.rules, c.pick(s, frontend)...)
	case s.othersMasqueraded():
		ch.rules = append([]rule{newRule(c.fromPodsHere(true), mark(c.bit))}, c.pick(s, frontend)...)
	default:
		for _, st := range s.steps() {
			ch.rules = append(ch.rules, newRule(c.from(st.who), then(s.to(st.step).name())))
		}
	}
	return ch
}

func (c compiler) from(w who) stmt {
	switch w {
	case podsHere:
		return c.fromPodsHere(false)
	case thisNode:
		return isLocal("saddr")
	}
	return stmt{}
}

// fromPodsHere matches what the detector calls pods of this node, or all others.
func (c compiler) fromPodsHere(not bool) stmt {
	switch d := c.detector; {
	case d.CIDR.IsValid():
		return c.within(c.saddr(), d.CIDR, not)
	case d.BridgeInterface != "":
		return fromInterface(d.BridgeInterface, not)
	case d.InterfacePrefix != "":
		return fromInterface(d.InterfacePrefix+"*", not)
	}
	return stmt{} // facts and detector agree: nobody asks
}

// pick gives the rules that choose an endpoint: for a client that is remembered the one
// that it had, else one at random.
func (c compiler) pick(s chainSpec, frontend []operand) []rule {
	endpoints := endpointsOf(s.port, s.pod.To == plan.Local)
	any := func(n int) rule { return c.dnat(endpoints, append(slices.Clone(frontend), random(n))...) }
	var rules []rule
	if s.sticky {
		rules = append(rules, c.dnat(setAffinity, append([]operand{c.saddr()}, c.frontend()...)...))
	}
	rules = append(rules, slices.Repeat([]rule{any(s.pod.most)}, tries(s.pod.most))...)
	return append(rules, any(1))
}

// compare orders keys as people read them.
func (k key) compare(o key) int {
	for _, d := range [...]int{int(k.set) - int(o.set), k.addr.Compare(o.addr), int(k.protocol) - int(o.protocol),
		int(k.port) - int(o.port), int(k.index) - int(o.index), k.source.Addr().Compare(o.source.Addr()), k.source.Bits() - o.source.Bits()} {
		if d != 0 {
			return d
		}
	}
	return 0
}

// serviceCIDRs are those of a family, which facts have.
func serviceCIDRs(facts *plan.Facts) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range facts.ServiceCIDRs {
		if model.FamilyOf(p.Addr()) == facts.Family {
			out = append(out, p)
		}
	}
	return out
}
