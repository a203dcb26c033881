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
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// This file is the little of the language of nftables that rules are made of. Each
// statement is the text that nft prints of it together with the kernel's expressions.

// rule is one rule: what nft prints, and what the kernel runs. The text is no
// decoration: tests hold it against what nft lists.
type rule struct {
	text  string
	exprs [][]byte
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
	load func(into reg) []byte
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
	return operand{word(w.family) + " " + name, w.addrRegs(), func(into reg) []byte {
		return x(&expr.Payload{DestRegister: uint32(into), Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size})
	}}
}

func (w words) saddr() operand { return w.network("saddr", 12, 8) }
func (w words) daddr() operand { return w.network("daddr", 16, 24) }

func l4proto() operand {
	return operand{"meta l4proto", 1, func(into reg) []byte {
		return x(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: uint32(into)})
	}}
}

func dport() operand {
	return operand{"th dport", 1, func(into reg) []byte {
		return x(&expr.Payload{DestRegister: uint32(into), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
	}}
}

func sport() operand {
	return operand{"th sport", 1, func(into reg) []byte {
		return x(&expr.Payload{DestRegister: uint32(into), Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2})
	}}
}

// random is a number below n, another one for each packet.
func random(n int) operand {
	return operand{fmt.Sprintf("numgen random mod %d", n), 1, func(into reg) []byte {
		return x(&expr.Numgen{Register: uint32(into), Modulus: uint32(n), Type: unix.NFT_NG_RANDOM})
	}}
}

// frontend is what a packet calls the Service by; nodePort the same where the
// address is the node's.
func (w words) frontend() []operand { return []operand{w.daddr(), l4proto(), dport()} }
func nodePort() []operand           { return []operand{l4proto(), dport()} }

// concat loads operands side by side, and returns the register behind them.
func concat(into reg, list ...operand) (text string, exprs [][]byte, end reg) {
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
	exprs [][]byte
}

// x is an expression as the kernel takes it; all is several.
func x(e expr.Any) []byte {
	b, err := expr.Marshal(unix.NFPROTO_UNSPEC, e)
	if err != nil {
		panic(fmt.Sprintf("BUG: %T: %v", e, err))
	}
	return b
}

func all(list ...expr.Any) [][]byte {
	var out [][]byte
	for _, e := range list {
		out = append(out, x(e))
	}
	return out
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
	return stmt{text + " @" + set.String(), append(exprs, x(&expr.Lookup{SourceRegister: uint32(regFirst), SetName: set.String()}))}
}

func vmap(set setID, list ...operand) stmt {
	text, exprs, _ := concat(regFirst, list...)
	return stmt{text + " vmap @" + set.String(),
		append(exprs, x(&expr.Lookup{SourceRegister: uint32(regFirst), DestRegister: uint32(regVerdict), IsDestRegSet: true, SetName: set.String()}))}
}

// lookup replaces operands by what a map has for them.
func lookup(at reg, set setID, list ...operand) stmt {
	text, exprs, _ := concat(at, list...)
	return stmt{text + " map @" + set.String(),
		append(exprs, x(&expr.Lookup{SourceRegister: uint32(at), DestRegister: uint32(at), IsDestRegSet: true, SetName: set.String()}))}
}

// dnat translates to the endpoint that a map has for operands. If it has none the
// rule does nothing.
func (w words) dnat(set setID, list ...operand) rule {
	found := lookup(regFirst, set, list...)
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(w.nfproto()),
		RegAddrMin: uint32(regFirst), RegProtoMin: uint32(regFirst + w.addrRegs())}
	return newRule(stmt{"dnat " + word(w.family) + " to " + found.text, append(found.exprs, x(nat))})
}

// update gives a client an entry in the map of affinity: what it dialled, and the
// endpoint that its packet is on its way to, translated by now. An entry that is there
// keeps its value and has its time begin anew: that is what an update does
// (nft_dynset.c).
func (w words) update(timeout time.Duration) rule {
	text, exprs, end := concat(regFirst, append([]operand{w.saddr()}, w.dialled()...)...)
	to, more, _ := concat(end, w.daddr(), dport())
	return newRule(stmt{
		fmt.Sprintf("update @%s { %s timeout %s : %s }", setAffinity, text, seconds(timeout), to),
		append(append(exprs, more...), x(&expr.Dynset{SrcRegKey: uint32(regFirst), SrcRegData: uint32(end),
			SetName: setAffinity.String(), Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: timeout})),
	})
}

// dialled is what a connection's client dialled, also when that is translated.
func (w words) dialled() []operand {
	return []operand{w.dialledAddr(), l4proto(), dialledPort()}
}

// Keys of what conntrack knows of a connection (linux/netfilter/nf_tables.h), and of
// which way.
const (
	ctProtoDst      = 12 // NFT_CT_PROTO_DST
	ctDstIP         = 20 // NFT_CT_DST_IP, Linux 4.17
	ctDstIP6        = 22
	directionOfIt   = 3 // NFTA_CT_DIRECTION
	originalPackets = 0 // IP_CT_DIR_ORIGINAL
)

func (w words) dialledAddr() operand {
	k := uint32(ctDstIP)
	if w.family == model.IPv6 {
		k = ctDstIP6
	}
	return operand{"ct original " + word(w.family) + " daddr", w.addrRegs(), func(into reg) []byte { return ctOf(k, into) }}
}

func dialledPort() operand {
	return operand{"ct original proto-dst", 1, func(into reg) []byte { return ctOf(ctProtoDst, into) }}
}

// ctOf loads something of a connection's original direction. (The library knows
// neither these keys nor that they have a direction.)
func ctOf(k uint32, into reg) []byte {
	var e nlbatch.Encoder
	e.String(unix.NFTA_EXPR_NAME, "ct")
	e.Nest(unix.NFTA_EXPR_DATA, func() {
		e.U32BE(unix.NFTA_CT_DREG, uint32(into))
		e.U32BE(unix.NFTA_CT_KEY, k)
		e.U8(directionOfIt, originalPackets)
	})
	return e.Content()
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
	exprs := [][]byte{o.load(regFirst)}
	size := p.Addr().BitLen() / 8
	if p.Bits() < p.Addr().BitLen() {
		text += p.Masked().String()
		exprs = append(exprs, x(&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: uint32(size), Mask: mask(p.Bits(), size), Xor: make([]byte, size)}))
	} else {
		text += p.Addr().String()
	}
	return stmt{text, append(exprs, x(&expr.Cmp{Op: op, Register: uint32(regFirst), Data: p.Masked().Addr().AsSlice()}))}
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
	return stmt{"fib " + what + " type local", all(f,
		&expr.Cmp{Op: expr.CmpOpEq, Register: uint32(regFirst), Data: native32(unix.RTN_LOCAL)})}
}

