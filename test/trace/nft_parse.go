package trace

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// nftReader reads lines; blank ones are passed over.
type nftReader struct {
	lines []string
	n     int // of the next one
	errs  []error
}

func (r *nftReader) next() (string, bool) {
	for r.n < len(r.lines) {
		line := strings.TrimSpace(r.lines[r.n])
		r.n++
		if line != "" && line[0] != '#' {
			return line, true
		}
	}
	return "", false
}

func (r *nftReader) fail(line string, err error) {
	r.errs = append(r.errs, fmt.Errorf("line %d: %q: %w", r.n, line, err))
}

// block calls each with the lines of a block that has been opened.
func (r *nftReader) block(each func(line string) error) {
	for {
		line, ok := r.next()
		switch {
		case !ok:
			r.fail("", errors.New("a block is not closed"))
			return
		case line == "}":
			return
		}
		if err := each(line); err != nil {
			r.fail(line, err)
		}
	}
}

// ParseNFTables reads tables of the families ip and ip6 as nft lists them. All that
// is in them must be understood. Sets and maps may be missing where rules name them:
// they count as empty.
func ParseNFTables(list string) (*NFTables, error) {
	r := &nftReader{lines: strings.Split(list, "\n")}
	rs := &NFTables{}
	seen := map[string]bool{}
	for {
		line, ok := r.next()
		if !ok {
			break
		}
		words := strings.Fields(line)
		if len(words) != 4 || words[0] != "table" || words[3] != "{" || words[1] != "ip" && words[1] != "ip6" {
			r.fail(line, errors.New("not a table of family ip or ip6"))
			break
		}
		t := &nftTable{family: words[1], name: words[2], sets: map[string]*nftSet{}, chains: map[string]*nftChain{}}
		if id := t.family + " " + t.name; seen[id] {
			r.fail(line, errors.New("that table is there already"))
		} else {
			seen[id] = true
		}
		t.read(r, rs)
	}
	if err := errors.Join(r.errs...); err != nil {
		return nil, fmt.Errorf("read ruleset: %w", err)
	}
	slices.SortStableFunc(rs.base, func(a, b *nftChain) int { return a.priority - b.priority })
	return rs, nil
}

func (t *nftTable) read(r *nftReader, rs *NFTables) {
	r.block(func(line string) error {
		words := strings.Fields(line)
		if len(words) != 3 || words[2] != "{" {
			return errors.New("neither a set nor a map nor a chain")
		}
		switch words[0] {
		case "set", "map":
			if t.sets[words[1]] != nil {
				return errors.New("a set or map of that name is there already, or stands after rules that name it")
			}
			s := &nftSet{name: words[1], declared: true, elements: map[string]nftElement{}, numbered: map[string][]nftElement{}}
			t.sets[s.name] = s
			t.readSet(r, s, words[0] == "map")
		case "chain":
			if c := t.chain(words[1]); c.rules == nil {
				c.rules = []*nftRule{}
				t.readChain(r, c)
				if c.hook != "" {
					rs.base = append(rs.base, c)
				}
				return nil
			}
			return errors.New("that chain is there already")
		default:
			return errors.New("neither a set nor a map nor a chain")
		}
		return nil
	})
	for name, c := range t.chains {
		if c.rules == nil {
			r.fail("", fmt.Errorf("table %s %s has no chain %s", t.family, t.name, name))
		}
	}
}

// chain returns a chain, perhaps one that is yet to come. One that was not there has
// no rules, as opposed to none at all.
func (t *nftTable) chain(name string) *nftChain {
	if t.chains[name] == nil {
		t.chains[name] = &nftChain{table: t, name: name}
	}
	return t.chains[name]
}

// nftWords cuts a line: a comma or semicolon at a word's end is a word of its own.
func nftWords(line string) *args {
	a := &args{}
	for _, w := range strings.Fields(line) {
		end := ""
		if n := len(w) - 1; n > 0 && (w[n] == ',' || w[n] == ';') {
			w, end = w[:n], w[n:]
		}
		a.words = append(a.words, w)
		if end != "" {
			a.words = append(a.words, end)
		}
	}
	return a
}

