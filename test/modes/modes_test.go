package modes

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/uml"
)

const (
	binaryEnv   = "SLUICE_TEST_AGENT"
	clusterCIDR = "10.244.0.0/16,fd00:10:244::/48"
	echoPort    = 8080
	openPort    = 7000
)

// TestModes builds the agent and runs the tests inside, on a kernel with IPVS.
func TestModes(t *testing.T) {
	if uml.Inside() {
		t.Skip("this is inside")
	}
	dir := t.TempDir()
	binary := buildAgent(t, dir)
	uml.RerunIn(t, uml.Machine{Writable: dir, Env: []string{binaryEnv + "=" + binary}}, "^(TestModeChange|TestIPVSAndNFTables)$")
}

// buildAgent builds the agent into a folder. The race detector does not run in
// User-Mode Linux.
func buildAgent(t *testing.T, dir string) string {
	t.Helper()
	binary := filepath.Join(dir, "sluice")
	if out, err := exec.Command("go", "build", "-race=false", "-buildvcs=false", "-o", binary, "../../cmd/sluice").CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	return binary
}

const manifest = `apiVersion: v1
kind: Node
metadata: {name: node1}
status: {addresses: [{type: InternalIP, address: 172.18.0.11}, {type: InternalIP, address: "fd00:172:18::11"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: LoadBalancer
  clusterIP: 10.96.1.1
  clusterIPs: [10.96.1.1, "fd00:10:96::101"]
  externalTrafficPolicy: Local
  healthCheckNodePort: 32001
  loadBalancerSourceRanges: [192.168.100.0/24, 172.18.0.0/16]
  ports:
  - {name: http, port: 80, targetPort: 8080, nodePort: 30001}
  - {name: open, port: 7000, targetPort: 7000, nodePort: 30002}
  - {name: udp, port: 53, targetPort: 5353, protocol: UDP, nodePort: 30003}
status: {loadBalancer: {ingress: [{ip: 203.0.113.1}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-4, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: open, port: 7000}, {name: udp, port: 5353, protocol: UDP}]
endpoints:
- {addresses: [10.244.1.11], nodeName: node1}
- {addresses: [10.244.2.11], nodeName: node2}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-6, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8080}, {name: open, port: 7000}, {name: udp, port: 5353, protocol: UDP}]
endpoints:
- {addresses: ["fd00:10:244:1::11"], nodeName: node1}
- {addresses: ["fd00:10:244:2::11"], nodeName: node2}
---
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: default}
spec:
  clusterIP: 10.96.1.2
  clusterIPs: [10.96.1.2, "fd00:10:96::102"]
  ports: [{port: 80}]
`

// What somebody else has: each line is a command.
const (
	foreignIPVS = `ipvsadm -A -t 192.0.2.9:80 -s wlc
ipvsadm -a -t 192.0.2.9:80 -r 10.99.0.1:80 -m -w 7
ipvsadm -A -f 77 -s rr
ipvsadm -A -t [fd00:99::9]:443 -s sh
ip link add foreign0 type dummy
ip addr add 192.0.2.9/32 dev foreign0`
	foreignRules = `ipset create FOREIGN hash:ip
ipset add FOREIGN 192.0.2.1
IPTABLES -N FOREIGN
IPTABLES -A FOREIGN -m set --match-set FOREIGN src -j DROP
IPTABLES -A INPUT -j FOREIGN
IPTABLES -t nat -A POSTROUTING -s 192.0.2.1/32 -j RETURN`
)

// world is a lab, one of whose nodes runs the agent.
type world struct {
	t         *testing.T
	lab       *netlab.Lab
	node      *netlab.Namespace
	iptables  []string // its commands here: each has rules of its own
	ipvs      bool     // the kernel has it
	binary    string
	manifests string
	agent     *exec.Cmd
	ended     chan error
	log       string
}

func (w *world) run(args ...string) string {
	w.t.Helper()
	out, err := w.node.Run(context.Background(), args[0], args[1:]...)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// newWorld is for the kernel with IPVS that uml gives.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := buildWorld(t, os.Getenv(binaryEnv))
	w.iptables, w.ipvs = []string{"iptables"}, true
	w.commands(foreignIPVS)
	w.commands(strings.ReplaceAll(foreignRules, "IPTABLES", "iptables"))
	return w
}

