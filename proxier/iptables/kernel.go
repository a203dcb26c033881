package iptables

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"

	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// tableRef names a chain.
type tableRef struct{ table, name string }

// change is what one transaction per table does. Exactly one of list and stream
// is used for the chains to write: stream for loads too large to hold.
type change struct {
	list   []tableChain
	stream func(emit func(tableChain))
	del    []tableRef
	empty  []tableRef // chains to create, or to empty if they exist
	jumps  []jump     // to insert at the top of their chains, in this order
	append []tableChain
}

func (c *change) nothing() bool {
	return len(c.list) == 0 && c.stream == nil && len(c.del) == 0 && len(c.empty) == 0 && len(c.jumps) == 0 && len(c.append) == 0
}

// actual is what the kernel has, as far as it can be ours.
type actual struct {
	chains map[tableRef]uint64          // hash of the content
	rules  map[tableRef]map[string]bool // rules of built-in chains, and of KUBE-FIREWALL
	held   map[tableRef]bool            // chains that rules of others lead to
}

// kernel is the one way to the kernel's tables. The real one is xtKernel; tests
// have a fake beside it.
type kernel interface {
	// read lists the nat and filter tables.
	read(ctx context.Context) (*actual, error)
	// apply makes a change. After an error any part of it may be in force.
	apply(ctx context.Context, ch *change) error
	// try tells whether the kernel accepts chains, without any effect on traffic.
	try(ctx context.Context, list []tableChain) error
	// token changes whenever somebody changes the tables; it is cheap. ok is
	// false where the kernel cannot tell.
	token() (t string, ok bool)
}

// xtKernel is the real kernel, through the iptables programs.
type xtKernel struct {
	run xtables.Runner
	// chunk is after how many rules a stream begins a new transaction; 0 for
	// never. The nft variant's programs take quadratic time in one transaction
	// (7.0 s for 131,000 rules, 2.4 s in chunks of 3,000); with the legacy
	// variant every transaction copies the whole table.
	chunk int
}

const (
	nftChunk   = 3000
	leastChunk = 40 // below this, smaller transactions are not tried
)

func newXTKernel(p xtables.Programs, stats xtables.Stats) *xtKernel {
	k := &xtKernel{run: xtables.Runner{Programs: p, Stats: stats}}
	if p.Variant == xtables.NFT {
		k.chunk = nftChunk
	}
	return k
}

var seed = maphash.MakeSeed()

// hashRules is the hash of a chain's content; it is the same within a process.
func hashRules(rules []string) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, r := range rules {
		_, _ = h.WriteString(r)
		_ = h.WriteByte('\n')
	}
	return h.Sum64()
}

func (k *xtKernel) read(ctx context.Context) (*actual, error) {
	a := &actual{chains: map[tableRef]uint64{}, rules: map[tableRef]map[string]bool{}, held: map[tableRef]bool{}}
	for _, table := range []string{tableFilter, tableNAT} {
		hashes := map[string]*maphash.Hash{}
		err := k.run.Save(ctx, table, func(c xtables.Chain) {
			switch {
			case c.Builtin || c.Name == chainFirewall:
				a.rules[tableRef{table, c.Name}] = map[string]bool{}
			case ours(table, c.Name) || c.Name == chainCanary:
				h := &maphash.Hash{}
				h.SetSeed(seed)
				hashes[c.Name] = h
			}
		}, func(name, text []byte) {
			if h := hashes[string(name)]; h != nil {
				_, _ = h.Write(text)
				_ = h.WriteByte('\n')
				return
			}
			rule := string(text)
			if rules := a.rules[tableRef{table, string(name)}]; rules != nil {
				rules[rule] = true
			}
			if to := xtables.JumpTarget(rule); ours(table, to) {
				a.held[tableRef{table, to}] = true
			}
		})
		if err != nil {
			return nil, err
		}
		for name, h := range hashes {
			a.chains[tableRef{table, name}] = h.Sum64()
		}
	}
	return a, nil
}

func (k *xtKernel) apply(ctx context.Context, ch *change) error {
	if ch.nothing() {
		return nil
	}
	for {
		err := k.run.Restore(ctx, func(w *bufio.Writer) {
			if ch.stream != nil || k.chunk > 0 && k.chunk < nftChunk {
				k.writeStream(w, ch)
			} else {
				writeTables(w, ch)
			}
		})
		var failed *xtables.RestoreError
		if !errors.As(err, &failed) || !failed.TooLarge() || k.chunk < leastChunk {
			return err
		}
		// In a user namespace a netlink socket cannot be given a larger buffer, and
		// a transaction must fit into it.
		k.chunk /= 4
	}
}

