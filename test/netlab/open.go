package netlab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// ServeOpen answers on a TCP address of the namespace like Serve, but leaves the
// connection open and sends back every line that it gets, until the client
// closes, or the lab is closed or stop called. For connections of Open.
func (n *Namespace) ServeOpen(name string, at netip.AddrPort) (stop func(), err error) {
	l, err := n.Listen("tcp", at.String())
	if err != nil {
		return nil, fmt.Errorf("serve %s at %s: %w", name, at, err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if _, err := io.WriteString(conn, answerText(name, conn.RemoteAddr())); err == nil {
					_, _ = io.Copy(conn, conn)
				}
			}()
		}
	}()
	return func() { l.Close() }, nil
}

// Conn is an open connection to a server started by ServeOpen.
type Conn struct {
	Server string // its name
	conn   net.Conn
	lines  *bufio.Reader
	sent   int
}

// Open connects from inside the namespace to a server started by ServeOpen and
// waits for its answer at most for patience. A source that is not valid leaves
// the choice to the kernel.
func (n *Namespace) Open(ctx context.Context, source netip.Addr, to netip.AddrPort, patience time.Duration) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var d net.Dialer
	if source.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	conn, err := n.dial(ctx, &d, "tcp", to.String())
	if err != nil {
		return nil, fmt.Errorf("open a connection to %s from %s: %w", to, n.Name, err)
	}
	c := &Conn{conn: conn, lines: bufio.NewReader(conn)}
	line, err := c.read(patience)
	if err == nil {
		_, err = fmt.Sscan(line, &c.Server)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the answer of %s: %w", to, err), conn.Close())
	}
	return c, nil
}

func (c *Conn) read(patience time.Duration) (string, error) {
	if err := c.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	return c.lines.ReadString('\n')
}

// Echo sends a line and waits at most for patience until it comes back: an error
// says that the connection does not carry anything any more.
func (c *Conn) Echo(patience time.Duration) error {
	c.sent++
	want := fmt.Sprintf("line %d\n", c.sent)
	if _, err := io.WriteString(c.conn, want); err != nil {
		return err
	}
	got, err := c.read(patience)
	if err == nil && got != want {
		err = fmt.Errorf("%q came back for %q", got, want)
	}
	return err
}

// Close ends the connection.
func (c *Conn) Close() error { return c.conn.Close() }

// Reset ends the connection at once, for everybody on its way.
func (c *Conn) Reset() error {
	if tcp, ok := c.conn.(*net.TCPConn); ok {
		if err := tcp.SetLinger(0); err != nil {
			return err
		}
	}
	return c.conn.Close()
}
