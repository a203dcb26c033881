package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// SCTP returns nil if the kernel has SCTP sockets, and else why not, for a
// test's Skip. The kernel's module is loaded if it can be.
func SCTP() error {
	fd, err := sctpSocket(true)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// sctpSocket makes a socket of the one-to-one style (RFC 6458, 4), which is used
// like TCP's. One of IPv6 does not announce the IPv4 addresses of its host.
func sctpSocket(is4 bool) (int, error) {
	domain := unix.AF_INET6
	if is4 {
		domain = unix.AF_INET
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return -1, fmt.Errorf("no SCTP sockets: %w", err)
	}
	if !is4 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return -1, errors.Join(fmt.Errorf("restrict a socket to IPv6: %w", err), unix.Close(fd))
		}
	}
	return fd, nil
}

// listenSCTP is Listen for SCTP.
func (n *Namespace) listenSCTP(at netip.AddrPort) (l net.Listener, err error) {
	err = n.Do(func() error {
		l, err = adopt(at, func(fd int) error {
			if err := unix.Bind(fd, sockaddr(at)); err != nil {
				return fmt.Errorf("bind: %w", err)
			}
			if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
				return fmt.Errorf("listen: %w", err)
			}
			return nil
		}, net.FileListener)
		return err
	})
	if err == nil {
		n.onClose(func() { l.Close() })
	}
	return l, err
}

// dialSCTP begins a connection, and does not wait for it: the first read does,
// and fails as connect(2) would. So nothing is lost of a server that answers and
// is gone before the client looks.
//
// The connection has one address at each end. Others would be announced in its
// first packets, past all that translates addresses: Services carry no
// associations with several addresses.
func (n *Namespace) dialSCTP(ctx context.Context, source netip.Addr, to netip.AddrPort) (conn net.Conn, err error) {
	if !source.IsValid() {
		if source, err = n.sourceFor(ctx, to); err != nil {
			return nil, err
		}
	}
	err = n.Do(func() error {
		conn, err = adopt(to, func(fd int) error {
			if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(source, 0))); err != nil {
				return fmt.Errorf("bind to %s: %w", source, err)
			}
			if err := reportErrors(fd, to.Addr().Is4()); err != nil {
				return fmt.Errorf("ask for ICMP errors: %w", err)
			}
			if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
				return fmt.Errorf("connect: %w", err)
			}
			return nil
		}, net.FileConn)
		return err
	})
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("BUG: net made a %T", conn), conn.Close())
	}
	return &sctpConn{tcp}, nil
}

// sctpConn is a connection that may still be in the making.
type sctpConn struct{ *net.TCPConn }

// Read is that of TCPConn, but tells the error that ended the connection. A
// socket of SCTP that is not connected reports an error alone, without "readable",
// which Go's runtime takes for a file that cannot be polled.
func (c *sctpConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	if raw, rerr := c.SyscallConn(); rerr == nil {
		_ = raw.Control(func(fd uintptr) {
			if e, serr := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); serr == nil && e != 0 {
				err = fmt.Errorf("read sctp %s: %w", c.LocalAddr(), unix.Errno(e))
			}
		})
	}
	return n, err
}

// sourceFor returns the address that the kernel prefers towards another.
func (n *Namespace) sourceFor(ctx context.Context, to netip.AddrPort) (netip.Addr, error) {
	conn, err := n.DialContext(ctx, "udp", to.String()) // sends nothing
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	return local.Addr().Unmap(), err
}

// adopt makes a socket of the address's family, prepares it, and hands it to
// package net, which takes a socket by its family and type, and so handles this
// one like TCP's: it reads, writes, accepts and closes, and keeps deadlines.
func adopt[T any](like netip.AddrPort, prepare func(fd int) error, take func(*os.File) (T, error)) (T, error) {
	var none T
	fd, err := sctpSocket(like.Addr().Is4())
	if err != nil {
		return none, err
	}
	f := os.NewFile(uintptr(fd), "sctp")
	defer f.Close() // net has a duplicate
	if err := prepare(fd); err != nil {
		return none, err
	}
	return take(f)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
