package nlbatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// ErrLost says that the kernel had more to tell than the socket could hold: what
// happened is not known.
var ErrLost = errors.New("notifications were lost")

// Listener hears of changes that others make.
type Listener struct {
	file   *os.File
	recv   []byte
	closed atomic.Bool
}

// Listen joins a group of notifications of NETLINK_NETFILTER, in the network
// namespace of the calling thread, but for those about what the socket with a
// netlink address (see Port) has changed: the kernel does not even queue them.
func Listen(group int, except uint32) (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := listen(fd, group, except); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("listen to netlink: %w", err)
	}
	return &Listener{file: os.NewFile(uintptr(fd), "netlink"), recv: make([]byte, 64<<10)}, nil
}

func listen(fd, group int, except uint32) error {
	if err := filter(fd, except); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, wantBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, wantBuffer)
	}
	return unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
}

// filter keeps messages away whose header names a socket. A packet of notifications
// is about one transaction, so that the first message speaks for all.
func filter(fd int, except uint32) error {
	const pidOffset = 12 // nlmsghdr.nlmsg_pid
	// The filter loads numbers in network byte order, the header is in the machine's.
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], except)
	program, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: pidOffset, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: binary.BigEndian.Uint32(b[:]), SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 20},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return err
	}
	raw := make([]unix.SockFilter, len(program))
	for i, p := range program {
		raw[i] = unix.SockFilter{Code: p.Op, Jt: p.Jt, Jf: p.Jf, K: p.K}
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(raw)), Filter: &raw[0]})
}

// Receive waits for notifications and gives each to got: its type and what follows
// its header, which got must not keep. After ErrLost one goes on receiving. It
// returns os.ErrClosed when the Listener is closed.
func (l *Listener) Receive(got func(typ uint16, payload []byte)) error {
	raw, err := l.file.SyscallConn()
	if err != nil {
		return err
	}
	n := 0
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		n, _, failed = unix.Recvfrom(int(fd), l.recv, 0)
		return failed != unix.EAGAIN && failed != unix.EINTR
	})
	switch {
	case l.closed.Load():
		return os.ErrClosed
	case err != nil:
		return err
	case failed == unix.ENOBUFS:
		return ErrLost
	case failed != nil:
		return fmt.Errorf("receive by netlink: %w", failed)
	}
	for h, body := range messages(l.recv[:n]) {
		got(h.typ, body)
	}
	return nil
}

// Close ends a Receive that waits.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.file.Close()
}
