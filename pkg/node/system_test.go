package node

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// tree makes a machine out of files.
func tree(t *testing.T, files map[string]string) System {
	t.Helper()
	s := System{Root: t.TempDir()}
	for name, content := range files {
		path := filepath.Join(s.Root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

const nf = "proc/sys/net/netfilter/nf_conntrack_"

// machine is a node as the kernel leaves it.
func machine() map[string]string {
	return map[string]string{
		nf + "max": "65536\n", nf + "tcp_timeout_established": "432000\n", nf + "tcp_timeout_close_wait": "60\n",
		nf + "tcp_be_liberal": "0\n", nf + "udp_timeout": "30\n", nf + "udp_timeout_stream": "120\n",
		"sys/module/nf_conntrack/parameters/hashsize": "16384\n",
		"proc/sys/net/ipv4/conf/all/route_localnet":   "0\n",
	}
}

// defaults are kube-proxy's.
func defaults() Conntrack {
	return Conntrack{MaxPerCore: 32768, Min: 131072, TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour}
}

func TestConntrackSysctls(t *testing.T) {
	tests := []struct {
		name     string
		settings func(*Conntrack)
		files    map[string]string // differing from a fresh machine; "-" is missing
		cpus     int
		want     map[string]int // what is written
		skipped  []string
	}{
		{"fresh machine", nil, nil, 2,
			map[string]int{"max": 131072, "hashsize": 32768, "tcp_timeout_established": 86400, "tcp_timeout_close_wait": 3600}, nil},
		{"many CPUs", nil, nil, 16,
			map[string]int{"max": 524288, "hashsize": 131072, "tcp_timeout_established": 86400, "tcp_timeout_close_wait": 3600}, nil},
		{"too many CPUs", nil, nil, 256,
			map[string]int{"max": 1048576, "hashsize": 262144, "tcp_timeout_established": 86400, "tcp_timeout_close_wait": 3600}, nil},
		{"too many CPUs, larger minimum", func(c *Conntrack) { c.Min = 4 << 20 }, nil, 256,
			map[string]int{"max": 1048576, "hashsize": 262144, "tcp_timeout_established": 86400, "tcp_timeout_close_wait": 3600}, nil},
		{"a minimum above the cap", func(c *Conntrack) { c.Min = 4 << 20 }, nil, 2,
			map[string]int{"max": 4 << 20, "hashsize": 1 << 20, "tcp_timeout_established": 86400, "tcp_timeout_close_wait": 3600}, nil},
		{"nothing asked for", func(c *Conntrack) { *c = Conntrack{Min: 131072} }, nil, 2, map[string]int{}, nil},
		{"already so", nil, map[string]string{nf + "max": "131072", "sys/module/nf_conntrack/parameters/hashsize": "32768",
			nf + "tcp_timeout_established": "86400", nf + "tcp_timeout_close_wait": "3600"}, 2, map[string]int{}, nil},
		{"never lowered", nil, map[string]string{nf + "max": "2000000", "sys/module/nf_conntrack/parameters/hashsize": "500000",
			nf + "tcp_timeout_established": "100000", nf + "tcp_timeout_close_wait": "7200"}, 2, map[string]int{},
			[]string{"max", "tcp_timeout_established", "tcp_timeout_close_wait"}},
		{"lowered from a default", func(c *Conntrack) {
			c.TCPEstablishedTimeout, c.TCPCloseWaitTimeout = time.Hour, time.Minute
		}, map[string]string{nf + "tcp_timeout_established": "86400", nf + "tcp_timeout_close_wait": "3600"}, 2,
			map[string]int{"max": 131072, "hashsize": 32768, "tcp_timeout_established": 3600, "tcp_timeout_close_wait": 60}, nil},
		{"the rest", func(c *Conntrack) {
			*c = Conntrack{TCPBeLiberal: true, UDPTimeout: 10 * time.Second, UDPStreamTimeout: 300 * time.Second}
		}, nil, 2, map[string]int{"tcp_be_liberal": 1, "udp_timeout": 10, "udp_timeout_stream": 300}, nil},
		{"no conntrack", nil, map[string]string{nf + "max": "-", "sys/module/nf_conntrack/parameters/hashsize": "-",
			nf + "tcp_timeout_established": "-", nf + "tcp_timeout_close_wait": "-"}, 2, map[string]int{},
			[]string{"max", "hashsize", "tcp_timeout_established", "tcp_timeout_close_wait"}},
		{"not a number", nil, map[string]string{nf + "max": "many"}, 2,
			map[string]int{"hashsize": 32768, "tcp_timeout_established": 86400, "tcp_timeout_close_wait": 3600}, []string{"max"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			files := machine()
			for name, content := range test.files {
				if files[name] = content; content == "-" {
					delete(files, name)
				}
			}
			s := tree(t, files)
			settings := defaults()
			if test.settings != nil {
				test.settings(&settings)
			}
			changes := ConntrackSysctls(settings, test.cpus, s.ReadInt)
			got := map[string]int{}
			skipped := map[string]bool{}
			for _, c := range changes {
				short := strings.TrimPrefix(filepath.Base(c.Path), "nf_conntrack_")
				if c.Why == "" {
					t.Errorf("%s: no reason", short)
				}
				if c.Skip {
					skipped[short] = true
					continue
				}
				got[short] = c.Want
			}
			if !maps.Equal(got, test.want) {
				t.Errorf("changes %v, want %v", got, test.want)
			}
			if len(skipped) != len(test.skipped) {
				t.Errorf("skipped %v, want %v", skipped, test.skipped)
			}
			for _, name := range test.skipped {
				if !skipped[name] {
					t.Errorf("%s is not reported as skipped", name)
				}
			}
			if errs := s.Apply(changes); len(errs) != 0 {
				t.Errorf("Apply: %v", errs)
			}
			for _, again := range ConntrackSysctls(settings, test.cpus, s.ReadInt) {
				if !again.Skip {
					t.Errorf("after Apply there is still to do: %v", again)
				}
			}
		})
	}
}

func TestNetworkSysctls(t *testing.T) {
	s := tree(t, machine())
	if got := NetworkSysctls(Network{}, s.ReadInt); len(got) != 0 {
		t.Errorf("without localhost NodePorts: %v, want nothing", got)
	}
	changes := NetworkSysctls(Network{LocalhostNodePorts: true}, s.ReadInt)
	if errs := s.Apply(changes); len(changes) != 1 || len(errs) != 0 {
		t.Fatalf("changes %v, errors %v; want one and none", changes, errs)
	}
	if n, err := s.ReadInt("proc/sys/net/ipv4/conf/all/route_localnet"); n != 1 || err != nil {
		t.Errorf("route_localnet is %d, %v; want 1", n, err)
	}
	if got := NetworkSysctls(Network{LocalhostNodePorts: true}, s.ReadInt); len(got) != 0 {
		t.Errorf("second time: %v, want nothing", got)
	}
}

func TestIPVSSysctls(t *testing.T) {
	const root = "proc/sys/net/ipv4/"
	kernel := map[string]string{
		root + "ip_forward": "0", root + "vs/conntrack": "0", root + "vs/conn_reuse_mode": "1",
		root + "vs/expire_nodest_conn": "0", root + "vs/expire_quiescent_template": "0",
		root + "conf/all/arp_ignore": "0", root + "conf/all/arp_announce": "0", root + "conf/all/route_localnet": "0",
	}
	always := map[string]int{"ip_forward": 1, "vs/conntrack": 1, "vs/expire_nodest_conn": 1, "vs/expire_quiescent_template": 1}
	for _, test := range []struct {
		name    string
		version KernelVersion
		strict  bool
		reuse   int
		text    string
	}{
		{"with the delay", KernelVersion{5, 8, 18}, false, 0, "delay it by a second"},
		{"the first that has it", KernelVersion{4, 1, 0}, false, 0, "delay it by a second"},
		{"mended", KernelVersion{5, 9, 0}, true, 1, "anew"},
		{"before it", KernelVersion{3, 10, 0}, false, 1, "has no conn_reuse_mode"},
		{"unknown", KernelVersion{}, true, 1, "not known"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := tree(t, kernel)
			settings := Network{IPVS: true, StrictARP: test.strict, Kernel: test.version}
			if errs := s.Apply(NetworkSysctls(settings, s.ReadInt)); len(errs) != 0 {
				t.Fatal(errs)
			}
			want := map[string]int{"vs/conn_reuse_mode": test.reuse, "conf/all/arp_ignore": 0, "conf/all/arp_announce": 0, "conf/all/route_localnet": 0}
			if test.strict {
				want["conf/all/arp_ignore"], want["conf/all/arp_announce"] = 1, 2
			}
			maps.Copy(want, always)
			for name, n := range want {
				if got, err := s.ReadInt(root + name); got != n || err != nil {
					t.Errorf("%s is %d, %v; want %d", name, got, err, n)
				}
			}
			if got := ReuseText(test.version); !strings.Contains(got, test.text) {
				t.Errorf("%q does not say %q", got, test.text)
			}
			if again := NetworkSysctls(settings, s.ReadInt); len(again) != 0 {
				t.Errorf("a second time: %v", again)
			}
		})
	}
	for _, c := range NetworkSysctls(Network{IPVS: true}, tree(t, nil).ReadInt) {
		if !c.Skip || c.Why == "" {
			t.Errorf("%s cannot be read and yet is to be written", c.Name())
		}
	}
}

// TestApplyGoesOn: what cannot be written is reported by name, the rest is done,
// and no file is made.
func TestApplyGoesOn(t *testing.T) {
	s := tree(t, map[string]string{"proc/sys/net/a": "1"})
	errs := s.Apply([]Change{{Path: "proc/sys/net/missing", Want: 5}, {Path: "proc/sys/net/a", Want: 7}})
	if len(errs) != 1 || !errors.Is(errs[0], fs.ErrNotExist) || !strings.Contains(errs[0].Error(), "net.missing") {
		t.Errorf("errors %v, want one that names net.missing", errs)
	}
	if n, _ := s.ReadInt("proc/sys/net/a"); n != 7 {
		t.Errorf("the other setting is %d, want 7", n)
	}
}

func TestOnlineCPUs(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-1": 2, "0-3,8,10-11": 7, "": runtime.NumCPU(), "3-1": runtime.NumCPU(), "x": runtime.NumCPU()} {
		s := tree(t, map[string]string{"sys/devices/system/cpu/online": list + "\n"})
		if got := s.OnlineCPUs(); got != want {
			t.Errorf("%q: %d CPUs, want %d", list, got, want)
		}
	}
	if got := tree(t, nil).OnlineCPUs(); got != runtime.NumCPU() {
		t.Errorf("nothing to read: %d CPUs, want %d", got, runtime.NumCPU())
	}
}

func TestIPv6(t *testing.T) {
	const inet6, disable = "proc/net/if_inet6", "proc/sys/net/ipv6/conf/all/disable_ipv6"
	for _, test := range []struct {
		name  string
		files map[string]string
		want  bool
	}{
		{"on", map[string]string{inet6: "", disable: "0\n"}, true},
		{"off by sysctl", map[string]string{inet6: "", disable: "1\n"}, false},
		{"not in the kernel", nil, false},
		{"no sysctl", map[string]string{inet6: ""}, true},
	} {
		ok, why := tree(t, test.files).IPv6()
		if ok != test.want || ok != (why == "") {
			t.Errorf("%s: %v %q, want %v and a reason if not", test.name, ok, why, test.want)
		}
	}
}

func TestSetOOMScoreAdj(t *testing.T) {
	s := tree(t, map[string]string{"proc/self/oom_score_adj": "0\n"})
	if err := s.SetOOMScoreAdj(-999); err != nil {
		t.Fatal(err)
	}
	if n, err := s.ReadInt("proc/self/oom_score_adj"); n != -999 || err != nil {
		t.Errorf("score %d, %v; want -999", n, err)
	}
	if err := s.SetOOMScoreAdj(-1001); err == nil {
		t.Error("-1001 was accepted")
	}
	if err := tree(t, nil).SetOOMScoreAdj(-999); err == nil {
		t.Error("no error where there is no such file")
	}
}

func TestKernelVersion(t *testing.T) {
	for release, want := range map[string]KernelVersion{
		"6.18.44-fc-v669":                  {6, 18, 44},
		"5.4-rc1":                          {5, 4, 0},
		"4.18.0-553.el8_10.x86_64":         {4, 18, 0},
		"6.1.0-13-cloud-amd64":             {6, 1, 0},
		"6.6.87.2-microsoft-standard-WSL2": {6, 6, 87},
		"5.15.":                            {5, 15, 0},
	} {
		if got, err := ParseKernelVersion(release); got != want || err != nil {
			t.Errorf("%q: %v, %v; want %v", release, got, err, want)
		}
	}
	for _, release := range []string{"", "6", "abc", "6..1", "6." + strconv.Itoa(1<<62) + "0"} {
		if v, err := ParseKernelVersion(release); err == nil {
			t.Errorf("%q: %v, want an error", release, v)
		}
	}
	v := KernelVersion{5, 8, 0}
	if !v.AtLeast(5, 8) || !v.AtLeast(4, 19) || v.AtLeast(5, 9) || v.AtLeast(6, 0) {
		t.Error("AtLeast is wrong")
	}
	if v, err := (System{}).KernelVersion(); err != nil || v.Major < 3 {
		t.Errorf("this kernel: %v, %v", v, err)
	}
}
