// Package node knows the machine that the agent runs on: its addresses and when
// they change, which of them serve NodePorts, its kernel's settings and version.
// Deciding (Select, PrimaryIP, ConntrackSysctls, NetworkSysctls) is apart from
// reading and writing (Addresses, Watch, System). It must not know Services or
// rules, and starts nothing by itself.
package node
