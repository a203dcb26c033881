package nftables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// nfKernel is the table of one family in the kernel of the network namespace that it
// was opened in.
type nfKernel struct {
	family model.Family
	table  string
	conn   *nlbatch.Conn
	most   int // bytes of a transaction

	changes *nlbatch.Listener // nil where nobody follows
	dirty   atomic.Bool       // somebody else has changed our table
}

var _ kernel = (*nfKernel)(nil)

// wantRoom is how large transactions may get. They are kept smaller than that; what
// one Service needs goes in one, however many endpoints it has.
const wantRoom = 8 << 20

func openKernel(f model.Family, table string) (*nfKernel, error) {
	conn, err := nlbatch.Open(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	k := &nfKernel{family: f, table: table, conn: conn}
	// The kernel's share of the buffer for one packet is larger than the packet.
	k.most = conn.Room(wantRoom) * 3 / 4
	return k, nil
}

func (k *nfKernel) room() int { return k.most }

// disturbed implements kernel.
func (k *nfKernel) disturbed() bool { return k.dirty.Swap(false) }

func message16(typ uint16) uint16 { return unix.NFNL_SUBSYS_NFTABLES<<8 | typ }

// nfproto is the family as nf_tables calls it.
func (k *nfKernel) nfproto() uint8 { return words{k.family}.nfproto() }

// begin begins a message about something in our table.
func (k *nfKernel) begin(e *nlbatch.Encoder, typ, flags uint16) {
	e.Begin(message16(typ), flags)
	e.Raw(k.nfproto(), unix.NFNETLINK_V0, 0, 0)
	e.String(attrTable, k.table) // the first attribute of every kind of object
}

const (
	policyAccept = 1 // NF_ACCEPT
	headerSize   = 4 // of nfnetlink (nfgenmsg)
)

// attrTable is NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE and
// NFTA_SET_ELEM_LIST_TABLE.
const attrTable = 1

// request is one netlink message of a transaction.
type request func(e *nlbatch.Encoder)

// commit implements kernel.
func (k *nfKernel) commit(ctx context.Context, t []message) error {
	var requests []request
	var of []int // which message a request belongs to
	for i, m := range t {
		list, err := k.requests(m)
		if err != nil {
			return fmt.Errorf("encode %s: %w", m, err)
		}
		for _, r := range list {
			requests, of = append(requests, r), append(of, i)
		}
	}
	if len(requests) == 0 {
		return nil
	}
	err := k.conn.Transaction(ctx, unix.NFNL_SUBSYS_NFTABLES, len(requests), func(i int, e *nlbatch.Encoder) { requests[i](e) })
	var rolled *nlbatch.Rolled
	if !errors.As(err, &rolled) {
		return err
	}
	back := &rolledBack{err: rolled.Err}
	for i, err := range rolled.Refused {
		if back.refused == nil {
			back.refused = map[int]error{}
		}
		back.refused[of[i]] = fmt.Errorf("%s: %w", t[of[i]], err)
	}
	return back
}

// requests are the netlink messages for one message.
func (k *nfKernel) requests(m message) ([]request, error) {
	switch m.what {
	case putTable:
		return []request{func(e *nlbatch.Encoder) {
			k.begin(e, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE)
			e.U32BE(unix.NFTA_TABLE_FLAGS, 0)
		}}, nil
	case deleteTable:
		return []request{func(e *nlbatch.Encoder) { k.begin(e, unix.NFT_MSG_DELTABLE, 0) }}, nil
	case putSet:
		return []request{func(e *nlbatch.Encoder) { k.putSet(e, m.set) }}, nil
	case deleteSet:
		return []request{func(e *nlbatch.Encoder) {
			k.begin(e, unix.NFT_MSG_DELSET, 0)
			e.String(unix.NFTA_SET_NAME, m.name)
		}}, nil
	case writeChain:
		return k.writeChain(m.chain), nil
	case deleteChain:
		return []request{func(e *nlbatch.Encoder) {
			k.begin(e, unix.NFT_MSG_DELCHAIN, 0)
			e.String(unix.NFTA_CHAIN_NAME, m.name)
		}}, nil
	case flushChain:
		return []request{func(e *nlbatch.Encoder) { k.flushChain(e, m.name) }}, nil
	case putElements:
		return []request{func(e *nlbatch.Encoder) { k.elements(e, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, m) }}, nil
	case deleteElements:
		return []request{func(e *nlbatch.Encoder) { k.elements(e, unix.NFT_MSG_DELSETELEM, 0, m) }}, nil
	}
	return nil, errors.New("unknown verb")
}

// Flags of sets (linux/netfilter/nf_tables.h).
const (
	setInterval = unix.NFT_SET_INTERVAL
	setMap      = unix.NFT_SET_MAP
	setTimeout  = unix.NFT_SET_TIMEOUT
	setEval     = unix.NFT_SET_EVAL
	setConcat   = 0x80 // NFT_SET_CONCAT: of ranges

	attrSetExpr    = 0x11 // NFTA_SET_EXPR
	attrDescConcat = 2    // NFTA_SET_DESC_CONCAT
	attrKeyEnd     = 10   // NFTA_SET_ELEM_KEY_END
)

func (s setSpec) flags() uint32 {
	flags := uint32(0)
	if s.value != nil {
		flags |= setMap
	}
	if s.dynamic {
		flags |= setTimeout | setEval
	}
	if s.ranges {
		flags |= setInterval | setConcat
	}
	return flags
}

func (k *nfKernel) putSet(e *nlbatch.Encoder, set setID) {
	spec := setSpecs[set]
	k.begin(e, unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE)
	e.String(unix.NFTA_SET_NAME, spec.name)
	e.U32BE(unix.NFTA_SET_FLAGS, spec.flags())
	e.U32BE(unix.NFTA_SET_KEY_TYPE, datatype(spec.key, k.family))
	e.U32BE(unix.NFTA_SET_KEY_LEN, uint32(length(spec.key, k.family)))
	if spec.value != nil {
		e.U32BE(unix.NFTA_SET_DATA_TYPE, datatype(spec.value, k.family))
		e.U32BE(unix.NFTA_SET_DATA_LEN, uint32(length(spec.value, k.family)))
	}
	e.U32BE(unix.NFTA_SET_ID, uint32(set)+1)
	e.Nest(unix.NFTA_SET_DESC, func() {
		if spec.dynamic {
			e.U32BE(unix.NFTA_SET_DESC_SIZE, mostClients)
		}
		if !spec.ranges {
			return
		}
		e.Nest(attrDescConcat, func() {
			for _, f := range spec.key {
				e.Nest(unix.NFTA_LIST_ELEM, func() { e.U32BE(1, uint32(f.size(k.family))) }) // NFTA_SET_FIELD_LEN
			}
		})
	})
	e.Bytes(unix.NFTA_SET_USERDATA, spec.notes(k.family))
	if spec.counter {
		e.Nest(attrSetExpr, func() {
			e.String(unix.NFTA_EXPR_NAME, "counter")
			e.Nest(unix.NFTA_EXPR_DATA, func() {})
		})
	}
}

func (k *nfKernel) elements(e *nlbatch.Encoder, typ, flags uint16, m message) {
	spec := setSpecs[m.set]
	k.begin(e, typ, flags)
	e.String(unix.NFTA_SET_ELEM_LIST_SET, spec.name)
	var b [64]byte
	e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func() {
		for i := range m.elements {
			el := &m.elements[i]
			e.Nest(unix.NFTA_LIST_ELEM, func() {
				e.Nest(unix.NFTA_SET_ELEM_KEY, func() { e.Bytes(unix.NFTA_DATA_VALUE, el.key.append(b[:0], false)) })
				if spec.ranges {
					e.Nest(attrKeyEnd, func() { e.Bytes(unix.NFTA_DATA_VALUE, el.key.append(b[:0], true)) })
				}
				if typ == unix.NFT_MSG_NEWSETELEM && spec.value != nil {
					e.Nest(unix.NFTA_SET_ELEM_DATA, func() { putValue(e, el.value, b[:0]) })
				}
			})
		}
	})
}

