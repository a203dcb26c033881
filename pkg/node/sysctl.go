package node

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Change is what is to be done about one kernel setting.
type Change struct {
	Path string // below the root: "proc/sys/net/..." or "sys/module/..."
	Have int    // what is in force; 0 if it cannot be read
	Want int
	Why  string // for people, in either case
	Skip bool   // nothing is to be written, although it is not what was asked for
}

// Name returns the setting's name as sysctl(8) has it, or its path.
func (c Change) Name() string {
	if name, ok := strings.CutPrefix(c.Path, "proc/sys/"); ok {
		return strings.ReplaceAll(name, "/", ".")
	}
	return "/" + c.Path
}

func (c Change) String() string {
	if c.Skip {
		return fmt.Sprintf("%s is left as it is: %s", c.Name(), c.Why)
	}
	return fmt.Sprintf("%s = %d (was %d): %s", c.Name(), c.Want, c.Have, c.Why)
}

// Reader returns the number that a file below the root holds: System.ReadInt.
type Reader func(path string) (int, error)

// Conntrack are kube-proxy's conntrack settings. 0 means: leave it alone.
type Conntrack struct {
	MaxPerCore            int // entries for each online CPU
	Min                   int // but at least these, if MaxPerCore is not 0
	TCPEstablishedTimeout time.Duration
	TCPCloseWaitTimeout   time.Duration
	TCPBeLiberal          bool
	UDPTimeout            time.Duration
	UDPStreamTimeout      time.Duration
}

// maxScaled is the most that scaling by CPUs gives, as in kube-proxy: entries
// take memory on machines with hundreds of cores. A larger Min does not lift it
// once the product is above: kube-proxy's rule, kept.
const maxScaled = 1 << 20

// Max returns the nf_conntrack_max that the settings ask for, 0 for none.
func (c Conntrack) Max(cpus int) int {
	if c.MaxPerCore <= 0 {
		return 0
	}
	scaled := c.MaxPerCore * cpus
	if scaled > maxScaled {
		return maxScaled
	}
	return max(scaled, c.Min)
}

const (
	netfilter = "proc/sys/net/netfilter/nf_conntrack_"
	hashsize  = "sys/module/nf_conntrack/parameters/hashsize"
)

// ConntrackSysctls compares the settings with what is in force. Unlike
// kube-proxy it never takes away what an administrator gave: a value higher
// than the wanted one stays, unless it is a timeout that is the kernel's or
// kube-proxy's own default, which nobody chose. A setting that cannot be read is skipped with the reason.
func ConntrackSysctls(settings Conntrack, cpus int, read Reader) []Change {
	var out []Change
	raise := func(path string, want int, why string, defaults ...int) {
		if want > 0 {
			out = appendRaise(out, read, path, want, why, defaults)
		}
	}
	limit := settings.Max(cpus)
	raise(netfilter+"max", limit, fmt.Sprintf("room for connections: %d for each of %d CPUs, at least %d", settings.MaxPerCore, cpus, settings.Min))
	if have, err := read(hashsize); err != nil || have < limit/4 {
		raise(hashsize, limit/4, "a bucket for every four connections")
	}
	raise(netfilter+"tcp_timeout_established", seconds(settings.TCPEstablishedTimeout),
		"conntrack.tcpEstablishedTimeout", 432000, 86400)
	raise(netfilter+"tcp_timeout_close_wait", seconds(settings.TCPCloseWaitTimeout),
		"conntrack.tcpCloseWaitTimeout", 60, 3600)
	if settings.TCPBeLiberal {
		raise(netfilter+"tcp_be_liberal", 1, "conntrack.tcpBeLiberal")
	}
	raise(netfilter+"udp_timeout", seconds(settings.UDPTimeout), "conntrack.udpTimeout", 30)
	raise(netfilter+"udp_timeout_stream", seconds(settings.UDPStreamTimeout), "conntrack.udpStreamTimeout", 120, 180)
	return out
}

// seconds rounds up what is less than a second: 0 would mean "leave it alone".
func seconds(d time.Duration) int {
	if d > 0 && d < time.Second {
		return 1
	}
	return int(d / time.Second)
}

