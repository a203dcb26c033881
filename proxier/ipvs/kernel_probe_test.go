package ipvs

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/ipset"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
	"github.com/sluice-proxy/sluice/test/uml"
)

// TestProbeWithIPVS runs the tests below where there is IPVS, as modules that
// nobody has loaded.
func TestProbeWithIPVS(t *testing.T) {
	if uml.Inside() {
		t.Skip("SKIPPED: it starts the others")
	}
	var modules []string
	for _, m := range uml.DefaultModules() {
		if !strings.HasPrefix(m, "ip_vs") && !strings.HasPrefix(m, "ip_set") && m != "xt_set" && m != "dummy" {
			modules = append(modules, m)
		}
	}
	uml.RerunIn(t, uml.Machine{Modules: modules}, "^TestGuestProbe")
}

// TestGuestProbe0CleanupLoadsNothing: a host that never had IPVS or ipset gets
// neither by cleaning up. It must run first.
func TestGuestProbe0CleanupLoadsNothing(t *testing.T) {
	guest(t)
	loaded := func() bool {
		sets, err := ipset.Loaded()
		if err != nil {
			t.Fatal(err)
		}
		_, err = os.Stat(ipvsTable)
		return sets || err == nil
	}
	if loaded() {
		t.Skip("SKIPPED: this kernel has IPVS or ipset already")
	}
	ctx := context.Background()
	for _, f := range families {
		if err := CleanupHost(ctx, f, nil); err != nil {
			t.Error(err)
		}
		if did, err := RemoveOther(ctx, f, nil); did || err != nil {
			t.Errorf("removed: %t, %v", did, err)
		}
	}
	if loaded() {
		t.Error("modules are loaded by cleaning up")
	}
}

