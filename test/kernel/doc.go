// Package kernel runs every scenario of test/scenarios with every proxier on a
// real kernel: it builds the scenario's cluster out of network namespaces, lets
// the proxier program node1, and dials each flow.
//
// It knows proxiers by their interface only. To put another one under test, add
// it to the table in proxiers_test.go.
//
// It needs network namespaces (root, or "unshare -Ur"), and skips loudly where
// there are none. SCTP flows are skipped where the kernel has no SCTP sockets.
// What needs IPVS is run by TestIPVS on a kernel that has it, the machine's own
// or one that is booted for it (package uml): the scenarios with the ipvs
// proxier, and tests of what is only there: schedulers, termination, and whose a
// virtual server is. What only nftables mode has is in nftables_test.go: counters,
// and a table that goes.
package kernel
