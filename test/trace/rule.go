package trace

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// args reads the words of a rule.
type args struct {
	words []string
	err   error
}

func (a *args) next() string {
	if len(a.words) == 0 {
		if a.err == nil {
			a.err = errors.New("rule ends in the middle of an option")
		}
		return ""
	}
	w := a.words[0]
	a.words = a.words[1:]
	return w
}

func (a *args) peek() string {
	if len(a.words) == 0 {
		return ""
	}
	return a.words[0]
}

// take reads the next word if it is want.
func (a *args) take(want string) bool {
	if a.peek() != want || len(a.words) == 0 {
		return false
	}
	a.words = a.words[1:]
	return true
}

func (a *args) fail(format string, v ...any) {
	if a.err == nil {
		a.err = fmt.Errorf(format, v...)
	}
}

func (a *args) uint(bits int) uint64 {
	s := a.next()
	return a.parseUint(s, bits)
}

func (a *args) parseUint(s string, bits int) uint64 {
	n, err := strconv.ParseUint(s, 0, bits)
	if err != nil {
		a.fail("bad number %q", s)
	}
	return n
}

// parseRule reads what follows "-A CHAIN".
func parseRule(words []string) (*rule, error) {
	a := &args{words: words}
	r := &rule{}
	for len(a.words) > 0 && a.err == nil {
		not := a.take("!")
		word := a.next()
		switch word {
		case "-j", "--jump":
			a.target(r)
			continue
		case "-g", "--goto":
			r.jump, r.gotoChain = a.next(), true
			continue
		case "-m", "--match":
			a.extension(r, a.next())
			continue
		case "--dport", "--destination-port", "--sport", "--source-port":
			// iptables takes an extension's options anywhere after its -m or -p.
			a.addPorts(r, word, not)
			continue
		}
		m := a.basic(word)
		if m == nil {
			a.fail("unknown option %s", word)
			break
		}
		r.add(m, not)
	}
	return r, a.err
}

func (r *rule) add(m match, not bool) {
	if not {
		plain := m
		m = func(w *walk) bool { return !plain(w) }
	}
	r.matches = append(r.matches, m)
}

// basic reads the matches that need no -m.
func (a *args) basic(word string) match {
	switch word {
	case "-s", "--source":
		p := a.prefix()
		return func(w *walk) bool { return p.Contains(w.packet.Src.Addr()) }
	case "-d", "--destination":
		p := a.prefix()
		return func(w *walk) bool { return p.Contains(w.packet.Dst.Addr()) }
	case "-i", "--in-interface":
		is := interfaceMatch(a.next())
		return func(w *walk) bool { return w.hook != "OUTPUT" && w.hook != "POSTROUTING" && is(w.packet.In) }
	case "-o", "--out-interface":
		is := interfaceMatch(a.next())
		return func(w *walk) bool { return w.hook != "INPUT" && w.hook != "PREROUTING" && is(w.out) }
	case "-p", "--protocol":
		proto := protocolName(a.next())
		return func(w *walk) bool { return proto == "all" || w.packet.Protocol == proto }
	}
	return nil
}

func interfaceMatch(name string) func(string) bool {
	if prefix, ok := strings.CutSuffix(name, "+"); ok {
		return func(s string) bool { return strings.HasPrefix(s, prefix) }
	}
	return func(s string) bool { return s == name }
}

func protocolName(s string) string {
	switch s {
	case "6":
		return "tcp"
	case "17":
		return "udp"
	case "132":
		return "sctp"
	case "0":
		return "all"
	}
	return strings.ToLower(s)
}

func (a *args) prefix() netip.Prefix {
	s := a.next()
	if addr, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(addr, addr.BitLen())
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a.fail("bad address %q", s)
	}
	return p.Masked()
}

// extension reads the options of one -m.
func (a *args) extension(r *rule, name string) {
	options := map[string]func(r *rule){
		"comment":   func(*rule) { a.expect("--comment"); a.next() },
		"nfacct":    func(*rule) { a.expect("--nfacct-name"); a.next() },
		"tcp":       a.ports,
		"udp":       a.ports,
		"sctp":      a.ports,
		"multiport": a.multiport,
		"mark":      a.markMatch,
		"conntrack": a.conntrack,
		"addrtype":  a.addrtype,
		"statistic": a.statistic,
		"recent":    a.recent,
	}[name]
	if options == nil {
		a.fail("unknown match %s", name)
		return
	}
	options(r)
}

func (a *args) expect(word string) {
	if got := a.next(); got != word {
		a.fail("%s where %s was expected", got, word)
	}
}

// option reads the next option if it is one of names, with the "!" before it.
func (a *args) option(names ...string) (name string, not, ok bool) {
	words := a.words
	not = a.take("!")
	if slices.Contains(names, a.peek()) {
		return a.next(), not, true
	}
	a.words = words
	return "", false, false
}

