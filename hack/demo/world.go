package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// Names of the hosts; examples/ has their addresses.
const (
	node   = "node-1" // runs the agent
	far    = "node-2"
	client = "client"
	shell  = "shell" // a pod that asks
)

var (
	servers   = []string{"web-1", "web-2", "web-3"}
	local     = servers[:2] // those on node
	farServer = servers[2]
)

// world is the namespaces, the agent and its folder of manifests.
type world struct {
	o     options
	mode  *mode
	lab   *netlab.Lab
	dir   string // temporary: manifests, the agent's log, the lock of iptables
	agent *agent
	pages *http.Client // of the node
	web   *http.Client // of the client outside
}

func build(o options) (w *world, err error) {
	w = &world{o: o, mode: modes[o.mode]}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.o.agent, err = filepath.Abs(o.agent); err != nil {
		return w, err
	}
	if _, err = os.Stat(w.o.agent); err != nil {
		return w, fmt.Errorf("there is no agent to show (make build): %w", err)
	}
	if w.dir, err = os.MkdirTemp("", "sluice-demo-"); err != nil {
		return w, err
	}
	if err = copyManifests(o.manifests, w.manifests()); err != nil {
		return w, err
	}
	// Some modes have more to show.
	if extra := filepath.Join(o.extra, o.mode); o.extra != "" {
		if _, none := os.Stat(extra); none == nil {
			err = copyManifests(extra, w.manifests())
		}
		if err != nil {
			return w, err
		}
	}
	if w.lab, err = netlab.New(hosts()); err != nil {
		return w, err
	}
	// What a network around a cluster does: load balancer addresses go to a node.
	if err = w.lab.RouteVia(netip.MustParsePrefix("203.0.113.0/24"), node); err != nil {
		return w, err
	}
	for _, name := range servers {
		if err = w.serve(name); err != nil {
			return w, err
		}
	}
	w.pages, w.web = w.httpFrom(node), w.httpFrom(client)
	return w, nil
}

func hosts() netlab.Config {
	host := func(name, v4, v6 string) netlab.HostSpec {
		return netlab.HostSpec{Name: name, Addrs: []netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}}
	}
	prefixes := func(v4, v6 string) []netip.Prefix {
		return []netip.Prefix{netip.MustParsePrefix(v4), netip.MustParsePrefix(v6)}
	}
	return netlab.Config{
		Nodes: []netlab.NodeSpec{{
			HostSpec: host(node, "172.18.0.11", "fd00:172:18::11"),
			PodCIDRs: prefixes("10.244.1.0/24", "fd00:10:244:1::/64"),
			Pods: []netlab.HostSpec{
				host(servers[0], "10.244.1.11", "fd00:10:244:1::11"),
				host(servers[1], "10.244.1.12", "fd00:10:244:1::12"),
				host(shell, "10.244.1.20", "fd00:10:244:1::20"),
			},
		}, {
			HostSpec: host(far, "172.18.0.12", "fd00:172:18::12"),
			PodCIDRs: prefixes("10.244.2.0/24", "fd00:10:244:2::/64"),
			Pods:     []netlab.HostSpec{host(servers[2], "10.244.2.13", "fd00:10:244:2::13")},
		}},
		Clients: []netlab.HostSpec{host(client, "192.168.100.10", "fd00:192:168:100::10")},
	}
}

const (
	clusterCIDRs = "10.244.0.0/16,fd00:10:244::/48"
	tcpPort      = 8080
	udpPort      = 5140
)

// serve makes a pod answer where examples/ says that it does.
func (w *world) serve(pod string) error {
	for _, a := range w.lab.Addrs(pod) {
		for network, port := range map[string]uint16{"tcp": tcpPort, "udp": udpPort} {
			if _, err := w.lab.Host(pod).Serve(pod, network, netip.AddrPortFrom(a, port)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *world) httpFrom(host string) *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: w.lab.Host(host).DialContext, DisableKeepAlives: true}}
}

// close takes everything away.
func (w *world) close() error {
	if w.agent != nil {
		w.agent.stop(syscall.SIGKILL)
	}
	if w.lab != nil {
		w.lab.Close()
	}
	if w.dir == "" {
		return nil
	}
	return os.RemoveAll(w.dir)
}

func (w *world) manifests() string { return filepath.Join(w.dir, "manifests") }
func (w *world) logFile() string   { return filepath.Join(w.dir, "agent.log") }

