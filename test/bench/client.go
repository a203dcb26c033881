package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// client makes connections from inside a namespace. It uses blocking sockets and
// no poller, so that a timed connect is one system call.
type client struct{ ns *netlab.Namespace }

// patience is how long one attempt may take. A node without rules refuses at
// once, so only lost packets wait this long.
const patience = 500 * time.Millisecond

// connect opens a connection and tells how long the handshake took. The caller
// closes the socket. It must run in the namespace (Do).
func connect(to netip.AddrPort) (fd int, took time.Duration, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, 0, err
	}
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	// Closing with a reset keeps ports and conntrack entries from piling up.
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
	)
	if err == nil {
		sa := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
		began := time.Now()
		err = unix.Connect(fd, sa)
		took = time.Since(began)
	}
	if err != nil {
		unix.Close(fd)
		return -1, took, err
	}
	return fd, took, nil
}

// ask connects to an endpoint, maybe through a Service, and returns which one
// answered.
func ask(to netip.AddrPort) (netip.Addr, error) {
	fd, _, err := connect(to)
	if err != nil {
		return netip.Addr{}, err
	}
	defer unix.Close(fd)
	var answer [4]byte
	for {
		n, err := unix.Read(fd, answer[:])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return netip.Addr{}, err
		case n != len(answer):
			return netip.Addr{}, fmt.Errorf("answer of %d bytes", n)
		default:
			return netip.AddrFrom4(answer), nil
		}
	}
}

// answered tries addresses one after the other until each has taken a
// connection, and returns when the last one did. Trying only one at a time
// leaves the CPU to the program under test.
func (c client) answered(ctx context.Context, addrs []netip.AddrPort, pause time.Duration) (at time.Time, err error) {
	err = c.ns.Do(func() error {
		for _, a := range addrs {
			for {
				fd, _, err := connect(a)
				at = time.Now()
				if err == nil {
					unix.Close(fd)
					break
				}
				if ctx.Err() != nil {
					return fmt.Errorf("%s does not answer: %w", a, err)
				}
				time.Sleep(pause)
			}
		}
		return nil
	})
	return at, err
}

// follow asks until the wanted endpoint answers. It returns when that was, and
// how many attempts failed on the way.
func (c client) follow(ctx context.Context, to netip.AddrPort, want netip.Addr) (at time.Time, failed int, err error) {
	err = c.ns.Do(func() error {
		for {
			got, err := ask(to)
			at = time.Now()
			if err == nil && got == want {
				return nil
			}
			if err != nil && err != unix.EINTR {
				failed++
			}
			if ctx.Err() != nil {
				return fmt.Errorf("traffic does not follow to %s", want)
			}
			time.Sleep(time.Millisecond)
		}
	})
	return at, failed, err
}

// target is one kind of connection to time: to one address, or to several in
// turns.
type target struct {
	from client
	to   []netip.AddrPort
	took [][]time.Duration // of each address
}

// timed times n connections to every target, in turns of a few so that all meet
// the same noise.
func timed(ctx context.Context, targets []*target, n int) error {
	const turn = 20
	for _, t := range targets {
		t.took = make([][]time.Duration, len(t.to))
	}
	for done := 0; done < n && ctx.Err() == nil; done += turn {
		for _, t := range targets {
			if err := t.turn(done/turn%len(t.to), min(turn, n-done)); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// turn times n connections to one address. One before them fills the CPU's
// caches.
func (t *target) turn(which, n int) error {
	return t.from.ns.Do(func() error {
		for k := -1; k < n; {
			fd, took, err := connect(t.to[which])
			if err == unix.EINTR {
				continue // a signal of the Go runtime; no sample
			}
			if err != nil {
				return fmt.Errorf("connect to %s: %w", t.to[which], err)
			}
			unix.Close(fd)
			if k >= 0 {
				t.took[which] = append(t.took[which], took)
			}
			k++
		}
		return nil
	})
}
