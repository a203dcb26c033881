package ipvs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/ipset"
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// nlKernel is the real kernel: netlink for virtual servers, addresses and sets,
// the iptables programs for the static rules. Its connections belong to the
// network namespace in which it was made.
type nlKernel struct {
	family model.Family
	run    xtables.Runner
	sets   *ipset.Conn
	route  *nlbatch.Conn
	genl   *nlbatch.Conn

	// everywhere is for cleaning up a host: static rules are removed in every
	// variant of iptables, and nothing is asked that would load a module.
	everywhere bool
	routesLate bool // see awaitRoute

	mu    sync.Mutex
	id    uint16 // IPVS's generic netlink family; 0: not looked up yet
	rules ruleMemory

	lastRead lastRead
}

var _ kernel = (*nlKernel)(nil)

// tables are those that hold static rules.
var tables = []string{tableNAT, tableFilter, tableMangle}

// newKernel opens the ways to the kernel. Whether it has IPVS is found out when
// that is used first.
func newKernel(family model.Family, p xtables.Programs, stats xtables.Stats) (*nlKernel, error) {
	k := &nlKernel{family: family, run: xtables.Runner{Programs: p, Stats: stats}}
	var err error
	if k.sets, err = ipset.Open(); err != nil {
		return nil, err
	}
	if k.route, err = nlbatch.Open(unix.NETLINK_ROUTE); err != nil {
		k.close()
		return nil, err
	}
	if k.genl, err = nlbatch.Open(unix.NETLINK_GENERIC); err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

func (k *nlKernel) close() {
	if k.sets != nil {
		_ = k.sets.Close()
	}
	if k.route != nil {
		_ = k.route.Close()
	}
	if k.genl != nil {
		_ = k.genl.Close()
	}
}

// prepare has the sets first: rules name them. Without chains it does not look at
// the rules.
func (k *nlKernel) prepare(ctx context.Context, want static) (repairs, error) {
	var fixed repairs
	if err := k.prepareSets(ctx, &fixed); err != nil {
		return fixed, err
	}
	index, err := k.deviceIndex(ctx)
	if err != nil {
		return fixed, err
	}
	if index == 0 {
		if err := k.makeDevice(ctx, device); err != nil {
			return fixed, err
		}
		fixed.devices++
	}
	if want.chains == nil {
		return fixed, nil
	}
	err = k.prepareRules(ctx, want, &fixed)
	return fixed, err
}

// prepareRules reads the tables, and writes one transaction a table if anything
// differs.
func (k *nlKernel) prepareRules(ctx context.Context, want static, fixed *repairs) error {
	have, last := k.lastRead.rules, k.lastRead.token
	k.lastRead = lastRead{}
	if now, ok := k.run.Token(tables...); !ok || have == nil || now != last {
		var err error
		if have, err = k.readRules(ctx); err != nil {
			return err
		}
	}
	ch := k.rules.compare(have, want)
	fixed.chains, fixed.jumps = len(ch.put)+len(ch.empty), len(ch.jumps)
	if ch.nothing() {
		return nil
	}
	if err := k.run.Restore(ctx, func(w *bufio.Writer) { ch.write(w) }); err != nil {
		return fmt.Errorf("write static rules: %w", err)
	}
	have, err := k.readRules(ctx)
	if err != nil {
		return err
	}
	k.rules.learn(ch, have)
	return nil
}

func (k *nlKernel) prepareSets(ctx context.Context, fixed *repairs) error {
	have, err := k.sets.Headers(ctx)
	if err != nil {
		return err
	}
	for id := range setCount {
		spec := k.spec(id)
		_, exists := have[spec.Name]
		if err := k.sets.Create(ctx, spec); err != nil {
			return err
		}
		if !exists {
			fixed.sets++
		}
	}
	return nil
}

func (k *nlKernel) spec(id setID) ipset.Spec {
	s := &setSpecs[id]
	return ipset.Spec{Name: id.name(k.family), Type: ipset.Type(s.typ), IPv6: k.family == model.IPv6, Marks: s.skbinfo}
}

// chainRef names a chain.
type chainRef struct{ table, name string }

// readRules lists the tables: each chain of ours and each built-in one with its
// rules.
func (k *nlKernel) readRules(ctx context.Context) (map[chainRef][]string, error) {
	have := map[chainRef][]string{}
	err := k.run.SaveAll(ctx, func(table string, c xtables.Chain) {
		if slices.Contains(tables, table) && (c.Builtin || all.Chain(table, c.Name)) {
			have[chainRef{table, c.Name}] = []string{}
		}
	}, func(table string, name, text []byte) {
		r := chainRef{table, string(name)}
		if _, wanted := have[r]; wanted {
			// The programs escape this in strings, without need.
			have[r] = append(have[r], strings.ReplaceAll(string(text), `\'`, "'"))
		}
	})
	return have, err
}

// lastRead is what read has read for the prepare that follows it, and the state
// of the tables before.
type lastRead struct {
	token string
	rules map[chainRef][]string
}

// ruleMemory knows how the programs print what we wrote, where that is not what
// we wrote.
type ruleMemory struct {
	printed map[string]string // what we want: what is printed for it
}

// rulesChange is what a restore does.
type rulesChange struct {
	put   []rules
	jumps []jump
	empty []chainRef // ours, of another time
}

func (c *rulesChange) nothing() bool {
	return len(c.put)+len(c.jumps)+len(c.empty) == 0
}

func (r rules) ref() chainRef { return chainRef{r.table, r.chain} }

func (r rules) text() string {
	return r.table + " " + r.chain + "\n" + strings.Join(r.content, "\n")
}

func (j jump) key() string { return j.table + " " + j.from + " " + j.text }

// compare decides what must be written.
func (m *ruleMemory) compare(have map[chainRef][]string, want static) *rulesChange {
	ch := &rulesChange{}
	wanted := map[chainRef]bool{}
	for _, r := range want.chains {
		wanted[r.ref()] = true
		got, ok := have[r.ref()]
		if !ok || !m.same(r, got) {
			ch.put = append(ch.put, r)
		}
	}
	for _, j := range want.jumps {
		if !m.jumps(j, have[chainRef{j.table, j.from}]) {
			ch.jumps = append(ch.jumps, j)
		}
	}
	for ref, got := range have {
		if len(got) > 0 && !wanted[ref] && slices.Contains(ownChains[ref.table], ref.name) {
			ch.empty = append(ch.empty, ref)
		}
	}
	return ch
}

// same tells whether a chain's content is what is wanted.
func (m *ruleMemory) same(want rules, got []string) bool {
	if slices.Equal(want.content, got) {
		return true
	}
	p, ok := m.printed[want.text()]
	return ok && p == strings.Join(got, "\n")
}

func (m *ruleMemory) jumps(want jump, got []string) bool {
	if slices.Contains(got, want.text) {
		return true
	}
	p, ok := m.printed[want.key()]
	return ok && slices.Contains(got, p)
}

// learn notes in what other form that is printed which was just written. have must
// be read right after that: whatever comes later may be somebody's change.
func (m *ruleMemory) learn(ch *rulesChange, have map[chainRef][]string) {
	if m.printed == nil {
		m.printed = map[string]string{}
	}
	for _, r := range ch.put {
		if got := have[r.ref()]; !m.same(r, got) && len(got) == len(r.content) {
			m.printed[r.text()] = strings.Join(got, "\n")
		}
	}
	for _, j := range ch.jumps {
		got, to := have[chainRef{j.table, j.from}], xtables.JumpTarget(j.text)
		i := slices.IndexFunc(got, func(text string) bool { return xtables.JumpTarget(text) == to })
		if i >= 0 && !m.jumps(j, got) {
			m.printed[j.key()] = got[i]
		}
	}
}

// write writes a transaction per table. Chains are declared, and thereby
// emptied, before any rule is written and any chain deleted: they refer to each
// other.
func (c *rulesChange) write(w *bufio.Writer) {
	for _, table := range []string{tableFilter, tableMangle, tableNAT} {
		var t bytes.Buffer
		c.writeTable(&t, table)
		if t.Len() > 0 {
			_, _ = fmt.Fprintf(w, "*%s\n%sCOMMIT\n", table, t.Bytes())
		}
	}
}

func (c *rulesChange) writeTable(w *bytes.Buffer, table string) {
	// A chain of the same name as one with rules may be declared again only before
	// those: declare everything first.
	for _, r := range c.put {
		if r.table == table {
			fmt.Fprintf(w, ":%s - [0:0]\n", r.chain)
		}
	}
	for _, ref := range c.empty {
		if ref.table == table {
			fmt.Fprintf(w, ":%s - [0:0]\n", ref.name)
		}
	}
	for _, r := range c.put {
		for _, text := range r.content {
			if r.table == table {
				fmt.Fprintf(w, "-A %s %s\n", r.chain, text)
			}
		}
	}
	for _, j := range c.jumps {
		if j.table == table {
			fmt.Fprintf(w, "-I %s 1 %s\n", j.from, j.text)
		}
	}
}

func (k *nlKernel) unrule(ctx context.Context, what xtables.Scope) (bool, error) {
	k.rules = ruleMemory{}
	if k.everywhere {
		return xtables.RemoveHost(ctx, k.family, what)
	}
	return k.run.Remove(ctx, what)
}

func (k *nlKernel) token(ctx context.Context) (token, error) {
	var t token
	t.tables, _ = k.run.Token(tables...)
	have, err := k.sets.Headers(ctx)
	if err != nil {
		return t, err
	}
	for id := range setCount {
		t.elements[id] = ^uint32(0)
		if h, ok := have[id.name(k.family)]; ok {
			t.elements[id] = h.Elements
		}
	}
	index, err := k.deviceIndex(ctx)
	t.device = index != 0
	return t, err
}

func (k *nlKernel) read(ctx context.Context) (*actual, error) {
	a := &actual{}
	var err error
	if a.servers, err = k.readServers(ctx); err != nil {
		return nil, err
	}
	if err := k.readSets(ctx, a); err != nil {
		return nil, err
	}
	if a.addrs, err = k.addresses(ctx); err != nil || k.everywhere {
		return a, err
	}
	k.lastRead.token, _ = k.run.Token(tables...)
	rules, err := k.readRules(ctx)
	k.lastRead.rules = rules
	a.othersServe = othersServe(rules[chainRef{tableNAT, chainServices}])
	return a, err
}

// othersServe decides by the rules of KUBE-SERVICES whether they are of iptables
// mode: ours and those of kube-proxy's ipvs mode look into sets. Whether there is
// a kube-ipvs0 tells nothing: whoever was to take over may have been killed.
func othersServe(rules []string) bool {
	return len(rules) > 0 && !slices.ContainsFunc(rules, func(text string) bool { return strings.Contains(text, "--match-set ") })
}

func (k *nlKernel) readSets(ctx context.Context, a *actual) error {
	if has, err := k.hasSets(); err != nil || !has {
		return err
	}
	headers, err := k.sets.Headers(ctx)
	if err != nil && !errors.Is(err, ipset.ErrUnsupported) { // cleaning up must work anywhere
		return err
	}
	for id := range setCount {
		h, ok := headers[id.name(k.family)]
		if !ok {
			continue
		}
		a.sets[id] = map[entry]bool{}
		if h.Elements == 0 && h.Type != ipset.BitmapPort { // whose count old kernels do not tell
			continue
		}
		list, err := k.sets.List(ctx, h.Name)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		for _, n := range list {
			a.sets[id][entry{n.Addr, model.Protocol(n.Protocol), n.Port, n.With, n.Mark}] = true
		}
	}
	return nil
}

// change is an entry op as the ipset package wants it.
func (k *nlKernel) change(o *op) ipset.Change {
	n := &o.entry
	return ipset.Change{Set: o.set.name(k.family), Type: ipset.Type(setSpecs[o.set].typ), Del: o.kind == delEntry,
		Entry: ipset.Entry{Addr: n.addr, Protocol: uint8(n.protocol), Port: n.port, With: n.with, Mark: n.mark, Mask: maskOf(n.mark)}}
}

// maskOf gives the bits that a mark of ours is about, shifted or not.
func maskOf(mark uint32) uint32 {
	if mark > insideMask {
		return insideMask << insideHigh
	}
	return insideMask
}

// layer is which part of the kernel an op is for. Ops of one go together.
func (o opKind) layer() int {
	switch o {
	case addEntry, delEntry:
		return 0
	case addAddr, delAddr:
		return 1
	}
	return 2
}

func (k *nlKernel) apply(ctx context.Context, ops []op) ([]failure, error) {
	var failures []failure
	for len(ops) > 0 {
		n := 1
		for n < len(ops) && ops[n].kind.layer() == ops[0].kind.layer() {
			n++
		}
		var refused map[int]error
		var err error
		switch run := ops[:n]; run[0].kind.layer() {
		case 0:
			refused, err = k.sets.Apply(ctx, n, func(i int) ipset.Change { return k.change(&run[i]) })
		case 1:
			refused, err = k.applyAddrs(ctx, run)
		default:
			refused, err = k.applyServers(ctx, run)
		}
		for i := range n {
			if why := refused[i]; why != nil {
				failures = append(failures, failure{ops[i], why})
			}
		}
		if err != nil {
			return failures, fmt.Errorf("change the kernel's tables: %w", err)
		}
		ops = ops[n:]
	}
	return failures, nil
}

// address is an address's bytes as netlink has them.
func address(a netip.Addr) []byte { return a.Unmap().AsSlice() }
