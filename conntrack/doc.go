// Package conntrack removes flows from the kernel's connection tracking table
// that contradict the plans. A UDP client that keeps its socket keeps its flow,
// and the flow remembers the translation it got first: the endpoint can be gone
// for hours while every packet refreshes the entry (kubernetes issues 122740,
// 139628). The same holds for SCTP. TCP notices by itself and is left alone.
//
// stale.go decides, without I/O, which flows those are; netlink.go lists and
// deletes; Cleaner puts the two together in a goroutine of its own, so that no
// Sync ever waits for the table. Nothing here knows proxiers, Services' policy
// or topology: a flow to any serving endpoint is good.
package conntrack
