package metrics

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	basemetrics "k8s.io/component-base/metrics"
)

// The bytes below are written as on a little-endian machine for what is in host
// order (lengths and types), as include/uapi/linux/netlink.h lays them out.
func skipOnBigEndian(t *testing.T) {
	if !littleEndian() {
		t.Skip("the hand-made bytes are those of a little-endian machine")
	}
}

func littleEndian() bool {
	req, err := acctRequest(nfnlMsgAcctGet, 0, "x")
	return err == nil && req.Serialize()[1] == 0 && req.Serialize()[0] != 0
}

func TestAcctRequestBytes(t *testing.T) {
	skipOnBigEndian(t)
	req, err := acctRequest(nfnlMsgAcctNew, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, "pkts5")
	if err != nil {
		t.Fatal(err)
	}
	req.Seq = 1
	want := []byte{
		32, 0, 0, 0, // length: 16 header + 4 nfgenmsg + 10 attribute, padded to 12
		0, 7, // message NEW of subsystem ACCT
		0x05, 0x06, // REQUEST|ACK, EXCL|CREATE
		1, 0, 0, 0, // sequence
		0, 0, 0, 0, // port id
		0, 0, 0, 0, // nfgenmsg: AF_UNSPEC, version 0, resource 0
		10, 0, 1, 0, 'p', 'k', 't', 's', '5', 0, 0, 0,
	}
	if got := req.Serialize(); !bytes.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestAcctNamesAreChecked(t *testing.T) {
	for _, name := range []string{"", strings.Repeat("n", 32)} {
		if _, err := acctRequest(nfnlMsgAcctGet, 0, name); err == nil {
			t.Errorf("name of %d characters was accepted", len(name))
		}
	}
	for _, name := range []string{NFAcctCTStateInvalid, NFAcctLocalhostNodePorts, strings.Repeat("n", 31)} {
		if _, err := acctRequest(nfnlMsgAcctGet, 0, name); err != nil {
			t.Error(err)
		}
	}
}

var acctAnswer = []byte{
	0, 0, 0, 0, // nfgenmsg
	10, 0, 1, 0, 'p', 'k', 't', 's', '5', 0, 0, 0,
	12, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0x01, 0x02, // 258 packets
	12, 0, 3, 0, 0, 0, 0, 1, 0, 0, 0, 0, // 2^32 bytes
	8, 0, 4, 0, 0, 0, 0, 1, // NFACCT_USE: not ours
}

func TestDecodeAcct(t *testing.T) {
	skipOnBigEndian(t)
	got, err := decodeAcct(acctAnswer)
	if want := (acctCounter{"pkts5", 258, 1 << 32}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

// Attributes are padded to four bytes, the last one need not be; and a name's
// zero may be missing.
func TestDecodeAcctWithoutPaddingOrZero(t *testing.T) {
	skipOnBigEndian(t)
	got, err := decodeAcct([]byte{0, 0, 0, 0,
		12, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 9,
		5, 0, 1, 0, 'p'})
	if want := (acctCounter{Name: "p", Packets: 9}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

func TestDecodeAcctRefusesNonsense(t *testing.T) {
	skipOnBigEndian(t)
	for name, b := range map[string][]byte{
		"empty":             {},
		"half a header":     {0, 0},
		"no attributes":     {0, 0, 0, 0},
		"no packet count":   acctAnswer[:16],
		"truncated":         acctAnswer[:20],
		"length beyond end": {0, 0, 0, 0, 200, 0, 1, 0, 'p', 0, 0, 0},
		"length too small":  {0, 0, 0, 0, 2, 0, 1, 0},
		"short number":      {0, 0, 0, 0, 8, 0, 1, 0, 'p', 0, 0, 0, 8, 0, 2, 0, 0, 0, 0, 1},
	} {
		if got, err := decodeAcct(b); err == nil {
			t.Errorf("%s: decoded as %+v", name, got)
		}
	}
}

func FuzzDecodeAcct(f *testing.F) {
	f.Add(acctAnswer)
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := decodeAcct(b); err == nil && c.Name == "" {
			t.Errorf("no error and no name from %v", b)
		}
	})
}

// fakeNFAcct is a kernel with nfacct, or without.
type fakeNFAcct struct {
	missing bool
	objects map[string]uint64
	created []string
}

func (f *fakeNFAcct) Get(name string) (acctCounter, error) {
	if f.missing {
		return acctCounter{}, ErrNFAcctUnsupported
	}
	n, ok := f.objects[name]
	if !ok {
		return acctCounter{}, errNFAcctNotFound
	}
	return acctCounter{Name: name, Packets: n}, nil
}

func (f *fakeNFAcct) Create(name string) error {
	f.objects[name] = 0
	f.created = append(f.created, name)
	return nil
}

func TestEnsureNFAcctCreatesOnlyWhatIsMissing(t *testing.T) {
	kernel := &fakeNFAcct{objects: map[string]uint64{NFAcctCTStateInvalid: 42}}
	for range 2 {
		if err := ensureNFAcct(kernel, NFAcctCTStateInvalid, NFAcctLocalhostNodePorts); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(kernel.created, []string{NFAcctLocalhostNodePorts}) || kernel.objects[NFAcctCTStateInvalid] != 42 {
		t.Errorf("created %v, objects %v", kernel.created, kernel.objects)
	}
}

func TestWithoutNFAcctNothingIsRegisteredAndNothingFails(t *testing.T) {
	kernel := &fakeNFAcct{missing: true}
	if err := ensureNFAcct(kernel, NFAcctCTStateInvalid); !errors.Is(err, ErrNFAcctUnsupported) {
		t.Errorf("EnsureNFAcct: %v", err)
	}
	before := len(registered.metrics)
	if err := registerNFAcct(kernel); err != nil {
		t.Errorf("register: %v", err)
	}
	if after := len(registered.metrics); after != before {
		t.Errorf("%d collectors were registered for counters that cannot exist", after-before)
	}
}

func TestNFAcctIsReadAtScrapeTime(t *testing.T) {
	kernel := &fakeNFAcct{objects: map[string]uint64{NFAcctCTStateInvalid: 5}}
	reg := basemetrics.NewKubeRegistry()
	for _, c := range nfacctCollectors(kernel) {
		if err := reg.CustomRegister(c); err != nil {
			t.Fatal(err)
		}
	}
	read := func() string {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, f := range families {
			out = append(out, fmt.Sprintf("%s=%g", f.GetName(), f.Metric[0].GetCounter().GetValue()))
		}
		return strings.Join(out, " ")
	}
	if got := read(); got != "kubeproxy_iptables_ct_state_invalid_dropped_packets_total=5" {
		t.Errorf("with one object: %q", got)
	}
	kernel.objects[NFAcctCTStateInvalid] = 6
	kernel.objects[NFAcctLocalhostNodePorts] = 1
	if got := read(); got != "kubeproxy_iptables_ct_state_invalid_dropped_packets_total=6 kubeproxy_iptables_localhost_nodeports_accepted_packets_total=1" {
		t.Errorf("with both: %q", got)
	}
	kernel.missing = true
	if got := read(); got != "" {
		t.Errorf("module gone: %q", got)
	}
}

// On the machine's own kernel, whatever it has: either both objects exist
// afterwards, or the answer is that there is no nfacct.
func TestRealKernelAnswersOneOrTheOther(t *testing.T) {
	kernel := systemNFAcct{}
	_, err := kernel.Get("sluice_no_such_object")
	switch {
	case errors.Is(err, errNFAcctNotFound):
	case errors.Is(err, ErrNFAcctUnsupported):
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		t.Skip("needs CAP_NET_ADMIN: ", err)
	default:
		t.Errorf("unexpected answer: %v", err)
	}
}