// TestGuestProbe1LoadsWithoutModprobe: the kernel loads IPVS and then schedulers
// by itself. It must run before everything that needs IPVS.
func TestGuestProbe1LoadsWithoutModprobe(t *testing.T) {
	guest(t)
	if _, err := os.Stat("/proc/net/ip_vs"); err == nil {
		t.Skip("SKIPPED: this kernel has IPVS already")
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	got, err := schedulersOf(context.Background(), model.IPv4)
	t.Setenv("PATH", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("loaded without modprobe: %v", got)
}

// TestGuestProbe2Host: everything is found, and nothing is left behind.
func TestGuestProbe2Host(t *testing.T) {
	eachFamily(t, func(t *testing.T, f model.Family) {
		guest(t)
		family := map[model.Family]string{model.IPv4: "198.51.100.0:20000", model.IPv6: "[2001:db8::c633:6400]:20000"}[f]
		run(t, "ipvsadm", "-A", "-t", family, "-s", "wlc") // somebody else's
		before := run(t, "ipvsadm", "-Sn")
		h, err := Probe(context.Background(), f, "legacy")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%+v", h)
		if loaded, err := ipset.Loaded(); !loaded || err != nil {
			t.Errorf("ipset is not seen where it is: %v", err)
		}
		for _, s := range []string{"rr", "wrr", "lc", "wlc", "dh", "sh", "sed", "nq", "lblc", "lblcr", "mh", "fo", "ovf"} {
			if err := CheckScheduler(s, h.Schedulers); err != nil {
				t.Error(err)
			}
		}
		if !slices.IsSorted(h.Schedulers) || !h.Inside || len(h.Missing) > 0 || h.Programs.Variant != xtables.Legacy || !strings.Contains(run(t, "ipvsadm", "-Ln"), "version "+h.Version+" ") {
			t.Errorf("found %+v", h)
		}
		if after := run(t, "ipvsadm", "-Sn"); after != before {
			t.Errorf("virtual servers: %s, before: %s", after, before)
		}
		if sets := run(t, "ipset", "list", "-n"); sets != "" {
			t.Errorf("left: sets %s", sets)
		}
		if _, err := net.InterfaceByName(probeDevice); err == nil {
			t.Errorf("left: device %s", probeDevice)
		}
		for _, table := range tables {
			if out := run(t, append(slices.Clone(h.Programs.Command), "-t", table, "-S")...); strings.Contains(out, "SLUICE") {
				t.Errorf("left in table %s: %s", table, out)
			}
		}
	})
}

// leave leaves what a Probe leaves that is killed, at its worst, beside what
// others have that looks alike. It returns a check of the latter.
func leave(t *testing.T, k *nlKernel) (kept func()) {
	t.Helper()
	ctx := context.Background()
	at := throwAways(k.family)
	must(t, k, op{kind: putServer, key: at[1], settings: trialSettings("rr")}, op{kind: putServer, key: at[probePorts-1], settings: trialSettings("mh")})
	theirs := trialSettings("rr")
	theirs.timeout++
	must(t, k, op{kind: putServer, key: at[0], settings: settings{scheduler: "wlc"}}, op{kind: putServer, key: at[2], settings: theirs},
		op{kind: putServer, key: at[3], settings: trialSettings("rr")}, op{kind: putDest, key: at[3], dest: destination{netip.AddrPortFrom(nth(k.family, 244, 1), 80), 1}})
	p := probe{nlKernel: k}
	set := trialSet(k.family, 99999, 1)
	if err := p.trySet(ctx, ipset.Spec{Name: set, Type: ipset.HashIPPort}); err != nil {
		t.Fatal(err)
	}
	run(t, "ipset", "create", set+"x", "hash:ip")
	run(t, "ipset", "create", trialSet(10-k.family, 99999, 1), "hash:ip") // of the other family
	for _, table := range []string{tableFilter, tableMangle} {
		run(t, append(slices.Clone(k.run.Command), "-t", table, "-N", chainProbe)...)
		run(t, append(slices.Clone(k.run.Command), "-t", table, "-A", chainProbe, "-m", "set", "--match-set", set, "dst,dst", "-j", "RETURN")...)
	}
	run(t, "ip", "link", "add", probeDevice, "type", "dummy")
	other := probeDevice[:len(probeDevice)-1]
	run(t, "ip", "link", "add", other, "type", "dummy")
	return func() {
		t.Helper()
		found, err := k.lookup(ctx, at)
		if err != nil || len(found) != 3 || found[at[0]] == nil || found[at[2]] == nil || found[at[3]] == nil {
			t.Errorf("virtual servers %v, %v; want those of others alone", found, err)
		}
		if sets := strings.Fields(run(t, "ipset", "list", "-n")); len(sets) != 2 || slices.Contains(sets, set) {
			t.Errorf("sets %q; want those of others alone", sets)
		}
		if links := run(t, "ip", "-o", "link"); strings.Contains(links, probeDevice+":") || !strings.Contains(links, other+":") {
			t.Errorf("devices %s; want those of others alone", links)
		}
		for _, table := range tables {
			if out := run(t, append(slices.Clone(k.run.Command), "-t", table, "-S")...); strings.Contains(out, chainProbe) {
				t.Errorf("left in table %s: %s", table, out)
			}
		}
	}
}

// TestGuestProbe3Killed: what a Probe left that was killed goes with the next, and
// with cleaning up, and nothing else goes.
func TestGuestProbe3Killed(t *testing.T) {
	for name, sweep := range map[string]func(model.Family) error{
		"probe":   func(f model.Family) error { _, err := Probe(context.Background(), f, "legacy"); return err },
		"cleanup": func(f model.Family) error { return CleanupHost(context.Background(), f, nil) },
	} {
		eachFamily(t, func(t *testing.T, f model.Family) {
			t.Run(name, func(t *testing.T) {
				k := guestKernel(t, f)
				kept := leave(t, k)
				if err := sweep(f); err != nil {
					t.Error(err)
				}
				kept()
			})
		})
	}
}

// TestProbeWithoutIPVS: a kernel without says so, and what to do.
func TestProbeWithoutIPVS(t *testing.T) {
	if uml.Inside() || uml.Native() {
		t.Skip("SKIPPED: this kernel has IPVS")
	}
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: not root")
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		t.Skip("SKIPPED: no iptables: ", err)
	}
	_, err := Probe(context.Background(), model.IPv4, "auto")
	if missing := (*Unavailable)(nil); !errors.As(err, &missing) || !strings.Contains(err.Error(), "ip_vs") {
		t.Errorf("error %v", err)
	}
}

// TestProbeInterrupted: a probe that was stopped gives no answer.
func TestProbeInterrupted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: not root")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Probe(ctx, model.IPv4, "auto"); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestCheckScheduler(t *testing.T) {
	offered := []string{"rr", "sh"}
	if err := CheckScheduler("sh", offered); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]string{
		"mh":    `this kernel has no IPVS scheduler "mh" (load module ip_vs_mh); it has rr, sh`,
		"bogus": `there is no IPVS scheduler "bogus"; this kernel has rr, sh`,
	} {
		if err := CheckScheduler(name, offered); err == nil || err.Error() != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// schedulersOf asks for the schedulers alone.
func schedulersOf(ctx context.Context, family model.Family) ([]string, error) {
	k, err := newKernel(family, xtables.Programs{Family: family}, xtables.Stats{})
	if err != nil {
		return nil, err
	}
	defer k.close()
	var h Host
	p := probe{nlKernel: k, host: &h}
	err = p.ipvs(ctx)
	return h.Schedulers, err
}
