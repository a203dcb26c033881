package ipvs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"time"

	libipvs "github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// Commands and attributes of linux/ip_vs.h.
const (
	cmdNewService = 1
	cmdSetService = 2
	cmdDelService = 3
	cmdGetService = 4
	cmdNewDest    = 5
	cmdSetDest    = 6
	cmdDelDest    = 7
	cmdGetDest    = 8

	attrService = 1
	attrDest    = 2

	svcAF       = 1
	svcProtocol = 2
	svcAddr     = 3
	svcPort     = 4
	svcMark     = 5
	svcSched    = 6
	svcFlags    = 7
	svcTimeout  = 8
	svcNetmask  = 9

	destAddr     = 1
	destPort     = 2
	destForward  = 3
	destWeight   = 4
	destUpper    = 5
	destLower    = 6
	destActive   = 7
	destInactive = 8
	destAF       = 11

	forwardMask = 0x7 // IP_VS_CONN_F_FWD_MASK; 0: NAT
	flagHashed  = 0x2 // the kernel's own
)

// ipvsFamily is IPVS's number, which is asked for once.
func (k *nlKernel) ipvsFamily(ctx context.Context) (uint16, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.id != 0 {
		return k.id, nil
	}
	id, err := k.genl.GenericFamily(ctx, "IPVS")
	if err != nil {
		return 0, fmt.Errorf("the kernel has no IPVS (module ip_vs): %w", err)
	}
	k.id = id
	return id, nil
}

func beginIPVS(e *nlbatch.Encoder, id uint16, cmd uint8) {
	e.Begin(id, 0)
	e.Raw(cmd, 1, 0, 0)
}

// encodeKey is what identifies a virtual server.
func encodeKey(e *nlbatch.Encoder, af uint8, key serverKey) {
	e.U16(svcAF, uint16(af))
	if key.mark != 0 {
		e.U32(svcMark, key.mark)
		return
	}
	e.U16(svcProtocol, uint16(key.protocol))
	e.Bytes(svcAddr, address(key.addr))
	e.U16BE(svcPort, key.port)
}

func encodeServer(e *nlbatch.Encoder, af uint8, key serverKey, s settings) {
	e.Nest(attrService, func() {
		encodeKey(e, af, key)
		e.String(svcSched, s.scheduler)
		var flags [8]byte
		binary.NativeEndian.PutUint32(flags[:], s.flags)
		binary.NativeEndian.PutUint32(flags[4:], ^uint32(0))
		e.Bytes(svcFlags, flags[:])
		e.U32(svcTimeout, s.timeout)
		if af == unix.AF_INET6 {
			e.U32(svcNetmask, 128)
		} else {
			e.U32(svcNetmask, ^uint32(0))
		}
	})
}

// encode writes an op as one command.
func encodeCommand(e *nlbatch.Encoder, id uint16, af, cmd uint8, o *op) {
	beginIPVS(e, id, cmd)
	if cmd == cmdNewService || cmd == cmdSetService {
		encodeServer(e, af, o.key, o.settings)
		return
	}
	e.Nest(attrService, func() { encodeKey(e, af, o.key) })
	if cmd == cmdDelService {
		return
	}
	e.Nest(attrDest, func() {
		at := o.dest.at
		e.Bytes(destAddr, address(at.Addr()))
		e.U16BE(destPort, at.Port())
		e.U16(destAF, uint16(af)) // Linux 3.18
		if cmd != cmdDelDest {
			e.U32(destForward, 0)
			e.U32(destWeight, o.dest.weight)
			e.U32(destUpper, 0)
			e.U32(destLower, 0)
		}
	})
}

// attempt is an op of a run and the command that is tried for it.
type attempt struct {
	op  int
	cmd uint8
}

func firstCommand(k opKind) uint8 {
	switch k {
	case putServer:
		return cmdNewService
	case delServer:
		return cmdDelService
	case putDest:
		return cmdNewDest
	}
	return cmdDelDest
}

// otherCommand is what to try after a refusal; 0: nothing. done: there is nothing
// to do.
func otherCommand(cmd uint8, err error) (other uint8, done bool) {
	exists, noServer, noDest := errors.Is(err, unix.EEXIST), errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOENT)
	switch {
	case cmd == cmdNewService && exists:
		return cmdSetService, false
	case cmd == cmdSetService && noServer:
		return cmdNewService, false
	case cmd == cmdNewDest && exists:
		return cmdSetDest, false
	case cmd == cmdSetDest && noDest:
		return cmdNewDest, false
	case cmd == cmdDelService, cmd == cmdDelDest:
		return 0, noServer || noDest
	}
	return 0, false
}

