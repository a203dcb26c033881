// Package nlbatch sends many netlink requests in few system calls. A request
// costs a system call or three with the usual libraries; the kernel's share of it
// is small. Here hundreds go into one sendmsg, only the last of them asks for an
// acknowledgement, and the kernel speaks up for those that fail.
//
// It knows messages, attributes, acknowledgements and dumps; it does not know
// what any of them mean.
package nlbatch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// chunkBytes bounds one send. The kernel refuses what does not fit the
	// socket's send buffer, 208 KiB where nobody changed it.
	chunkBytes = 64 << 10
	// chunkMost bounds the messages of one send where the receive buffer is large.
	chunkMost = 1024
	// answerBytes is what one queued error takes of the receive buffer: a small
	// packet with its bookkeeping (skb truesize).
	answerBytes = 1024
	wantBuffer  = 2 << 20
	// answerWait is for a kernel that does not answer within the send. None is known.
	answerWait = 5000 // ms
)

// ErrInterrupted says that what a dump lists was changed meanwhile: the list may
// have gaps.
var ErrInterrupted = errors.New("changed while it was listed")

// Conn is a netlink socket in the network namespace of the thread that opened it.
// Its methods can be called at any time from any goroutine.
type Conn struct {
	mu     sync.Mutex
	fd     int
	seq    uint32
	most   int // messages of one send whose errors all fit the receive buffer
	encode Encoder
	recv   []byte
	calls  int
}

// Open opens a socket of a protocol: unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER,
// unix.NETLINK_GENERIC.
func Open(protocol int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("bind netlink socket: %w", err)
	}
	// Without these everything works, with more bytes and smaller chunks.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, wantBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, wantBuffer)
	}
	size, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		size = 64 << 10
	}
	return &Conn{fd: fd, most: max(1, min(chunkMost, size/answerBytes)), recv: make([]byte, 64<<10)}, nil
}

// Close closes the socket.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	fd := c.fd
	c.fd = -1
	return unix.Close(fd)
}

// Calls is how many system calls the connection has made to send and receive.
func (c *Conn) Calls() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls
}

// Execute sends n requests in order; write encodes the i-th, which must be one
// message. The kernel goes on after a request that it refuses. The map has those,
// by index; it is nil if there is none. The error is for the rest: what was not
// sent, or not answered.
func (c *Conn) Execute(ctx context.Context, n int, write func(i int, e *Encoder)) (map[int]error, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var refused map[int]error
	for done := 0; done < n; {
		if err := ctx.Err(); err != nil {
			return refused, err
		}
		first := c.seq + 1
		count := c.fill(done, n, write)
		err := c.send(func(seq uint32, errno error) {
			if refused == nil {
				refused = map[int]error{}
			}
			refused[done+int(seq-first)] = errno
		}, first, count)
		if err != nil {
			return refused, err
		}
		done += count
	}
	return refused, nil
}

// fill encodes one chunk and returns how many messages it has.
func (c *Conn) fill(from, n int, write func(i int, e *Encoder)) int {
	e := &c.encode
	e.buf = e.buf[:0]
	count := 0
	for from+count < n && count < c.most && len(e.buf) < chunkBytes {
		c.seq++
		start := e.open()
		write(from+count, e)
		e.close(start, c.seq)
		count++
		if from+count == n || count == c.most || len(e.buf) >= chunkBytes {
			flags := e.buf[start+6:]
			binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
		}
	}
	return count
}

// send sends a chunk and collects what the kernel says until the last message is
// answered.
func (c *Conn) send(refuse func(seq uint32, err error), first uint32, count int) error {
	if err := c.write(); err != nil {
		return err
	}
	last := first + uint32(count) - 1
	var earlier error
	for {
		data, err := c.read(earlier == nil)
		if err != nil {
			// Without the right to do any of it, the kernel answers the first and drops
			// the rest.
			if errors.Is(err, unix.EAGAIN) && earlier != nil {
				return earlier
			}
			return err
		}
		for h, body := range messages(data) {
			if h.typ != unix.NLMSG_ERROR || h.seq-first >= uint32(count) {
				continue
			}
			if err := answer(h, body); err != nil {
				refuse(h.seq, err)
				earlier = err
			}
			if h.seq == last {
				return nil
			}
		}
	}
}

// Query sends one request that is answered by messages and an acknowledgement,
// and gives each message's payload to got, which must not keep it.
func (c *Conn) Query(ctx context.Context, write func(e *Encoder), got func(payload []byte) error) error {
	return c.ask(ctx, unix.NLM_F_ACK, false, write, got)
}

// Dump is Query for lists. After ErrInterrupted the caller may start again.
func (c *Conn) Dump(ctx context.Context, write func(e *Encoder), got func(payload []byte) error) error {
	return c.ask(ctx, unix.NLM_F_DUMP, false, write, got)
}

