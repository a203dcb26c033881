package nftables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// This file is the little of the language of nftables that rules are made of. Each
// statement is the text that nft prints of it together with the kernel's expressions.

// rule is one rule: what nft prints, and what the kernel runs. The text is no
// decoration: tests hold it against what nft lists.
type rule struct {
	text  string
	exprs []expr.Any
}

// reg is one of the kernel's sixteen 32-bit registers.
type reg uint32

const (
	regFirst   reg = unix.NFT_REG32_00
	regVerdict reg = unix.NFT_REG_VERDICT
)

// operand is something that rules load and compare.
type operand struct {
	text string
	regs reg // how many registers it fills
	load func(into reg) expr.Any
}

// words builds the statements of one family.
type words struct {
	family model.Family
}

func (w words) addrRegs() reg {
	if w.family == model.IPv6 {
		return 4
	}
	return 1
}

func (w words) network(name string, v4, v6 uint32) operand {
	offset, size := v4, uint32(4)
	if w.family == model.IPv6 {
		offset, size = v6, 16
	}
	return operand{word(w.family) + " " + name, w.addrRegs(), func(into reg) expr.Any {
		return &expr.Payload{DestRegister: uint32(into), Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
	}}
}

func (w words) saddr() operand { return w.network("saddr", 12, 8) }
func (w words) daddr() operand { return w.network("daddr", 16, 24) }

func l4proto() operand {
	return operand{"meta l4proto", 1, func(into reg) expr.Any {
		return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: uint32(into)}
	}}
}

func dport() operand {
	return operand{"th dport", 1, func(into reg) expr.Any {
		return &expr.Payload{DestRegister: uint32(into), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
	}}
}

func sport() operand {
	return operand{"th sport", 1, func(into reg) expr.Any {
		return &expr.Payload{DestRegister: uint32(into), Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2}
	}}
}

// random is a number below n, another one for each packet.
func random(n int) operand {
	return operand{fmt.Sprintf("numgen random mod %d", n), 1, func(into reg) expr.Any {
		return &expr.Numgen{Register: uint32(into), Modulus: uint32(n), Type: unix.NFT_NG_RANDOM}
	}}
}

// frontend is what a packet calls the Service by; nodePort the same where the
// address is the node's.
func (w words) frontend() []operand { return []operand{w.daddr(), l4proto(), dport()} }
func nodePort() []operand           { return []operand{l4proto(), dport()} }

// concat loads operands side by side, and returns the register behind them.
func concat(into reg, list ...operand) (text string, exprs []expr.Any, end reg) {
	var texts []string
	for _, o := range list {
		texts = append(texts, o.text)
		exprs = append(exprs, o.load(into))
		into += o.regs
	}
	return strings.Join(texts, " . "), exprs, into
}

// stmt is a part of a rule.
type stmt struct {
	text  string
	exprs []expr.Any
}

func newRule(parts ...stmt) rule {
	var r rule
	var texts []string
	for _, p := range parts {
		if p.text != "" {
			texts = append(texts, p.text)
		}
		r.exprs = append(r.exprs, p.exprs...)
	}
	r.text = strings.Join(texts, " ")
	return r
}

// in matches what a set has; vmap does what a map says.
func in(set setID, list ...operand) stmt {
	text, exprs, _ := concat(regFirst, list...)
	return stmt{text + " @" + set.String(), append(exprs, &expr.Lookup{SourceRegister: uint32(regFirst), SetName: set.String()})}
}

func vmap(set setID, list ...operand) stmt {
	text, exprs, _ := concat(regFirst, list...)
	return stmt{text + " vmap @" + set.String(),
		append(exprs, &expr.Lookup{SourceRegister: uint32(regFirst), DestRegister: uint32(regVerdict), IsDestRegSet: true, SetName: set.String()})}
}

// lookup replaces operands by what a map has for them.
func lookup(at reg, set setID, list ...operand) stmt {
	text, exprs, _ := concat(at, list...)
	return stmt{text + " map @" + set.String(),
		append(exprs, &expr.Lookup{SourceRegister: uint32(at), DestRegister: uint32(at), IsDestRegSet: true, SetName: set.String()})}
}

// dnat translates to the endpoint that a map has for operands. If it has none the
// rule does nothing.
func (w words) dnat(set setID, list ...operand) rule {
	found := lookup(regFirst, set, list...)
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(w.nfproto()),
		RegAddrMin: uint32(regFirst), RegProtoMin: uint32(regFirst + w.addrRegs())}
	return newRule(stmt{"dnat " + word(w.family) + " to " + found.text, append(found.exprs, nat)})
}

// remember gives a client an entry in a map of affinity, for an endpoint that is
// looked up in another map, or lets the entry that it has live on: an update
// prolongs what is there and leaves its value alone (nft_dynset.c).
//
// The value is found first: registers for both at once there are not in IPv6.
func (w words) remember(affinity setID, timeout time.Duration, endpoints setID, frontend []operand, n int) rule {
	found := lookup(regFirst, endpoints, append(append([]operand{}, frontend...), random(n))...)
	at := regFirst + w.addrRegs() + 1
	text, exprs, _ := concat(at, append([]operand{w.saddr()}, frontend...)...)
	return newRule(stmt{
		fmt.Sprintf("update @%s { %s timeout %s : %s }", affinity, text, seconds(timeout), found.text),
		append(append(found.exprs, exprs...), &expr.Dynset{SrcRegKey: uint32(at), SrcRegData: uint32(regFirst),
			SetName: affinity.String(), Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: timeout}),
	})
}

