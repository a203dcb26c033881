package ipvs

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// TestKernelStaticRules: the proxier's real rules are accepted by every variant,
// are printed as they are written, are put right, and go.
func TestKernelStaticRules(t *testing.T) {
	for _, v := range []xtables.Variant{xtables.NFT, xtables.Legacy} {
		eachFamily(t, func(t *testing.T, f model.Family) {
			t.Run(string(v), func(t *testing.T) { staticRules(t, v, f) })
		})
	}
}

func staticRules(t *testing.T, v xtables.Variant, f model.Family) {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		t.Skipf("SKIPPED: no network namespace of our own (run as root, or under unshare -Urn): %v", err)
	}
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
	p, err := xtables.Find(v, f)
	if err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	k, err := newKernel(f, p, xtables.Stats{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.close)
	ctx := context.Background()
	o := Options{Family: f, Programs: p, MasqueradeBit: 14, RandomFully: true, Inside: true,
		Detector: proxier.Detector{CIDR: netip.PrefixFrom(nth(f, 1, 0), 24)}}
	want := base(&o, &plan.Facts{Family: f})
	var fixed repairs
	if err := k.prepareSets(ctx, &fixed); err != nil || fixed.sets != int(setCount) {
		t.Fatalf("%+v, %v", fixed, err)
	}
	prepare := func(chains, jumps int) {
		t.Helper()
		var fixed repairs
		if err := k.prepareRules(ctx, want, &fixed); err != nil {
			t.Fatal(err)
		}
		if fixed.chains != chains || fixed.jumps != jumps {
			t.Fatalf("repairs %+v, want %d chains and %d jumps", fixed, chains, jumps)
		}
	}
	prepare(len(want.chains), len(want.jumps))
	prepare(0, 0)
	if len(k.rules.printed) > 0 {
		t.Errorf("printed differently than written, so that each start writes them anew:")
		for w, p := range k.rules.printed {
			t.Errorf("\n%s\nis printed as\n%s", w, p)
		}
	}
	k.rules = ruleMemory{} // a restart
	prepare(0, 0)
	have, err := k.readRules(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var input []string
	for i := len(want.jumps) - 1; i >= 0; i-- {
		if j := want.jumps[i]; j.table == tableFilter && j.from == "INPUT" {
			input = append(input, j.text)
		}
	}
	if diff := cmp.Diff(input, have[chainRef{tableFilter, "INPUT"}]); diff != "" {
		t.Errorf("jumps are not in order (-want +got):\n%s", diff)
	}
	iptables := func(args ...string) { run(t, append(slices.Clone(p.Command), args...)...) }
	iptables("-F", chainIPVSFilter)
	iptables("-t", "nat", "-A", chainServices, "-j", "RETURN")
	iptables("-t", "nat", "-F", "PREROUTING")
	prepare(2, 1)
	// As many rules as before, and others: right after our own write, too.
	for range 2 {
		iptables("-t", "nat", "-R", chainMarkMasq, "1", "-j", "RETURN")
		prepare(1, 0)
	}
	prepare(0, 0)
	if have, err = k.readRules(ctx); err != nil || othersServe(have[chainRef{tableNAT, chainServices}]) {
		t.Errorf("our own rules are taken for iptables mode's: %v, %v", have[chainRef{tableNAT, chainServices}], err)
	}
	o.Inside = false
	want = base(&o, &plan.Facts{Family: f})
	if err := k.prepareRules(ctx, want, &fixed); err != nil {
		t.Fatal(err)
	}
	prepare(0, 0)
	if have, err = k.readRules(ctx); err != nil || len(have[chainRef{tableMangle, chainInside}]) > 0 {
		t.Errorf("a chain of before is not empty: %v, %v", have[chainRef{tableMangle, chainInside}], err)
	}
	iptables("-N", "THEIRS")
	iptables("-A", "THEIRS", "-j", chainForward)
	if err := teardown(k); err != nil {
		t.Fatal(err)
	}
	if have, err = k.readRules(ctx); err != nil {
		t.Fatal(err)
	}
	for ref, list := range have {
		kept := ref == chainRef{tableFilter, chainForward} || ref.name == "THEIRS"
		if strings.HasPrefix(ref.name, "KUBE") && !kept || len(list) > 0 && !kept {
			t.Errorf("left: %v %q", ref, list)
		}
	}
}

// TestKernelLearnsForms: what is printed in another form is learnt right after it
// was written, and only then.
func TestKernelLearnsForms(t *testing.T) {
	want := static{chains: []rules{{tableNAT, "C", []string{"-d 10.0.0.1 -j ACCEPT"}}}, jumps: []jump{{tableNAT, "OUTPUT", "-j C"}}}
	form := func(to string) map[chainRef][]string {
		return map[chainRef][]string{{tableNAT, "C"}: {"-d " + to + " -j ACCEPT"}, {tableNAT, "OUTPUT"}: {"-m comment -j C"}}
	}
	var m ruleMemory
	ch := m.compare(form("10.0.0.1/32"), want)
	if len(ch.put) != 1 || len(ch.jumps) != 1 {
		t.Fatalf("foreign content is taken for ours: %+v", ch)
	}
	m.learn(ch, form("10.0.0.1/32"))
	for range 2 {
		if ch := m.compare(form("10.0.0.1/32"), want); !ch.nothing() {
			t.Errorf("not learnt: %+v", ch)
		}
		drift := form("10.0.0.2/32")
		drift[chainRef{tableNAT, "OUTPUT"}] = []string{"-m mark -j C"}
		if ch := m.compare(drift, want); len(ch.put) != 1 || len(ch.jumps) != 1 {
			t.Errorf("a change is not seen: %+v", ch)
		}
	}
	m = ruleMemory{}
	m.learn(ch, map[chainRef][]string{{tableNAT, "C"}: {"-d 10.0.0.1 -j ACCEPT"}, {tableNAT, "OUTPUT"}: {"-j C"}})
	m.learn(ch, map[chainRef][]string{{tableNAT, "C"}: {"-d 10.0.0.1 -j ACCEPT", "-j DROP"}})
	if len(m.printed) > 0 {
		t.Errorf("learnt without need: %v", m.printed)
	}
	if ch := m.compare(form("10.0.0.2"), want); len(ch.put) != 1 || len(ch.jumps) != 1 {
		t.Errorf("the first look after a write takes drift for ours: %+v", ch)
	}
}

// TestKernelOthersServe: rules that look into sets are of ipvs mode.
func TestKernelOthersServe(t *testing.T) {
	sets := "-m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT"
	service := `-d 10.96.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j KUBE-SVC-NPX46M4PTMTKRN6Y`
	last := `-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS`
	for _, c := range []struct {
		rules []string
		want  bool
	}{
		{nil, false},
		{[]string{sets}, false},
		{[]string{"-s 127.0.0.0/8 -j RETURN", sets}, false}, // kube-proxy's ipvs mode
		{[]string{last}, true},
		{[]string{service, last}, true},
	} {
		if got := othersServe(c.rules); got != c.want {
			t.Errorf("%q: %t", c.rules, got)
		}
	}
}

// TestKernelWriteOrder: chains are all declared before rules that may name them,
// and jumps come last.
func TestKernelWriteOrder(t *testing.T) {
	ch := &rulesChange{
		put:   []rules{{tableNAT, "A", []string{"-j B"}}, {tableNAT, "B", []string{"-j RETURN"}}},
		jumps: []jump{{tableNAT, "OUTPUT", "-j A"}, {tableFilter, "INPUT", "-j X"}},
		empty: []chainRef{{tableNAT, "E"}}}
	var b bytes.Buffer
	w := bufio.NewWriter(&b)
	ch.write(w)
	_ = w.Flush()
	const want = "*filter\n-I INPUT 1 -j X\nCOMMIT\n*nat\n:A - [0:0]\n:B - [0:0]\n:E - [0:0]\n-A A -j B\n-A B -j RETURN\n-I OUTPUT 1 -j A\nCOMMIT\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

// TestKernelParseDestinations: what is not found by its address is left to be
// looked up.
func TestKernelParseDestinations(t *testing.T) {
	const text = `IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:0050 rr persistent 300 FFFFFFFF
  -> 0AF40102:1F90      Masq    0      3          12
  -> 0AF40101:1F90      Route   1      0          0
UDP  [2001:0db8:0000:0000:0000:0000:0000:0001]:0035 rr
  -> [2001:0db8:0000:0000:0000:0000:0000:0002]:0035      Masq    1      0          0
FWM  00002801 sh
  -> 0AF40101:1F90      Masq    1      0          0
FWM  00002801 sh
  -> [2001:0db8:0000:0000:0000:0000:0000:0002]:0035      Masq    5      0          0
`
	tcp := serverKey{addr: netip.MustParseAddr("10.96.0.1"), port: 80, protocol: model.TCP}
	mark := serverKey{mark: 0x2801}
	empty := func() *liveServer { return &liveServer{destinations: map[netip.AddrPort]liveDest{}} }
	got := map[serverKey]*liveServer{tcp: empty(), mark: empty()}
	seen, err := parseDestinations([]byte(text), got)
	if err != nil {
		t.Fatal(err)
	}
	if !seen[tcp] || seen[mark] || len(seen) != 2 {
		t.Errorf("seen %v", seen)
	}
	pod := netip.MustParseAddrPort
	want := map[serverKey]*liveServer{
		tcp:  {destinations: map[netip.AddrPort]liveDest{pod("10.244.1.2:8080"): {0, 3, 12, false}, pod("10.244.1.1:8080"): {1, 0, 0, true}}},
		mark: empty(),
	}
	if diff := cmp.Diff(want, got, comparers); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, bad := range []string{"TCP 0A6:x rr", "QQQ 0A600001:0050 rr", "TCP 0A600001:0050 rr\n -> zz:1 Masq 1 0 0", "TCP 0A600001:0050 rr\n -> 0A600001:0050 Masq 1"} {
		if _, err := parseDestinations([]byte(bad), got); err == nil {
			t.Errorf("%q was understood", bad)
		}
	}
}

// TestKernelOtherCommand: what is tried after each refusal.
func TestKernelOtherCommand(t *testing.T) {
	for _, c := range []struct {
		cmd   uint8
		err   unix.Errno
		other uint8
		done  bool
	}{
		{cmdNewService, unix.EEXIST, cmdSetService, false},
		{cmdNewService, unix.ENOENT, 0, false}, // no such scheduler
		{cmdSetService, unix.ESRCH, cmdNewService, false},
		{cmdSetService, unix.ENOENT, 0, false},
		{cmdNewDest, unix.EEXIST, cmdSetDest, false},
		{cmdNewDest, unix.ESRCH, 0, false},
		{cmdSetDest, unix.ENOENT, cmdNewDest, false},
		{cmdDelService, unix.ESRCH, 0, true},
		{cmdDelDest, unix.ESRCH, 0, true},
		{cmdDelDest, unix.ENOENT, 0, true},
		{cmdDelDest, unix.EPERM, 0, false},
	} {
		if other, done := otherCommand(c.cmd, fmt.Errorf("wrapped: %w", c.err)); other != c.other || done != c.done {
			t.Errorf("command %d, %v: %d, %t", c.cmd, c.err, other, done)
		}
	}
}

func TestKernelMaskOf(t *testing.T) {
	for mark, want := range map[uint32]uint32{0x2801: 0x3fff, 0x2fff: 0x3fff, 0x2801 << insideHigh: 0x3fff << insideHigh, 0x2fff << insideHigh: 0x3fff << insideHigh} {
		if got := maskOf(mark); got != want {
			t.Errorf("%#x: %#x, want %#x", mark, got, want)
		}
	}
}
