// Package ipset creates, fills, lists and destroys the kernel's ipsets of the few
// types that kube-proxy's ipvs mode has, by netlink alone. It knows sets and
// their elements; it does not know what they are for.
package ipset

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// Type is a set type under the kernel's name.
type Type string

// The types that this package can encode elements of.
const (
	HashIP        Type = "hash:ip"
	HashIPPort    Type = "hash:ip,port"
	HashIPPortIP  Type = "hash:ip,port,ip"
	HashIPPortNet Type = "hash:ip,port,net"
	BitmapPort    Type = "bitmap:port"
)

// revisions are the first that have packet marks (Linux 3.17). A later one would
// be shown as unknown by older ipset programs.
var revisions = map[Type]uint8{HashIP: 4, HashIPPort: 5, HashIPPortIP: 5, HashIPPortNet: 7, BitmapPort: 3}

// Spec is a set to be. Sizes are for hash types.
type Spec struct {
	Name     string
	Type     Type
	IPv6     bool
	Marks    bool   // elements carry packet marks (skbinfo)
	HashSize uint32 // 0: 1024
	MaxElem  uint32 // 0: 1048576
}

// Entry is an element. Which fields count depends on the type. Mark and Mask are
// no part of its identity.
type Entry struct {
	Addr       netip.Addr
	Protocol   uint8
	Port       uint16
	With       netip.Prefix // hash:ip,port,ip and hash:ip,port,net; the kernel refuses /0
	Mark, Mask uint32       // of sets with Marks
}

// Header is what is known of a set without listing it.
type Header struct {
	Name       string
	Type       Type
	Family     uint8 // unix.AF_INET, AF_INET6, AF_UNSPEC
	Marks      bool
	MaxElem    uint32
	Elements   uint32
	References uint32 // by rules and other sets
}

// ErrMismatch says that a set of the name exists and is of another kind.
var ErrMismatch = errors.New("the set exists with another type or family")

// ErrUnsupported says that the kernel has no ipsets at all.
var ErrUnsupported = errors.New("the kernel has no ipset (module ip_set)")

// ErrNoType says that the kernel has ipsets, and not of this type and revision.
var ErrNoType = errors.New("the kernel does not have the set type")

// commands, IPSET_CMD_*.
const (
	cmdCreate  = 2
	cmdDestroy = 3
	cmdList    = 7
	cmdAdd     = 9
	cmdDel     = 10
)

// attributes, IPSET_ATTR_*; and IPSET_ERR_*.
const (
	attrProtocol = 1
	attrSetName  = 2
	attrTypeName = 3
	attrRevision = 4
	attrFamily   = 5
	attrFlags    = 6
	attrData     = 7
	attrADT      = 8

	attrIP         = 1
	attrPort       = 4
	attrPortTo     = 5
	attrProto      = 7
	attrCADTFlags  = 8
	attrHashSize   = 18
	attrMaxElem    = 19
	attrElements   = 24
	attrReferences = 25
	attrIP2        = 20
	attrCIDR2      = 21
	attrSKBMark    = 27

	attrIPv4 = 1
	attrIPv6 = 2

	flagListHeader  = 1 << 2
	flagWithSKBInfo = 1 << 6

	netOrder = unix.NLA_F_NET_BYTEORDER

	errFindType unix.Errno = 4098
	errBusy     unix.Errno = 4100
	errHashFull unix.Errno = 4352
	errSKBInfo  unix.Errno = 4114
)

// protocol 6 is what every kernel speaks, and all that is needed.
const protocol = 6

// Conn speaks with the kernel in the network namespace of the thread that opened
// it.
type Conn struct{ nl *nlbatch.Conn }

