package iptables

import (
	"strconv"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
)

// Names of the nfacct objects that kube-proxy counts with, and that its metrics
// read. They are created outside this package.
const (
	InvalidDroppedCounter     = "ct_state_invalid_dropped_pkts"
	LocalhostNodePortsCounter = "localhost_nps_accepted_pkts"
)

// commentFirewall is that of the jumps to chainProxyFirewall. ipvs mode has a
// chain of the same name under another comment.
const commentFirewall = "kubernetes load balancer firewall"

// Detector tells pods of this node from everybody else.
type Detector = proxier.Detector

func local(d Detector, r rule) rule    { return match(d, r, "") }
func notLocal(d Detector, r rule) rule { return match(d, r, "! ") }

func match(d Detector, r rule, not string) rule {
	src, in := d.Match()
	if src != "" {
		r.src = not + src
	}
	if in != "" {
		r.in = not + in
	}
	return r
}

// jump is a rule in a built-in chain that leads into one of ours.
type jump struct {
	table, from string
	text        string
}

// jumps are kube-proxy's, in the order in which each is put at the top of its
// chain if it is missing, so that the later ones end up above the earlier.
func (c compiler) jumps() []jump {
	j := func(table, from, match, comment, to string) jump {
		return jump{table, from, rule{comment: comment, match: "", target: "-j " + to}.withLeading(match)}
	}
	const isNew = "-m conntrack --ctstate NEW"
	list := []jump{
		j(tableFilter, "INPUT", isNew, "kubernetes externally-visible service portals", chainExternalServices),
		j(tableFilter, "FORWARD", isNew, "kubernetes externally-visible service portals", chainExternalServices),
		j(tableFilter, "INPUT", "", "kubernetes health check service ports", chainNodePorts),
		j(tableFilter, "FORWARD", isNew, "kubernetes service portals", chainServices),
		j(tableFilter, "OUTPUT", isNew, "kubernetes service portals", chainServices),
		j(tableFilter, "FORWARD", "", "kubernetes forwarding rules", chainForward),
		j(tableFilter, "INPUT", isNew, commentFirewall, chainProxyFirewall),
		j(tableFilter, "OUTPUT", isNew, commentFirewall, chainProxyFirewall),
		j(tableFilter, "FORWARD", isNew, commentFirewall, chainProxyFirewall),
		j(tableNAT, "OUTPUT", "", "kubernetes service portals", chainServices),
		j(tableNAT, "PREROUTING", "", "kubernetes service portals", chainServices),
		j(tableNAT, "POSTROUTING", "", "kubernetes postrouting rules", chainPostrouting),
	}
	if c.localhostNodePorts() {
		list = append(list,
			j(tableFilter, "INPUT", "", "", chainFirewall),
			j(tableFilter, "OUTPUT", "", "", chainFirewall))
	}
	return list
}

// withLeading puts a match before the comment, as kube-proxy's jumps have it.
func (r rule) withLeading(match string) string {
	return strings.TrimSpace(match + " " + r.String())
}

func (c compiler) localhostNodePorts() bool {
	return c.facts.Family == model.IPv4 && c.facts.LocalhostNodePorts
}

// martianRule keeps others from dialing loopback addresses that route_localnet
// opens (CVE-2020-8558). It must be, to the letter, the rule that the kubelet
// writes into the same chain; it is only ever added.
func (c compiler) martianRule() (string, bool) {
	return rule{src: "! 127.0.0.0/8", dst: "127.0.0.0/8",
		comment: "block incoming localnet connections",
		match:   "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT", target: "-j DROP"}.String(), c.localhostNodePorts()
}

// base gives the chains that do not depend on Services.
func (c compiler) base(o *Options) []tableChain {
	mark := "0x" + strconv.FormatUint(1<<uint(o.MasqueradeBit), 16)
	marked := mark + "/" + mark
	forward := []string{}
	if !o.AcceptInvalid {
		counter := ""
		if c.nfacct {
			counter = matchNFAcct + InvalidDroppedCounter
		}
		forward = append(forward, "-m conntrack --ctstate INVALID"+counter+" -j DROP")
	}
	forward = append(forward,
		rule{comment: "kubernetes forwarding rules", match: "-m mark --mark " + marked, target: "-j ACCEPT"}.String(),
		rule{comment: "kubernetes forwarding conntrack rule", match: "-m conntrack --ctstate RELATED,ESTABLISHED", target: "-j ACCEPT"}.String())
	masquerade := "-j MASQUERADE"
	if o.RandomFully {
		masquerade += " --random-fully"
	}
	return []tableChain{
		{tableNAT, chain{chainMarkMasq, []string{"-j MARK --set-xmark " + marked}}},
		{tableNAT, chain{chainPostrouting, []string{
			"-m mark ! --mark " + marked + " -j RETURN",
			// Clear the mark, so that a packet that passes again is judged anew.
			"-j MARK --set-xmark " + mark + "/0x0",
			rule{comment: "kubernetes service traffic requiring SNAT", target: masquerade}.String(),
		}}},
		{tableFilter, chain{chainForward, forward}},
	}
}

