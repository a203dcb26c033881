package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// client makes connections from inside a namespace. It uses blocking sockets and
// no poller, so that a timed connect is one system call.
type client struct{ ns *netlab.Namespace }

// How long one attempt may take. What a node without rules lets pass is refused at
// once (serveEndpoints); short attempts keep a wait for the first answer exact when
// rules that are not complete swallow it.
const (
	impatient = 20 * time.Millisecond // where no answer is the rule
	patient   = 200 * time.Millisecond
)

// connect opens a connection and tells how long the handshake took. The caller
// closes the socket. It must run in the namespace (Do).
func connect(to netip.AddrPort, patience time.Duration) (fd int, took time.Duration, err error) {
	return connectFrom(0, to, patience)
}

// connectFrom is connect from a given port; the kernel chooses one for 0.
func connectFrom(port int, to netip.AddrPort, patience time.Duration) (fd int, took time.Duration, err error) {
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
	if err == nil && port != 0 {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: port})
	}
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
	fd, _, err := connect(to, patient)
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
func (c client) answered(ctx context.Context, addrs []netip.AddrPort, try func(netip.AddrPort) error, pause time.Duration) (at time.Time, err error) {
	began := time.Now()
	err = c.ns.Do(func() error {
		for _, a := range addrs {
			for {
				err := try(a)
				at = time.Now()
				if err == nil {
					break
				}
				if ctx.Err() != nil {
					return fmt.Errorf("%s does not answer: %w", a, err)
				}
				time.Sleep(longer(pause, began))
			}
		}
		return nil
	})
	return at, err
}

// briefly tries to connect.
func briefly(to netip.AddrPort) error {
	fd, _, err := connect(to, impatient)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// follow asks until the wanted endpoint answers. It returns when that was, and
// how many attempts failed on the way.
func (c client) follow(ctx context.Context, to netip.AddrPort, want netip.Addr) (at time.Time, failed int, err error) {
	began := time.Now()
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
			time.Sleep(longer(time.Millisecond, began))
		}
	})
	return at, failed, err
}

// longer is the pause between two attempts. Who asks takes time from who is to
// answer: the longer it lasts, the less often, to within one in a hundred.
func longer(pause time.Duration, began time.Time) time.Duration {
	return max(pause, time.Since(began)/100)
}

// target is one kind of connection to time: to one address, or to several in
// turns.
type target struct {
	from  client
	to    []netip.AddrPort
	turns []time.Duration // median of each turn
	lost  int             // attempts without an answer
}

// tolerable is how many lost attempts are a remark and not the end.
const tolerable = 20

// timed times n connections to every target, in turns of a few: what disturbs
// the machine for longer than a turn disturbs all targets' turns of the same
// number alike.
func timed(ctx context.Context, targets []*target, n int) error {
	const turn = 20
	for done := 0; done < n && ctx.Err() == nil; done += turn {
		for _, t := range targets {
			if err := t.turn(min(turn, n-done)); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// turn times n connections to the next address. One before them fills the CPU's
// caches.
func (t *target) turn(n int) error {
	to := t.to[len(t.turns)%len(t.to)]
	var took []time.Duration
	err := t.from.ns.Do(func() error {
		for k := -1; k < n; {
			fd, d, err := connect(to, patient)
			if err == unix.EINTR {
				continue // a signal of the Go runtime; no sample
			}
			if err != nil {
				if t.lost++; t.lost > tolerable {
					return fmt.Errorf("connect to %s: %w", to, err)
				}
				continue
			}
			unix.Close(fd)
			if k >= 0 {
				took = append(took, d)
			}
			k++
		}
		return nil
	})
	slices.Sort(took)
	t.turns = append(t.turns, quantile(took, 0.5))
	return err
}

// median is that of all turns.
func (t *target) median() time.Duration {
	return quantile(slices.Sorted(slices.Values(t.turns)), 0.5)
}

// above is the median of how much longer each turn took than base's.
func (t *target) above(base *target) time.Duration {
	return quantile(t.differences(base, 0, 1), 0.5)
}

// slowestAbove is the same for the address that takes longest.
func (t *target) slowestAbove(base *target) time.Duration {
	var most time.Duration
	for first := range t.to {
		if d := t.differences(base, first, len(t.to)); len(d) > 0 {
			most = max(most, quantile(d, 0.5))
		}
	}
	return most
}

// differences compares every step-th turn, sorted.
func (t *target) differences(base *target, first, step int) []time.Duration {
	var out []time.Duration
	for k := first; k < min(len(t.turns), len(base.turns)); k += step {
		out = append(out, t.turns[k]-base.turns[k])
	}
	slices.Sort(out)
	return out
}