// done returns what went wrong; words that nobody has read are wrong as well.
func (a *args) done() error {
	if len(a.words) > 0 {
		a.fail("unknown: %s", strings.Join(a.words, " "))
	}
	return a.err
}

func (t *nftTable) readSet(r *nftReader, s *nftSet, isMap bool) {
	r.block(func(line string) error {
		a := nftWords(line)
		switch a.next() {
		case "typeof", "type":
			s.key = t.kinds(a)
			if a.take(":") {
				s.value = t.kinds(a)
			}
			if isMap != (s.value != nil) || len(s.key) == 0 {
				a.fail("a set has keys, and a map values as well")
			}
		case "flags":
			for _, f := range strings.Split(a.next(), ",") {
				if !slices.Contains([]string{"interval", "dynamic", "timeout"}, f) {
					a.fail("unknown flag %s", f)
				}
				s.interval = s.interval || f == "interval"
			}
		case "size":
			s.size = int(a.uint(31))
		case "counter":
			s.counts = true
		case "elements":
			if n := len(s.key); n == 0 || s.interval && (n == 1 || s.key[n-1] != "addr" || s.value != nil) {
				return errors.New("no type before it, or one that is not known here")
			}
			a.expect("=")
			a.expect("{")
			for a.err == nil && !slices.Contains(a.words, "}") {
				more, ok := r.next()
				if !ok {
					return errors.New("the list of elements is not closed")
				}
				a.words = append(a.words, nftWords(more).words...)
			}
			t.elements(a, s)
		default:
			return errors.New("unknown property of a set")
		}
		return a.done()
	})
	if s.key == nil {
		r.fail("", fmt.Errorf("%s has no type", s.name))
	}
}

// kinds reads a concatenation of types, or of expressions of such types.
func (t *nftTable) kinds(a *args) (kinds []string) {
	types := map[string]string{"ipv4_addr": "addr", "ipv6_addr": "addr", "inet_proto": "protocol", "inet_service": "port", "verdict": "verdict"}
	for {
		if k := types[a.peek()]; k != "" {
			a.next()
			kinds = append(kinds, k)
		} else {
			kinds = append(kinds, t.field(a).kind)
		}
		if a.err != nil || !a.take(".") {
			return kinds
		}
	}
}

// elements reads from behind the opening brace to the closing one.
func (t *nftTable) elements(a *args, s *nftSet) {
	for a.err == nil {
		e := nftElement{}
		kinds := s.key
		if s.interval {
			kinds = s.key[:len(s.key)-1]
		}
		key := values(a, kinds)
		if s.interval {
			a.expect(".")
			s.addRange(a, key, a.prefix())
		}
		e.text = key
		if s.counts {
			nftCounter(a)
		}
		if s.value != nil {
			a.expect(":")
			t.value(a, s, &e)
		}
		if _, twice := s.elements[key]; twice {
			a.fail("two elements with the key %s", key)
		}
		if !s.interval {
			s.add(key, e)
		}
		if !a.take(",") {
			break
		}
	}
	a.expect("}")
}

func (s *nftSet) add(key string, e nftElement) {
	s.elements[key] = e
	if s.key[len(s.key)-1] != "number" {
		return
	}
	cut := max(0, strings.LastIndex(key, " . "))
	e.number, _ = strconv.Atoi(strings.TrimPrefix(key[cut:], " . "))
	list := s.numbered[key[:cut]]
	at, _ := slices.BinarySearchFunc(list, e.number, func(e nftElement, n int) int { return e.number - n })
	s.numbered[key[:cut]] = slices.Insert(list, at, e)
}

