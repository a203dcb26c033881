package iptables

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// A dispatch tree stands for one of kube-proxy's long lists: all rules of
// KUBE-SERVICES, say. Up to maxLeaf rules it is that list. Beyond, the rules
// move into chains by address (then port) prefix, four bits a step, steps that
// lead nowhere left out, so that a new connection meets O(log n) rules.
//
// The shape depends on the set of rules only, never on history, and a changed
// rule rewrites at most the chains on its own path and the leaves beside them.

// maxLeaf is how many rules a chain has before it is split.
const maxLeaf = 32

// treeID names a tree.
type treeID uint8

const (
	treeServices       treeID = iota // nat KUBE-SERVICES: addresses
	treeNodePorts                    // nat KUBE-NODEPORTS: ports
	treeRefuse                       // filter KUBE-SERVICES: ClusterIPs without endpoints
	treeRefuseExternal               // filter KUBE-EXTERNAL-SERVICES: external addresses without
	treeRefusePorts                  // filter KUBE-EXTERNAL-SERVICES: node ports without
	treeFirewall                     // filter KUBE-PROXY-FIREWALL
	treeHealthPorts                  // filter KUBE-NODEPORTS
	treeCount
)

// treeSpec says where a tree hangs. prefix begins its chains' names.
type treeSpec struct {
	table, root, prefix string
	ports               bool // keys are ports only
}

var treeSpecs = [treeCount]treeSpec{
	treeServices:       {tableNAT, chainServices, prefixCluster, false},
	treeNodePorts:      {tableNAT, chainNodePorts, prefixExternal, true},
	treeRefuse:         {tableFilter, chainServices, prefixCluster, false},
	treeRefuseExternal: {tableFilter, chainExternalServices, prefixExternal, false},
	treeRefusePorts:    {tableFilter, chainExternalServices, prefixExternal, true},
	treeFirewall:       {tableFilter, chainProxyFirewall, prefixSources, false},
	treeHealthPorts:    {tableFilter, chainNodePorts, prefixLocal, true},
}

// entry is one rule of a tree.
type entry struct {
	key      string // big-endian address bytes, then two bytes of port
	protocol model.Protocol
	text     string
}

func addrKey(a netip.Addr, port uint16) string {
	return string(binary.BigEndian.AppendUint16(a.AsSlice(), port))
}

func portKey(port uint16) string { return string(binary.BigEndian.AppendUint16(nil, port)) }

func (e entry) compare(o entry) int {
	if c := strings.Compare(e.key, o.key); c != 0 {
		return c
	}
	return strings.Compare(e.text, o.text)
}

// tree is a sorted list of entries; its chains are computed from it.
type tree struct {
	treeSpec
	entries []entry // sorted, immutable
}

// with returns the tree without some entries and with others.
func (t tree) with(remove, add []entry) tree {
	if len(remove)+len(add) == 0 {
		return t
	}
	slices.SortFunc(remove, entry.compare)
	slices.SortFunc(add, entry.compare)
	out := make([]entry, 0, len(t.entries)+len(add))
	for _, e := range t.entries {
		for len(add) > 0 && add[0].compare(e) < 0 {
			out, add = append(out, add[0]), add[1:]
		}
		for len(remove) > 0 && remove[0].compare(e) < 0 {
			remove = remove[1:]
		}
		if len(remove) > 0 && remove[0].compare(e) == 0 {
			remove = remove[1:]
			continue
		}
		out = append(out, e)
	}
	t.entries = append(out, add...)
	return t
}

// walk computes the tree's chains. keys, if not nil, are the (sorted) keys that
// differ between two versions of the tree: then only chains that can differ are
// given to emit. The result is what the root chain holds of the tree.
func (t tree) walk(keys []string, emit func(chain)) []string {
	if len(t.entries) <= maxLeaf {
		return texts(t.entries)
	}
	w := walker{tree: t, keys: keys, all: keys == nil, emit: emit}
	if n := commonDigits(t.entries); n == 0 {
		return w.children(t.entries, 0, "-j ")
	}
	return w.node(t.entries, "-j ")
}

func texts(list []entry) []string {
	out := make([]string, len(list))
	for i := range list {
		out[i] = list[i].text
	}
	return out
}

type walker struct {
	tree
	keys []string
	all  bool
	emit func(chain)
}

