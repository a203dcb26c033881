package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// newTestCluster is a lab without an API server.
func newTestCluster(t *testing.T, mode, variant string) *cluster {
	t.Helper()
	if err := netlab.Supported(); err != nil {
		t.Skip(err)
	}
	programs := []string{"nft"}
	if mode == modeIPTables {
		programs = []string{"xtables-" + variant + "-multi"}
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skip(err)
		}
	}
	s := &settings{mode: mode, variants: []string{variant}, programs: []string{ours}, services: 1, endpoints: 1}
	c, err := newCluster(s, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.lab.Close)
	return c
}

// The node that others are compared with tracks connections as they do.
func TestBare(t *testing.T) {
	for _, m := range [][2]string{{modeIPTables, "legacy"}, {modeIPTables, "nft"}, {modeNFTables, modeNFTables}} {
		t.Run(m[0]+"/"+m[1], func(t *testing.T) {
			c := newTestCluster(t, m[0], m[1])
			t.Setenv("XTABLES_LOCKFILE", filepath.Join(c.dir, "lock"))
			name := nodeName(bare, m[1])
			node, pod := c.lab.Host(name), c.lab.Host(podName(name))
			trial := newTrial(c, c.s, ours, m[1])
			if _, err := trial.path(); err != nil {
				t.Fatal(err)
			}
			for range 2 { // once for each program
				if err := trial.prepareBare(t.Context(), node); err != nil {
					t.Fatal(err)
				}
			}
			conn, err := pod.DialContext(t.Context(), "tcp4", netip.AddrPortFrom(canaryEndpoint(0), endpointPort).String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			var flows []*netlink.ConntrackFlow
			err = node.Do(func() (err error) {
				flows, err = netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
				return err
			})
			if err != nil || len(flows) != 1 {
				t.Errorf("%d flows are tracked, want 1: %v", len(flows), err)
			}
		})
	}
}

// dnat is a ruleset that translates Services.
func dnat(services map[netip.AddrPort]netip.AddrPort) string {
	var out strings.Builder
	out.WriteString("table ip fake {\n\tchain prerouting {\n\t\ttype nat hook prerouting priority -100\n")
	for from, to := range services {
		fmt.Fprintf(&out, "\t\tip daddr %s tcp dport %d dnat to %s\n", from.Addr(), from.Port(), to)
	}
	out.WriteString("\t}\n}\n")
	return out.String()
}

// Attempts from before there were rules do not make later ones fail.
func TestProber(t *testing.T) {
	c := newTestCluster(t, modeNFTables, modeNFTables)
	name := nodeName(ours, modeNFTables)
	node, pod := c.lab.Host(name), c.lab.Host(podName(name))
	if err := bareNFTables(t.Context(), node); err != nil { // it tracks
		t.Fatal(err)
	}
	p := &prober{port: lastPort - 3}
	try := func() (err error) {
		_ = pod.Do(func() error { err = p.try(numbered(0).addr()); return nil })
		return err
	}
	for range 10 {
		if err := try(); err != unix.ECONNREFUSED {
			t.Fatalf("error %v of an address that nobody translates, want that it is refused", err)
		}
	}
	rules := dnat(map[netip.AddrPort]netip.AddrPort{numbered(0).addr(): netip.AddrPortFrom(c.s.layout().endpoint(0, 0, 0), endpointPort)})
	if _, err := node.RunInput(t.Context(), rules, "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	if err := await(t.Context(), 10*time.Second, "the Service answers", try); err != nil {
		t.Error(err)
	}
	if p.port < firstPort || p.port > firstPort+1000 {
		t.Errorf("port %d after the last one", p.port)
	}
}

// fakeProgram writes a program that does once what a command says, and then
// nothing any more.
func fakeProgram(t *testing.T, file, command string) {
	t.Helper()
	text := "#!/bin/sh\n[ \"$1\" != --version ] || { echo fake; exit; }\n" + command + "\nexec sleep 1000\n"
	if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// firstEndpoints has one endpoint for each Service of a run.
func firstEndpoints(l layout) map[netip.AddrPort]netip.AddrPort {
	to := map[netip.AddrPort]netip.AddrPort{
		netip.AddrPortFrom(kubernetesIP, 443): netip.AddrPortFrom(controlAddr, 6443),
		dns.addr():                            netip.AddrPortFrom(l.dns()[0], endpointPort),
		canary.addr():                         netip.AddrPortFrom(canaryEndpoint(0), endpointPort),
	}
	for i := range l.services {
		to[numbered(i).addr()] = netip.AddrPortFrom(l.endpoint(i, 0, 0), endpointPort)
	}
	return to
}

// TestGivesUp measures a program that never serves anything, and one that serves
// but does not follow: what takes too long is said so, and the rest is measured.
func TestGivesUp(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	t.Parallel()
	if err := netlab.Supported(); err != nil {
		t.Skip(err)
	}
	tools := t.TempDir()
	s := &settings{}
	if err := s.find(""); err != nil {
		t.Skip(err)
	}
	for _, name := range []string{"etcd", "kube-apiserver"} {
		if err := os.Symlink(filepath.Join(s.tools, name), filepath.Join(tools, name)); err != nil {
			t.Fatal(err)
		}
	}
	l := layout{12, 2}
	rules := filepath.Join(tools, "rules")
	if err := os.WriteFile(rules, []byte(dnat(firstEndpoints(l))), 0o644); err != nil {
		t.Fatal(err)
	}
	fakeProgram(t, filepath.Join(tools, peer), "true")
	fakeProgram(t, filepath.Join(tools, ours), "nft -f "+rules)
	s, err := parse([]string{"-mode", modeNFTables, "-tools", tools, "-sluice", filepath.Join(tools, ours), "-services", fmt.Sprint(l.services), "-endpoints", fmt.Sprint(l.endpoints),
		"-changes", "2", "-burst", "6", "-connections", "40", "-rest", "1s", "-cold-limit", "15s", "-follow-limit", "2s", "-repair-limit", "2s"})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := run(t.Context(), s, &out); err != nil {
		t.Errorf("what is given up is a result, not an error: %v", err)
	}
	checkRows(t, out.String(), []row{
		{"cold start until every Service answers", "> 15 s", ""},
		{"CPU time of a cold start", "> *", ""}, // 0, or the least that can be told apart
		{"endpoint change until traffic follows, p99", "-", "> 2 s"},
		{"traffic follows the last of many changes after", "-", "> 2 s"},
		{"connections lost during these changes", "-", "0"},
		{"CPU time per 1,000 endpoint changes", "-", ""},
		{"memory after all changes", "-", ""},
		{"rules flushed, until every Service answers again", "-", "> 2 s"},
		{"new connection to a Service, added latency", "-", ""},
	})
	if n := strings.Count(out.String(), "Not measured"); n != 1 || !strings.Contains(out.String(), "kube-proxy, nftables: the rest of its figures: cold start takes more than 15s") {
		t.Errorf("%d holes are named, want one", n)
	}
}

// row is what a row of the table should say; "" for anything but nothing. A * at the end
// stands for anything.
type row struct{ title, peer, ours string }

func checkRows(t *testing.T, table string, rows []row) {
	t.Helper()
	for _, r := range rows {
		_, line, _ := strings.Cut(table, "| "+r.title+" ")
		cells := strings.Split(line, "|")
		if len(cells) < 3 {
			t.Errorf("no row %q in\n%s", r.title, table)
			continue
		}
		for k, want := range []string{r.peer, r.ours} {
			got := strings.TrimSpace(cells[k+1])
			begin, any := strings.CutSuffix(want, "*")
			if want == "" && (got == "" || got == "-") || any && !strings.HasPrefix(got, begin) || want != "" && !any && got != want {
				t.Errorf("%s: %q in column %d, want %q, of\n%s", r.title, got, k+1, want, table)
			}
		}
	}
}