// DumpThrough is Dump for lists of which others change something all the time, but
// not what matters to the caller: it goes on to the end. What it lists may then have
// gaps, and some of it twice.
func (c *Conn) DumpThrough(ctx context.Context, write func(e *Encoder), got func(payload []byte) error) error {
	return c.ask(ctx, unix.NLM_F_DUMP, true, write, got)
}

func (c *Conn) ask(ctx context.Context, flags uint16, through bool, write func(e *Encoder), got func(payload []byte) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	e := &c.encode
	e.buf = e.buf[:0]
	c.seq++
	start := e.open()
	write(e)
	e.close(start, c.seq)
	binary.NativeEndian.PutUint16(e.buf[start+6:], binary.NativeEndian.Uint16(e.buf[start+6:])|flags)
	if err := c.write(); err != nil {
		return err
	}
	var failed error // the rest of the dump is read nevertheless
	for {
		data, err := c.read(true)
		if err != nil {
			return errors.Join(failed, err)
		}
		for h, body := range messages(data) {
			if h.seq != c.seq {
				continue
			}
			if h.flags&unix.NLM_F_DUMP_INTR != 0 && failed == nil && !through {
				failed = ErrInterrupted
			}
			switch h.typ {
			case unix.NLMSG_DONE:
				if failed == nil {
					failed = answer(h, body)
				}
				return failed
			case unix.NLMSG_ERROR:
				if err := answer(h, body); err != nil {
					return err
				}
				return failed
			default:
				if failed == nil {
					failed = got(body)
				}
			}
		}
	}
}

func (c *Conn) write() error {
	to := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	for {
		c.calls++
		err := unix.Sendto(c.fd, c.encode.buf, 0, to)
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return fmt.Errorf("send %d bytes by netlink: %w", len(c.encode.buf), err)
		}
	}
}

// read receives one packet. The kernel handles requests within the send, so that
// what it has to say is there already.
func (c *Conn) read(wait bool) ([]byte, error) {
	for {
		c.calls++
		n, flags, err := c.recvfrom()
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && wait:
			wait = false
			if err := c.poll(); err != nil {
				return nil, err
			}
		case err != nil:
			return nil, fmt.Errorf("receive by netlink: %w", err)
		case flags&unix.MSG_TRUNC != 0:
			return nil, errors.New("receive by netlink: a message does not fit the buffer")
		default:
			return c.recv[:n], nil
		}
	}
}

func (c *Conn) recvfrom() (n, flags int, err error) {
	n, _, flags, _, err = unix.Recvmsg(c.fd, c.recv, nil, unix.MSG_DONTWAIT)
	return n, flags, err
}

func (c *Conn) poll() error {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}, answerWait)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("wait for netlink: %w", err)
		case n == 0:
			return errors.New("wait for netlink: the kernel does not answer")
		default:
			return nil
		}
	}
}

type header struct {
	typ, flags uint16
	seq        uint32
}

// messages iterates over the messages of a packet.
func messages(data []byte) func(func(header, []byte) bool) {
	return func(yield func(header, []byte) bool) {
		for len(data) >= unix.NLMSG_HDRLEN {
			size := int(binary.NativeEndian.Uint32(data))
			if size < unix.NLMSG_HDRLEN || size > len(data) {
				return
			}
			h := header{binary.NativeEndian.Uint16(data[4:]), binary.NativeEndian.Uint16(data[6:]), binary.NativeEndian.Uint32(data[8:])}
			if !yield(h, data[unix.NLMSG_HDRLEN:size]) {
				return
			}
			data = data[min(align(size), len(data)):]
		}
	}
}

// Refusal is an error number together with what the kernel said about it.
type Refusal struct {
	Errno unix.Errno
	Text  string
}

func (r *Refusal) Error() string { return r.Errno.Error() + " (" + r.Text + ")" }
func (r *Refusal) Unwrap() error { return r.Errno }

// answer is the error in an NLMSG_ERROR or NLMSG_DONE: a unix.Errno or a
// *Refusal. NETLINK_CAP_ACK leaves only the request's header before the attributes.
func answer(h header, body []byte) error {
	if len(body) < 4 {
		return nil
	}
	code := int32(binary.NativeEndian.Uint32(body))
	if code == 0 {
		return nil
	}
	errno := unix.Errno(-code)
	rest := body[4:]
	if h.typ == unix.NLMSG_ERROR {
		rest = rest[min(unix.NLMSG_HDRLEN, len(rest)):]
	}
	const ackTLVs, message = 0x200, 1 // NLM_F_ACK_TLVS, NLMSGERR_ATTR_MSG
	if h.flags&ackTLVs != 0 {
		for a, v := range Attributes(rest) {
			if a == message {
				return &Refusal{errno, Text(v)}
			}
		}
	}
	return errno
}
