package iptables

import (
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// chain is a user chain with its complete content. Rules are written as
// iptables-save prints them, so that what is read back compares equal.
type chain struct {
	name  string
	rules []string // the text behind "-A NAME "
}

// ruleset is what one plan compiles to: chains of its own in the nat table, and
// entries in the dispatch trees that all plans share.
type ruleset struct {
	chains  []chain // in the order of reference: a chain comes before those that jump to it
	entries []placed
}

// placed is an entry and the tree it belongs to.
type placed struct {
	tree treeID
	entry
}

// compiler turns plans into rulesets. It is a value: the same compiler and plan
// always give the same ruleset.
type compiler struct {
	facts    *plan.Facts
	detector Detector
	comments bool // endpoint rules carry comments
	nfacct   bool
}

// largeCluster is the number of endpoints above which endpoint rules go without
// comments, as in kube-proxy: a comment takes 288 bytes in the kernel.
const largeCluster = 1000

func newCompiler(o *Options, set *plan.Set) compiler {
	return compiler{
		facts:    set.Facts,
		detector: o.Detector,
		comments: set.Endpoints <= largeCluster,
		nfacct:   o.NFAcct,
	}
}

// rule has the parts of a rule in the order in which iptables-save prints them.
type rule struct {
	src, dst, in string // may begin with "! "
	protocol     model.Protocol
	comment      string
	match        string
	target       string // "-j X", "-g X", with options
}

func (r rule) String() string {
	var b strings.Builder
	b.Grow(128)
	part := func(flag, value string) {
		if value == "" {
			return
		}
		if rest, not := strings.CutPrefix(value, "! "); not {
			b.WriteString("! ")
			value = rest
		}
		b.WriteString(flag)
		b.WriteString(value)
		b.WriteByte(' ')
	}
	part("-s ", r.src)
	part("-d ", r.dst)
	part("-i ", r.in)
	if r.protocol != 0 {
		part("-p ", r.protocol.String())
	}
	if r.comment != "" {
		b.WriteString(`-m comment --comment "`)
		b.WriteString(r.comment)
		b.WriteString(`" `)
	}
	part("", r.match)
	part("", r.target)
	return strings.TrimSuffix(b.String(), " ")
}

func host(a netip.Addr) string { return netip.PrefixFrom(a, a.BitLen()).String() }

func dport(p model.Protocol, port uint16) string {
	return "-m " + p.String() + " --dport " + strconv.Itoa(int(port))
}

const (
	toMarkMasq = "-j " + chainMarkMasq
	srcLocal   = "-m addrtype --src-type LOCAL"
	dstLocal   = "-m addrtype --dst-type LOCAL"

	matchNFAcct = " -m nfacct --nfacct-name  " // iptables-save writes two blanks
)

// compile gives a plan's ruleset.
func (c compiler) compile(p *plan.Plan) ruleset {
	n := namesOf(p)
	var rs ruleset
	use := usesOf(p)
	cluster := chain{name: n.cluster()}
	local := chain{name: n.local()}
	for i := range p.Frontends {
		f := &p.Frontends[i]
		if f.Kind != plan.ClusterIP {
			continue
		}
		switch f.FromOutside.To {
		case plan.Cluster:
			cluster.rules = append(cluster.rules, c.masqueradeInternal(p, n, f)...)
		case plan.Local:
			local.rules = append(local.rules, c.masqueradeInternal(p, n, f)...)
		}
	}
	if use.cluster || use.local {
		rs.chains = append(rs.chains, c.endpointChains(p, n, use)...)
	}
	if use.cluster {
		rs.chains = append(rs.chains, c.spread(p, n, &cluster, prefixCluster, p.Cluster)...)
	}
	if use.local {
		rs.chains = append(rs.chains, c.spread(p, n, &local, prefixLocal, p.Local)...)
	}
	rs.chains = append(rs.chains, c.externalChains(p, n)...)
	rs.entries = c.entries(p, n)
	return rs
}

// uses says which endpoint sets some route leads to.
type uses struct{ cluster, local bool }

func usesOf(p *plan.Plan) uses {
	var u uses
	for i := range p.Frontends {
		f := &p.Frontends[i]
		for _, r := range [...]plan.Route{f.FromPod, f.FromNode, f.FromOutside} {
			u.cluster = u.cluster || r.To == plan.Cluster
			u.local = u.local || r.To == plan.Local
		}
	}
	return u
}

// masqueradeInternal marks ClusterIP traffic that must be masqueraded: all of
// it, or what does not come from a pod of this node.
func (c compiler) masqueradeInternal(p *plan.Plan, n portNames, f *plan.Frontend) []string {
	r := rule{dst: host(f.Addr), protocol: p.Protocol, comment: n.name + " cluster IP",
		match: dport(p.Protocol, f.Port), target: toMarkMasq}
	switch {
	case f.FromPod.Masquerade:
	case f.FromOutside.Masquerade:
		r = notLocal(c.detector, r)
	default:
		return nil
	}
	return []string{r.String()}
}

// needsChain says whether an endpoint gets a KUBE-SEP chain. It does where there
// is more to do than to translate: remember the client, or masquerade an
// endpoint that reaches itself, which can only happen on its own node. All
// others are one rule in the Service's chain; that is two thirds of the rules
// and nine tenths of the chains that a large cluster would have otherwise.
func needsChain(p *plan.Plan, e plan.Endpoint) bool { return p.Affinity > 0 || e.Local }

// endpointChains gives the KUBE-SEP chains of the sets in use.
func (c compiler) endpointChains(p *plan.Plan, n portNames, use uses) []chain {
	var out []chain
	seen := map[netip.AddrPort]bool{}
	add := func(list []plan.Endpoint) {
		for _, e := range list {
			if !needsChain(p, e) || seen[e.AddrPort] {
				continue
			}
			seen[e.AddrPort] = true
			out = append(out, c.endpointChain(p, n, e))
		}
	}
	if use.cluster {
		add(p.Cluster)
	}
	if use.local {
		add(p.Local)
	}
	return out
}

func (c compiler) endpointChain(p *plan.Plan, n portNames, e plan.Endpoint) chain {
	sep := chain{name: n.endpoint(e)}
	comment := ""
	if c.comments {
		comment = n.name
	}
	if e.Local {
		sep.rules = append(sep.rules, rule{src: host(e.Addr()), comment: comment, target: toMarkMasq}.String())
	}
	set := ""
	if p.Affinity > 0 {
		set = "-m recent --set --name " + sep.name + c.recentMask()
	}
	sep.rules = append(sep.rules, rule{protocol: p.Protocol, comment: comment, match: set, target: dnat(e)}.String())
	return sep
}

func dnat(e plan.Endpoint) string { return "-j DNAT --to-destination " + e.String() }

func (c compiler) recentMask() string {
	if c.facts.Family == model.IPv6 {
		return " --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource"
	}
	return " --mask 255.255.255.255 --rsource"
}

// spread appends to a Service's chain the rules that choose one of its
// endpoints, and returns it behind the chains that it needs.
func (c compiler) spread(p *plan.Plan, n portNames, ch *chain, prefix string, list []plan.Endpoint) []chain {
	if p.Affinity > 0 {
		seconds := strconv.Itoa(int(p.Affinity.Seconds()))
		for _, e := range list {
			sep := n.endpoint(e)
			ch.rules = append(ch.rules, rule{comment: c.arrow(n, e),
				match:  "-m recent --rcheck --seconds " + seconds + " --reap --name " + sep + c.recentMask(),
				target: "-j " + sep}.String())
		}
	}
	g := grouping{c: c, p: p, n: n, prefix: prefix}
	ch.rules = append(ch.rules, g.rules(hashed(list), "")...)
	return append(g.out, *ch)
}

func (c compiler) arrow(n portNames, e plan.Endpoint) string {
	if !c.comments {
		return ""
	}
	return n.name + " -> " + e.String()
}

// toEndpoint is the rule that hands a connection to an endpoint.
func (c compiler) toEndpoint(p *plan.Plan, n portNames, e plan.Endpoint, match string) string {
	r := rule{comment: c.arrow(n, e), match: match}
	if needsChain(p, e) {
		r.target = "-j " + n.endpoint(e)
	} else {
		r.protocol, r.target = p.Protocol, dnat(e)
	}
	return r.String()
}

// chance matches part of the connections at random; nothing for all of them.
// The kernel keeps a probability as a number out of 2^31, and iptables-save
// prints that number.
func chance(part, whole int) string {
	if part >= whole {
		return ""
	}
	v := math.Round(float64(part) / float64(whole) * (1 << 31))
	return fmt.Sprintf("-m statistic --mode random --probability %.11f", v/(1<<31))
}

// externalChains gives KUBE-EXT and KUBE-FW.
func (c compiler) externalChains(p *plan.Plan, n portNames) []chain {
	var out []chain
	var ext, fw bool
	for i := range p.Frontends {
		f := &p.Frontends[i]
		if f.Kind == plan.ClusterIP || f.Refused() {
			continue
		}
		if !ext {
			out = append(out, c.externalChain(n, f))
			ext = true
		}
		if f.Sources != nil && !fw {
			out = append(out, c.sourcesChain(n, f))
			fw = true
		}
	}
	return out
}

func (c compiler) externalChain(n portNames, f *plan.Frontend) chain {
	ch := chain{name: n.external()}
	add := func(r rule) { ch.rules = append(ch.rules, r.String()) }
	jump := func(to plan.Target) string {
		if to == plan.Local {
			return "-j " + n.local()
		}
		return "-j " + n.cluster()
	}
	external := n.name + " external destinations"
	if f.FromPod == f.FromOutside && f.FromNode == f.FromOutside {
		if f.FromOutside.Masquerade {
			add(rule{comment: "masquerade traffic for " + external, target: toMarkMasq})
		}
		add(rule{target: jump(f.FromOutside.To)})
		return ch
	}
	if f.FromPod != f.FromOutside {
		add(local(c.detector, rule{comment: "pod traffic for " + external, target: jump(f.FromPod.To)}))
	}
	if f.FromNode.Masquerade {
		add(rule{comment: "masquerade LOCAL traffic for " + external, match: srcLocal, target: toMarkMasq})
	}
	add(rule{comment: "route LOCAL traffic for " + external, match: srcLocal, target: jump(f.FromNode.To)})
	if f.FromOutside.To >= plan.Cluster {
		add(rule{target: jump(f.FromOutside.To)})
	}
	return ch
}

func (c compiler) sourcesChain(n portNames, f *plan.Frontend) chain {
	ch := chain{name: n.sources()}
	for _, s := range f.Sources {
		ch.rules = append(ch.rules, rule{src: s.String(), comment: n.name + " loadbalancer IP", target: "-j " + n.external()}.String())
	}
	ch.rules = append(ch.rules, rule{comment: "other traffic to " + n.name + " will be dropped by KUBE-PROXY-FIREWALL"}.String())
	return ch
}

// entries are a plan's rules in the shared dispatch trees.
func (c compiler) entries(p *plan.Plan, n portNames) []placed {
	var out []placed
	add := func(t treeID, key string, r rule) {
		r.protocol = p.Protocol
		out = append(out, placed{t, entry{key: key, protocol: p.Protocol, text: r.String()}})
	}
	for i := range p.Frontends {
		f := &p.Frontends[i]
		c.frontendEntries(p, n, f, add)
	}
	if p.HealthPort != 0 {
		out = append(out, placed{treeHealthPorts, entry{key: portKey(p.HealthPort), protocol: model.TCP,
			text: rule{protocol: model.TCP, comment: n.name + " health check node port",
				match: dport(model.TCP, p.HealthPort), target: "-j ACCEPT"}.String()}})
	}
	return out
}

func (c compiler) frontendEntries(p *plan.Plan, n portNames, f *plan.Frontend, add func(treeID, string, rule)) {
	match := dport(p.Protocol, f.Port)
	verdict, why := "", ""
	switch f.FromOutside.To {
	case plan.Reject:
		verdict, why = "-j REJECT --reject-with "+c.rejectWith(), n.name+" has no endpoints"
	case plan.Drop:
		verdict, why = "-j DROP", n.name+" has no local endpoints"
	}
	switch f.Kind {
	case plan.ClusterIP:
		if verdict != "" {
			add(treeRefuse, addrKey(f.Addr, f.Port), rule{dst: host(f.Addr), comment: why, match: match, target: verdict})
			return
		}
		to := n.cluster()
		if f.FromOutside.To == plan.Local {
			to = n.local()
		}
		add(treeServices, addrKey(f.Addr, f.Port), rule{dst: host(f.Addr), comment: n.name + " cluster IP", match: match, target: "-j " + to})
	case plan.NodePort:
		c.nodePortEntries(p, n, f, match, add)
		if verdict != "" {
			add(treeRefusePorts, portKey(f.Port), rule{comment: why, match: dstLocal + " " + match, target: verdict})
		}
	default:
		c.externalEntries(n, f, match, add)
		if verdict != "" {
			add(treeRefuseExternal, addrKey(f.Addr, f.Port), rule{dst: host(f.Addr), comment: why, match: match, target: verdict})
		}
	}
}

func (c compiler) externalEntries(n portNames, f *plan.Frontend, match string, add func(treeID, string, rule)) {
	if f.Refused() {
		return
	}
	what := " external IP"
	if f.Kind == plan.LoadBalancer {
		what = " loadbalancer IP"
	}
	to := n.external()
	if f.Sources != nil {
		to = n.sources()
		add(treeFirewall, addrKey(f.Addr, f.Port), rule{dst: host(f.Addr),
			comment: n.name + " traffic not accepted by " + n.sources(), match: match, target: "-j DROP"})
	}
	add(treeServices, addrKey(f.Addr, f.Port), rule{dst: host(f.Addr), comment: n.name + what, match: match, target: "-j " + to})
}

func (c compiler) nodePortEntries(p *plan.Plan, n portNames, f *plan.Frontend, match string, add func(treeID, string, rule)) {
	if f.Refused() {
		return
	}
	r := rule{comment: n.name, match: match, target: "-j " + n.external()}
	if c.nfacct && c.facts.Family == model.IPv4 && c.facts.LocalhostNodePorts {
		counted := r
		counted.dst = "127.0.0.0/8"
		counted.match += matchNFAcct + LocalhostNodePortsCounter
		add(treeNodePorts, portKey(f.Port), counted)
	}
	add(treeNodePorts, portKey(f.Port), r)
}

func (c compiler) rejectWith() string {
	if c.facts.Family == model.IPv6 {
		return "icmp6-port-unreachable"
	}
	return "icmp-port-unreachable"
}