// seconds writes a duration as nft does: 3h, 1h30m, 10s.
func seconds(d time.Duration) string {
	var b strings.Builder
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := d / u.unit; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.name)
			d -= n * u.unit
		}
	}
	return b.String()
}

// within matches an address in, or not in, a prefix.
func (w words) within(o operand, p netip.Prefix, not bool) stmt {
	text, op := o.text+" ", expr.CmpOpEq
	if not {
		text, op = o.text+" != ", expr.CmpOpNeq
	}
	exprs := []expr.Any{o.load(regFirst)}
	size := p.Addr().BitLen() / 8
	if p.Bits() < p.Addr().BitLen() {
		text += p.Masked().String()
		exprs = append(exprs, &expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: uint32(size), Mask: mask(p.Bits(), size), Xor: make([]byte, size)})
	} else {
		text += p.Addr().String()
	}
	return stmt{text, append(exprs, &expr.Cmp{Op: op, Register: uint32(regFirst), Data: p.Masked().Addr().AsSlice()})}
}

func mask(bits, size int) []byte {
	m := make([]byte, size)
	for i := range bits {
		m[i/8] |= 0x80 >> (i % 8)
	}
	return m
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// isLocal matches packets whose source (saddr) or destination (daddr) is an address
// of this machine.
func isLocal(what string) stmt {
	f := &expr.Fib{Register: uint32(regFirst), ResultADDRTYPE: true, FlagSADDR: what == "saddr", FlagDADDR: what == "daddr"}
	return stmt{"fib " + what + " type local", []expr.Any{f,
		&expr.Cmp{Op: expr.CmpOpEq, Register: uint32(regFirst), Data: native32(unix.RTN_LOCAL)}}}
}

// fromInterface matches, or not, the interface that a packet came in by. A name
// that ends in * stands for all that begin so.
func fromInterface(name string, not bool) stmt {
	text, op := `iifname "`+name+`"`, expr.CmpOpEq
	if not {
		text, op = `iifname != "`+name+`"`, expr.CmpOpNeq
	}
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	if prefix, wild := strings.CutSuffix(name, "*"); wild {
		data = []byte(prefix)
	}
	return stmt{text, []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: uint32(regFirst)},
		&expr.Cmp{Op: op, Register: uint32(regFirst), Data: data}}}
}

// ctHas matches packets whose connection has one of some bits.
func ctHas(k expr.CtKey, text string, bits uint32) stmt {
	return stmt{text, []expr.Any{&expr.Ct{Key: k, Register: uint32(regFirst)},
		&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: 4, Mask: native32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: uint32(regFirst), Data: make([]byte, 4)}}}
}

func ctTranslated() stmt { return ctHas(expr.CtKeySTATUS, "ct status dnat", 1<<5) } // IPS_DST_NAT
func ctInvalid() stmt    { return ctHas(expr.CtKeySTATE, "ct state invalid", expr.CtStateBitINVALID) }
func ctKnown() stmt {
	return ctHas(expr.CtKeySTATE, "ct state established,related", expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}

func ctNew() stmt { return ctHas(expr.CtKeySTATE, "ct state new", expr.CtStateBitNEW) }

// ctOriginal and ctReply match the packets of one direction.
func ctOriginal() stmt { return ctDirection("original", 0) }
func ctReply() stmt    { return ctDirection("reply", 1) }

func ctDirection(name string, n byte) stmt {
	return stmt{"ct direction " + name, []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: uint32(regFirst)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: uint32(regFirst), Data: []byte{n}}}}
}

// mark sets a bit of the packet's mark, for masqueraded to find; unmark takes it off.
func mark(bit uint32) stmt {
	return stmt{fmt.Sprintf("meta mark set meta mark | 0x%08x", bit), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: uint32(regFirst)},
		&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: 4, Mask: native32(^bit), Xor: native32(bit)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: uint32(regFirst)}}}
}

func unmark(bit uint32) stmt {
	return stmt{fmt.Sprintf("meta mark & 0x%08x != 0x00000000 meta mark set meta mark ^ 0x%08x", bit, bit), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: uint32(regFirst)},
		&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: 4, Mask: native32(bit), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: uint32(regFirst), Data: make([]byte, 4)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: uint32(regFirst)},
		&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: 4, Mask: native32(^uint32(0)), Xor: native32(bit)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: uint32(regFirst)}}}
}

func masquerade() stmt {
	return stmt{"masquerade fully-random", []expr.Any{&expr.Masq{FullyRandom: true}}}
}

// count counts the packets that come so far.
func count() stmt { return stmt{"counter", []expr.Any{&expr.Counter{}}} }

func verdict(kind expr.VerdictKind, text string, to chainName) stmt {
	if to != "" {
		text += " " + string(to)
	}
	return stmt{text, []expr.Any{&expr.Verdict{Kind: kind, Chain: string(to)}}}
}

func goTo(c chainName) stmt { return verdict(expr.VerdictGoto, "goto", c) }
func jump(c chainName) stmt { return verdict(expr.VerdictJump, "jump", c) }
func drop() stmt            { return verdict(expr.VerdictDrop, "drop", "") }
func returns() stmt         { return verdict(expr.VerdictReturn, "return", "") }

// then does what an element's value says.
func then(c chainName) stmt {
	if c == dropAll {
		return drop()
	}
	return goTo(c)
}

// reject refuses with ICMP port unreachable, as iptables' REJECT does.
func (w words) reject() stmt {
	code := uint8(3) // ICMP_PORT_UNREACH
	if w.family == model.IPv6 {
		code = 4 // ICMPV6_PORT_UNREACH
	}
	return stmt{"reject", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: code}}}
}

func (w words) nfproto() uint8 {
	if w.family == model.IPv6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}
