package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Numbers of linux/netfilter/nfnetlink_conntrack.h that x/sys/unix lacks.
const (
	ctNew    = unix.NFNL_SUBSYS_CTNETLINK << 8   // IPCTNL_MSG_CT_NEW, which is 0
	ctGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1 // IPCTNL_MSG_CT_GET
	ctDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaTimeout    = 7
	ctaID         = 12
	ctaZone       = 18
	ctaFilter     = 25 // since 5.8, which is also the first kernel to heed it

	sizeofNfgenmsg = 4
	nlaTypeMask    = ^uint16(unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)

	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaTupleZone  = 3

	ctaIP4Src = 1
	ctaIP4Dst = 2
	ctaIP6Src = 3
	ctaIP6Dst = 4

	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaFilterOrigFlags = 1

	// Bits of ctaFilterOrigFlags (net/netfilter/nf_internals.h): what of the
	// tuple beside them must match.
	filterIPDst    = 1 << 1
	filterProtoNum = 1 << 3
	filterDstPort  = 1 << 5
)

const (
	// dumpAttempts is how often a dump that the kernel calls inconsistent is
	// made, as in kube-proxy.
	dumpAttempts = 5
	// askSingly is up to how many frontends are asked for one by one. Each dump
	// makes the kernel walk the whole table, and only what matches is copied: with
	// 50,000 flows of others that takes a fifth of what copying them takes.
	askSingly = 4
	// deleteBatch is how many deletions go to the kernel at once: their
	// acknowledgements must fit into the socket's receive buffer.
	deleteBatch = 64
	// receiveSize holds any part of a dump: the kernel never makes them longer
	// than 32 KiB.
	receiveSize = 1 << 16
)

// errInterrupted says that the table changed under a dump.
var errInterrupted = fmt.Errorf("dump interrupted by changes: %w", unix.EINTR)

// Kernel is the connection tracking table of the network namespace of the
// thread that calls. The zero Kernel is ready; it holds no socket.
type Kernel struct {
	filter atomic.Int32 // whether CTA_FILTER works: see the constants
}

const (
	filterUnknown int32 = iota
	filterWorks
	filterIgnored
)

// List is Table's. It has the kernel select the flows where it can (since 5.8);
// what the kernel lets through is checked again, because older ones ignore the
// filter without a word.
func (k *Kernel) List(ctx context.Context, family model.Family, want []Frontend, visit func(*Flow)) error {
	works, err := k.probe(family)
	if err != nil {
		return err
	}
	s, err := open()
	if err != nil {
		return err
	}
	defer s.close()
	asked := make(map[Frontend]struct{}, len(want))
	for _, f := range want {
		asked[f] = struct{}{}
	}
	checked := func(f *Flow) {
		if _, ok := asked[Frontend{f.Protocol, f.Dst.Addr(), f.Dst.Port()}]; !ok {
			if _, ok = asked[Frontend{Protocol: f.Protocol, Port: f.Dst.Port()}]; !ok {
				return
			}
		}
		visit(f)
	}
	for _, part := range dumps(asked, works) {
		_, err := s.dumpRetrying(ctx, family, part, checked)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			// A protocol that this kernel does not know by its ports, for one.
			_, err = s.dumpRetrying(ctx, family, filter{}, checked)
		}
		if err != nil {
			return fmt.Errorf("list %s conntrack: %w", family, err)
		}
	}
	return nil
}

// filter is what one dump asks the kernel for. Zero fields match everything.
type filter struct {
	protocol model.Protocol
	addr     netip.Addr
	port     uint16
}

// dumps decides how to find the flows of some frontends: few of them are asked
// for one by one, many by one dump of each protocol among them. IPv6 addresses
// are never given to the kernel: as of 6.18 it compares them the wrong way round
// (ctnetlink_filter_match_tuple: !ipv6_addr_cmp) and leaves out what was asked for.
func dumps(want map[Frontend]struct{}, filterWorks bool) []filter {
	if len(want) == 0 {
		return nil
	}
	if !filterWorks {
		return []filter{{}}
	}
	single, protocols := map[filter]struct{}{}, map[filter]struct{}{}
	for f := range want {
		one := filter{protocol: f.Protocol, port: f.Port}
		if f.Addr.Is4() {
			one.addr = f.Addr
		}
		single[one] = struct{}{}
		protocols[filter{protocol: f.Protocol}] = struct{}{}
	}
	if len(single) <= askSingly {
		return slices.Collect(maps.Keys(single))
	}
	return slices.Collect(maps.Keys(protocols))
}

