package ipvs

import (
	"context"
	"net/netip"
	"slices"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// serverKey identifies a virtual server: by address, protocol and port, or by a
// packet mark alone.
type serverKey struct {
	addr     netip.Addr // zero if mark is not 0
	port     uint16
	protocol model.Protocol
	mark     uint32 // fwmark; 0: by address
}

// settings are what can be changed of a virtual server without a connection
// noticing.
type settings struct {
	scheduler string
	flags     uint32 // flagPersistent, flagSched1, flagSched2 (as in linux/ip_vs.h, without the kernel's own bits)
	timeout   uint32 // seconds of persistence; 0 without flagPersistent
}

// Flags of a virtual server: IP_VS_SVC_F_*. What the scheduler flags mean is the
// scheduler's: sh-fallback and mh-fallback are the first, sh-port and mh-port the
// second.
const (
	flagPersistent = 0x0001
	flagSched1     = 0x0008
	flagSched2     = 0x0010
)

// destination is a real server as it should be. It is always reached by NAT.
type destination struct {
	at     netip.AddrPort
	weight uint32
}

// server is a virtual server with its destinations, sorted by address.
type server struct {
	serverKey
	settings
	destinations []destination
}

// wants says whether a destination is one of the server's.
func (s *server) wants(at netip.AddrPort) bool {
	return slices.ContainsFunc(s.destinations, func(d destination) bool { return d.at == at })
}

// entry is an element of an ipset. Which fields are used depends on the set's
// type; the others are zero.
type entry struct {
	addr     netip.Addr
	protocol model.Protocol
	port     uint16
	with     netip.Prefix // second address (hash:ip,port,ip) or range (hash:ip,port,net)
	mark     uint32       // skbmark, for setInside: not part of the element's identity
}

// opKind is what an op does. Each is idempotent: adding what exists sets it,
// setting what does not exist adds it, deleting what does not exist succeeds.
type opKind uint8

const (
	addEntry opKind = iota
	delEntry
	addAddr // to kube-ipvs0
	delAddr
	putServer // adds, or changes settings
	delServer // with its destinations
	putDest   // adds, or changes the weight
	delDest
)

// op is one change of the kernel's state.
type op struct {
	kind     opKind
	set      setID          // entries
	entry    entry          // entries
	addr     netip.Addr     // addresses
	key      serverKey      // servers and destinations
	settings settings       // putServer
	dest     destination    // destinations
	owner    *model.PortKey // the port it is done for; nil for what is shared
}

// failure is an op that the kernel refused, and why.
type failure struct {
	op  op
	err error
}

// liveDest is a destination as the kernel has it.
type liveDest struct {
	weight           uint32
	active, inactive uint32 // connections
	foreign          bool   // not reached by NAT: never ours
}

// liveServer is a virtual server as the kernel has it.
type liveServer struct {
	settings
	destinations map[netip.AddrPort]liveDest
}

// actual is what the kernel has.
type actual struct {
	servers map[serverKey]*liveServer // of this family, everybody's
	sets    [setCount]map[entry]bool  // of ours; nil: the set does not exist
	addrs   map[netip.Addr]bool       // on kube-ipvs0; nil: there is no such device
	// othersServe says that rules of iptables mode, ours or kube-proxy's, forward
	// traffic to Services.
	othersServe bool
}

// token is what can be learnt about the kernel's state at next to no cost. Two
// equal tokens do not prove that nothing changed.
type token struct {
	tables   string           // see xtables
	elements [setCount]uint32 // of each set; ^0: the set does not exist
	device   bool             // kube-ipvs0 exists
}

// repairs counts what was not there, or not as it should be.
type repairs struct{ chains, jumps, sets, devices int }

// kernel is the one way to the kernel. The real one is nlKernel; tests have a
// fake beside it.
type kernel interface {
	// read lists everything. The connection counts are as of now.
	read(ctx context.Context) (*actual, error)
	// prepare creates kube-ipvs0 and the sets that do not exist, and brings the
	// static rules and jumps into force. It changes nothing that is right, and
	// says what it had to do.
	prepare(ctx context.Context, base static) (repairs, error)
	// apply makes changes in the given order and goes on after those that the
	// kernel refuses, which it returns. After an error any part may be done.
	apply(ctx context.Context, ops []op) ([]failure, error)
	// lookup reads single virtual servers; one that does not exist is missing in
	// the result.
	lookup(ctx context.Context, keys []serverKey) (map[serverKey]*liveServer, error)
	// addresses lists those of kube-ipvs0; nil: there is no such device.
	addresses(ctx context.Context) (map[netip.Addr]bool, error)
	token(ctx context.Context) (token, error)
	// unrule removes static rules, and says whether there were any.
	unrule(ctx context.Context, what xtables.Scope) (bool, error)
	// clear removes the sets, which no rule may name any more, and kube-ipvs0 if it
	// holds no address.
	clear(ctx context.Context) error
}
