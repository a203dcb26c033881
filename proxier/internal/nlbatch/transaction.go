package nlbatch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Messages of nfnetlink that begin and end a transaction (linux/netfilter/nfnetlink.h).
const (
	batchBegin = unix.NFNL_MSG_BATCH_BEGIN
	batchEnd   = unix.NFNL_MSG_BATCH_END
)

// A buffer larger than keepBytes is given back when a transaction of few messages
// comes: after a start the next large one may never come.
const (
	keepBytes    = 256 << 10
	keepMessages = 16
)

// ErrTooLarge says that a transaction does not fit the socket's send buffer: the
// kernel takes one only as a whole, in one packet.
var ErrTooLarge = errors.New("larger than the socket's send buffer")

// Rolled says that a transaction had no effect. Refused are the messages that the
// kernel found wrong, by index; it goes through all of them before it gives up, and
// the socket has room for the first thousands. Where it names none, the transaction failed as a whole.
type Rolled struct {
	Refused map[int]error
	Err     error // the first of them, or what was wrong with the whole
}

func (r *Rolled) Error() string { return r.Err.Error() }

// Unwrap implements errors.
func (r *Rolled) Unwrap() error { return r.Err }

// Transaction sends n messages to a subsystem of nfnetlink (unix.NFNL_SUBSYS_NFTABLES)
// so that either all of them take effect at one moment or none does. The error is a
// *Rolled if it is the latter; with any other nothing is known of the outcome.
func (c *Conn) Transaction(ctx context.Context, subsystem uint16, n int, write func(i int, e *Encoder)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return &Rolled{Err: err}
	}
	e := &c.encode
	if e.buf = e.buf[:0]; cap(e.buf) > keepBytes && n < keepMessages {
		e.buf = nil // a large one was needed once
	}
	begin := c.bracket(batchBegin, subsystem)
	for i := range n {
		c.seq++
		start := e.open()
		write(i, e)
		e.close(start, c.seq)
		if i == n-1 {
			flags := e.buf[start+6:]
			binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
		}
	}
	last := c.seq
	c.bracket(batchEnd, subsystem)
	if err := c.write(); errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS) {
		return &Rolled{Err: fmt.Errorf("%d bytes: %w", len(e.buf), ErrTooLarge)}
	} else if err != nil {
		return err
	}
	return c.outcome(begin, last)
}

// bracket appends the message that begins or ends a transaction. Its sequence
// number is the one by which the kernel complains of the whole.
func (c *Conn) bracket(typ, subsystem uint16) (seq uint32) {
	c.seq++
	e := &c.encode
	start := e.open()
	e.Begin(typ, 0)
	e.Raw(unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(subsystem>>8), byte(subsystem))
	e.close(start, c.seq)
	return c.seq
}

// outcome reads what the kernel has to say of the transaction between two sequence
// numbers, which may begin again at 0 between them. All of it is there when the send
// returns. Where the socket had no room for all, some message was refused: of success
// there is one word only.
func (c *Conn) outcome(begin, last uint32) error {
	rolled := &Rolled{}
	answered := false
	for !answered {
		data, err := c.read(rolled.Err == nil)
		if errors.Is(err, unix.EAGAIN) && rolled.Err != nil {
			break
		}
		if errors.Is(err, unix.ENOBUFS) {
			rolled.Err = err
			continue
		}
		if err != nil {
			return err
		}
		for h, body := range messages(data) {
			n := h.seq - begin
			if h.typ != unix.NLMSG_ERROR || n > last+1-begin {
				continue
			}
			answered = answered || h.seq == last
			err := answer(h, body)
			if err == nil {
				continue
			}
			if rolled.Err == nil || errors.Is(rolled.Err, unix.ENOBUFS) {
				rolled.Err = err
			}
			if n > 0 && n <= last-begin {
				if rolled.Refused == nil {
					rolled.Refused = map[int]error{}
				}
				rolled.Refused[int(n)-1] = err
			}
		}
	}
	if rolled.Err != nil {
		c.drain()
		return rolled
	}
	return nil
}

// drain throws away what is left to read of a transaction.
func (c *Conn) drain() {
	for {
		if _, err := c.read(false); err != nil {
			return
		}
	}
}

// Room makes room for transactions of up to size bytes, and returns how large they
// may be: without the right to have as much as one asks for, less.
func (c *Conn) Room(size int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size) != nil {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, size)
	}
	have, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return 64 << 10
	}
	// The kernel doubles what is asked for, for its own bookkeeping, and a packet
	// must leave some of it.
	return min(size, have/2)
}

// Port is the socket's netlink address: what the kernel names in notifications of
// changes that were made through it.
func (c *Conn) Port() (uint32, error) {
	sa, err := unix.Getsockname(c.fd)
	if err != nil {
		return 0, fmt.Errorf("read the netlink socket's address: %w", err)
	}
	return sa.(*unix.SockaddrNetlink).Pid, nil
}

// Len is the number of bytes written so far, of all messages that go together.
func (e *Encoder) Len() int { return len(e.buf) }