// probe finds out once whether the kernel heeds CTA_FILTER: one that does
// refuses a filter that refers to a tuple that is not there; one that does not
// starts to dump, which closing the socket ends.
func (k *Kernel) probe(family model.Family) (bool, error) {
	if v := k.filter.Load(); v != filterUnknown {
		return v == filterWorks, nil
	}
	p, err := open()
	if err != nil {
		return false, err
	}
	defer p.close()
	m := message{}
	m.begin(ctGet, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, p.next(), family)
	m.nest(ctaFilter, func() { m.uint32(ctaFilterOrigFlags, filterIPDst) })
	if err := p.send(m.end()); err != nil {
		return false, fmt.Errorf("probe conntrack filter: %w", err)
	}
	verdict := filterIgnored
	err = p.receive(func(h header, payload []byte) (bool, error) {
		return true, h.failure(payload)
	})
	switch {
	case errors.Is(err, unix.EINVAL):
		verdict = filterWorks
	case err != nil:
		return false, fmt.Errorf("probe conntrack filter: %w", err)
	}
	k.filter.Store(verdict)
	return verdict == filterWorks, nil
}

// Delete is Table's. Each flow is named by its original tuple, its zone and,
// where known, its ID, so that nothing younger is hit.
func (k *Kernel) Delete(ctx context.Context, flows []Flow) (int, error) {
	if len(flows) == 0 {
		return 0, nil
	}
	s, err := open()
	if err != nil {
		return 0, err
	}
	defer s.close()
	deleted := 0
	var failed error
	for len(flows) > 0 && failed == nil {
		if failed = ctx.Err(); failed != nil {
			break
		}
		n := min(deleteBatch, len(flows))
		var d int
		d, failed = s.deleteBatch(flows[:n])
		deleted += d
		flows = flows[n:]
	}
	if failed != nil {
		return deleted, fmt.Errorf("delete conntrack flows: %w", failed)
	}
	return deleted, nil
}

// deleteBatch sends the deletions in one go and reads as many answers. A flow
// that is not there (any more) is no error; another failure does not keep the
// rest from being deleted.
func (s *socket) deleteBatch(flows []Flow) (deleted int, failed error) {
	m := message{}
	var first uint32
	for i := range flows {
		seq := s.next()
		if i == 0 {
			first = seq
		}
		m.begin(ctDelete, unix.NLM_F_REQUEST|unix.NLM_F_ACK, seq, model.FamilyOf(flows[i].Dst.Addr()))
		m.flow(&flows[i])
		m.end()
	}
	if err := s.send(m.buf); err != nil {
		return 0, err
	}
	answers := 0
	err := s.receive(func(h header, payload []byte) (bool, error) {
		if h.typ != unix.NLMSG_ERROR || h.seq-first >= uint32(len(flows)) {
			return false, nil
		}
		answers++
		switch err := h.failure(payload); {
		case err == nil:
			deleted++
		case !errors.Is(err, unix.ENOENT):
			failed = errors.Join(failed, err)
		}
		return answers == len(flows), nil
	})
	return deleted, errors.Join(failed, err)
}

// dumpRetrying dumps until the kernel calls the result consistent, five times
// at most. seen is how many flows the kernel sent the last time.
func (s *socket) dumpRetrying(ctx context.Context, family model.Family, want filter, visit func(*Flow)) (seen int, err error) {
	for range dumpAttempts {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if seen, err = s.dump(ctx, family, want, visit); !errors.Is(err, unix.EINTR) {
			return seen, err
		}
	}
	return seen, err
}

// dump has the kernel list the flows that match and keeps none of them.
func (s *socket) dump(ctx context.Context, family model.Family, want filter, visit func(*Flow)) (seen int, err error) {
	m := message{}
	seq := s.next()
	m.begin(ctGet, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, seq, family)
	m.filter(want)
	if err := s.send(m.end()); err != nil {
		return 0, err
	}
	interrupted := false
	var flow Flow
	err = s.receive(func(h header, payload []byte) (bool, error) {
		if h.seq != seq {
			return false, nil
		}
		interrupted = interrupted || h.flags&unix.NLM_F_DUMP_INTR != 0
		switch h.typ {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			return true, h.failure(payload)
		case ctNew:
			seen++
			if decode(payload, &flow) {
				visit(&flow)
			}
		}
		return false, ctx.Err()
	})
	if err == nil && interrupted {
		err = errInterrupted
	}
	return seen, err
}

