package kernel

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
	"github.com/sluice-proxy/sluice/test/trace"
)

var update = flag.Bool("update", false, "write what kernels print into documents instead of comparing it")

// watched is a table that has the first packets of TCP connections traced from the
// moment when they come in, or are sent.
const watched = `
table %s watched {
	chain in {
		type filter hook prerouting priority raw;
		tcp flags & (fin | syn | rst | ack) == syn meta nftrace set 1
	}
	chain out {
		type filter hook output priority raw;
		tcp flags & (fin | syn | rst | ack) == syn meta nftrace set 1
	}
}
`

// watcher follows packets through a node's kernel.
type watcher struct {
	mu    sync.Mutex
	lines []string // what "nft monitor trace" has printed
}

// watch starts to follow packets of a family.
func watch(t *testing.T, node *netlab.Namespace, family string) *watcher {
	t.Helper()
	if _, err := node.RunInput(t.Context(), fmt.Sprintf(watched, family), "nft", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "nft", "monitor", "trace")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = node.Start(cmd)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := &watcher{}
	done := make(chan struct{})
	go func() {
		w.read(out)
		close(done)
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-done; _ = cmd.Wait() })
	return w
}

func (w *watcher) read(out io.Reader) {
	for lines := bufio.NewScanner(out); lines.Scan(); {
		w.mu.Lock()
		w.lines = append(w.lines, lines.Text())
		w.mu.Unlock()
	}
}

// visit is a rule that a packet met and that applied.
type visit struct{ chain, rule, verdict string }

var traced = regexp.MustCompile(`^trace id ([0-9a-f]+) ip6? (\S+) (\S+) (packet:|rule (.*) \(verdict (.*)\)|policy|verdict)`)

// paths takes apart what has been printed: the rules of our table that each packet of
// a flow met. What is left of flows before is passed over.
func (w *watcher) paths(flow *scenarios.Flow) (paths [][]visit) {
	w.mu.Lock()
	defer w.mu.Unlock()
	id, entry := "", ""
	for _, line := range w.lines {
		m := traced.FindStringSubmatch(line)
		switch {
		case m == nil:
		case m[2] == "watched" && m[4] == "packet:" && (m[1] != id || m[3] == entry):
			// A packet's number is not used for it alone, but no packet comes in twice.
			// One that the node sends to itself goes out and comes in.
			id, entry = "", m[3]
			if isOf(line, flow) {
				id = m[1]
				paths = append(paths, nil)
			}
		case m[2] == "sluice" && m[5] != "" && m[1] == id:
			last := len(paths) - 1
			paths[last] = append(paths[last], visit{m[3], m[5], m[6]})
		}
	}
	return paths
}

func isOf(packet string, f *scenarios.Flow) bool {
	return strings.Contains(packet, fmt.Sprintf(" saddr %s ", f.Source)) && strings.Contains(packet, fmt.Sprintf(" daddr %s ", f.To.Addr())) &&
		strings.Contains(packet, fmt.Sprintf(" dport %d ", f.To.Port()))
}

// of returns the path of a connection's first packet. It makes connections until the
// trace of one is complete, which is so when another one begins.
func (w *watcher) of(t *testing.T, f *scenarios.Flow, ask func() error) []visit {
	t.Helper()
	w.mu.Lock()
	w.lines = nil
	w.mu.Unlock()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			if paths := w.paths(f); len(paths) > 1 {
				return paths[0]
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	t.Fatal("nft monitor prints nothing")
	return nil
}

// pathsOf programs a scenario's node and says how flows go through its kernel; of clients
// with affinity, when they are remembered.
func pathsOf(t *testing.T, name string, f model.Family, wanted func(*scenarios.Flow) bool, got func(*scenarios.Scenario, *scenarios.Flow, string, []visit)) {
	t.Helper()
	s, err := scenarios.Load("../scenarios/" + name + ".txtar")
	if err != nil {
		t.Fatal(err)
	}
	lab := build(t, s)
	node := lab.Host(scenarios.NodeName)
	prepareNFTables(t, s, node)
	table, rendered := programNFTables(t, s, node, f, 0)
	// The path is known when the packet has been sent, whatever comes back.
	ask := func(flow *scenarios.Flow) error {
		_, err := lab.Host(flow.From.Name).Ask(t.Context(), "tcp", flow.Source, flow.To, silence/5)
		return err
	}
	var flows []*scenarios.Flow
	for i := range s.Flows {
		flow := &s.Flows[i]
		if !flow.In("nftables") || flow.Family() != f || flow.Protocol != model.TCP || !wanted(flow) {
			continue
		}
		flows = append(flows, flow)
		if flow.Sticky > 0 { // the first connection is seen by chance only, and goes another way
			if err := ask(flow); err != nil {
				t.Fatal(err)
			}
		}
	}
	w := watch(t, node, strings.Fields(table)[0])
	for _, flow := range flows {
		got(s, flow, rendered, w.of(t, flow, func() error { return ask(flow) }))
	}
}

// TestNFTablesPaths: the kernel takes packets the way that test/trace follows them.
func TestNFTablesPaths(t *testing.T) {
	needNFT(t)
	for _, name := range []string{"cluster-ip", "external-local", "source-ranges", "both-local", "no-endpoints",
		"node-ports-localhost", "node-ports-primary", "detect-bridge", "detect-interface", "masquerade-all", "service-cidr", "affinity"} {
		for _, f := range []model.Family{model.IPv4, model.IPv6} {
			t.Run(name+" "+f.String(), func(t *testing.T) {
				t.Parallel()
				all := func(*scenarios.Flow) bool { return true }
				pathsOf(t, name, f, all, func(s *scenarios.Scenario, flow *scenarios.Flow, rendered string, path []visit) {
					comparePath(t, s, flow, rendered, path)
				})
			})
		}
	}
}

func comparePath(t *testing.T, s *scenarios.Scenario, flow *scenarios.Flow, rendered string, path []visit) {
	t.Helper()
	rules, err := s.NFTables(rendered)
	if err != nil {
		t.Fatal(err)
	}
	outs, err := s.Outcomes(flow, rules)
	if err != nil {
		t.Fatal(err)
	}
	if flow.Sticky > 0 { // it is not the client's first connection: see pathsOf
		var list []trace.Outcome
		for _, first := range outs {
			again, err := s.Again(flow, rules, first)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, again...)
		}
		outs = list
	}
	var have []string
	for _, v := range path {
		have = append(have, "sluice "+v.chain+": "+normal.Replace(v.rule))
	}
	var all [][]string
	for _, o := range outs {
		var steps []string
		for _, step := range o.Path { // without the elements that were found
			if !strings.Contains(step, "update @") {
				step, _, _ = strings.Cut(step, " { ")
			}
			steps = append(steps, step)
		}
		all = append(all, steps)
	}
	if s.Settings.BridgeInterface != "" {
		// A packet that goes back to the bridge has another number in postrouting.
		have = upToPostrouting(have)
		for i := range all {
			all[i] = upToPostrouting(all[i])
		}
	}
	if !slices.ContainsFunc(all, func(o []string) bool { return slices.Equal(o, have) }) {
		t.Errorf("%s: the kernel's way:\n  %s\nfollowed:\n  %s", flow.Text, strings.Join(have, "\n  "), strings.Join(all[0], "\n  "))
	}
}

func upToPostrouting(steps []string) []string {
	i := slices.IndexFunc(steps, func(s string) bool { return strings.HasPrefix(s, "sluice remember-postrouting: ") })
	if i < 0 {
		return steps
	}
	return steps[:i]
}
