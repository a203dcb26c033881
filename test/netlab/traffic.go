package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Serve answers on an address of the namespace, over "tcp", "udp" or "sctp", with
// name and the source address that it sees, until the lab is closed or stop
// called. Over TCP and SCTP it answers at once and closes; over UDP it answers
// each datagram. SCTP needs a kernel that has it: see [SCTP].
func (n *Namespace) Serve(name, network string, at netip.AddrPort) (stop func(), err error) {
	switch network {
	case "tcp", "sctp":
		listen := func() (net.Listener, error) { return n.Listen(network, at.String()) }
		if network == "sctp" {
			listen = func() (net.Listener, error) { return n.listenSCTP(at) }
		}
		l, err := listen()
		if err != nil {
			return nil, fmt.Errorf("serve %s at %s: %w", name, at, err)
		}
		go serveStreams(l, name)
		return func() { l.Close() }, nil
	case "udp":
		c, err := n.ListenPacket(network, at.String())
		if err != nil {
			return nil, fmt.Errorf("serve %s at %s: %w", name, at, err)
		}
		go serveUDP(c, name)
		return func() { c.Close() }, nil
	}
	return nil, fmt.Errorf("serve %s at %s: no sockets for %s", name, at, network)
}

func serveStreams(l net.Listener, name string) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			_, _ = io.WriteString(conn, answerText(name, conn.RemoteAddr()))
		}()
	}
}

func serveUDP(c net.PacketConn, name string) {
	buf := make([]byte, 2048)
	for {
		_, from, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error for an answer to a client that has gone
		}
		_, _ = c.WriteTo([]byte(answerText(name, from)), from)
	}
}

func answerText(name string, from net.Addr) string { return name + " " + from.String() + "\n" }

// Result is how an attempt to reach a server ended.
type Result uint8

// Results.
const (
	Answered    Result = iota
	Refused            // reset, or ICMP port unreachable
	Unreachable        // ICMP network or host unreachable, or no route: nobody serves the address
	TimedOut           // silence
)

func (r Result) String() string {
	return [...]string{"answered", "refused", "unreachable", "timed out"}[r]
}

// Answer tells what a client learnt by one attempt.
type Answer struct {
	Result Result
	Server string         // name of the server
	Seen   netip.AddrPort // the client as the server saw it
	Local  netip.AddrPort // the client as it knows itself
	Err    error          // unless answered: the error as the client got it
	Took   time.Duration
}

// SourceKept says whether the server saw the client's own address.
func (a Answer) SourceKept() bool { return a.Seen.Addr() == a.Local.Addr() }

// String returns a line for people.
func (a Answer) String() string {
	if a.Result != Answered {
		return fmt.Sprintf("%s (%v)", a.Result, a.Err)
	}
	return fmt.Sprintf("%s answered %s, seen as %s", a.Server, a.Local, a.Seen)
}

// Ask dials a server started by Serve, over "tcp", "udp" or "sctp", from inside
// the namespace, each time from a new port, and waits for its answer at most for
// patience. A source that is not valid leaves the choice to the kernel. An
// error is returned only if the question could not be asked; refusals and
// silence are Answers.
func (n *Namespace) Ask(ctx context.Context, network string, source netip.Addr, to netip.AddrPort, patience time.Duration) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := time.Now()
	conn, err := n.dialFrom(ctx, network, source, to)
	if err == nil {
		defer conn.Close()
		var a Answer
		if a, err = ask(ctx, conn, network == "udp"); err == nil {
			a.Took = time.Since(start)
			return a, nil
		}
	}
	result, ok := classify(err)
	if !ok {
		return Answer{}, fmt.Errorf("ask %s from %s: %w", to, n.Name, err)
	}
	return Answer{Result: result, Err: err, Took: time.Since(start)}, nil
}

// dialFrom makes a connection from an address, or any if it is not valid.
func (n *Namespace) dialFrom(ctx context.Context, network string, source netip.Addr, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Control: reportErrorsUDP}
	switch local := netip.AddrPortFrom(source, 0); {
	case network == "sctp":
		return n.dialSCTP(ctx, source, to)
	case network != "tcp" && network != "udp":
		return nil, fmt.Errorf("no sockets for %s", network)
	case source.IsValid() && network == "tcp":
		d.LocalAddr = net.TCPAddrFromAddrPort(local)
	case source.IsValid():
		d.LocalAddr = net.UDPAddrFromAddrPort(local)
	}
	return n.dial(ctx, &d, network, to.String())
}

func reportErrorsUDP(network, _ string, c syscall.RawConn) (err error) {
	if !strings.HasPrefix(network, "udp") {
		return nil
	}
	cerr := c.Control(func(fd uintptr) { err = reportErrors(int(fd), network == "udp4") })
	return errors.Join(cerr, err)
}

// reportErrors makes a socket of UDP or SCTP report every ICMP error: without it
// "host unreachable" would look like silence (ip(7), IP_RECVERR), and to SCTP
// "port unreachable" too.
func reportErrors(fd int, is4 bool) error {
	if is4 {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_RECVERR, 1)
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
}

func ask(ctx context.Context, conn net.Conn, datagram bool) (Answer, error) {
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	var text []byte
	var err error
	if datagram {
		text, err = exchange(conn)
	} else {
		text, err = io.ReadAll(conn)
	}
	if err != nil {
		return Answer{}, err
	}
	name, seen, ok := strings.Cut(strings.TrimSpace(string(text)), " ")
	from, err := netip.ParseAddrPort(seen)
	if !ok || err != nil {
		return Answer{}, fmt.Errorf("answer %q is not a lab server's", text)
	}
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return Answer{}, err
	}
	return Answer{Server: name, Seen: unmap(from), Local: unmap(local)}, nil
}

// exchange sends one datagram and waits for another. A filter on the own host
// makes send fail with EPERM; whether it was a REJECT shows in the ICMP error
// that is waiting by then, or never comes.
func exchange(conn net.Conn) ([]byte, error) {
	if _, err := conn.Write([]byte("?")); err != nil && !errors.Is(err, unix.EPERM) {
		return nil, err
	}
	buf := make([]byte, 2048)
	k, err := conn.Read(buf)
	return buf[:k], err
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

func classify(err error) (Result, bool) {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		return Refused, true
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return Unreachable, true
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return TimedOut, true
	}
	return 0, false
}
