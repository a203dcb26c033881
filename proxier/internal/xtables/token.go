package xtables

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Token is cheap and changes whenever somebody changes one of the tables. ok is
// false where the kernel cannot tell.
func (p Programs) Token(tables ...string) (token string, ok bool) {
	if p.Variant == NFT {
		return nftGeneration()
	}
	for _, table := range tables {
		info, err := legacyInfo(p.Family, table)
		if err != nil {
			return "", false
		}
		token += info
	}
	return token, true
}

// nftGeneration asks for the ruleset generation, which every commit of anybody
// in this network namespace increases.
func nftGeneration() (string, bool) {
	const getGen = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN
	req := nl.NewNetlinkRequest(getGen, 0)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil || len(msgs) == 0 || len(msgs[0]) < nl.SizeofNfgenmsg {
		return "", false
	}
	attrs, err := nl.ParseRouteAttr(msgs[0][nl.SizeofNfgenmsg:])
	if err != nil {
		return "", false
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.NFTA_GEN_ID && len(a.Value) == 4 {
			return fmt.Sprint(binary.BigEndian.Uint32(a.Value)), true
		}
	}
	return "", false
}

// legacyInfo is struct ipt_getinfo: number of entries, size and hook offsets of
// a table. Hardly any change leaves all of them as they were.
func legacyInfo(family model.Family, table string) (string, error) {
	const getInfo = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	domain, level := unix.AF_INET, unix.IPPROTO_IP
	if family == model.IPv6 {
		domain, level = unix.AF_INET6, unix.IPPROTO_IPV6
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return "", fmt.Errorf("open raw socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	var info [84]byte
	copy(info[:31], table)
	size := uint32(len(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), getInfo,
		uintptr(unsafe.Pointer(&info[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return "", fmt.Errorf("ask for table %s: %w", table, errno)
	}
	return string(info[:]), nil
}