func putValue(e *nlbatch.Encoder, v value, b []byte) {
	if v.then == "" {
		e.Bytes(unix.NFTA_DATA_VALUE, v.append(b))
		return
	}
	e.Nest(unix.NFTA_DATA_VERDICT, func() {
		if v.then == dropAll {
			e.U32BE(unix.NFTA_VERDICT_CODE, 0) // NF_DROP
			return
		}
		e.U32BE(unix.NFTA_VERDICT_CODE, uint32(0xffffffff&int64(unix.NFT_GOTO)))
		e.String(unix.NFTA_VERDICT_CHAIN, string(v.then))
	})
}

// size implements kernel, roughly.
func (k *nfKernel) size(m message) int {
	switch m.what {
	case putElements, deleteElements:
		spec := setSpecs[m.set]
		one := length(spec.key, k.family) + length(spec.value, k.family) + 28
		if spec.ranges {
			one += length(spec.key, k.family) + 8
		}
		if spec.value != nil && spec.value[0] == fieldVerdict {
			one += 48
		}
		return 64 + one*len(m.elements)
	case writeChain:
		return 256 + 1024*len(m.chain.rules)
	}
	return 512
}

// writeChain makes a chain, or empties it if it is there, and fills it.
func (k *nfKernel) writeChain(c chain) []request {
	list := []request{func(e *nlbatch.Encoder) { k.putChain(e, c) }, func(e *nlbatch.Encoder) { k.flushChain(e, string(c.name)) }}
	for _, r := range c.rules {
		list = append(list, func(e *nlbatch.Encoder) {
			k.begin(e, unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND)
			e.String(unix.NFTA_RULE_CHAIN, string(c.name))
			e.Nest(unix.NFTA_RULE_EXPRESSIONS, func() {
				for _, x := range r.exprs {
					e.Bytes(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, x)
				}
			})
			e.Bytes(unix.NFTA_RULE_USERDATA, signature(r.exprs))
		})
	}
	return list
}