// appendRaise adds what is to be done to have at least want. A higher value
// gives way only if it is one of defaults.
func appendRaise(out []Change, read Reader, path string, want int, why string, defaults []int) []Change {
	c := Change{Path: path, Want: want, Why: why}
	have, err := read(path)
	switch {
	case err != nil:
		c.Skip, c.Why = true, err.Error()
	case have == want:
		return out
	case have > want && !slices.Contains(defaults, have):
		c.Have, c.Skip = have, true
		c.Why = fmt.Sprintf("it is %d, and %d was asked for: a value that is higher and no known default is not lowered", have, want)
	default:
		c.Have = have
	}
	return append(out, c)
}

// Network are the settings of the network that forwarding needs.
type Network struct {
	// LocalhostNodePorts says that IPv4 NodePorts are served on 127.0.0.1 by
	// iptables: translated packets leave with a loopback source.
	LocalhostNodePorts bool
	// IPVS says that the ipvs mode runs, on a kernel of version Kernel (zero:
	// unknown).
	IPVS   bool
	Kernel KernelVersion
	// StrictARP is --ipvs-strict-arp; it counts with IPVS only.
	StrictARP bool
}

// NetworkSysctls compares the settings with what is in force. Forwarding itself
// (ip_forward) and bridge-nf-call-iptables are the network plugin's business in
// iptables mode, and ip_forward the proxy's in ipvs mode: in kube-proxy as here.
func NetworkSysctls(settings Network, read Reader) []Change {
	var out []Change
	raise := func(path string, want int, why string) {
		out = appendRaise(out, read, "proc/sys/net/ipv4/"+path, want, why, nil)
	}
	if settings.LocalhostNodePorts {
		raise("conf/all/route_localnet", 1,
			"NodePorts on localhost; to leave it off, set iptables.localhostNodePorts to false, "+
				"or nodePortAddresses to something without loopback addresses (kubernetes issue 90259)")
	}
	if !settings.IPVS {
		return out
	}
	raise("ip_forward", 1, "packets to endpoints on other hosts are forwarded by this one")
	raise("vs/conntrack", 1, "IPVS connections are known to conntrack, so that iptables can masquerade them")
	if noReuse(settings.Kernel) {
		out = appendSet(out, read, "proc/sys/net/ipv4/vs/conn_reuse_mode", 0, ReuseText(settings.Kernel))
	}
	raise("vs/expire_nodest_conn", 1, "a connection whose endpoint was removed ends with its next packet, in place of hanging")
	raise("vs/expire_quiescent_template", 1, "sessionAffinity lets go of an endpoint that gets no new connections")
	if settings.StrictARP {
		raise("conf/all/arp_ignore", 1, "ipvs.strictARP: the node does not answer ARP for Service addresses on kube-ipvs0")
		raise("conf/all/arp_announce", 2, "ipvs.strictARP: the node does not announce Service addresses on kube-ipvs0")
	}
	return out
}

// noReuse says whether conn_reuse_mode must be off: with it on, these kernels
// drop the first packet of a client that uses a port again, and the client waits
// a second (kubernetes issue 81775; mended by kernel commit f0a5e4d7a594).
func noReuse(v KernelVersion) bool { return v.AtLeast(4, 1) && !v.AtLeast(5, 9) }

// ReuseText says what a kernel does about a client that uses a source port again
// while IPVS still knows the connection before.
func ReuseText(v KernelVersion) string {
	switch {
	case v == KernelVersion{}:
		return "the kernel's version is not known, so conn_reuse_mode stays as it is"
	case noReuse(v):
		return fmt.Sprintf("on Linux %s a client that uses a port again goes to the endpoint of before, also while that one is leaving: "+
			"the other setting would delay it by a second (mended in 5.9)", v)
	case !v.AtLeast(4, 1):
		return fmt.Sprintf("Linux %s has no conn_reuse_mode: a client that uses a port again goes to the endpoint of before", v)
	}
	return fmt.Sprintf("Linux %s chooses an endpoint anew for a client that uses a port again, without the delay of kernels before 5.9", v)
}

// appendSet adds what is to be done to have exactly want.
func appendSet(out []Change, read Reader, path string, want int, why string) []Change {
	c := Change{Path: path, Want: want, Why: why}
	have, err := read(path)
	switch {
	case err != nil:
		c.Skip, c.Why = true, err.Error()
	case have == want:
		return out
	}
	c.Have = have
	return append(out, c)
}
