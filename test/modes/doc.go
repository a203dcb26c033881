// Package modes runs the agent's binary in one mode after the other on one node
// and looks at what is left of the mode before, and of what others have in the
// kernel: its iptables rules, virtual servers, ipsets and addresses. It runs on a
// kernel with IPVS (see test/uml).
//
// It must not know how the agent works: it sees flags, the kernel, and packets.
package modes