// writeTables writes a change that is held in memory: filter before nat, so
// that a Service that loses its endpoints is refused before it is no longer
// translated.
func writeTables(w *bufio.Writer, ch *change) {
	for _, table := range []string{tableFilter, tableNAT} {
		var t bytes.Buffer
		for _, c := range ch.list {
			if c.table == table {
				writeChain(&t, c.chain)
			}
		}
		writeRest(&t, table, ch)
		writeTable(w, table, t.Bytes())
	}
}

// writeStream writes a change whose chains come one by one: nat as they come,
// filter (which is small) at the end.
func (k *xtKernel) writeStream(w *bufio.Writer, ch *change) {
	var filter, nat bytes.Buffer
	rules, open := 0, false
	chains := ch.stream
	if chains == nil {
		chains = func(emit func(tableChain)) {
			for _, c := range ch.list {
				emit(c)
			}
		}
	}
	chains(func(c tableChain) {
		if c.table == tableFilter {
			writeChain(&filter, c.chain)
			return
		}
		if k.chunk > 0 && rules > k.chunk {
			_, _ = w.WriteString("COMMIT\n")
			rules, open = 0, false
		}
		if !open {
			_, _ = w.WriteString("*nat\n")
			open = true
		}
		nat.Reset()
		writeChain(&nat, c.chain)
		_, _ = w.Write(nat.Bytes())
		rules += len(c.rules) + 1
	})
	if open {
		_, _ = w.WriteString("COMMIT\n")
	}
	nat.Reset()
	writeRest(&filter, tableFilter, ch)
	writeTable(w, tableFilter, filter.Bytes())
	writeRest(&nat, tableNAT, ch)
	writeTable(w, tableNAT, nat.Bytes())
}

func writeTable(w *bufio.Writer, table string, content []byte) {
	if len(content) == 0 {
		return
	}
	_, _ = w.WriteString("*" + table + "\n")
	_, _ = w.Write(content)
	_, _ = w.WriteString("COMMIT\n")
}

// writeChain creates or empties a chain and fills it.
func writeChain(w *bytes.Buffer, c chain) {
	w.WriteString(":" + c.name + " - [0:0]\n")
	for _, r := range c.rules {
		w.WriteString("-A " + c.name + " " + r + "\n")
	}
}

// writeRest writes a table's deletions and jumps. Chains are emptied before any
// is deleted, because they may refer to each other.
func writeRest(w *bytes.Buffer, table string, ch *change) {
	for _, d := range ch.del {
		if d.table == table {
			w.WriteString(":" + d.name + " - [0:0]\n")
		}
	}
	for _, e := range ch.empty {
		if e.table == table {
			w.WriteString(":" + e.name + " - [0:0]\n")
		}
	}
	for _, d := range ch.del {
		if d.table == table {
			w.WriteString("-X " + d.name + "\n")
		}
	}
	for _, c := range ch.append {
		if c.table == table {
			for _, r := range c.rules {
				w.WriteString("-A " + c.name + " " + r + "\n")
			}
		}
	}
	for _, j := range ch.jumps {
		if j.table == table {
			w.WriteString("-I " + j.from + " 1 " + j.text + "\n")
		}
	}
}

// try loads rules into chains that nothing leads to, and removes them again.
func (k *xtKernel) try(ctx context.Context, list []tableChain) error {
	perTable := map[string][]string{}
	for _, c := range list {
		perTable[c.table] = append(perTable[c.table], c.rules...)
	}
	var del []tableRef
	var put []tableChain
	targets := map[tableRef]bool{}
	for table, rules := range perTable {
		put = append(put, tableChain{table, chain{chainTrial, rules}})
		del = append(del, tableRef{table, chainTrial})
		for _, r := range rules {
			if to := xtables.JumpTarget(r); isObjectChain(to) || to == chainMarkMasq {
				targets[tableRef{table, to}] = true
			}
		}
	}
	// A rule can jump only to what exists: make empty chains for those that do not.
	have, err := k.read(ctx)
	if err != nil {
		return err
	}
	var stubs []tableChain
	for t := range targets {
		if _, ok := have.chains[t]; !ok {
			stubs = append(stubs, tableChain{t.table, chain{name: t.name}})
			del = append(del, t)
		}
	}
	err = k.apply(ctx, &change{list: append(stubs, put...)})
	if cleanup := k.apply(ctx, &change{del: del}); cleanup != nil && err == nil {
		err = fmt.Errorf("remove trial chains: %w", cleanup)
	}
	return err
}

func (k *xtKernel) token() (string, bool) { return k.run.Token(tableNAT, tableFilter) }