func (s *nftSet) addRange(a *args, first string, p netip.Prefix) {
	for _, r := range s.ranges {
		if r.first == first && r.last.Overlaps(p) {
			a.fail("%s overlaps with %s", p, r.text)
		}
	}
	s.ranges = append(s.ranges, nftRange{first, p, first + " . " + p.String()})
}

func (t *nftTable) value(a *args, s *nftSet, e *nftElement) {
	if !slices.Equal(s.value, []string{"verdict"}) {
		e.value = values(a, s.value)
		e.text += " : " + e.value
		return
	}
	v, text := t.verdict(a, a.next())
	if v == nil {
		a.fail("unknown verdict %s", text)
	}
	e.then = v
	e.text += " : " + text
}

// values reads the fields of a key or value, and writes them in one way.
func values(a *args, kinds []string) string {
	var parts []string
	for i, k := range kinds {
		if i > 0 {
			a.expect(".")
		}
		parts = append(parts, valueOf(a, k))
	}
	return strings.Join(parts, " . ")
}

func valueOf(a *args, kind string) string {
	word := a.next()
	switch kind {
	case "addr":
		addr, err := netip.ParseAddr(word)
		if err != nil {
			a.fail("bad address %q", word)
		}
		return addr.String()
	case "protocol":
		if p := protocolName(word); slices.Contains([]string{"tcp", "udp", "sctp"}, p) {
			return p
		}
		a.fail("unknown protocol %s", word)
	case "port":
		return strconv.Itoa(int(a.parseUint(word, 16)))
	case "number":
		return strconv.Itoa(int(a.parseUint(word, 32)))
	default:
		a.fail("a verdict is no part of a key")
	}
	return word
}

// verdict reads a verdict that begins with a word; nil if it is none.
func (t *nftTable) verdict(a *args, word string) (*nftVerdict, string) {
	switch word {
	case "drop":
		return &nftVerdict{kind: drop}, word
	case "return":
		return &nftVerdict{kind: leave}, word
	case "goto", "jump":
		c := t.chain(a.next())
		return &nftVerdict{to: c.name, jump: word == "jump"}, word + " " + c.name
	}
	return nil, word
}

func (t *nftTable) readChain(r *nftReader, c *nftChain) {
	r.block(func(line string) error {
		a := nftWords(line)
		if a.take("type") {
			c.readHook(a)
			return a.done()
		}
		rule := &nftRule{text: line}
		for len(a.words) > 0 && a.err == nil {
			if s := t.statement(a); s != nil {
				rule.statements = append(rule.statements, s)
			}
		}
		c.rules = append(c.rules, rule)
		return a.done()
	})
}

// hooks are where chains of each type may stand.
var nftHooks = map[string][]string{
	"nat":    {"prerouting", "input", "output", "postrouting"},
	"filter": {"prerouting", "input", "forward", "output", "postrouting"},
}

// priorities are the names that nft has for them.
var nftPriorities = map[string]int{"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100}

// readHook reads "nat hook prerouting priority dstnat; policy accept;".
func (c *nftChain) readHook(a *args) {
	c.kind = a.next()
	a.expect("hook")
	c.hook = a.next()
	if !slices.Contains(nftHooks[c.kind], c.hook) {
		a.fail("no chain of type %s at %s is known here", c.kind, c.hook)
	}
	a.expect("priority")
	c.priority = nftPriority(a)
	a.expect(";")
	a.expect("policy")
	policy, known := map[string]verdictKind{"accept": accept, "drop": drop}[a.next()]
	if !known {
		a.fail("unknown policy")
	}
	c.policy = policy
	a.expect(";")
}

// nftPriority reads "dstnat", "-100" or "srcnat + 50".
func nftPriority(a *args) int {
	word := a.next()
	p, named := nftPriorities[word]
	if n, err := strconv.Atoi(word); !named && err != nil {
		a.fail("unknown priority %s", word)
	} else if !named {
		return n
	}
	switch {
	case a.take("+"):
		p += int(a.uint(16))
	case a.take("-"):
		p -= int(a.uint(16))
	}
	return p
}
