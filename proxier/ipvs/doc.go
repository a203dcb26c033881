// Package ipvs forwards Service traffic by IPVS virtual servers, with
// kube-proxy's names for the ipsets and chains around them, and the semantics of
// the other proxiers. It knows plans; it does not know where they come from.
//
// compile.go turns a plan into virtual servers, addresses and set entries,
// base.go has the few static rules, termination.go lets connections to removed
// endpoints end, the kernel files act, and proxier.go decides what must
// be written.
package ipvs