func (k *nfKernel) flushChain(e *nlbatch.Encoder, name string) {
	k.begin(e, unix.NFT_MSG_DELRULE, 0)
	e.String(unix.NFTA_RULE_CHAIN, name)
}

func (k *nfKernel) putChain(e *nlbatch.Encoder, c chain) {
	k.begin(e, unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE)
	e.String(unix.NFTA_CHAIN_NAME, string(c.name))
	if c.hook == nil {
		return
	}
	e.Nest(unix.NFTA_CHAIN_HOOK, func() {
		e.U32BE(unix.NFTA_HOOK_HOOKNUM, c.hook.number)
		e.U32BE(unix.NFTA_HOOK_PRIORITY, uint32(c.hook.priority))
	})
	e.U32BE(unix.NFTA_CHAIN_POLICY, policyAccept)
	e.String(unix.NFTA_CHAIN_TYPE, c.hook.typ)
}

// signatureType is a kind of note to a rule that nft does not know and passes over.
const signatureType = 0xc8

// signature is what a rule of ours carries to be known again: the kernel prints
// expressions in other words than it takes them.
func signature(exprs [][]byte) []byte {
	h := fnv.New64a()
	for _, x := range exprs {
		_, _ = h.Write(x)
	}
	return note(signatureType, binary.BigEndian.AppendUint64(nil, h.Sum64()))
}

// digest is what a chain is compared by: how it is entered, and its rules.
type digest struct{ h uint64 }

func newDigest(typ string, number uint32, priority int32, policy uint32) *digest {
	d := &digest{14695981039346656037}
	d.add([]byte(fmt.Sprint(typ, number, priority, policy)))
	return d
}

func (d *digest) add(b []byte) {
	for _, c := range b {
		d.h = (d.h ^ uint64(c)) * 1099511628211
	}
	d.h = (d.h ^ 0x100) * 1099511628211
}

// head is the digest of how a chain should be entered, which the kernel does not
// change in a chain that is there.
func (c chain) head() uint64 {
	if c.hook == nil {
		return newDigest("", 0, 0, 0).h
	}
	return newDigest(c.hook.typ, c.hook.number, c.hook.priority, 0).h
}

// digestOf is the digest of a chain as it should be.
func (c chain) digestOf() uint64 {
	d := newDigest("", 0, 0, 0)
	if c.hook != nil {
		d = newDigest(c.hook.typ, c.hook.number, c.hook.priority, policyAccept)
	}
	for _, r := range c.rules {
		d.add(signature(r.exprs))
	}
	return d.h
}
