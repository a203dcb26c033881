package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// vipDevice is the interface on which ipvs mode, ours and kube-proxy's, keeps
// the addresses of Services. They are local, but not the node's.
const vipDevice = "kube-ipvs0"

const (
	// listAttempts is how often a listing is made that addresses change under.
	listAttempts = 5
	// settleFor is how long Watch waits for more after a change: an interface
	// comes with several messages.
	settleFor = 100 * time.Millisecond
	// retryFirst and retryMost bound the pause before subscribing again.
	retryFirst = 100 * time.Millisecond
	retryMost  = 10 * time.Second
)

// Addresses lists the node's own addresses of a family, sorted, each once,
// loopback and link-local ones included, those of kube-ipvs0 not. Interfaces
// that are down count: their addresses are local all the same. It reads the
// network namespace of the calling thread.
func Addresses(family model.Family) ([]netip.Addr, error) {
	var err error
	for range listAttempts {
		var out []netip.Addr
		if out, err = addresses(family); err == nil {
			return out, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return nil, fmt.Errorf("list %s addresses: %w", family, err)
}

func addresses(family model.Family) ([]netip.Addr, error) {
	exclude, err := vipIndex()
	if err != nil {
		return nil, err
	}
	af := netlink.FAMILY_V4
	if family == model.IPv6 {
		af = netlink.FAMILY_V6
	}
	list, err := netlink.AddrList(nil, af)
	if err != nil {
		return nil, err
	}
	out := make([]netip.Addr, 0, len(list))
	for _, a := range list {
		if a.LinkIndex == exclude || a.IPNet == nil {
			continue
		}
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			out = append(out, addr.Unmap())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

// vipIndex returns the index of kube-ipvs0, which no other link has, or noLink.
func vipIndex() (int, error) {
	link, err := netlink.LinkByName(vipDevice)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return noLink, nil
	}
	if err != nil {
		return noLink, fmt.Errorf("look up %s: %w", vipDevice, err)
	}
	return link.Attrs().Index, nil
}

// noLink is the index of no link: the kernel's begin at 1.
const noLink = 0

// Watch calls changed soon after addresses or links of the node's change, once
// for changes that come together, and once at the beginning and whenever
// messages may have been lost. Addresses of kube-ipvs0, thousands of which come
// with a large cluster, are not worth a call. It subscribes in the network
// namespace of the calling thread and returns nil when ctx ends.
func Watch(ctx context.Context, changed func()) error {
	pause := retryFirst
	for {
		heard, err := watchOnce(ctx, changed)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EPERM) {
			return fmt.Errorf("watch addresses: %w", err) // it will not get better
		}
		if heard {
			pause = retryFirst
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, retryMost)
	}
}

// watchOnce subscribes and reads until something fails. heard says that the
// subscription worked for a while.
func watchOnce(ctx context.Context, changed func()) (heard bool, err error) {
	f, err := subscribe()
	if err != nil {
		return false, err
	}
	defer f.Close()
	// A read that waits ends when ctx does.
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	msgs := messages{buf: make([]byte, 1<<16)}
	if msgs.vips, err = vipIndex(); err != nil {
		return false, err
	}
	changed() // what came before the subscription is not told by it
	for {
		matters, err := msgs.read(ctx, f, time.Time{})
		if err != nil {
			return heard, err
		}
		heard = true
		if !matters {
			continue
		}
		// Collect what follows closely.
		until := time.Now().Add(settleFor)
		for {
			_, err := msgs.read(ctx, f, until)
			if ctx.Err() != nil {
				return heard, nil
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return heard, err
			}
		}
		changed()
	}
}

// messages reads what a subscription tells.
type messages struct {
	buf  []byte
	vips int // index of kube-ipvs0, or noLink
}

// read waits for messages and says whether one of them matters. That some were
// lost is a message, too: the socket stays subscribed.
func (m *messages) read(ctx context.Context, f *os.File, until time.Time) (matters bool, err error) {
	if err := f.SetReadDeadline(until); err != nil {
		return false, err
	}
	// The end of ctx sets a deadline of its own, which the line above may just
	// have overwritten.
	if err := ctx.Err(); err != nil {
		return false, err
	}
	n, err := f.Read(m.buf)
	if errors.Is(err, unix.ENOBUFS) {
		m.vips, err = vipIndex()
		return true, err
	}
	if err != nil {
		return false, err
	}
	return m.matter(m.buf[:n]), nil
}

// matter says whether any of the messages is about more than an address of
// kube-ipvs0, and follows the coming and going of that link. What it cannot read
// matters.
func (m *messages) matter(data []byte) bool {
	list, err := syscall.ParseNetlinkMessage(data)
	if err != nil {
		return true
	}
	matters := false
	for _, msg := range list {
		index := noLink
		if len(msg.Data) >= 8 { // both kinds of header have it at the same place
			index = int(binary.NativeEndian.Uint32(msg.Data[4:8]))
		}
		switch msg.Header.Type {
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			matters = true
			switch {
			case linkName(&msg) != vipDevice:
				if index == m.vips {
					m.vips = noLink // renamed
				}
			case msg.Header.Type == unix.RTM_NEWLINK:
				m.vips = index
			default:
				m.vips = noLink
			}
		case unix.RTM_NEWADDR, unix.RTM_DELADDR:
			matters = matters || index == noLink || index != m.vips
		default:
			matters = true
		}
	}
	return matters
}

// linkName returns the name that a message about a link has, or "".
func linkName(msg *syscall.NetlinkMessage) string {
	attrs, err := syscall.ParseNetlinkRouteAttr(msg)
	if err != nil {
		return ""
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.IFLA_IFNAME {
			return unix.ByteSliceToString(a.Value)
		}
	}
	return ""
}

// subscribe opens a netlink socket that hears of links and addresses.
func subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open route netlink socket: %w", err)
	}
	groups := uint32(unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("subscribe to addresses: %w", err)
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}