// applyRounds: the first tries to add, the second to set what exists. More are
// for somebody who works against us.
const applyRounds = 4

func (k *nlKernel) applyServers(ctx context.Context, ops []op) (map[int]error, error) {
	id, err := k.ipvsFamily(ctx)
	if err != nil {
		return nil, err
	}
	list := make([]attempt, len(ops))
	for i := range ops {
		list[i] = attempt{i, firstCommand(ops[i].kind)}
	}
	failed := map[int]error{}
	for range applyRounds {
		refused, err := k.genl.Execute(ctx, len(list), func(i int, e *nlbatch.Encoder) {
			encodeCommand(e, id, k.af(), list[i].cmd, &ops[list[i].op])
		})
		var again []attempt
		for i, a := range list {
			why := refused[i]
			if why == nil {
				delete(failed, a.op)
				continue
			}
			other, done := otherCommand(a.cmd, why)
			if done {
				continue
			}
			failed[a.op] = explain(&ops[a.op], why)
			if other != 0 {
				again = append(again, attempt{a.op, other})
			}
		}
		if err != nil || len(again) == 0 {
			return failed, err
		}
		list = k.notOverruled(ops, again, failed)
	}
	return failed, nil
}

// notOverruled drops what a later op of the run has undone already.
func (k *nlKernel) notOverruled(ops []op, list []attempt, failed map[int]error) []attempt {
	type object struct {
		key serverKey
		at  netip.AddrPort // zero: the virtual server
	}
	last := map[object]int{}
	for i := range ops {
		switch o := &ops[i]; o.kind {
		case delServer:
			last[object{key: o.key}] = i
		case delDest:
			last[object{o.key, o.dest.at}] = i
		}
	}
	var out []attempt
	for _, a := range list {
		o := &ops[a.op]
		overruled := last[object{key: o.key}] > a.op
		if o.kind == putDest {
			overruled = overruled || last[object{o.key, o.dest.at}] > a.op
		}
		if overruled {
			delete(failed, a.op)
		} else {
			out = append(out, a)
		}
	}
	return out
}

// explain says what error numbers mean here.
func explain(o *op, err error) error {
	switch {
	case o.kind == putServer && errors.Is(err, unix.ENOENT):
		return fmt.Errorf("the kernel has no scheduler %q (module ip_vs_%s): %w", o.settings.scheduler, o.settings.scheduler, err)
	case o.kind == putDest && errors.Is(err, unix.ESRCH):
		return fmt.Errorf("its virtual server does not exist: %w", err)
	}
	return err
}