func (a *args) ports(r *rule) {
	for {
		name, not, ok := a.option("--dport", "--destination-port", "--sport", "--source-port")
		if !ok {
			return
		}
		a.addPorts(r, name, not)
	}
}

func (a *args) addPorts(r *rule, name string, not bool) {
	in := a.portRange(a.next())
	if strings.HasPrefix(name, "--d") {
		r.add(func(w *walk) bool { return in(w.packet.Dst.Port()) }, not)
	} else {
		r.add(func(w *walk) bool { return in(w.packet.Src.Port()) }, not)
	}
}

func (a *args) portRange(s string) func(uint16) bool {
	from, to, isRange := strings.Cut(s, ":")
	if !isRange {
		to = from
	}
	if from == "" {
		from = "0"
	}
	if to == "" {
		to = "65535"
	}
	lo, hi := uint16(a.parseUint(from, 16)), uint16(a.parseUint(to, 16))
	return func(p uint16) bool { return lo <= p && p <= hi }
}

func (a *args) multiport(r *rule) {
	name, not, ok := a.option("--dports", "--destination-ports", "--sports", "--source-ports", "--ports")
	if !ok {
		a.fail("unknown option %s of multiport", a.peek())
		return
	}
	var ranges []func(uint16) bool
	for part := range strings.SplitSeq(a.next(), ",") {
		ranges = append(ranges, a.portRange(part))
	}
	in := func(p uint16) bool {
		return slices.ContainsFunc(ranges, func(f func(uint16) bool) bool { return f(p) })
	}
	r.add(func(w *walk) bool {
		dst, src := in(w.packet.Dst.Port()), in(w.packet.Src.Port())
		switch name {
		case "--dports", "--destination-ports":
			return dst
		case "--sports", "--source-ports":
			return src
		}
		return dst || src
	}, not)
}

// valueMask reads "value" or "value/mask".
func (a *args) valueMask() (value, mask uint32) {
	v, m, has := strings.Cut(a.next(), "/")
	value, mask = uint32(a.parseUint(v, 32)), ^uint32(0)
	if has {
		mask = uint32(a.parseUint(m, 32))
	}
	return value, mask
}

func (a *args) markMatch(r *rule) {
	_, not, ok := a.option("--mark")
	if !ok {
		a.fail("unknown option %s of mark", a.peek())
		return
	}
	value, mask := a.valueMask()
	r.add(func(w *walk) bool { return w.packet.Mark&mask == value }, not)
}

func (a *args) conntrack(r *rule) {
	_, not, ok := a.option("--ctstate")
	if !ok {
		a.fail("unknown option %s of conntrack", a.peek())
		return
	}
	states := strings.Split(a.next(), ",")
	for _, s := range states {
		if !slices.Contains([]string{"NEW", "ESTABLISHED", "RELATED", "INVALID", "DNAT", "SNAT", "UNTRACKED"}, s) {
			a.fail("unknown connection state %s", s)
		}
	}
	r.add(func(w *walk) bool {
		is := [...]string{New: "NEW", Established: "ESTABLISHED", Related: "RELATED", Invalid: "INVALID"}[w.packet.State]
		return slices.Contains(states, is) ||
			(w.result.Translated && slices.Contains(states, "DNAT")) ||
			((w.result.Masqueraded || w.result.SNAT.IsValid()) && slices.Contains(states, "SNAT"))
	}, not)
}

func (a *args) addrtype(r *rule) {
	type condition struct {
		dst, not bool
	}
	var conditions []condition
	limitIn, limitOut := false, false
	for {
		name, not, ok := a.option("--dst-type", "--src-type", "--limit-iface-in", "--limit-iface-out")
		if !ok {
			break
		}
		switch name {
		case "--limit-iface-in":
			limitIn = true
			continue
		case "--limit-iface-out":
			limitOut = true
			continue
		}
		if t := a.next(); t != "LOCAL" {
			a.fail("unknown address type %s", t)
		}
		conditions = append(conditions, condition{name == "--dst-type", not})
	}
	if len(conditions) == 0 {
		a.fail("unknown option %s of addrtype", a.peek())
	}
	for _, c := range conditions {
		r.add(func(w *walk) bool {
			iface := ""
			if limitIn {
				iface = w.packet.In
			}
			if limitOut {
				iface = w.out
			}
			if c.dst {
				return w.host.localOn(w.packet.Dst.Addr(), iface)
			}
			return w.host.localOn(w.packet.Src.Addr(), iface)
		}, c.not)
	}
}

func (a *args) statistic(r *rule) {
	a.expect("--mode")
	a.expect("random")
	_, not, ok := a.option("--probability")
	p, err := strconv.ParseFloat(a.next(), 64)
	if !ok || err != nil || p < 0 || p > 1 {
		a.fail("bad probability")
		return
	}
	if not {
		p = 1 - p
	}
	r.add(func(w *walk) bool {
		if p == 1 || p == 0 {
			return p == 1
		}
		if w.chance(p) {
			w.result.Probability *= p
			return true
		}
		w.result.Probability *= 1 - p
		return false
	}, false)
}

