package trace

import (
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// statement reads the next statement of a rule; nil for one that only counts.
func (t *nftTable) statement(a *args) nftStatement {
	word := a.peek()
	switch word {
	case "counter":
		nftCounter(a)
		return nil
	case "iifname":
		return nftInterface(a)
	case "fib":
		return nftFib(a)
	case "ct":
		if len(a.words) < 2 || a.words[1] != "original" {
			return nftConnection(a)
		}
	case "dnat":
		return t.dnat(a)
	case "update":
		return t.update(a)
	case "masquerade":
		return nftMasquerade(a)
	case "reject":
		a.next()
		return func(*walk) (nftVerdict, error) { return nftVerdict{kind: reject}, nil }
	case "meta":
		if len(a.words) > 1 && a.words[1] == "mark" {
			return nftMark(a)
		}
		if len(a.words) > 2 && slices.Contains(nftProtocols, a.words[2]) {
			return nftProtocol(a)
		}
	case "drop", "return", "goto", "jump":
		v, _ := t.verdict(a, a.next())
		return func(*walk) (nftVerdict, error) { return *v, nil }
	}
	return t.match(a)
}

var nftProtocols = []string{"tcp", "udp", "sctp"}

// nftProtocol reads "meta l4proto tcp".
func nftProtocol(a *args) nftStatement {
	a.expect("meta")
	a.expect("l4proto")
	name := a.next()
	return func(w *walk) (nftVerdict, error) { return nftIf(w.packet.Protocol == name), nil }
}

// nftCounter reads "counter" and what it has counted, if they are there.
func nftCounter(a *args) {
	if a.take("counter") && a.take("packets") {
		a.uint(64)
		a.expect("bytes")
		a.uint(64)
	}
}

// nftInterface reads iifname "cbr0", or != and a name; "veth*" stands for all that
// begin so.
func nftInterface(a *args) nftStatement {
	a.expect("iifname")
	not := a.take("!=")
	name, err := strconv.Unquote(a.next())
	if err != nil {
		a.fail("the name of an interface has quotes")
	}
	is := func(s string) bool { return s == name }
	if prefix, ok := strings.CutSuffix(name, "*"); ok {
		is = func(s string) bool { return strings.HasPrefix(s, prefix) }
	}
	return func(w *walk) (nftVerdict, error) { return nftIf(is(w.packet.In) != not), nil }
}

func nftFib(a *args) nftStatement {
	a.expect("fib")
	what := a.next()
	if what != "saddr" && what != "daddr" {
		a.fail("unknown: fib %s", what)
	}
	a.expect("type")
	a.expect("local")
	return func(w *walk) (nftVerdict, error) {
		addr := w.packet.Dst.Addr()
		if what == "saddr" {
			addr = w.packet.Src.Addr()
		}
		return nftIf(w.host.Local(addr)), nil
	}
}

// nftConnection reads "ct state invalid", or other states, or "ct status dnat", or "ct
// direction original": that of every packet that is followed.
func nftConnection(a *args) nftStatement {
	a.expect("ct")
	if a.take("status") {
		a.expect("dnat")
		return func(w *walk) (nftVerdict, error) { return nftIf(w.result.Translated), nil }
	}
	if a.take("direction") {
		way := a.next()
		if way != "original" && way != "reply" {
			a.fail("unknown: ct direction %s", way)
		}
		return func(*walk) (nftVerdict, error) { return nftIf(way == "original"), nil }
	}
	a.expect("state")
	known := map[string]State{"new": New, "established": Established, "related": Related, "invalid": Invalid}
	var states []State
	for name := range strings.SplitSeq(a.next(), ",") {
		s, ok := known[name]
		if !ok {
			a.fail("unknown connection state %s", name)
		}
		states = append(states, s)
	}
	return func(w *walk) (nftVerdict, error) { return nftIf(slices.Contains(states, w.packet.State)), nil }
}

// nftMark reads "meta mark & 0x4000 != 0x0", or "meta mark set meta mark | 0x4000".
func nftMark(a *args) nftStatement {
	a.expect("meta")
	a.expect("mark")
	if !a.take("set") {
		a.expect("&")
		mask := uint32(a.uint(32))
		op := a.next()
		if op != "!=" && op != "==" {
			a.fail("unknown: meta mark & N %s", op)
		}
		value := uint32(a.uint(32))
		return func(w *walk) (nftVerdict, error) { return nftIf((w.packet.Mark&mask == value) == (op == "==")), nil }
	}
	a.expect("meta")
	a.expect("mark")
	op := a.next()
	if op != "|" && op != "^" {
		a.fail("unknown: meta mark set meta mark %s", op)
	}
	bits := uint32(a.uint(32))
	return func(w *walk) (nftVerdict, error) {
		if op == "|" {
			w.packet.Mark |= bits
		} else {
			w.packet.Mark ^= bits
		}
		return nftNext, nil
	}
}

func nftMasquerade(a *args) nftStatement {
	a.expect("masquerade")
	a.expect("fully-random")
	return func(w *walk) (nftVerdict, error) {
		if w.kind != "nat" || w.hook != "POSTROUTING" {
			return nftMiss, errors.New("masquerade outside of postrouting")
		}
		w.result.Masqueraded = true
		return nftVerdict{kind: accept}, nil
	}
}

// field reads one expression that can be a part of a key.
func (t *nftTable) field(a *args) nftField {
	switch word := a.next(); word {
	case "ip", "ip6":
		return t.addrField(a, word)
	case "ct":
		return t.dialledField(a)
	case "meta":
		a.expect("l4proto")
		return nftField{kind: "protocol", of: func(w *walk) string { return w.packet.Protocol }}
	case "th":
		if a.take("sport") {
			return nftField{kind: "port", of: func(w *walk) string { return strconv.Itoa(int(w.packet.Src.Port())) }}
		}
		a.expect("dport")
		return nftField{kind: "port", of: func(w *walk) string { return strconv.Itoa(int(w.packet.Dst.Port())) }}
	case "numgen":
		a.expect("random")
		a.expect("mod")
		f := nftField{kind: "number", below: int(a.uint(31))}
		if f.below == 0 {
			a.fail("there is no number below 0")
		}
		return f
	default:
		a.fail("unknown expression %s", word)
	}
	return nftField{}
}

func (t *nftTable) addrField(a *args, family string) nftField {
	what := a.next()
	if family != t.family || what != "saddr" && what != "daddr" {
		a.fail("unknown: %s %s in a table of family %s", family, what, t.family)
	}
	return nftField{kind: "addr", of: func(w *walk) string {
		if what == "saddr" {
			return w.packet.Src.Addr().String()
		}
		return w.packet.Dst.Addr().String()
	}}
}

// dialledField reads "ct original ip daddr", the address that the connection's client
// dialled, or "ct original proto-dst", the port.
func (t *nftTable) dialledField(a *args) nftField {
	a.expect("original")
	if a.take("proto-dst") {
		return nftField{kind: "port", of: func(w *walk) string { return strconv.Itoa(int(w.original().Port())) }}
	}
	a.expect(t.family)
	a.expect("daddr")
	return nftField{kind: "addr", of: func(w *walk) string { return w.original().Addr().String() }}
}

// original is where a new connection's first packet was sent to. Of others it is not
// known.
func (w *walk) original() netip.AddrPort {
	if w.packet.State != New {
		w.fault = errors.New("what the client of an old connection dialled is not known")
	}
	return w.dialled
}

// fields reads a concatenation.
func (t *nftTable) fields(a *args) (list []nftField) {
	for {
		f := t.field(a)
		list = append(list, f)
		if a.err != nil || !a.take(".") {
			return list
		}
		if f.kind == "number" {
			a.fail("a random number that is not a key's last field")
		}
	}
}

func kindsOf(fields []nftField) (kinds []string) {
	for _, f := range fields {
		kinds = append(kinds, f.kind)
	}
	return kinds
}

// set gives the set or map "@name" that is asked by such fields. One that has not
// been declared is empty, and of whatever type fits.
func (t *nftTable) set(a *args, name string, fields []nftField, value ...string) *nftSet {
	name, ok := strings.CutPrefix(name, "@")
	if !ok {
		a.fail("@ and the name of a set were expected")
	}
	kinds := kindsOf(fields)
	s := t.sets[name]
	if s == nil {
		s = &nftSet{name: name, key: kinds, value: value, elements: map[string]nftElement{}}
		t.sets[name] = s
	}
	if !slices.Equal(s.key, kinds) || !slices.Equal(s.value, value) {
		a.fail("%s is by %v (%v), and not by %v (%v)", name, s.key, s.value, kinds, value)
	}
	return s
}

// match reads fields and what they are held against: a set, a map of verdicts, or,
// for one address, a prefix.
func (t *nftTable) match(a *args) nftStatement {
	fields := t.fields(a)
	switch {
	case a.take("vmap"):
		return t.vmap(a, fields)
	case strings.HasPrefix(a.peek(), "@"):
		s := t.set(a, a.next(), fields)
		return func(w *walk) (nftVerdict, error) {
			e, ok := s.ask(w, fields)
			return nftVerdict{miss: !ok, found: e.text}, nil
		}
	case len(fields) != 1 || fields[0].kind != "addr":
		a.fail("unknown match %s", a.peek())
		return nil
	}
	not := a.take("!=")
	p := a.prefix()
	return func(w *walk) (nftVerdict, error) {
		addr, err := netip.ParseAddr(fields[0].of(w))
		return nftIf(p.Contains(addr) != not), err
	}
}

func (t *nftTable) vmap(a *args, fields []nftField) nftStatement {
	s := t.set(a, a.next(), fields, "verdict")
	return func(w *walk) (nftVerdict, error) {
		e, ok := s.ask(w, fields)
		if !ok {
			return nftMiss, nil
		}
		v := *e.then
		v.found = e.text
		return v, nil
	}
}

func (t *nftTable) dnat(a *args) nftStatement {
	a.expect("dnat")
	a.expect(t.family)
	a.expect("to")
	fields := t.fields(a)
	a.expect("map")
	s := t.set(a, a.next(), fields, "addr", "port")
	return func(w *walk) (nftVerdict, error) {
		if w.kind != "nat" || w.hook != "PREROUTING" && w.hook != "OUTPUT" {
			return nftMiss, errors.New("dnat outside of prerouting and output")
		}
		e, ok := s.ask(w, fields)
		if !ok {
			return nftMiss, nil
		}
		addr, port, _ := strings.Cut(e.value, " . ")
		to, err := netip.ParseAddr(addr)
		n, errPort := strconv.ParseUint(port, 10, 16)
		w.packet.Dst = netip.AddrPortFrom(to, uint16(n))
		w.result.Translated = true
		return nftVerdict{kind: accept, found: e.text}, errors.Join(err, errPort)
	}
}

// update reads "update @affinity { ip saddr . ... timeout 3h : ip daddr . th dport }".
func (t *nftTable) update(a *args) nftStatement {
	a.expect("update")
	name := a.next()
	a.expect("{")
	key := t.fields(a)
	a.expect("timeout")
	keep := nftDuration(a)
	a.expect(":")
	value := t.fields(a)
	a.expect("}")
	s := t.set(a, name, key, kindsOf(value)...)
	if slices.ContainsFunc(append(key, value...), func(f nftField) bool { return f.kind == "number" }) {
		a.fail("a random number cannot be noted")
	}
	return func(w *walk) (nftVerdict, error) {
		if w.kind != "nat" || w.hook != "POSTROUTING" && w.hook != "INPUT" {
			return nftMiss, errors.New("update outside of nat's postrouting and input: the endpoint need not be known")
		}
		return nftIf(s.note(w, keyOf(w, key), keyOf(w, value), keep)), nil
	}
}

// nftDuration reads what nft writes for seconds: 3h, 1d2h, 1h30m.
func nftDuration(a *args) time.Duration {
	word := a.next()
	days, rest, ok := strings.Cut(word, "d")
	if !ok {
		days, rest = "0", word
	}
	n, err := strconv.Atoi(days)
	d := time.Duration(n) * 24 * time.Hour
	if err == nil && rest != "" {
		var more time.Duration
		more, err = time.ParseDuration(rest)
		d += more
	}
	if err != nil || d <= 0 {
		a.fail("bad duration %q", word)
	}
	return d
}