// Open opens a connection. The kernel loads ip_set for the first request.
func Open() (*Conn, error) {
	nl, err := nlbatch.Open(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	return &Conn{nl}, nil
}

// Close closes the connection.
func (c *Conn) Close() error { return c.nl.Close() }

// Calls is how many system calls were made.
func (c *Conn) Calls() int { return c.nl.Calls() }

// Loaded says whether the kernel has ipsets now. Unlike any request it does not
// make the kernel load them.
func Loaded() (bool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("look for ipset: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	// What ipset says to this does not matter; nobody else answers.
	const option = 83 // SO_IP_SET
	_, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, option)
	return !errors.Is(err, unix.ENOPROTOOPT), nil
}

func begin(e *nlbatch.Encoder, cmd uint16, flags uint16, family uint8) {
	e.Begin(unix.NFNL_SUBSYS_IPSET<<8|cmd, flags)
	e.Raw(family, 0, 0, 0)
	e.U8(attrProtocol, protocol)
}

func (s Spec) family() uint8 {
	switch {
	case s.Type == BitmapPort:
		return unix.AF_UNSPEC // ports of both
	case s.IPv6:
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// Create creates a set. One that exists is adopted whatever its sizes; the error
// wraps ErrMismatch if it cannot serve.
func (c *Conn) Create(ctx context.Context, s Spec) error {
	if len(s.Name) == 0 || len(s.Name) > 31 {
		return fmt.Errorf("create set %q: a name has 1 to 31 characters", s.Name)
	}
	err := c.one(ctx, func(e *nlbatch.Encoder) { s.encode(e) })
	switch {
	case errors.Is(err, unix.EEXIST):
		return c.adopt(ctx, s)
	case errors.Is(err, errFindType):
		return fmt.Errorf("create set %s: %w: %s, revision %d", s.Name, ErrNoType, s.Type, revisions[s.Type])
	case errors.Is(err, unix.EINVAL): // of nfnetlink or of the set type
		if _, why := c.Headers(ctx); errors.Is(why, ErrUnsupported) {
			err = ErrUnsupported
		}
		return fmt.Errorf("create set %s: %w", s.Name, err)
	case err != nil:
		return fmt.Errorf("create set %s: %w", s.Name, Explain(err))
	}
	return nil
}

func (s Spec) encode(e *nlbatch.Encoder) {
	begin(e, cmdCreate, unix.NLM_F_CREATE|unix.NLM_F_EXCL, s.family())
	e.String(attrSetName, s.Name)
	e.String(attrTypeName, string(s.Type))
	e.U8(attrRevision, revisions[s.Type])
	e.U8(attrFamily, s.family())
	e.Nest(attrData, func() {
		if s.Type == BitmapPort {
			e.U16BE(attrPort|netOrder, 0)
			e.U16BE(attrPortTo|netOrder, 65535)
		} else {
			e.U32BE(attrHashSize|netOrder, orElse(s.HashSize, 1024))
			e.U32BE(attrMaxElem|netOrder, orElse(s.MaxElem, 1<<20))
		}
		if s.Marks {
			e.U32BE(attrCADTFlags|netOrder, flagWithSKBInfo)
		}
	})
}

func orElse(n, other uint32) uint32 {
	if n == 0 {
		return other
	}
	return n
}

func (c *Conn) adopt(ctx context.Context, s Spec) error {
	h, err := c.Header(ctx, s.Name)
	if err != nil {
		return err
	}
	switch {
	case h.Type != s.Type:
		return fmt.Errorf("adopt set %s of type %s, wanted %s: %w", s.Name, h.Type, s.Type, ErrMismatch)
	case h.Family != s.family() && h.Family != unix.AF_UNSPEC:
		return fmt.Errorf("adopt set %s of address family %d, wanted %d: %w", s.Name, h.Family, s.family(), ErrMismatch)
	case s.Marks && !h.Marks:
		return fmt.Errorf("adopt set %s without skbinfo, wanted with: %w", s.Name, ErrMismatch)
	}
	return nil
}

// one sends a single request.
func (c *Conn) one(ctx context.Context, write func(e *nlbatch.Encoder)) error {
	refused, err := c.nl.Execute(ctx, 1, func(_ int, e *nlbatch.Encoder) { write(e) })
	if err != nil {
		return err
	}
	return refused[0]
}

// Destroy removes a set; one that does not exist is no error, one that rules
// refer to is.
func (c *Conn) Destroy(ctx context.Context, name string) error {
	err := c.one(ctx, func(e *nlbatch.Encoder) {
		begin(e, cmdDestroy, 0, unix.AF_INET)
		e.String(attrSetName, name)
	})
	if errors.Is(err, unix.EINVAL) { // of nfnetlink: a name of a set is never wrong
		err = ErrUnsupported
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("destroy set %s: %w", name, Explain(err))
	}
	return nil
}

// Change adds an element to a set, or takes one out of it.
type Change struct {
	Set   string
	Type  Type
	Del   bool
	Entry Entry
}

// Apply makes n changes in order and goes on after those that the kernel
// refuses, which it returns by index. Adding what exists succeeds and sets its
// mark; deleting what does not exist succeeds, also if there is no set.
func (c *Conn) Apply(ctx context.Context, n int, change func(i int) Change) (map[int]error, error) {
	refused, err := c.nl.Execute(ctx, n, func(i int, e *nlbatch.Encoder) { change(i).encode(e) })
	for i, why := range refused {
		if errors.Is(why, unix.ENOENT) && change(i).Del {
			delete(refused, i)
		} else {
			refused[i] = Explain(why)
		}
	}
	return refused, err
}

func (ch Change) encode(e *nlbatch.Encoder) {
	cmd := uint16(cmdAdd)
	if ch.Del {
		cmd = cmdDel
	}
	n := &ch.Entry
	family := uint8(unix.AF_INET)
	if n.Addr.Is6() {
		family = unix.AF_INET6
	}
	begin(e, cmd, 0, family) // without NLM_F_EXCL: idempotent
	e.String(attrSetName, ch.Set)
	e.Nest(attrData, func() {
		if ch.Type != BitmapPort {
			address(e, attrIP, n.Addr)
		}
		if ch.Type != HashIP {
			e.U16BE(attrPort|netOrder, n.Port)
		}
		if ch.Type != HashIP && ch.Type != BitmapPort {
			e.U8(attrProto, n.Protocol)
		}
		if ch.Type == HashIPPortIP || ch.Type == HashIPPortNet {
			address(e, attrIP2, n.With.Addr())
		}
		if ch.Type == HashIPPortNet {
			e.U8(attrCIDR2, uint8(n.With.Bits()))
		}
		if !ch.Del && n.Mark != 0 {
			e.U64BE(attrSKBMark|netOrder, uint64(n.Mark)<<32|uint64(n.Mask))
		}
	})
}

func address(e *nlbatch.Encoder, attr uint16, a netip.Addr) {
	e.Nest(attr, func() {
		if a.Is4() {
			e.Bytes(attrIPv4|netOrder, a.AsSlice())
		} else {
			e.Bytes(attrIPv6|netOrder, a.AsSlice())
		}
	})
}

// Explain says what the errors mean that only ipset has.
func Explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errBusy):
		return fmt.Errorf("it is in use by rules or other sets: %w", unix.EBUSY)
	case errors.Is(err, errHashFull):
		return fmt.Errorf("the set is full: %w", unix.ENOSPC)
	case errors.Is(err, errSKBInfo):
		return fmt.Errorf("the set was created without skbinfo: %w", unix.EINVAL)
	}
	var no unix.Errno
	if errors.As(err, &no) && no >= 4096 {
		return fmt.Errorf("the kernel's ipset says error %d (IPSET_ERR_*)", int(no))
	}
	return err
}

