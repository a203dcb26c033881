package main

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// prober makes attempts of which many fail, for nobody translates the address. Its
// sockets do not wait in connect, so that the kernel tells them when the address
// cannot be reached, and each has another port: a flow that was not translated
// once never is, for two minutes (nf_conntrack_tcp_timeout_syn_sent).
type prober struct{ port int }

// With a pause after each lost attempt, all ports last for longer than that.
const (
	firstPort, lastPort = 1024, 65535

	lostPause     = 2 * time.Millisecond
	answeredPause = 250 * time.Microsecond
	probeLimit    = 5 * time.Millisecond
)

// try connects once. It must run in the namespace (Do).
func (p *prober) try(to netip.AddrPort) error {
	for {
		p.port++
		if p.port < firstPort || p.port > lastPort {
			p.port = firstPort
		}
		err := probe(p.port, to)
		if err != unix.EADDRINUSE && err != unix.EINTR { // else it was no attempt
			return err
		}
	}
}

func probe(port int, to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port}); err != nil {
		return err
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if err != unix.EINPROGRESS {
		return err
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(probeLimit.Milliseconds()))
	if err != nil {
		return err
	}
	if n == 0 {
		return unix.ETIMEDOUT
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	return err
}