// readServers takes the servers from a dump, and destinations from
// /proc/net/ip_vs: by netlink they would be a dump for each server. That is done
// only for servers that are missing in the file (Linux 6.1 leaves some out while
// another network namespace has servers, too), and for those by mark, which look
// alike there in both families.
func (k *nlKernel) readServers(ctx context.Context) (map[serverKey]*liveServer, error) {
	servers := map[serverKey]*liveServer{}
	if has, err := k.hasIPVS(); err != nil || !has {
		return servers, err
	}
	id, err := k.ipvsFamily(ctx)
	if errors.Is(err, unix.ENOENT) {
		return servers, nil // a kernel without IPVS has none; cleaning up must work there
	}
	if err != nil {
		return nil, err
	}
	err = k.genl.Dump(ctx, func(e *nlbatch.Encoder) {
		beginIPVS(e, id, cmdGetService)
	}, func(payload []byte) error {
		if key, s, ok := parseServer(payload, k.af()); ok {
			servers[key] = s
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list virtual servers: %w", err)
	}
	if len(servers) == 0 {
		return servers, nil
	}
	data, err := os.ReadFile(ipvsTable)
	if err != nil {
		return nil, fmt.Errorf("list destinations: %w", err)
	}
	seen, err := parseDestinations(data, servers)
	if err != nil {
		return nil, fmt.Errorf("list destinations: %w", err)
	}
	for key := range servers {
		if seen[key] {
			continue
		}
		s, err := lookupServer(ctx, k.genl, id, k.af(), key)
		if err != nil {
			return nil, fmt.Errorf("look up virtual server %s: %w", key, err)
		}
		if s == nil {
			delete(servers, key) // gone since
		} else {
			servers[key] = s
		}
	}
	return servers, nil
}

// parseServer reads a virtual server; ok is false if it is not of the family.
func parseServer(payload []byte, af uint8) (key serverKey, s *liveServer, ok bool) {
	s = &liveServer{destinations: map[netip.AddrPort]liveDest{}}
	var addr []byte
	for a, v := range nlbatch.Attributes(payload[min(unix.GENL_HDRLEN, len(payload)):]) {
		if a != attrService {
			continue
		}
		for a, v := range nlbatch.Attributes(v) {
			switch {
			case a == svcSched:
				s.scheduler = nlbatch.Text(v)
			case a == svcAddr:
				addr = v
			case len(v) < 2:
			case a == svcAF:
				ok = binary.NativeEndian.Uint16(v) == uint16(af)
			case a == svcProtocol:
				key.protocol = model.Protocol(binary.NativeEndian.Uint16(v))
			case a == svcPort:
				key.port = binary.BigEndian.Uint16(v)
			case len(v) < 4:
			case a == svcMark:
				key.mark = binary.NativeEndian.Uint32(v)
			case a == svcFlags:
				s.flags = binary.NativeEndian.Uint32(v) &^ flagHashed
			case a == svcTimeout:
				s.timeout = binary.NativeEndian.Uint32(v)
			}
		}
	}
	if s.flags&flagPersistent == 0 {
		s.timeout = 0
	}
	if key.mark != 0 {
		return serverKey{mark: key.mark}, s, ok
	}
	key.addr = parseAddr(addr, af)
	return key, s, ok && key.addr.IsValid()
}

// parseAddr reads a union nf_inet_addr: 16 bytes, of which IPv4 uses four.
func parseAddr(v []byte, af uint8) netip.Addr {
	n := 4
	if af == unix.AF_INET6 {
		n = 16
	}
	if len(v) < n {
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(v[:n])
	return a
}

// parseDestinations reads /proc/net/ip_vs:
//
//	TCP  0A600001:0050 rr persistent 300 FFFFFFFF
//	  -> 0AF40107:1F90      Masq    1      0          2
//	FWM  00002801 mh
//
// It returns the virtual servers by address that it found there.
func parseDestinations(data []byte, servers map[serverKey]*liveServer) (map[serverKey]bool, error) {
	seen := make(map[serverKey]bool, len(servers))
	var at *liveServer
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		f := bytes.Fields(lines.Bytes())
		if len(f) < 2 || string(f[0]) == "IP" && string(f[1]) == "Virtual" || string(f[0]) == "Prot" || string(f[1]) == "RemoteAddress:Port" {
			continue
		}
		if string(f[0]) != "->" {
			key, ok := parseKeyText(string(f[0]), f[1])
			if !ok {
				return nil, fmt.Errorf("read virtual server %q", lines.Text())
			}
			at = nil
			if key.mark == 0 {
				seen[key], at = true, servers[key]
			}
			continue
		}
		if at == nil {
			continue // of the other family, by mark, or newer than the list
		}
		if len(f) < 6 {
			return nil, fmt.Errorf("read destination %q", lines.Text())
		}
		to, ok := parseAddrPortText(f[1])
		weight, err1 := strconv.ParseInt(string(f[3]), 10, 64)
		active, err2 := strconv.ParseInt(string(f[4]), 10, 64)
		inactive, err3 := strconv.ParseInt(string(f[5]), 10, 64)
		if !ok || errors.Join(err1, err2, err3) != nil {
			return nil, fmt.Errorf("read destination %q", lines.Text())
		}
		at.destinations[to] = liveDest{uint32(weight), uint32(max(active, 0)), uint32(max(inactive, 0)), string(f[2]) != "Masq"}
	}
	return seen, lines.Err()
}

var protocolNames = map[string]model.Protocol{"TCP": model.TCP, "UDP": model.UDP, "SCTP": model.SCTP, "IP": 0}

func parseKeyText(protocol string, text []byte) (serverKey, bool) {
	if protocol == "FWM" {
		mark, err := strconv.ParseUint(string(text), 16, 32)
		return serverKey{mark: uint32(mark)}, err == nil
	}
	p, known := protocolNames[protocol]
	to, ok := parseAddrPortText(text)
	return serverKey{addr: to.Addr(), port: to.Port(), protocol: p}, ok && known
}

// parseAddrPortText reads 0A600001:0050 and [2001:0db8:...]:0050, all in hexadecimal.
func parseAddrPortText(text []byte) (netip.AddrPort, bool) {
	colon := bytes.LastIndexByte(text, ':')
	if colon < 1 {
		return netip.AddrPort{}, false
	}
	port, err := strconv.ParseUint(string(text[colon+1:]), 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	host := text[:colon]
	if host[0] == '[' {
		a, err := netip.ParseAddr(string(bytes.Trim(host, "[]")))
		return netip.AddrPortFrom(a, uint16(port)), err == nil
	}
	n, err := strconv.ParseUint(string(host), 16, 32)
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(n))
	return netip.AddrPortFrom(netip.AddrFrom4(b), uint16(port)), err == nil
}

func (k *nlKernel) lookup(ctx context.Context, keys []serverKey) (map[serverKey]*liveServer, error) {
	id, err := k.ipvsFamily(ctx)
	if err != nil {
		return nil, err
	}
	out := map[serverKey]*liveServer{}
	for _, key := range keys {
		s, err := lookupServer(ctx, k.genl, id, k.af(), key)
		if err != nil {
			return nil, fmt.Errorf("look up virtual server %s: %w", key, err)
		}
		if s != nil {
			out[key] = s
		}
	}
	return out, nil
}

// lookupServer reads one virtual server; nil: it does not exist.
func lookupServer(ctx context.Context, c *nlbatch.Conn, id uint16, af uint8, key serverKey) (*liveServer, error) {
	var s *liveServer
	err := c.Query(ctx, func(e *nlbatch.Encoder) {
		beginIPVS(e, id, cmdGetService)
		e.Nest(attrService, func() { encodeKey(e, af, key) })
	}, func(payload []byte) error {
		if _, found, ok := parseServer(payload, af); ok {
			s = found
		}
		return nil
	})
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, nil
	case err != nil || s == nil:
		return nil, err
	}
	return s, c.Dump(ctx, func(e *nlbatch.Encoder) {
		beginIPVS(e, id, cmdGetDest)
		e.Nest(attrService, func() { encodeKey(e, af, key) })
	}, func(payload []byte) error {
		at, d := parseDest(payload, af)
		if at.IsValid() {
			s.destinations[at] = d
		}
		return nil
	})
}

func parseDest(payload []byte, serverAF uint8) (netip.AddrPort, liveDest) {
	var d liveDest
	var addr []byte
	var port uint16
	af := serverAF // of kernels that do not say
	for a, v := range nlbatch.Attributes(payload[min(unix.GENL_HDRLEN, len(payload)):]) {
		if a != attrDest {
			continue
		}
		for a, v := range nlbatch.Attributes(v) {
			switch {
			case a == destAddr:
				addr = v
			case len(v) < 2:
			case a == destPort:
				port = binary.BigEndian.Uint16(v)
			case a == destAF:
				af = uint8(binary.NativeEndian.Uint16(v))
			case len(v) < 4:
			case a == destForward:
				d.foreign = binary.NativeEndian.Uint32(v)&forwardMask != 0
			case a == destWeight:
				d.weight = binary.NativeEndian.Uint32(v)
			case a == destActive:
				d.active = binary.NativeEndian.Uint32(v)
			case a == destInactive:
				d.inactive = binary.NativeEndian.Uint32(v)
			}
		}
	}
	return netip.AddrPortFrom(parseAddr(addr, af), port), d
}

// SetTimeouts sets how long the kernel keeps idle IPVS connections; 0 leaves a
// time as it is. They are the kernel's in this network namespace, for all virtual
// servers of either family.
func SetTimeouts(tcp, tcpFin, udp time.Duration) error {
	if tcp == 0 && tcpFin == 0 && udp == 0 {
		return nil
	}
	h, err := libipvs.New("")
	if err != nil {
		return fmt.Errorf("set IPVS timeouts: %w", err)
	}
	defer h.Close()
	if err := h.SetConfig(&libipvs.Config{TimeoutTCP: tcp, TimeoutTCPFin: tcpFin, TimeoutUDP: udp}); err != nil {
		return fmt.Errorf("set IPVS timeouts: %w", err)
	}
	return nil
}
