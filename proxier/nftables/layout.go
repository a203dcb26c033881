package nftables

import (
	"encoding/binary"
	"net/netip"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// This file is how keys and values look in the kernel: fields side by side, each
// filled up to whole registers of four bytes.

// size is how many bytes a field has, without what fills it up.
func (f field) size(family model.Family) int {
	switch f {
	case fieldAddr, fieldClient, fieldSource:
		if family == model.IPv6 {
			return 16
		}
		return 4
	case fieldProtocol:
		return 1
	case fieldPort, fieldServerPort:
		return 2
	case fieldIndex:
		return 4
	}
	return 0 // a verdict has no size
}

func padded(n int) int { return (n + 3) &^ 3 }

// length is how many bytes a key or a value of several fields has.
func length(list []field, family model.Family) int {
	n := 0
	for _, f := range list {
		n += padded(f.size(family))
	}
	return n
}

// Types of fields as nft knows them (nft's datatype.h); several in one are six bits
// each.
const (
	typeInteger = 4
	typeIPv4    = 7
	typeIPv6    = 8
	typeProto   = 12
	typeService = 13
	typeVerdict = 0xffffff00 // NFT_DATA_VERDICT
)

func (f field) datatype(family model.Family) uint32 {
	switch f {
	case fieldProtocol:
		return typeProto
	case fieldPort, fieldServerPort:
		return typeService
	case fieldIndex:
		return typeInteger
	case fieldVerdict:
		return typeVerdict
	}
	if family == model.IPv6 {
		return typeIPv6
	}
	return typeIPv4
}

func datatype(list []field, family model.Family) uint32 {
	t := uint32(0)
	for _, f := range list {
		t = t<<6 | f.datatype(family)
	}
	return t
}

// append appends a key's bytes. With end, the last field is the end of its range.
func (k key) append(b []byte, end bool) []byte { return k.appendFor(k.addr, b, end) }

// append appends the bytes of a client's key.
func (c client) append(b []byte) []byte { return c.appendFor(c.from, b, false) }

// appendFor appends a key with the client in front that keys of some sets have.
func (k key) appendFor(from netip.Addr, b []byte, end bool) []byte {
	for _, f := range setSpecs[k.set].key {
		switch f {
		case fieldAddr:
			b = append(b, k.addr.AsSlice()...)
		case fieldClient:
			b = append(b, from.AsSlice()...)
		case fieldProtocol:
			b = append(b, byte(k.protocol), 0, 0, 0)
		case fieldPort, fieldServerPort:
			b = append(binary.BigEndian.AppendUint16(b, k.port), 0, 0)
		case fieldIndex:
			b = binary.NativeEndian.AppendUint32(b, k.index)
		case fieldSource:
			a := k.source.Masked().Addr()
			if end {
				a = lastOf(k.source)
			}
			b = append(b, a.AsSlice()...)
		}
	}
	return b
}

// lastOf is the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// appendValue appends the bytes of an endpoint.
func (v value) append(b []byte) []byte {
	b = append(b, v.to.Addr().AsSlice()...)
	return append(binary.BigEndian.AppendUint16(b, v.to.Port()), 0, 0)
}

// parseKey reads a key back; end is the end of its range, if it has one. It returns
// the client in front of keys of affinity separately.
func parseKey(set setID, family model.Family, b, end []byte) (k key, from netip.Addr, ok bool) {
	spec := setSpecs[set]
	if len(b) < length(spec.key, family) {
		return k, from, false
	}
	k.set = set
	at := 0
	for _, f := range spec.key {
		v := b[at : at+f.size(family)]
		switch f {
		case fieldAddr:
			k.addr, _ = netip.AddrFromSlice(v)
		case fieldClient:
			from, _ = netip.AddrFromSlice(v)
		case fieldProtocol:
			k.protocol = model.Protocol(v[0])
		case fieldPort, fieldServerPort:
			k.port = binary.BigEndian.Uint16(v)
		case fieldIndex:
			k.index = binary.NativeEndian.Uint32(v)
		case fieldSource:
			if k.source, ok = prefixOf(v, end, at); !ok {
				return k, from, false
			}
		}
		at += padded(f.size(family))
	}
	return k, from, true
}

// prefixOf is the prefix between a first and a last address, if they make one.
func prefixOf(first, end []byte, at int) (netip.Prefix, bool) {
	a, _ := netip.AddrFromSlice(first)
	if end == nil {
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	if len(end) < at+len(first) {
		return netip.Prefix{}, false
	}
	last, _ := netip.AddrFromSlice(end[at : at+len(first)])
	for bits := a.BitLen(); bits >= 0; bits-- {
		if p := netip.PrefixFrom(a, bits); lastOf(p) == last && p.Masked() == p {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

func parseTo(family model.Family, b []byte) (netip.AddrPort, bool) {
	n := fieldAddr.size(family)
	if len(b) < n+2 {
		return netip.AddrPort{}, false
	}
	a, _ := netip.AddrFromSlice(b[:n])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[n:])), true
}

// What nft notes beside a set, to print "typeof ip daddr . th dport" for it and to
// read that again (libnftnl's udata.h, nft's expression.h and proto.h: numbers that
// are in everybody's kernels, and therefore fixed).
const (
	noteKeyOrder, noteValueOrder, noteKeyType, noteValueType = 0, 1, 3, 4
	noteKind, noteBody                                       = 0, 1

	kindVerdict, kindPayload, kindMeta    = 1, 7, 9
	kindConcat, kindNumgen                = 13, 23
	protoTransport, protoIP, protoIP6     = 11, 12, 13
	ipSource, ipDestination               = 11, 12
	ip6Source, ip6Destination             = 8, 9
	transportSource, transportDestination = 1, 2
	metaL4Proto                           = 16
	numgenRandom                          = 1
)

func note(typ byte, v []byte) []byte { return append([]byte{typ, byte(len(v))}, v...) }

func note32(typ byte, v uint32) []byte { return note(typ, binary.NativeEndian.AppendUint32(nil, v)) }

func join(list ...[]byte) []byte {
	var out []byte
	for _, b := range list {
		out = append(out, b...)
	}
	return out
}

func payloadNote(proto, what uint32) []byte {
	return join(note32(noteKind, kindPayload), note(noteBody, join(note32(0, proto), note32(1, what))))
}

// note describes a field to nft.
func (f field) note(family model.Family) []byte {
	proto, source, destination := uint32(protoIP), uint32(ipSource), uint32(ipDestination)
	if family == model.IPv6 {
		proto, source, destination = protoIP6, ip6Source, ip6Destination
	}
	switch f {
	case fieldAddr:
		return payloadNote(proto, destination)
	case fieldSource, fieldClient:
		return payloadNote(proto, source)
	case fieldPort:
		return payloadNote(protoTransport, transportDestination)
	case fieldServerPort:
		return payloadNote(protoTransport, transportSource)
	case fieldProtocol:
		return join(note32(noteKind, kindMeta), note(noteBody, note32(0, metaL4Proto)))
	case fieldVerdict:
		return join(note32(noteKind, kindVerdict), note(noteBody, nil))
	case fieldIndex:
		return join(note32(noteKind, kindNumgen), note(noteBody, join(note32(0, numgenRandom), note32(1, 1<<16), note32(2, 0))))
	}
	return nil
}

func typeNote(list []field, family model.Family) []byte {
	if len(list) == 1 {
		return list[0].note(family)
	}
	var all [][]byte
	for i, f := range list {
		all = append(all, note(byte(i), f.note(family)))
	}
	return join(note32(noteKind, kindConcat), note(noteBody, join(all...)))
}

// notes are the user data of a set.
func (s setSpec) notes(family model.Family) []byte {
	order := uint32(0)
	if len(s.key) == 1 {
		order = 2 // big endian
	}
	out := note32(noteKeyOrder, order)
	if s.value != nil {
		out = join(out, note32(noteValueOrder, 0))
	}
	out = join(out, note(noteKeyType, typeNote(s.key, family)))
	if s.value != nil {
		out = join(out, note(noteValueType, typeNote(s.value, family)))
	}
	return out
}
