// Package modes runs the agent's binary in one mode after the other on one node
// and looks at what is left of the mode before, and of what others have in the
// kernel: their rules in both variants of iptables, tables, virtual servers, ipsets
// and addresses. What concerns ipvs mode runs on a kernel with IPVS (see test/uml),
// what concerns nftables mode on the machine's own.
//
// It must not know how the agent works: it sees flags, the kernel, and packets.
package modes
