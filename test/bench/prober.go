package main

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// prober makes attempts of which many fail, for nobody translates the address,
// each from another port: a flow that was not translated once never is, for two
// minutes (nf_conntrack_tcp_timeout_syn_sent), if nobody refuses it.
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
		fd, _, err := connectFrom(p.port, to, probeLimit)
		switch err {
		case unix.EADDRINUSE, unix.EINTR:
			continue // no attempt
		case nil:
			unix.Close(fd)
		}
		return err
	}
}
