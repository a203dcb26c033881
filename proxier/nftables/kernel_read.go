package nftables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// readTries is how often a list is begun again that was changed meanwhile.
const readTries = 5

// dump lists objects of a kind in our table. body is without the header of nfnetlink.
func (k *nfKernel) dump(ctx context.Context, typ uint16, got func(body []byte) error) error {
	return k.conn.Dump(ctx, func(e *nlbatch.Encoder) { k.begin(e, typ, 0) }, func(b []byte) error {
		if len(b) < headerSize {
			return errors.New("a message without header")
		}
		return got(b[headerSize:])
	})
}

// read implements kernel. It starts over while others write.
func (k *nfKernel) read(ctx context.Context, got func(element) error) (*actual, error) {
	a := &actual{sets: map[setID]bool{}, chains: map[chainName]uint64{}}
	var err error
	if a.table, a.asleep, err = k.state(ctx); err != nil || !a.table {
		return a, err
	}
	for range readTries {
		a.sets, a.extra, a.chains, a.heads = map[setID]bool{}, nil, map[chainName]uint64{}, map[chainName]uint64{}
		if err = k.readStructure(ctx, a); !errors.Is(err, nlbatch.ErrInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list table %s: %w", k.table, err)
	}
	for set := range setCount {
		if !a.sets[set] || setSpecs[set].dynamic {
			continue
		}
		if err := k.readSet(ctx, set, a, got); err != nil {
			return nil, fmt.Errorf("list %s: %w", set, err)
		}
	}
	return a, nil
}

// there implements kernel.
func (k *nfKernel) there(ctx context.Context) (bool, error) {
	there, _, err := k.state(ctx)
	return there, err
}

// tableDormant is NFT_TABLE_F_DORMANT: no chain of the table is entered.
const tableDormant = 1

// state says whether there is a table of ours, and whether it is dormant.
func (k *nfKernel) state(ctx context.Context) (there, asleep bool, err error) {
	err = k.conn.Query(ctx, func(e *nlbatch.Encoder) { k.begin(e, unix.NFT_MSG_GETTABLE, 0) }, func(b []byte) error {
		if len(b) >= headerSize {
			flags := first(b[headerSize:], unix.NFTA_TABLE_FLAGS)
			asleep = len(flags) == 4 && binary.BigEndian.Uint32(flags)&tableDormant != 0
		}
		return nil
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, false, nil
	case err != nil:
		return false, false, fmt.Errorf("look for table %s: %w", k.table, err)
	}
	return true, asleep, nil
}

func (k *nfKernel) readStructure(ctx context.Context, a *actual) error {
	if err := k.dump(ctx, unix.NFT_MSG_GETSET, func(b []byte) error { k.readSpec(b, a); return nil }); err != nil {
		return err
	}
	digests := map[chainName]*digest{}
	if err := k.dump(ctx, unix.NFT_MSG_GETCHAIN, func(b []byte) error {
		if name, d, head, ours := k.readChain(b); ours {
			digests[name], a.heads[name] = d, head
		}
		return nil
	}); err != nil {
		return err
	}
	err := k.dump(ctx, unix.NFT_MSG_GETRULE, func(b []byte) error {
		name := chainName(nlbatch.Text(first(b, unix.NFTA_RULE_CHAIN)))
		if d := digests[name]; d != nil && nlbatch.Text(first(b, attrTable)) == k.table {
			d.add(first(b, unix.NFTA_RULE_USERDATA))
		}
		return nil
	})
	for name, d := range digests {
		a.chains[name] = d.h
	}
	return err
}

// baseChains are the table's chains that packets enter it by, whoever made it.
func (k *nfKernel) baseChains(ctx context.Context) (names []string, err error) {
	for range readTries {
		names = nil
		err = k.dump(ctx, unix.NFT_MSG_GETCHAIN, func(b []byte) error {
			if nlbatch.Text(first(b, attrTable)) == k.table && first(b, unix.NFTA_CHAIN_HOOK) != nil {
				names = append(names, nlbatch.Text(first(b, unix.NFTA_CHAIN_NAME)))
			}
			return nil
		})
		if !errors.Is(err, nlbatch.ErrInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	return names, nil
}

func (k *nfKernel) readChain(b []byte) (_ chainName, _ *digest, head uint64, ours bool) {
	var table, name, typ string
	var number, policy uint32
	var priority int32
	for t, v := range nlbatch.Attributes(b) {
		switch t {
		case attrTable:
			table = nlbatch.Text(v)
		case unix.NFTA_CHAIN_NAME:
			name = nlbatch.Text(v)
		case unix.NFTA_CHAIN_TYPE:
			typ = nlbatch.Text(v)
		case unix.NFTA_CHAIN_POLICY:
			policy = binary.BigEndian.Uint32(v)
		case unix.NFTA_CHAIN_HOOK:
			for t, v := range nlbatch.Attributes(v) {
				switch t {
				case unix.NFTA_HOOK_HOOKNUM:
					number = binary.BigEndian.Uint32(v)
				case unix.NFTA_HOOK_PRIORITY:
					priority = int32(binary.BigEndian.Uint32(v))
				}
			}
		}
	}
	return chainName(name), newDigest(typ, number, priority, policy), newDigest(typ, number, priority, 0).h, table == k.table
}

// readSpec notes a set, and whether it is as we make it.
func (k *nfKernel) readSpec(b []byte, a *actual) {
	var table, name string
	var flags, keyType, dataType, keyLen, dataLen uint32
	for t, v := range nlbatch.Attributes(b) {
		switch t {
		case attrTable:
			table = nlbatch.Text(v)
		case unix.NFTA_SET_NAME:
			name = nlbatch.Text(v)
		case unix.NFTA_SET_FLAGS:
			flags = binary.BigEndian.Uint32(v)
		case unix.NFTA_SET_KEY_TYPE:
			keyType = binary.BigEndian.Uint32(v)
		case unix.NFTA_SET_DATA_TYPE:
			dataType = binary.BigEndian.Uint32(v)
		case unix.NFTA_SET_KEY_LEN:
			keyLen = binary.BigEndian.Uint32(v)
		case unix.NFTA_SET_DATA_LEN:
			dataLen = binary.BigEndian.Uint32(v)
		}
	}
	if table != k.table || flags&unix.NFT_SET_ANONYMOUS != 0 { // such a set is a part of a rule
		return
	}
	for set, spec := range setSpecs {
		if spec.name == name {
			// Some kernels say only later that a set is one of concatenated ranges.
			a.sets[setID(set)] = flags&^setConcat == spec.flags()&^setConcat &&
				keyType == datatype(spec.key, k.family) && dataType == datatype(spec.value, k.family) &&
				int(keyLen) == length(spec.key, k.family) &&
				(int(dataLen) == length(spec.value, k.family) || spec.value == nil || spec.value[0] == fieldVerdict)
			return
		}
	}
	a.extra = append(a.extra, name)
}

// readSet lists a set's elements. If there is one that we cannot have written the
// set counts as different. Nobody but us writes there (or disturbed says so); that
// others write to their own tables must not make the list begin again for ever.
func (k *nfKernel) readSet(ctx context.Context, set setID, a *actual, got func(element) error) error {
	return k.listElements(ctx, set, func(c client, ok bool) error {
		if !ok {
			a.sets[set] = false
			return nil
		}
		return got(c.element)
	})
}

func (k *nfKernel) listElements(ctx context.Context, set setID, got func(c client, ok bool) error) error {
	return k.listRaw(ctx, set, func(b []byte) error { return got(k.element(set, b)) })
}

// listRaw lists a set's elements as the kernel writes them.
func (k *nfKernel) listRaw(ctx context.Context, set setID, got func(b []byte) error) error {
	return k.conn.DumpThrough(ctx, func(e *nlbatch.Encoder) {
		k.begin(e, unix.NFT_MSG_GETSETELEM, 0)
		e.String(unix.NFTA_SET_ELEM_LIST_SET, set.String())
	}, func(b []byte) error {
		if len(b) < headerSize {
			return errors.New("a message without header")
		}
		for _, v := range nlbatch.Attributes(first(b[headerSize:], unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			if err := got(v); err != nil {
				return err
			}
		}
		return nil
	})
}

// element reads one element. ok is false if it is none that we would write.
func (k *nfKernel) element(set setID, b []byte) (c client, ok bool) {
	var keyBytes, end, data, verdict []byte
	for t, v := range nlbatch.Attributes(b) {
		switch t {
		case unix.NFTA_SET_ELEM_KEY:
			keyBytes = first(v, unix.NFTA_DATA_VALUE)
		case attrKeyEnd:
			end = first(v, unix.NFTA_DATA_VALUE)
		case unix.NFTA_SET_ELEM_DATA:
			data, verdict = first(v, unix.NFTA_DATA_VALUE), first(v, unix.NFTA_DATA_VERDICT)
		}
	}
	c.key, c.from, ok = parseKey(set, k.family, keyBytes, end)
	if !ok || set == setHairpin && c.from != c.addr {
		return c, false
	}
	if set == setReplies {
		c.addr = c.from // the frontend's, which is the source here
	}
	switch spec := setSpecs[set]; {
	case spec.value == nil:
	case spec.value[0] == fieldVerdict:
		c.then = parseVerdict(verdict)
	default:
		c.to, ok = parseTo(k.family, data)
	}
	return c, ok
}

// parseVerdict gives a name that no chain has for a verdict that is none of ours.
func parseVerdict(b []byte) chainName {
	code, to := int32(0), ""
	for t, v := range nlbatch.Attributes(b) {
		switch t {
		case unix.NFTA_VERDICT_CODE:
			code = int32(binary.BigEndian.Uint32(v))
		case unix.NFTA_VERDICT_CHAIN:
			to = nlbatch.Text(v)
		}
	}
	switch {
	case code == unix.NFT_GOTO:
		return chainName(to)
	case code == 0:
		return dropAll
	}
	return chainName(fmt.Sprintf("?verdict %d %s", code, to))
}

func first(b []byte, typ uint16) []byte {
	for t, v := range nlbatch.Attributes(b) {
		if t == typ {
			return v
		}
	}
	return nil
}

// clients implements kernel.
func (k *nfKernel) clients(ctx context.Context, got func(client)) error {
	err := k.listElements(ctx, setAffinity, func(c client, ok bool) error {
		if ok {
			got(c)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list %s: %w", setAffinity, err)
	}
	return nil
}

// counters implements kernel.
func (k *nfKernel) counters(ctx context.Context, set setID, got func(key, Count)) error {
	err := k.listRaw(ctx, set, func(b []byte) error {
		if c, ok := k.element(set, b); ok {
			got(c.key, parseCount(first(b, unix.NFTA_SET_ELEM_EXPR)))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list %s: %w", set, err)
	}
	return nil
}

// parseCount reads a counter expression.
func parseCount(b []byte) (n Count) {
	for t, v := range nlbatch.Attributes(first(b, unix.NFTA_EXPR_DATA)) {
		switch {
		case len(v) < 8:
		case t == unix.NFTA_COUNTER_BYTES:
			n.Bytes = binary.BigEndian.Uint64(v)
		case t == unix.NFTA_COUNTER_PACKETS:
			n.Packets = binary.BigEndian.Uint64(v)
		}
	}
	return n
}

// forgetMost is how many clients are forgotten in one transaction.
const forgetMost = 500

// forget implements kernel. Entries can time out any moment, and the kernel refuses
// to delete what is not there.
func (k *nfKernel) forget(ctx context.Context, list []client) error {
	for len(list) > 0 {
		n := min(len(list), forgetMost)
		if err := k.forgetSome(ctx, list[:n]); err != nil {
			return fmt.Errorf("delete from %s: %w", setAffinity, err)
		}
		list = list[n:]
	}
	return nil
}

func (k *nfKernel) forgetSome(ctx context.Context, list []client) error {
	for len(list) > 0 {
		err := k.conn.Transaction(ctx, unix.NFNL_SUBSYS_NFTABLES, len(list), func(i int, e *nlbatch.Encoder) {
			k.begin(e, unix.NFT_MSG_DELSETELEM, 0)
			e.String(unix.NFTA_SET_ELEM_LIST_SET, setAffinity.String())
			e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func() {
				e.Nest(unix.NFTA_LIST_ELEM, func() {
					e.Nest(unix.NFTA_SET_ELEM_KEY, func() { e.Bytes(unix.NFTA_DATA_VALUE, list[i].append(nil)) })
				})
			})
		})
		var rolled *nlbatch.Rolled
		if !errors.As(err, &rolled) || len(rolled.Refused) == 0 {
			return err
		}
		var left []client
		for i, c := range list {
			if refused := rolled.Refused[i]; refused == nil {
				left = append(left, c)
			} else if !errors.Is(refused, unix.ENOENT) {
				return refused
			}
		}
		list = left
	}
	return nil
}