func buildWorld(t *testing.T, binary string) *world {
	t.Helper()
	lab, err := netlab.New(netlab.Default())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lab.Close)
	w := &world{t: t, lab: lab, node: lab.Host("node1"), binary: binary, manifests: t.TempDir()}
	if err := os.WriteFile(filepath.Join(w.manifests, "web.yaml"), []byte(manifest), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, pod := range []string{"pod1", "pod3"} {
		for _, a := range lab.Addrs(pod) {
			if _, err := lab.Host(pod).Serve(pod, "tcp", netip.AddrPortFrom(a, echoPort)); err != nil {
				t.Fatal(err)
			}
			if _, err := lab.Host(pod).ServeOpen(pod, netip.AddrPortFrom(a, openPort)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return w
}

// commands runs each line.
func (w *world) commands(list string) {
	w.t.Helper()
	for line := range strings.Lines(list) {
		w.run(strings.Fields(line)...)
	}
}

// Words of the agent's log for what it removes.
const (
	goneIPTables  = "the iptables mode's chains"
	goneIPVS      = "the ipvs mode's virtual servers"
	goneNFTables  = "the nftables mode's table"
	goneKubeProxy = "the table of kube-proxy's nftables mode"
)

// start runs the agent in a mode and waits until it has removed what the mode
// before has left, "" if there was none, in both families.
func (w *world) start(mode, removes string, flags ...string) {
	w.t.Helper()
	w.launch(mode, flags...)
	want := []string{`"All Services are served" ipFamily="IPv4"`, `"All Services are served" ipFamily="IPv6"`}
	if removes != "" {
		want = append(want, removed+` ipFamily="IPv4" removed="`+removes, removed+` ipFamily="IPv6" removed="`+removes)
	}
	w.until("the agent serves in mode "+mode, func() error {
		log := w.logged()
		for _, s := range want {
			if !strings.Contains(log, s) {
				return fmt.Errorf("the log does not say %s", s)
			}
		}
		return nil
	})
	log := w.logged()
	if strings.Contains(log, "may still be there") || removes == "" && strings.Contains(log, removed) {
		w.t.Errorf("mode %s:\n%s", mode, log)
	}
}

const removed = `"Removed what another mode had left"`

// launch runs the agent.
func (w *world) launch(mode string, flags ...string) {
	w.t.Helper()
	w.log = filepath.Join(w.t.TempDir(), mode+".log")
	out, err := os.Create(w.log)
	if err != nil {
		w.t.Fatal(err)
	}
	defer out.Close()
	w.agent = exec.Command(w.binary, append([]string{"--proxy-mode=" + mode, "--mode-fallback=false", "--manifests=" + w.manifests,
		"--hostname-override=node1", "--cluster-cidr=" + clusterCIDR, "--conntrack-max-per-core=0"}, flags...)...)
	w.agent.Stdout, w.agent.Stderr = out, out
	if err := w.node.Start(w.agent); err != nil {
		w.t.Fatal(err)
	}
	w.ended = make(chan error, 1)
	go func(c *exec.Cmd, ended chan error) { ended <- c.Wait() }(w.agent, w.ended)
}

func (w *world) stop() {
	w.t.Helper()
	_ = w.agent.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-w.ended:
		if err != nil {
			w.t.Errorf("the agent ended with %v\n%s", err, w.logged())
		}
	case <-time.After(30 * time.Second):
		w.t.Fatal("the agent does not stop")
	}
}

// refused waits until the agent serves or says that its mode cannot be had here.
func (w *world) refused() bool {
	w.t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		select {
		case err := <-w.ended:
			if err == nil || !strings.Contains(w.logged(), " cannot run here: ") {
				w.t.Fatalf("the agent ended with %v\n%s", err, w.logged())
			}
			return true
		case <-deadline:
			w.t.Fatalf("the agent neither serves nor ends\n%s", w.logged())
		case <-time.After(50 * time.Millisecond):
		}
		if log := w.logged(); strings.Contains(log, `"All Services are served" ipFamily="IPv4"`) && strings.Contains(log, `"All Services are served" ipFamily="IPv6"`) {
			return false
		}
	}
}

func (w *world) logged() string {
	text, err := os.ReadFile(w.log)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func (w *world) until(what string, so func() error) {
	w.t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		err := so()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			w.t.Fatalf("gave up waiting until %s: %v\n%s", what, err, w.logged())
		case err := <-w.ended:
			w.t.Fatalf("the agent ended (%v) while waiting until %s\n%s", err, what, w.logged())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// serves checks that pods, the node and the outside are answered, in both
// families.
func (w *world) serves(mode string) {
	w.t.Helper()
	for _, q := range []struct{ from, to string }{
		{"pod2", "10.96.1.1:80"}, {"pod2", "[fd00:10:96::101]:80"}, {"node1", "10.96.1.1:80"}, {"node1", "[fd00:10:96::101]:80"},
		{"client", "172.18.0.11:30001"}, {"client", "[fd00:172:18::11]:30001"},
	} {
		for range 6 {
			a, err := w.lab.Host(q.from).Ask(w.t.Context(), "tcp", netip.Addr{}, netip.MustParseAddrPort(q.to), 5*time.Second)
			if err != nil {
				w.t.Fatal(err)
			}
			if a.Result != netlab.Answered {
				w.t.Errorf("mode %s: %s from %s: %s", mode, q.to, q.from, a)
				break
			}
		}
	}
	for _, to := range []string{"10.96.1.2:80", "[fd00:10:96::102]:80"} {
		a, err := w.lab.Host("pod2").Ask(w.t.Context(), "tcp", netip.Addr{}, netip.MustParseAddrPort(to), 5*time.Second)
		if err != nil || a.Result != netlab.Refused {
			w.t.Errorf("mode %s: %s, without endpoints: %s, %v", mode, to, a, err)
		}
	}
}

// state is what the node's kernel has, line by line. Counters are not in it.
func (w *world) state() []string {
	w.t.Helper()
	var out []string
	add := func(prefix, text string, keep func(string) bool) {
		for line := range strings.Lines(text) {
			line = strings.TrimSpace(line)
			if line != "" && keep(line) {
				out = append(out, prefix+" "+line)
			}
		}
	}
	always := func(string) bool { return true }
	for _, iptables := range w.iptables {
		for _, program := range []string{iptables + "-save", strings.Replace(iptables, "ip", "ip6", 1) + "-save"} {
			add(program, w.run(program), func(line string) bool {
				return strings.HasPrefix(line, ":") && !strings.Contains(line, " ACCEPT ") || strings.HasPrefix(line, "-A ")
			})
		}
	}
	for i, line := range out {
		if strings.Contains(line, " :") {
			out[i], _, _ = strings.Cut(line, " [") // counters
		}
	}
	// The kubelet's as well, so it stays.
	out = slices.DeleteFunc(out, func(line string) bool { return strings.Contains(line, "KUBE-FIREWALL") })
	add("ipset", w.run("ipset", "list", "-n"), always)
	if !w.ipvs {
		return append(out, w.tables()...)
	}
	add("ipvs", w.run("ipvsadm", "-S", "-n"), always)
	add("addr", w.run("ip", "-o", "addr", "show", "dev", "foreign0"), func(line string) bool { return strings.Contains(line, "192.0.2.9") })
	if text, err := w.node.Run(context.Background(), "ip", "-o", "addr", "show", "dev", "kube-ipvs0"); err == nil {
		add("kube-ipvs0", text, always)
		out = append(out, "kube-ipvs0 exists")
	}
	return out
}

// lacks fails if any line of the state has one of the words.
func (w *world) lacks(mode string, words ...string) {
	w.t.Helper()
	for _, line := range w.state() {
		for _, word := range words {
			if strings.Contains(line, word) {
				w.t.Errorf("in mode %s there is still: %s", mode, line)
			}
		}
	}
}

// has fails unless a line of the state has the word.
func (w *world) has(mode, word string) {
	w.t.Helper()
	if !slices.ContainsFunc(w.state(), func(line string) bool { return strings.Contains(line, word) }) {
		w.t.Errorf("in mode %s there is no %s", mode, word)
	}
}

// keeps fails if something is gone that was there before the agent came.
func (w *world) keeps(mode string, before []string) {
	w.t.Helper()
	now := w.state()
	for _, line := range before {
		if !slices.Contains(now, line) {
			w.t.Errorf("after mode %s somebody else's is gone: %s", mode, line)
		}
	}
}

// TestModeChange goes from iptables to ipvs, back, and to ipvs again, then cleans
// up. Each mode serves, nothing of the other is left, and what others have stays.
func TestModeChange(t *testing.T) {
	if !uml.Inside() {
		t.Skip("run by TestModes, on a kernel with IPVS")
	}
	w := newWorld(t)
	before := w.state()
	theirs := func(mode string) { t.Helper(); w.keeps(mode, before) }
	// What only one mode of the two has.
	ofIPTables := []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES", "load balancer firewall"}
	ofIPVS := []string{"kube-ipvs0", "10.96.1.1:80", "[fd00:10:96::101]:80", "ipset KUBE-", "KUBE-NODE-PORT ", "KUBE-LOAD-BALANCER", "KUBE-IPVS"}

	w.start("iptables", "")
	w.serves("iptables")
	w.lacks("iptables", ofIPVS...)
	theirs("iptables")
	conn, err := w.lab.Host("pod2").Open(t.Context(), netip.Addr{}, netip.MustParseAddrPort("10.96.1.1:7000"), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	w.stop()

	w.start("ipvs", goneIPTables)
	w.serves("ipvs")
	w.lacks("ipvs", ofIPTables...)
	theirs("ipvs")
	if err := conn.Echo(5 * time.Second); err != nil {
		t.Errorf("a connection from before the change to ipvs: %v", err)
	}
	w.stop()
	w.serves("ipvs, stopped")

	w.start("iptables", goneIPVS)
	w.serves("iptables again")
	w.lacks("iptables again", ofIPVS...)
	theirs("iptables again")
	w.stop()

	w.start("ipvs", goneIPTables)
	w.serves("ipvs again")
	w.lacks("ipvs again", ofIPTables...)
	w.stop()

	w.cleanup(before)
}

// cleanup runs --cleanup, twice, and wants the kernel to have what it had before.
func (w *world) cleanup(before []string) {
	w.t.Helper()
	for range 2 {
		out, err := w.node.Run(w.t.Context(), w.binary, "--cleanup", "--hostname-override=node1")
		if err != nil {
			w.t.Fatalf("--cleanup: %v\n%s", err, out)
		}
		if diff := cmp.Diff(before, w.state()); diff != "" {
			w.t.Errorf("before the agent came (-) and after --cleanup (+):\n%s", diff)
		}
	}
}