// decode reads the attributes that matter of one conntrack message (nfgenmsg
// included), and returns false if it is not of a protocol with ports.
func decode(b []byte, f *Flow) bool {
	if len(b) < sizeofNfgenmsg {
		return false
	}
	*f = Flow{}
	var reply Flow
	zone := false
	attributes(b[sizeofNfgenmsg:], func(typ uint16, v []byte) {
		switch typ {
		case ctaTupleOrig:
			zone = f.decodeTuple(v)
		case ctaTupleReply:
			reply.decodeTuple(v)
		case ctaID:
			if len(v) == 4 {
				f.ID = binary.BigEndian.Uint32(v)
			}
		case ctaZone:
			if len(v) == 2 {
				f.Zone = binary.BigEndian.Uint16(v)
			}
		}
	})
	f.ZoneOfOriginal = zone
	f.ReplySrc = reply.Src
	return tracked(f.Protocol) && f.Dst.IsValid() && f.ReplySrc.IsValid()
}

// decodeTuple reads a tuple's addresses as a flow's, and says whether it names
// a zone of its own.
func (f *Flow) decodeTuple(b []byte) (zone bool) {
	var src, dst netip.Addr
	var sport, dport uint16
	attributes(b, func(typ uint16, v []byte) {
		switch typ {
		case ctaTupleIP:
			attributes(v, func(typ uint16, v []byte) {
				switch typ {
				case ctaIP4Src, ctaIP6Src:
					src, _ = netip.AddrFromSlice(v)
				case ctaIP4Dst, ctaIP6Dst:
					dst, _ = netip.AddrFromSlice(v)
				}
			})
		case ctaTupleProto:
			attributes(v, func(typ uint16, v []byte) {
				switch {
				case typ == ctaProtoNum && len(v) == 1:
					f.Protocol = model.Protocol(v[0])
				case typ == ctaProtoSrcPort && len(v) == 2:
					sport = binary.BigEndian.Uint16(v)
				case typ == ctaProtoDstPort && len(v) == 2:
					dport = binary.BigEndian.Uint16(v)
				}
			})
		case ctaTupleZone:
			if len(v) == 2 {
				f.Zone, zone = binary.BigEndian.Uint16(v), true
			}
		}
	})
	f.Src, f.Dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return zone
}

// attributes walks netlink attributes; a malformed rest is ignored.
func attributes(b []byte, visit func(typ uint16, value []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return
		}
		visit(binary.NativeEndian.Uint16(b[2:])&nlaTypeMask, b[unix.SizeofNlAttr:n])
		b = b[min(align(n), len(b)):]
	}
}

func align(n int) int { return (n + 3) &^ 3 }

// message builds netlink messages of the conntrack subsystem, one after the other.
type message struct {
	buf   []byte
	start int
}

func (m *message) begin(typ, flags uint16, seq uint32, family model.Family) {
	m.start = len(m.buf)
	af := byte(unix.AF_INET)
	if family == model.IPv6 {
		af = unix.AF_INET6
	}
	m.buf = binary.NativeEndian.AppendUint32(m.buf, 0) // length: see end
	m.buf = binary.NativeEndian.AppendUint16(m.buf, typ)
	m.buf = binary.NativeEndian.AppendUint16(m.buf, flags)
	m.buf = binary.NativeEndian.AppendUint32(m.buf, seq)
	m.buf = binary.NativeEndian.AppendUint32(m.buf, 0) // from any port
	m.buf = append(m.buf, af, unix.NFNETLINK_V0, 0, 0) // nfgenmsg
}

func (m *message) end() []byte {
	binary.NativeEndian.PutUint32(m.buf[m.start:], uint32(len(m.buf)-m.start))
	return m.buf
}

func (m *message) attribute(typ uint16, value ...byte) {
	m.buf = binary.NativeEndian.AppendUint16(m.buf, uint16(unix.SizeofNlAttr+len(value)))
	m.buf = binary.NativeEndian.AppendUint16(m.buf, typ)
	m.buf = append(m.buf, value...)
	m.buf = append(m.buf, make([]byte, align(len(value))-len(value))...)
}

func (m *message) uint32(typ uint16, v uint32) {
	m.attribute(typ, binary.NativeEndian.AppendUint32(nil, v)...)
}

func (m *message) big16(typ uint16, v uint16) { m.attribute(typ, byte(v>>8), byte(v)) }

func (m *message) nest(typ uint16, inner func()) {
	at := len(m.buf)
	m.attribute(typ | unix.NLA_F_NESTED)
	inner()
	binary.NativeEndian.PutUint16(m.buf[at:], uint16(len(m.buf)-at))
}