// touched says whether a changed key lies under the digits that list's keys
// share, or would lie there.
func (w *walker) touched(list []entry, digits int) bool {
	if w.all {
		return true
	}
	first := list[0].key
	i := sort.Search(len(w.keys), func(i int) bool {
		return comparePrefix(w.keys[i], first, digits) >= 0
	})
	return i < len(w.keys) && comparePrefix(w.keys[i], first, digits) == 0
}

// node gives the rules that lead to the chain of a group of entries, and emits
// the chain and those below it.
func (w *walker) node(list []entry, verb string) []string {
	if len(list) == 1 {
		return texts(list)
	}
	digits := commonDigits(list)
	name := w.chainName(list[0].key, digits)
	refs := w.branches(list, digits, verb+name)
	switch {
	case len(list) <= maxLeaf || digits == 2*len(list[0].key):
		// Leaves are always emitted: one that appears when its parent is split has
		// no changed key of its own.
		w.emit(chain{name, texts(list)})
	case w.touched(list, digits):
		w.emit(chain{name, w.children(list, digits, "-g ")})
	}
	return refs
}

func (w *walker) children(list []entry, digits int, verb string) []string {
	var rules []string
	for len(list) > 0 {
		d := digit(list[0].key, digits)
		n := sort.Search(len(list), func(i int) bool { return digit(list[i].key, digits) > d })
		rules = append(rules, w.node(list[:n], verb)...)
		list = list[n:]
	}
	return rules
}

// branches are the rules that send what shares the digits to target. An address
// prefix is one rule; below a complete address, port ranges need one for each
// protocol that occurs.
func (w *walker) branches(list []entry, digits int, target string) []string {
	key := list[0].key
	r := rule{target: target}
	addrBytes := len(key) - 2
	if addrBytes > 0 {
		bits := min(4*digits, 8*addrBytes)
		addr, _ := netip.AddrFromSlice([]byte(key[:addrBytes]))
		r.dst = netip.PrefixFrom(addr, bits).Masked().String()
		if 4*digits <= 8*addrBytes {
			return []string{r.String()}
		}
	}
	lo, hi := portRange(key[addrBytes:], 4*digits-8*addrBytes)
	var seen []model.Protocol
	for _, e := range list {
		if !slices.Contains(seen, e.protocol) {
			seen = append(seen, e.protocol)
		}
	}
	slices.Sort(seen)
	var out []string
	for _, p := range seen {
		r.protocol = p
		r.match = "-m " + p.String() + " --dport " + lo
		if hi != lo {
			r.match += ":" + hi
		}
		out = append(out, r.String())
	}
	return out
}

func portRange(port string, bits int) (lo, hi string) {
	p := binary.BigEndian.Uint16([]byte(port))
	mask := uint16(1<<(16-bits) - 1)
	return strconv.Itoa(int(p &^ mask)), strconv.Itoa(int(p | mask))
}

// chainName is readable where it fits: KUBE-SVC-10.96.16.0/20,
// KUBE-EXT-ports-30720-31743; a hash otherwise.
func (w *walker) chainName(key string, digits int) string {
	addrBytes := len(key) - 2
	name := ""
	if addrBytes > 0 {
		addr, _ := netip.AddrFromSlice([]byte(key[:addrBytes]))
		name = netip.PrefixFrom(addr, min(4*digits, 8*addrBytes)).Masked().String()
	}
	if bits := 4*digits - 8*addrBytes; bits > 0 || addrBytes == 0 {
		lo, hi := portRange(key[addrBytes:], bits)
		name += "ports-" + lo + "-" + hi
	}
	if len(w.prefix)+len(name) > maxChainName {
		name = hash("dispatch", name)
	}
	return w.prefix + name
}

// commonDigits is how many hexadecimal digits all keys of a sorted list share.
func commonDigits(list []entry) int {
	a, b := list[0].key, list[len(list)-1].key
	n := 2 * len(a)
	for i := range n {
		if digit(a, i) != digit(b, i) {
			return i
		}
	}
	return n
}

func digit(key string, i int) byte {
	if i%2 == 0 {
		return key[i/2] >> 4
	}
	return key[i/2] & 15
}

func comparePrefix(a, b string, digits int) int {
	for i := range digits {
		if c := int(digit(a, i)) - int(digit(b, i)); c != 0 {
			return c
		}
	}
	return 0
}