// tableChain is a chain and its table.
type tableChain struct {
	table string
	chain
}

// nodePortTail sends what no Service address matched, but a local address did,
// to the node ports. It must stay last: a Service's own address wins.
func (c compiler) nodePortTail() []string {
	const comment = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
	if !c.facts.NodePorts.All {
		var out []string
		for _, a := range c.facts.NodePorts.Addrs {
			if a.IsLoopback() && !c.localhostNodePorts() {
				continue
			}
			out = append(out, rule{dst: host(a), comment: comment, target: "-j " + chainNodePorts}.String())
		}
		return out
	}
	r := rule{comment: comment, match: dstLocal, target: "-j " + chainNodePorts}
	switch {
	case c.facts.Family == model.IPv6:
		r.dst = "! ::1/128"
	case !c.facts.LocalhostNodePorts:
		r.dst = "! 127.0.0.0/8"
	}
	return []string{r.String()}
}

// rootChains are the chains in which dispatch trees begin, with the trees that
// each holds, in order.
var rootChains = []struct {
	table, name string
	trees       []treeID
}{
	{tableFilter, chainServices, []treeID{treeRefuse}},
	{tableFilter, chainExternalServices, []treeID{treeRefuseExternal, treeRefusePorts}},
	{tableFilter, chainProxyFirewall, []treeID{treeFirewall}},
	{tableFilter, chainNodePorts, []treeID{treeHealthPorts}},
	{tableNAT, chainNodePorts, []treeID{treeNodePorts}},
	{tableNAT, chainServices, []treeID{treeServices}},
}

// forest is all dispatch trees of one moment.
type forest [treeCount]tree

func emptyForest() forest {
	var f forest
	for i := range f {
		f[i].treeSpec = treeSpecs[i]
	}
	return f
}

// dispatchChains gives the root chains and those of the trees. Without a
// change, all of them; with one, those that can differ because of it.
func (c compiler) dispatchChains(f *forest, changed *treeKeys, emit func(tableChain)) {
	for _, root := range rootChains {
		touched := changed == nil
		for _, id := range root.trees {
			touched = touched || len(changed[id]) > 0
		}
		if !touched {
			continue
		}
		var rules []string
		for _, id := range root.trees {
			var keys []string
			if changed != nil {
				keys = append([]string{}, changed[id]...) // empty, not nil: nothing of this tree
			}
			rules = append(rules, f[id].walk(keys, func(ch chain) { emit(tableChain{root.table, ch}) })...)
		}
		if root.table == tableNAT && root.name == chainServices {
			rules = append(rules, c.nodePortTail()...)
		}
		emit(tableChain{root.table, chain{root.name, rules}})
	}
}

// treeKeys are, for each tree, the sorted keys whose entries changed.
type treeKeys [treeCount][]string

// Render gives the complete nat and filter content that a Set asks for, in the
// form of iptables-save: for people, and for tests that follow packets through
// it. Jumps from built-in chains are written in the order in which they end up.
func Render(set *plan.Set, o Options) string {
	c := newCompiler(&o, set)
	w := wanted{}
	c.everything(set, &o, func(p *plan.Plan) bool { return true }, w.add)
	return w.text(c)
}

// RenderService gives what the plans of one Service compile to: its own chains,
// then its rules in the shared chains, named by their root. It is for people.
func RenderService(set *plan.Set, o Options, name model.ServiceName) string {
	c := newCompiler(&o, set)
	var b strings.Builder
	for _, p := range set.Sorted() {
		if p.PortKey.Service() != name {
			continue
		}
		rs := c.compile(p)
		for _, ch := range rs.chains {
			for _, r := range ch.rules {
				b.WriteString(tableNAT + " -A " + ch.name + " " + r + "\n")
			}
		}
		for _, e := range rs.entries {
			spec := treeSpecs[e.tree]
			b.WriteString(spec.table + " -A " + spec.root + " " + e.text + "\n")
		}
	}
	return b.String()
}