// recent follows xt_recent: --rcheck and --update ask whether the source is in
// the list (within --seconds), --update and --set enter it.
func (a *args) recent(r *rule) {
	var mode, list string
	var seconds time.Duration
	not := false
	for {
		name, n, ok := a.option("--set", "--rcheck", "--update", "--remove", "--seconds", "--reap",
			"--name", "--mask", "--rsource", "--hitcount")
		if !ok {
			break
		}
		switch name {
		case "--seconds":
			seconds = time.Duration(a.uint(32)) * time.Second
		case "--name":
			list = a.next()
		case "--mask":
			if m := a.next(); m != "255.255.255.255" && m != "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" {
				a.fail("mask %s of recent is not supported", m)
			}
		case "--reap", "--rsource":
		case "--hitcount":
			a.fail("--hitcount of recent is not supported")
		default:
			mode, not = name, n
		}
	}
	if mode == "" || list == "" {
		a.fail("recent without mode or name")
	}
	r.add(func(w *walk) bool { return w.askRecent(mode, list, seconds) }, not)
}

func (w *walk) askRecent(mode, list string, seconds time.Duration) bool {
	entries := w.result.Memory.list(list)
	src := w.packet.Src.Addr().String()
	e, found := entries[src]
	found = found && (seconds == 0 || w.packet.At-e.Seen <= seconds)
	switch mode {
	case "--set":
		entries[src] = Entry{Seen: w.packet.At}
		return true
	case "--update":
		if found {
			entries[src] = Entry{Seen: w.packet.At}
		}
	case "--remove":
		delete(entries, src)
	}
	return found
}

// target reads what follows -j: a name that is no known target is a user chain.
func (a *args) target(r *rule) {
	switch name := a.next(); name {
	case "ACCEPT":
		r.act = func(*walk) (verdictKind, error) { return accept, nil }
	case "DROP":
		r.act = func(*walk) (verdictKind, error) { return drop, nil }
	case "RETURN":
		r.act = func(*walk) (verdictKind, error) { return leave, nil }
	case "REJECT":
		if a.take("--reject-with") {
			a.next()
		}
		r.act = func(*walk) (verdictKind, error) { return reject, nil }
	case "MARK":
		r.act = a.markTarget()
	case "DNAT":
		r.act = a.dnat()
	case "SNAT":
		r.act = a.snat()
	case "MASQUERADE":
		a.skip("--random", "--random-fully")
		r.act = func(w *walk) (verdictKind, error) {
			if w.hook != "POSTROUTING" {
				return drop, errors.New("MASQUERADE outside of POSTROUTING")
			}
			w.result.Masqueraded = true
			return accept, nil
		}
	default:
		r.jump = name
	}
}

func (a *args) skip(names ...string) {
	for slices.Contains(names, a.peek()) && len(a.words) > 0 {
		a.next()
	}
}

func (a *args) markTarget() action {
	name := a.next()
	value, mask := a.valueMask()
	set := func(keep, flip uint32) action {
		return func(w *walk) (verdictKind, error) {
			w.packet.Mark = w.packet.Mark&keep ^ flip
			return next, nil
		}
	}
	switch name {
	case "--set-xmark":
		return set(^mask, value)
	case "--set-mark":
		return set(^(mask | value), value)
	case "--or-mark":
		return set(^value, value)
	case "--and-mark":
		return set(value, 0)
	case "--xor-mark":
		return set(^uint32(0), value)
	}
	a.fail("unknown option %s of MARK", name)
	return nil
}

func (a *args) dnat() action {
	a.expect("--to-destination")
	to := a.addrPort()
	a.skip("--random", "--persistent")
	return func(w *walk) (verdictKind, error) {
		if w.hook != "PREROUTING" && w.hook != "OUTPUT" {
			return drop, errors.New("DNAT outside of PREROUTING and OUTPUT")
		}
		port := to.Port()
		if port == 0 {
			port = w.packet.Dst.Port()
		}
		w.packet.Dst = netip.AddrPortFrom(to.Addr(), port)
		w.result.Translated = true
		return accept, nil
	}
}

func (a *args) snat() action {
	a.expect("--to-source")
	to := a.addrPort()
	a.skip("--random", "--random-fully", "--persistent")
	return func(w *walk) (verdictKind, error) {
		if w.hook != "POSTROUTING" && w.hook != "INPUT" {
			return drop, errors.New("SNAT outside of POSTROUTING and INPUT")
		}
		w.result.SNAT = to
		return accept, nil
	}
}

// addrPort reads an address with or without port.
func (a *args) addrPort() netip.AddrPort {
	s := a.next()
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap
	}
	addr, err := netip.ParseAddr(strings.Trim(s, "[]"))
	if err != nil {
		a.fail("bad address %q (ranges are not supported)", s)
	}
	return netip.AddrPortFrom(addr, 0)
}