func isProtocol(p model.Protocol) stmt {
	return stmt{"meta l4proto " + p.String(), all(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: uint32(regFirst)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: uint32(regFirst), Data: []byte{byte(p)}})}
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
	return stmt{text, all(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: uint32(regFirst)},
		&expr.Cmp{Op: op, Register: uint32(regFirst), Data: data})}
}

// ctHas matches packets whose connection has one of some bits.
func ctHas(k expr.CtKey, text string, bits uint32) stmt {
	return stmt{text, all(&expr.Ct{Key: k, Register: uint32(regFirst)},
		&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: 4, Mask: native32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: uint32(regFirst), Data: make([]byte, 4)})}
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
	return stmt{"ct direction " + name, all(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: uint32(regFirst)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: uint32(regFirst), Data: []byte{n}})}
}

// mark sets a bit of the packet's mark, for masqueraded to find; unmark takes it off.
func mark(bit uint32) stmt {
	return stmt{fmt.Sprintf("meta mark set meta mark | 0x%08x", bit), all(
		&expr.Meta{Key: expr.MetaKeyMARK, Register: uint32(regFirst)},
		&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: 4, Mask: native32(^bit), Xor: native32(bit)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: uint32(regFirst)})}
}

func unmark(bit uint32) stmt {
	return stmt{fmt.Sprintf("meta mark & 0x%08x != 0x00000000 meta mark set meta mark ^ 0x%08x", bit, bit), all(
		&expr.Meta{Key: expr.MetaKeyMARK, Register: uint32(regFirst)},
		&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: 4, Mask: native32(bit), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: uint32(regFirst), Data: make([]byte, 4)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: uint32(regFirst)},
		&expr.Bitwise{SourceRegister: uint32(regFirst), DestRegister: uint32(regFirst), Len: 4, Mask: native32(^uint32(0)), Xor: native32(bit)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: uint32(regFirst)})}
}

func masquerade() stmt {
	return stmt{"masquerade fully-random", all(&expr.Masq{FullyRandom: true})}
}

// count counts the packets that come so far.
func count() stmt { return stmt{"counter", all(&expr.Counter{})} }

func verdict(kind expr.VerdictKind, text string, to chainName) stmt {
	if to != "" {
		text += " " + string(to)
	}
	return stmt{text, all(&expr.Verdict{Kind: kind, Chain: string(to)})}
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
	return stmt{"reject", all(&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: code})}
}

func (w words) nfproto() uint8 {
	if w.family == model.IPv6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}
