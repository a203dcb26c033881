package scenarios

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Flow says what must happen to a new connection:
//
//	pod shell -> tcp 10.96.0.10:80 = web-1, web-2 kept
//	client 198.51.100.7 -> udp 172.18.0.11:30053 = dns-1:5353 masq
//	pod web-1 -> tcp 10.96.0.10:80 = web-1 masq, web-2 kept
//	node -> tcp 10.96.0.99:80 = reject
//
// Who: "pod NAME", "node [NAME]" (node1 without a name), "client"; an address
// behind it is the source, for clients any address outside. What: one of
//
//	reject   refused by the node (ICMP port unreachable, or a reset)
//	drop     swallowed by the node
//	none     not the node's business: it goes where it would go without Services
//	N endpoints   one of N, all with the same chance
//	A, B ...      one of these hosts, optionally with :port and NN%; the same
//	              chance for all unless said
//
// "kept" or "masq" behind an endpoint (or behind the last of several) says
// whether it sees the client's address or the node's. "sticky DURATION" at the
// end: further connections of that client reach the same endpoint for so long.
//
// Before it all, "iptables:" or "ipvs,nftables:" says that the flow holds in these
// modes only: where kube-proxy's modes differ, and users rely on it.
type Flow struct {
	Text     string
	Modes    []string // empty: all
	From     *Host
	Source   netip.Addr // valid: always
	Protocol model.Protocol
	To       netip.AddrPort

	Expect Expect
	Count  int      // of endpoints, if Expect is Endpoints and Targets empty
	Masq   bool     // with Count
	Target []Target // endpoints
	Sticky time.Duration
}

// Expect is what a flow's outcome is.
type Expect uint8

// Expectations.
const (
	Endpoints Expect = iota
	Reject
	Drop
	None
)

// Target is one endpoint that may answer.
type Target struct {
	Host   *Host
	Addr   netip.Addr
	Port   uint16  // 0: whichever
	Chance float64 // of 1
	Masq   bool
}

// Is says whether the target is an endpoint's address.
func (t *Target) Is(a netip.AddrPort) bool {
	return t.Addr == a.Addr() && (t.Port == 0 || t.Port == a.Port())
}

// In says whether the flow holds in a proxier's mode.
func (f *Flow) In(mode string) bool { return len(f.Modes) == 0 || slices.Contains(f.Modes, mode) }

// Family returns the family of the flow's destination.
func (f *Flow) Family() model.Family { return model.FamilyOf(f.To.Addr()) }

func parseFlow(line string, c *Cluster) (Flow, error) {
	f := Flow{Text: strings.Join(strings.Fields(line), " ")}
	text := f.Text
	if modes, rest, ok := strings.Cut(text, ": "); ok {
		f.Modes, text = strings.Split(modes, ","), rest
		for _, m := range f.Modes {
			if !slices.Contains([]string{"iptables", "ipvs", "nftables"}, m) {
				return f, fmt.Errorf("unknown mode %q", m)
			}
		}
	}
	who, rest, ok := strings.Cut(text, " -> ")
	dest, what, ok2 := strings.Cut(rest, " = ")
	if !ok || !ok2 {
		return f, errors.New("not of the form WHO -> PROTOCOL ADDRESS:PORT = WHAT")
	}
	if err := f.parseDest(dest); err != nil {
		return f, err
	}
	if err := f.parseWho(strings.Fields(who), c); err != nil {
		return f, err
	}
	if what, sticky, ok := strings.Cut(what, " sticky "); ok {
		d, err := time.ParseDuration(sticky)
		if err != nil {
			return f, err
		}
		f.Sticky = d
		return f, f.parseWhat(what, c)
	}
	return f, f.parseWhat(what, c)
}

func (f *Flow) parseDest(dest string) error {
	proto, addr, _ := strings.Cut(dest, " ")
	for _, p := range []model.Protocol{model.TCP, model.UDP, model.SCTP} {
		if p.String() == proto {
			f.Protocol = p
		}
	}
	if f.Protocol == 0 {
		return fmt.Errorf("unknown protocol %q", proto)
	}
	var err error
	f.To, err = netip.ParseAddrPort(addr)
	return err
}

func (f *Flow) parseWho(words []string, c *Cluster) error {
	kind := words[0]
	words = words[1:]
	name := map[string]string{"node": NodeName, "client": "client"}[kind]
	if kind != "client" && len(words) > 0 && c.Host(words[0]) != nil {
		name, words = words[0], words[1:]
	}
	f.From = c.Host(name)
	if f.From == nil || f.From.Place != map[string]Place{"node": Node, "client": Outside, "pod": Pod}[kind] {
		return fmt.Errorf("no such %s", kind)
	}
	f.Source = f.From.Addr(f.Family())
	if len(words) > 0 {
		var err error
		if f.Source, err = netip.ParseAddr(words[0]); err != nil {
			return err
		}
		words = words[1:]
		if kind == "client" && !slices.Contains(f.From.Addrs, f.Source) {
			f.From.Addrs = append(f.From.Addrs, f.Source)
		}
	}
	if len(words) > 0 || !f.Source.IsValid() || model.FamilyOf(f.Source) != f.Family() {
		return errors.New("source and destination do not fit together")
	}
	return nil
}

func (f *Flow) parseWhat(what string, c *Cluster) error {
	switch strings.TrimSpace(what) {
	case "reject":
		f.Expect = Reject
		return nil
	case "drop":
		f.Expect = Drop
		return nil
	case "none":
		f.Expect = None
		return nil
	}
	alternatives := strings.Split(what, ",")
	masq := ""
	for _, alt := range slices.Backward(alternatives) {
		words := strings.Fields(alt)
		if n := len(words); n > 0 && (words[n-1] == "kept" || words[n-1] == "masq") {
			masq, words = words[n-1], words[:n-1]
		}
		if masq == "" {
			return errors.New("it does not say whether the source is kept or masq")
		}
		if len(words) == 2 && words[1] == "endpoints" {
			n, err := strconv.Atoi(words[0])
			f.Count, f.Masq = n, masq == "masq"
			return err
		}
		t, err := parseTarget(words, f.Family(), c)
		if err != nil {
			return err
		}
		t.Masq = masq == "masq"
		if t.Chance == 0 {
			t.Chance = 1 / float64(len(alternatives))
		}
		f.Target = append(f.Target, t)
	}
	slices.Reverse(f.Target)
	return nil
}

func parseTarget(words []string, family model.Family, c *Cluster) (Target, error) {
	var t Target
	if len(words) == 2 && strings.HasSuffix(words[1], "%") {
		percent, err := strconv.ParseFloat(strings.TrimSuffix(words[1], "%"), 64)
		if err != nil {
			return t, err
		}
		t.Chance = percent / 100
		words = words[:1]
	}
	if len(words) != 1 {
		return t, fmt.Errorf("%q is neither a verdict nor an endpoint", strings.Join(words, " "))
	}
	name, port, hasPort := strings.Cut(words[0], ":")
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return t, err
		}
		t.Port = uint16(n)
	}
	if t.Host = c.Host(name); t.Host == nil {
		return t, fmt.Errorf("no host is named %q", name)
	}
	if t.Addr = t.Host.Addr(family); !t.Addr.IsValid() {
		return t, fmt.Errorf("host %s has no %s address", name, family)
	}
	return t, nil
}
