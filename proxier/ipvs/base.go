package ipvs

import (
	"strconv"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Tables and chains. Names are kube-proxy's ipvs mode's, but for those of the
// mangle table, which it does not use.
const (
	tableNAT    = "nat"
	tableFilter = "filter"
	tableMangle = "mangle"

	chainServices      = "KUBE-SERVICES"
	chainPostrouting   = "KUBE-POSTROUTING"
	chainMarkMasq      = "KUBE-MARK-MASQ"
	chainLoadBalancer  = "KUBE-LOAD-BALANCER"
	chainNodePort      = "KUBE-NODE-PORT" // in nat and in filter
	chainForward       = "KUBE-FORWARD"
	chainProxyFirewall = "KUBE-PROXY-FIREWALL"
	chainSourceRanges  = "KUBE-SOURCE-RANGES-FIREWALL" // in filter and in mangle
	chainIPVSFilter    = "KUBE-IPVS-FILTER"
	chainIPVSOut       = "KUBE-IPVS-OUT-FILTER" // in mangle; kube-proxy's is in filter
	chainInside        = "KUBE-IPVS-INSIDE"     // in mangle and in nat
)

// commentFirewall is that of the jumps to chainProxyFirewall. iptables mode has a
// chain of the same name under another comment.
const commentFirewall = "kube-proxy firewall rules"

// rules is a chain with its complete content, as iptables-save prints it.
type rules struct {
	table, chain string
	content      []string // the text behind "-A CHAIN "
}

// jump is a rule of a built-in chain that leads into one of ours. Jumps are put
// at the top of their chains in the given order, so that later ones end up above
// earlier ones.
type jump struct {
	table, from string
	text        string
}

// static is all that is not changed by Services: chains and jumps of one family.
type static struct {
	family model.Family
	chains []rules
	jumps  []jump
}

// Marks that send clients inside to a virtual server of their own. They have a
// signature, so that no mark that somebody else may use leads there: IPVS would
// take any packet to this node that carries it. Small numbers, which LVS set-ups
// count from 1, are out of the question.
const (
	insideSignature = 0x2800
	insideSigMask   = 0x3800
	insideMask      = 0x3fff
	insideMost      = 0x07ff // marks that there are
	insideHigh      = 16     // not 15: bit 15 is the kubelet's mark to drop
)

// insideShift moves the marks above the masquerade bit if that is among their
// bits.
func insideShift(masqueradeBit int) int {
	if masqueradeBit >= 14 {
		return 0
	}
	return insideHigh
}

// ruleWriter prints the static rules of one family.
type ruleWriter struct {
	o      *Options
	facts  *plan.Facts
	family model.Family
}

func (w ruleWriter) match(id setID, dirs string) string {
	return "-m set --match-set " + id.name(w.family) + " " + dirs
}

func (w ruleWriter) loopback() string {
	if w.family == model.IPv6 {
		return "-s ::1/128"
	}
	return "-s 127.0.0.0/8"
}

// pods gives the match for sources that are pods of this node ("-s 10.0.0.0/8"),
// with "! " in front for those that are not.
func (w ruleWriter) pods(not string) string {
	switch src, in := w.o.Detector.Match(); {
	case src != "":
		return not + "-s " + src
	case in != "":
		return not + "-i " + in
	}
	return ""
}

func (w ruleWriter) masquerade() string {
	if w.o.RandomFully {
		return "-j MASQUERADE --random-fully"
	}
	return "-j MASQUERADE"
}

func join(parts ...string) string {
	out := parts[:0]
	for _, p := range parts {
		if p != "" {
			out = append(out, p)
		}
	}
	return strings.Join(out, " ")
}

func note(text string) string { return `-m comment --comment "` + text + `"` }

func hex(n uint32) string { return "0x" + strconv.FormatUint(uint64(n), 16) }

const isNew = "-m conntrack --ctstate NEW"

// base gives the rules that do not depend on Services.
func base(o *Options, facts *plan.Facts) static {
	w := ruleWriter{o, facts, o.Family}
	s := static{family: o.Family}
	chain := func(table, name string, content ...string) {
		s.chains = append(s.chains, rules{table, name, content})
	}
	chain(tableNAT, chainMarkMasq, "-j MARK --set-xmark "+w.marked())
	chain(tableNAT, chainLoadBalancer,
		w.match(setLoadBalancerLocal, "dst,dst")+" -j RETURN",
		"-j "+chainMarkMasq)
	chain(tableNAT, chainNodePort, w.nodePorts()...)
	chain(tableNAT, chainServices, w.services()...)
	if o.Inside {
		chain(tableNAT, chainInside,
			"-j MARK --set-xmark 0x0/"+hex(insideMask<<insideShift(o.MasqueradeBit)),
			join(note("node traffic to services with a local policy"), "-m addrtype --src-type LOCAL", w.masquerade()))
	}
	chain(tableNAT, chainPostrouting, w.postrouting()...)
	chain(tableFilter, chainForward,
		join(note("kubernetes forwarding rules"), "-m mark --mark "+w.marked(), "-j ACCEPT"),
		join(note("kubernetes forwarding conntrack rule"), "-m conntrack --ctstate RELATED,ESTABLISHED", "-j ACCEPT"))
	chain(tableFilter, chainNodePort,
		join("-p tcp", note("Kubernetes health check node port"), w.match(setHealthCheckNodePort, "dst"), "-j ACCEPT"))
	chain(tableFilter, chainSourceRanges, w.sourceRanges()...)
	chain(tableFilter, chainProxyFirewall, w.firewall())
	chain(tableFilter, chainIPVSFilter, w.filter()...)
	chain(tableMangle, chainSourceRanges, w.sourceRanges()...)
	chain(tableMangle, chainIPVSOut, w.out()...)
	if o.Inside && o.Detector.Detects() {
		chain(tableMangle, chainInside, join(w.pods(""), isNew, w.mapInside()))
	}
	s.jumps = w.jumps()
	return s
}

// marked is the masquerade mark with its mask.
func (w ruleWriter) marked() string {
	m := hex(1 << uint(w.o.MasqueradeBit))
	return m + "/" + m
}

// services decides whose source is rewritten. What is accepted here is not seen
// by others' rules in the nat table.
func (w ruleWriter) services() []string {
	out := []string{
		w.loopback() + " -j RETURN",
		join(note("Kubernetes service lb portal"), w.match(setLoadBalancer, "dst,dst"), "-j "+chainLoadBalancer),
	}
	clusterIP := note("Kubernetes service cluster ip + port for masquerade purpose")
	switch {
	case w.facts.MasqueradeAll:
		out = append(out, join(clusterIP, w.match(setClusterIP, "dst,dst"), "-j "+chainMarkMasq))
	case w.o.Detector.Detects():
		out = append(out, join(w.pods("! "), clusterIP, w.match(setClusterIP, "dst,dst"), "-j "+chainMarkMasq))
	}
	return append(out,
		join(note("Kubernetes service external ip + port for masquerade and filter purpose"), w.match(setExternalIP, "dst,dst"), "-j "+chainMarkMasq),
		w.match(setExternalIP, "dst,dst")+" -j ACCEPT",
		w.match(setExternalIPLocal, "dst,dst")+" -j ACCEPT",
		// Before the node ports: an address on kube-ipvs0 is local, too, and its port
		// may be the number of a node port (kubernetes issue 132068).
		w.match(setClusterIP, "dst,dst")+" -j ACCEPT",
		w.match(setLoadBalancer, "dst,dst")+" -j ACCEPT",
		"-m addrtype --dst-type LOCAL -j "+chainNodePort)
}

func (w ruleWriter) nodePorts() []string {
	var out []string
	for _, p := range []struct {
		protocol   model.Protocol
		local, all setID
		dirs       string
	}{
		{model.TCP, setNodePortLocalTCP, setNodePortTCP, "dst"},
		{model.UDP, setNodePortLocalUDP, setNodePortUDP, "dst"},
		{model.SCTP, setNodePortLocalSCTP, setNodePortSCTP, "dst,dst"},
	} {
		protocol := "-p " + p.protocol.String()
		out = append(out,
			join(protocol, note(setSpecs[p.local].comment), w.match(p.local, p.dirs), "-j RETURN"),
			join(protocol, note(setSpecs[p.all].comment), w.match(p.all, p.dirs), "-j "+chainMarkMasq))
	}
	return out
}

func (w ruleWriter) postrouting() []string {
	out := []string{join(note(setSpecs[setLoopBack].comment), w.match(setLoopBack, "dst,dst,src"), w.masquerade())}
	if w.o.Inside {
		shift := insideShift(w.o.MasqueradeBit)
		out = append(out, "-m mark --mark "+hex(insideSignature<<shift)+"/"+hex(insideSigMask<<shift)+" -j "+chainInside)
	}
	mark := hex(1 << uint(w.o.MasqueradeBit))
	return append(out,
		// A node that dials an address on kube-ipvs0 gets that as its source. Nobody
		// else could answer it.
		join("! -o lo", note("node traffic to services"), w.match(setIPs, "src"), w.masquerade()),
		"-m mark ! --mark "+w.marked()+" -j RETURN",
		"-j MARK --set-xmark "+mark+"/0x0",
		join(note("kubernetes service traffic requiring SNAT"), w.masquerade()))
}

func (w ruleWriter) firewall() string {
	return join(isNew, note(setSpecs[setLoadBalancerFW].comment), w.match(setLoadBalancerFW, "dst,dst"), "-j "+chainSourceRanges)
}

func (w ruleWriter) sourceRanges() []string {
	return []string{
		join(note(setSpecs[setLoadBalancerSourceCIDR].comment), w.match(setLoadBalancerSourceCIDR, "dst,dst,src"), "-j RETURN"),
		"-j DROP",
	}
}

// filter keeps what is no Service's from the host's own ports, which would be
// reachable through every address on kube-ipvs0 (kubernetes issue 72236).
func (w ruleWriter) filter() []string {
	out := []string{
		join(isNew, note(setSpecs[setDrop].comment), w.match(setDrop, "dst,dst"), "-j DROP"),
		join(w.pods("! "), isNew, "-m addrtype ! --src-type LOCAL", note(setSpecs[setDropOutside].comment), w.match(setDropOutside, "dst,dst"), "-j DROP"),
	}
	for _, id := range []setID{setLoadBalancer, setClusterIP, setExternalIP, setExternalIPLocal} {
		out = append(out, w.match(id, "dst,dst")+" -j RETURN")
	}
	reject := "-j REJECT --reject-with icmp-port-unreachable"
	if w.family == model.IPv6 {
		reject = "-j REJECT --reject-with icmp6-port-unreachable"
	}
	return append(out,
		w.match(setHealthCheckNodePort, "dst")+" -j RETURN",
		join(isNew, w.match(setIPs, "dst"), reject))
}

// out is for the node's own packets, which IPVS takes before the filter table
// sees them.
func (w ruleWriter) out() []string {
	list := []string{
		join(isNew, note(setSpecs[setDrop].comment), w.match(setDrop, "dst,dst"), "-j DROP"),
		w.firewall(),
	}
	if w.o.Inside {
		list = append(list, join(isNew, w.mapInside()))
	}
	return list
}

// mapInside gives a packet the mark of the frontend that it goes to, if that has
// one.
func (w ruleWriter) mapInside() string {
	return "-j SET --map-set " + setInside.name(w.family) + " dst,dst --map-mark"
}

func (w ruleWriter) jumps() []jump {
	j := func(table, from, comment, to string) jump {
		return jump{table, from, join(note(comment), "-j "+to)}
	}
	list := []jump{
		j(tableNAT, "OUTPUT", "kubernetes service portals", chainServices),
		j(tableNAT, "PREROUTING", "kubernetes service portals", chainServices),
		j(tableNAT, "POSTROUTING", "kubernetes postrouting rules", chainPostrouting),
		j(tableFilter, "FORWARD", "kubernetes forwarding rules", chainForward),
		j(tableFilter, "INPUT", "kubernetes health check rules", chainNodePort),
		j(tableFilter, "INPUT", commentFirewall, chainProxyFirewall),
		j(tableFilter, "FORWARD", commentFirewall, chainProxyFirewall),
		j(tableFilter, "INPUT", "kubernetes ipvs access filter", chainIPVSFilter),
		j(tableMangle, "OUTPUT", "kubernetes ipvs access filter", chainIPVSOut),
	}
	if w.o.Inside && w.o.Detector.Detects() {
		list = append(list, j(tableMangle, "INPUT", "pods and services with a local policy", chainInside))
	}
	return list
}
