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
}

// NetworkSysctls compares the settings with what is in force. Forwarding itself
// (ip_forward) and bridge-nf-call-iptables are the network plugin's business, in
// kube-proxy as here.
func NetworkSysctls(settings Network, read Reader) []Change {
	if !settings.LocalhostNodePorts {
		return nil
	}
	return appendRaise(nil, read, "proc/sys/net/ipv4/conf/all/route_localnet", 1,
		"NodePorts on localhost; to leave it off, set iptables.localhostNodePorts to false, "+
			"or nodePortAddresses to something without loopback addresses (kubernetes issue 90259)", nil)
}
