package ipvs

import (
	"context"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
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

// TestGuestProbe1LoadsWithoutModprobe: the kernel loads IPVS and then schedulers
// by itself. It must run first.
func TestGuestProbe1LoadsWithoutModprobe(t *testing.T) {
	guest(t)
	if _, err := os.Stat("/proc/net/ip_vs"); err == nil {
		t.Skip("SKIPPED: this kernel has IPVS already")
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	got, err := Schedulers(context.Background(), model.IPv4)
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
	if err == nil || !strings.Contains(err.Error(), "ip_vs") {
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
