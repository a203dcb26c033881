// Package nftables forwards Service traffic by flat maps of nf_tables, in a table of
// its own. It knows plans; it does not know where they come from.
//
// compile.go turns a plan into elements of the maps and names the chains that its
// verdicts lead to, base.go has what does not depend on Services, kernel.go and its
// siblings act, by netlink, and proxier.go decides what must be written. README.md
// follows a packet.
package nftables
