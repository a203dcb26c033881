package metrics

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"k8s.io/component-base/metrics"
)

// The nfacct objects of kube-proxy's iptables rules (-m nfacct --nfacct-name).
const (
	NFAcctCTStateInvalid     = "ct_state_invalid_dropped_pkts"
	NFAcctLocalhostNodePorts = "localhost_nps_accepted_pkts"
)

// ErrNFAcctUnsupported says that this kernel has no nfacct (CONFIG_NETFILTER_
// NETLINK_ACCT, module nfnetlink_acct). Rules must not refer to nfacct objects
// then.
var ErrNFAcctUnsupported = errors.New("kernel has no nfacct")

var errNFAcctNotFound = errors.New("no such nfacct object")

// From include/uapi/linux/netfilter/nfnetlink_acct.h.
const (
	nfnlMsgAcctNew = 0
	nfnlMsgAcctGet = 1

	nfacctName    = 1
	nfacctPkts    = 2
	nfacctBytes   = 3
	nfacctNameMax = 32 // the terminating zero included
)

// acctCounter is one nfacct object.
type acctCounter struct {
	Name           string
	Packets, Bytes uint64
}

// nfacct is what of the kernel's accounting objects is needed. Get returns
// errNFAcctNotFound where there is no such object; both return
// ErrNFAcctUnsupported where there can be none.
type nfacct interface {
	Get(name string) (acctCounter, error)
	Create(name string) error
}

// systemNFAcct speaks to the kernel of the calling thread's network namespace.
type systemNFAcct struct{}

func (systemNFAcct) Get(name string) (acctCounter, error) {
	req, err := acctRequest(nfnlMsgAcctGet, unix.NLM_F_ACK, name)
	if err != nil {
		return acctCounter{}, err
	}
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return acctCounter{}, acctError(err)
	}
	if len(msgs) == 0 {
		return acctCounter{}, fmt.Errorf("get nfacct object %s: empty answer", name)
	}
	return decodeAcct(msgs[0])
}

func (systemNFAcct) Create(name string) error {
	// NLM_F_EXCL: without it the kernel answers EBUSY for an object that exists,
	// and with NLM_F_REPLACE it would set its counters to 0.
	req, err := acctRequest(nfnlMsgAcctNew, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, name)
	if err != nil {
		return err
	}
	_, err = req.Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
		return nil
	}
	return acctError(err)
}

func acctRequest(message, flags int, name string) (*nl.NetlinkRequest, error) {
	if name == "" || len(name) >= nfacctNameMax {
		return nil, fmt.Errorf("nfacct object name %q: must have 1 to %d characters", name, nfacctNameMax-1)
	}
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_ACCT<<8|message, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(nfacctName, nl.ZeroTerminated(name)))
	return req, nil
}

// acctError tells "no such object" and "no such subsystem" from the rest.
// nfnetlink answers EINVAL for a subsystem that nobody registered.
func acctError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return errNFAcctNotFound
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT):
		return ErrNFAcctUnsupported
	}
	return err
}

// decodeAcct reads the payload of an answer: struct nfgenmsg, then attributes
// whose numbers are in network byte order.
func decodeAcct(payload []byte) (acctCounter, error) {
	var c acctCounter
	if len(payload) < nl.SizeofNfgenmsg {
		return c, fmt.Errorf("decode nfacct object: %d bytes are too few", len(payload))
	}
	// ParseRouteAttr steps over the padding after the last attribute, which must
	// be there then.
	raw := slices.Concat(payload[nl.SizeofNfgenmsg:], make([]byte, -len(payload)&3))
	attrs, err := nl.ParseRouteAttr(raw)
	if err != nil {
		return c, fmt.Errorf("decode nfacct object: %w", err)
	}
	var gotPackets bool
	for _, a := range attrs {
		kind := a.Attr.Type & nl.NLA_TYPE_MASK
		switch kind {
		case nfacctName:
			name, _, _ := bytes.Cut(a.Value, []byte{0})
			c.Name = string(name)
		case nfacctPkts, nfacctBytes:
			if len(a.Value) != 8 {
				return c, fmt.Errorf("decode nfacct object: attribute %d has %d bytes, not 8", kind, len(a.Value))
			}
			n := binary.BigEndian.Uint64(a.Value)
			if kind == nfacctPkts {
				c.Packets, gotPackets = n, true
			} else {
				c.Bytes = n
			}
		}
	}
	if c.Name == "" || !gotPackets {
		return c, errors.New("decode nfacct object: name or packet count is missing")
	}
	return c, nil
}

// EnsureNFAcct creates those nfacct objects that do not exist; the counters of
// the others stay as they are. It returns an error that wraps
// ErrNFAcctUnsupported where the kernel has none; rules must then be written
// without them. Call it before the first sync in iptables mode.
func EnsureNFAcct(names ...string) error { return ensureNFAcct(systemNFAcct{}, names...) }

func ensureNFAcct(kernel nfacct, names ...string) error {
	for _, name := range names {
		_, err := kernel.Get(name)
		if errors.Is(err, errNFAcctNotFound) {
			err = kernel.Create(name)
		}
		if err != nil {
			return fmt.Errorf("create nfacct object %s: %w", name, err)
		}
	}
	return nil
}

// registerNFAcct registers kube-proxy's two packet counters, unless the kernel
// cannot count (kube-proxy leaves the metrics out then, too).
func registerNFAcct(kernel nfacct) error {
	if _, err := kernel.Get(NFAcctCTStateInvalid); err != nil && !errors.Is(err, errNFAcctNotFound) {
		return nil
	}
	for _, c := range nfacctCollectors(kernel) {
		if err := registerCollector(c.name, c); err != nil {
			return err
		}
	}
	return nil
}

func nfacctCollectors(kernel nfacct) []*nfacctCollector {
	of := func(name, object, help string) *nfacctCollector {
		return &nfacctCollector{name: name, object: object, kernel: kernel,
			desc: metrics.NewDesc(name, help, nil, nil, metrics.ALPHA, "")}
	}
	return []*nfacctCollector{
		of("kubeproxy_iptables_ct_state_invalid_dropped_packets_total", NFAcctCTStateInvalid,
			"packets dropped by iptables to work around conntrack problems"),
		of("kubeproxy_iptables_localhost_nodeports_accepted_packets_total", NFAcctLocalhostNodePorts,
			"Number of packets accepted on nodeports of loopback interface"),
	}
}

// nfacctCollector reads one object's packet count at each scrape.
type nfacctCollector struct {
	metrics.BaseStableCollector
	name, object string
	desc         *metrics.Desc
	kernel       nfacct
}

// DescribeWithStability implements metrics.StableCollector.
func (c *nfacctCollector) DescribeWithStability(ch chan<- *metrics.Desc) { ch <- c.desc }

// CollectWithStability implements metrics.StableCollector. A counter that
// cannot be read is left out: an error here would fail the whole scrape.
func (c *nfacctCollector) CollectWithStability(ch chan<- metrics.Metric) {
	n, err := c.kernel.Get(c.object)
	if err != nil {
		return
	}
	ch <- metrics.NewLazyConstMetric(c.desc, metrics.CounterValue, float64(n.Packets))
}