func copyManifests(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(from, "*.yaml"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("there are no manifests in %s: %w", from, errors.Join(err, os.ErrNotExist))
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, filepath.Base(f)), text, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// edit replaces a text in a manifest, in one step, as editors and ConfigMap
// volumes do. It returns when that was.
func (w *world) edit(file, old, new string) (time.Time, error) {
	path := filepath.Join(w.manifests(), file)
	text, err := os.ReadFile(path)
	if err != nil {
		return time.Time{}, err
	}
	if strings.Count(string(text), old) != 1 {
		return time.Time{}, fmt.Errorf("edit %s: %q is there %d times, not once", file, old, strings.Count(string(text), old))
	}
	next := filepath.Join(w.dir, file)
	if err := os.WriteFile(next, []byte(strings.Replace(string(text), old, new, 1)), 0o644); err != nil {
		return time.Time{}, err
	}
	at := time.Now()
	return at, os.Rename(next, path)
}

// agent is the running program.
type agent struct {
	cmd   *exec.Cmd
	ended chan struct{}
	err   error // valid when ended is closed
}

func (a *agent) stop(sig syscall.Signal) {
	_ = a.cmd.Process.Signal(sig) // it may have ended
	select {
	case <-a.ended:
	case <-time.After(5 * time.Second):
		_ = a.cmd.Process.Kill()
		<-a.ended
	}
}

// starter starts programs on one thread that never ends before this process: the
// kernel kills a child when the thread that started it ends (Pdeathsig), and so
// the agent cannot outlive even a demo that is killed.
var starter = func() chan<- func() {
	calls := make(chan func())
	go func() {
		runtime.LockOSThread()
		for call := range calls {
			call()
		}
	}()
	return calls
}()

// startAgent starts the agent on the node and waits until all Services are
// served. It returns how long that took.
func (w *world) startAgent(ctx context.Context) (time.Duration, error) {
	log, err := os.OpenFile(w.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd := exec.Command("nsenter", append([]string{"--net=" + w.lab.Host(node).Path(), "--", w.o.agent,
		"--manifests=" + w.manifests(), "--hostname-override=" + node, "--proxy-mode=" + w.o.mode, "--mode-fallback=false",
		"--cluster-cidr=" + clusterCIDRs,
		// The machine's own: the demo leaves them alone.
		"--conntrack-max-per-core=0", "--oom-score-adj=0"}, w.mode.flags...)...)
	cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+filepath.Join(w.dir, "xtables.lock"))
	cmd.Stdout, cmd.Stderr = log, log
	// A process group of its own: Ctrl-C is for the demo, which then stops it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	begin := time.Now()
	started := make(chan error)
	starter <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return 0, fmt.Errorf("start the agent: %w", err)
	}
	a := &agent{cmd: cmd, ended: make(chan struct{})}
	w.agent = a
	go func() {
		a.err = cmd.Wait()
		close(a.ended)
	}()
	err = w.until(ctx, "the agent serves all Services", func() (bool, error) {
		metrics, err := w.metrics(ctx)
		return err == nil && metrics.value(`kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"}`) > 0 &&
			metrics.value(`kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv6"}`) > 0, nil
	})
	return time.Since(begin), err
}

// until tries again and again, until something is so or cannot come any more. It may
// take a third of what the whole may: machines are slow, virtual ones above all.
func (w *world) until(ctx context.Context, what string, so func() (bool, error)) error {
	most := w.o.limit / 3
	limit := time.After(most)
	for {
		ok, err := so()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w", what, ctx.Err())
		case <-w.agent.ended:
			return fmt.Errorf("the agent ended while the demo waited until %s: %v%s", what, w.agent.err, w.agentLog())
		case <-limit:
			return fmt.Errorf("it did not happen within %s that %s%s", most, what, w.agentLog())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// agentLog is the end of the agent's log, as part of a message.
func (w *world) agentLog() string {
	text, err := os.ReadFile(w.logFile())
	if err != nil || len(text) == 0 {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return "\nthe end of the agent's log:\n  " + strings.Join(lines[max(0, len(lines)-12):], "\n  ")
}

// page gets a page of the agent's, from its own node.
func (w *world) page(ctx context.Context, path string) (string, error) {
	text, _, err := get(ctx, w.pages, "http://127.0.0.1:10249"+path)
	return text, err
}

func get(ctx context.Context, from *http.Client, url string) (string, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", nil, err
	}
	resp, err := from.Do(req)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return string(text), resp.Header, err
}

// metrics are samples by what stands before the value.
type metrics map[string]float64

func (w *world) metrics(ctx context.Context) (metrics, error) {
	text, err := w.page(ctx, "/metrics")
	if err != nil {
		return nil, err
	}
	out := metrics{}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseFloat(value, 64); ok && err == nil {
			out[name] = v
		}
	}
	return out, nil
}

func (m metrics) value(sample string) float64 { return m[sample] }

// sum adds up a metric over its labels.
func (m metrics) sum(name string) (sum float64) {
	for sample, v := range m {
		if sample == name || strings.HasPrefix(sample, name+"{") {
			sum += v
		}
	}
	return sum
}