// tries is how often a list is begun again that changed while it was read.
const tries = 4

// List lists a set's elements. The error wraps unix.ENOENT if there is no such
// set.
func (c *Conn) List(ctx context.Context, name string) ([]Entry, error) {
	var out []Entry
	err := c.dump(ctx, name, 0, func() { out = out[:0] }, func(set []byte) error {
		for a, v := range nlbatch.Attributes(set) {
			if a != attrADT {
				continue
			}
			for a, v := range nlbatch.Attributes(v) {
				if a == attrData {
					out = append(out, parseEntry(v))
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list set %s: %w", name, err)
	}
	return out, nil
}

// Headers gives the headers of all sets by name. The error wraps ErrUnsupported
// where the kernel cannot have any.
func (c *Conn) Headers(ctx context.Context) (map[string]Header, error) {
	out := map[string]Header{}
	err := c.dump(ctx, "", flagListHeader, func() { clear(out) }, func(set []byte) error {
		h := parseHeader(set)
		out[h.Name] = h
		return nil
	})
	if errors.Is(err, unix.EINVAL) { // of nfnetlink
		err = ErrUnsupported
	}
	if err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	return out, nil
}

// Header gives the header of one set. The error wraps unix.ENOENT if there is no
// such set.
func (c *Conn) Header(ctx context.Context, name string) (Header, error) {
	var h Header
	err := c.dump(ctx, name, flagListHeader, func() {}, func(set []byte) error {
		h = parseHeader(set)
		return nil
	})
	if err != nil {
		return Header{}, fmt.Errorf("look at set %s: %w", name, err)
	}
	return h, nil
}

func (c *Conn) dump(ctx context.Context, name string, flags uint32, reset func(), got func(set []byte) error) error {
	var err error
	for range tries {
		reset()
		err = c.nl.Dump(ctx, func(e *nlbatch.Encoder) {
			begin(e, cmdList, 0, unix.AF_INET)
			if name != "" {
				e.String(attrSetName, name)
			}
			if flags != 0 {
				e.U32BE(attrFlags|netOrder, flags)
			}
		}, func(payload []byte) error { return got(payload[min(4, len(payload)):]) })
		if !errors.Is(err, nlbatch.ErrInterrupted) {
			break
		}
	}
	return err
}

func parseHeader(set []byte) Header {
	var h Header
	for a, v := range nlbatch.Attributes(set) {
		switch {
		case a == attrSetName:
			h.Name = nlbatch.Text(v)
		case a == attrTypeName:
			h.Type = Type(nlbatch.Text(v))
		case a == attrFamily && len(v) > 0:
			h.Family = v[0]
		case a == attrData:
			for a, v := range nlbatch.Attributes(v) {
				if len(v) < 4 {
					continue
				}
				n := binary.BigEndian.Uint32(v)
				switch a {
				case attrElements:
					h.Elements = n
				case attrReferences:
					h.References = n
				case attrMaxElem:
					h.MaxElem = n
				case attrCADTFlags:
					h.Marks = n&flagWithSKBInfo != 0
				}
			}
		}
	}
	return h
}

func parseEntry(data []byte) Entry {
	var n Entry
	var with netip.Addr
	bits := -1
	for a, v := range nlbatch.Attributes(data) {
		switch {
		case a == attrIP:
			n.Addr = parseAddress(v)
		case a == attrIP2:
			with = parseAddress(v)
		case a == attrPort && len(v) >= 2:
			n.Port = binary.BigEndian.Uint16(v)
		case a == attrProto && len(v) >= 1:
			n.Protocol = v[0]
		case a == attrCIDR2 && len(v) >= 1:
			bits = int(v[0])
		case a == attrSKBMark && len(v) >= 8:
			m := binary.BigEndian.Uint64(v)
			n.Mark, n.Mask = uint32(m>>32), uint32(m)
		}
	}
	if with.IsValid() {
		if bits < 0 {
			bits = with.BitLen()
		}
		n.With = netip.PrefixFrom(with, bits)
	}
	return n
}

func parseAddress(v []byte) netip.Addr {
	for _, v := range nlbatch.Attributes(v) {
		a, _ := netip.AddrFromSlice(v)
		return a
	}
	return netip.Addr{}
}