// addr appends an address as the attribute of its family.
func (m *message) addr(typ4, typ6 uint16, a netip.Addr) {
	if a.Is4() {
		m.attribute(typ4, a.AsSlice()...)
	} else {
		m.attribute(typ6, a.AsSlice()...)
	}
}

// tuple appends one direction. Its zone is the entry's if ownZone.
func (m *message) tuple(typ uint16, protocol model.Protocol, src, dst netip.AddrPort, ownZone bool, zone uint16) {
	m.nest(typ, func() {
		m.nest(ctaTupleIP, func() {
			m.addr(ctaIP4Src, ctaIP6Src, src.Addr())
			m.addr(ctaIP4Dst, ctaIP6Dst, dst.Addr())
		})
		m.nest(ctaTupleProto, func() {
			m.attribute(ctaProtoNum, byte(protocol))
			m.big16(ctaProtoSrcPort, src.Port())
			m.big16(ctaProtoDstPort, dst.Port())
		})
		if ownZone {
			m.big16(ctaTupleZone, zone)
		}
	})
}

// flow appends what names one entry. A deletion without a tuple would flush the
// whole table; this never leaves it out.
func (m *message) flow(f *Flow) {
	m.tuple(ctaTupleOrig, f.Protocol, f.Src, f.Dst, f.ZoneOfOriginal, f.Zone)
	if f.Zone != 0 && !f.ZoneOfOriginal {
		m.big16(ctaZone, f.Zone)
	}
	if f.ID != 0 {
		m.attribute(ctaID, binary.BigEndian.AppendUint32(nil, f.ID)...)
	}
}

// filter appends what a dump is limited to.
func (m *message) filter(want filter) {
	if want == (filter{}) {
		return
	}
	flags := uint32(filterProtoNum)
	m.nest(ctaTupleOrig, func() {
		if want.addr.IsValid() {
			flags |= filterIPDst
			m.nest(ctaTupleIP, func() { m.addr(ctaIP4Dst, ctaIP6Dst, want.addr) })
		}
		m.nest(ctaTupleProto, func() {
			m.attribute(ctaProtoNum, byte(want.protocol))
			if want.port != 0 {
				flags |= filterDstPort
				m.big16(ctaProtoDstPort, want.port)
			}
		})
	})
	m.nest(ctaFilter, func() { m.uint32(ctaFilterOrigFlags, flags) })
}

// socket is a netlink socket of the netfilter family.
type socket struct {
	fd  int
	seq uint32
	buf []byte
}

func open() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netfilter netlink socket: %w", err)
	}
	s := &socket{fd: fd, buf: make([]byte, receiveSize)}
	// The kernel answers at once or never; nobody must hang on "never".
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
	if err == nil {
		// Do not send requests back with their errors.
		err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("set up netfilter netlink socket: %w", err)
	}
	return s, nil
}

func (s *socket) close() { _ = unix.Close(s.fd) } // a netlink socket has nothing to lose

func (s *socket) next() uint32 {
	s.seq++
	return s.seq
}

func (s *socket) send(b []byte) error {
	if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to kernel: %w", err)
	}
	return nil
}

// header is the part of a netlink message header that matters.
type header struct {
	typ, flags uint16
	seq        uint32
}

// failure returns the error that an NLMSG_ERROR or NLMSG_DONE carries.
func (h header) failure(payload []byte) error {
	if (h.typ != unix.NLMSG_ERROR && h.typ != unix.NLMSG_DONE) || len(payload) < 4 {
		return nil
	}
	if code := int32(binary.NativeEndian.Uint32(payload)); code < 0 {
		return unix.Errno(-code)
	}
	return nil
}

// receive hands over messages from the kernel until visit says that it has seen
// the last one.
func (s *socket) receive(visit func(header, []byte) (done bool, err error)) error {
	for {
		n, from, err := unix.Recvfrom(s.fd, s.buf, unix.MSG_TRUNC)
		if err == unix.EINTR {
			continue // a signal, nothing to do with the dump
		}
		if err != nil {
			return fmt.Errorf("receive from kernel: %w", err)
		}
		if n > len(s.buf) {
			return fmt.Errorf("receive from kernel: message of %d bytes cut off", n)
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue // not from the kernel
		}
		for b := s.buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.SizeofNlMsghdr || size > len(b) {
				return errors.New("receive from kernel: malformed message")
			}
			h := header{binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), binary.NativeEndian.Uint32(b[8:])}
			if done, err := visit(h, b[unix.SizeofNlMsghdr:size]); done || err != nil {
				return err
			}
			b = b[min(align(size), len(b)):]
		}
	}
}
