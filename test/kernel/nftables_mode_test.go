package kernel

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/nftables"
	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/scenarios"
	"github.com/sluice-proxy/sluice/test/uml"
)

// nftablesNode makes a scenario's cluster and gives what opens a proxier on its
// node. It skips where the machine has no nf_tables.
func nftablesNode(t *testing.T, s *scenarios.Scenario) (*netlab.Lab, func(nftables.Options) *nftables.Proxier) {
	t.Helper()
	if err := netlab.Supported(); err != nil || uml.Inside() {
		t.Skip("SKIPPED, nf_tables not tested: ", err)
	}
	lab := build(t, s)
	return lab, func(o nftables.Options) *nftables.Proxier {
		t.Helper()
		o.Family, o.MasqueradeBit, o.Detector = model.IPv4, 14, proxier.Detector(s.Detector(model.IPv4))
		var x *nftables.Proxier
		if err := lab.Host(scenarios.NodeName).Do(func() (err error) {
			if _, err = nftables.Probe(context.Background(), o.Family); err == nil {
				x, err = nftables.New(o)
			}
			return err
		}); err != nil {
			t.Skip("SKIPPED, nf_tables not tested: ", err)
		}
		return x
	}
}

func load(t *testing.T, name string) *scenarios.Scenario {
	t.Helper()
	s, err := scenarios.Load("../scenarios/" + name + ".txtar")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestTableGoes: where another mode serves the same Services, nobody notices that
// the table is taken away. A kernel that deletes a table at once runs its rules for
// a moment longer than it finds the elements that they look for.
func TestTableGoes(t *testing.T) {
	s := load(t, "cluster-ip")
	lab, open := nftablesNode(t, s)
	node := lab.Host(scenarios.NodeName)
	other, err := newIPTables("nft")(s, model.IPv4)
	if err != nil {
		t.Skip("SKIPPED, nothing else can serve: ", err)
	}
	program(t, node, other, s.SetIn("iptables", model.IPv4))
	x := open(nftables.Options{})

	at, stop := netip.MustParseAddrPort("10.96.0.10:80"), make(chan struct{})
	var clients sync.WaitGroup
	for _, from := range []string{"shell", scenarios.NodeName} {
		clients.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					t.Logf("%d connections from %s", n, from)
					return
				default:
				}
				if a, err := lab.Host(from).Ask(t.Context(), "tcp", netip.Addr{}, at, patience); err != nil || a.Result != netlab.Answered {
					t.Errorf("from %s: %v, %v", from, a, err)
					return
				}
			}
		})
	}
	for range 40 {
		x.Forget()
		program(t, node, x, s.SetIn("nftables", model.IPv4))
		if err := node.Do(func() error {
			_, err := nftables.RemoveObjects(model.IPv4)
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	clients.Wait()
	tables, err := node.Run(t.Context(), "nft", "list", "tables")
	if err != nil || slices.Contains(strings.Split(tables, "\n"), "table ip sluice") {
		t.Errorf("the table is still there: %v\n%s", err, tables)
	}
}

// traffic is what a proxier has counted, by port.
func traffic(t *testing.T, x *nftables.Proxier, set *plan.Set) (map[string]nftables.Traffic, int) {
	t.Helper()
	list, leftOut, err := x.Traffic(t.Context(), set)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]nftables.Traffic{}
	for _, c := range list {
		out[c.Port.String()+"/"+c.Port.Protocol.String()] = c
	}
	return out, leftOut
}

const headers4 = 20 + 8 // of IPv4 and UDP, which are counted with the payload

// exchanges asks over UDP, and returns what a counter must have seen of it.
func exchanges(t *testing.T, lab *netlab.Lab, times int, to string, hosts ...string) (requests, replies nftables.Count) {
	t.Helper()
	for _, host := range hosts {
		for range times {
			a, err := lab.Host(host).Ask(t.Context(), "udp", netip.Addr{}, netip.MustParseAddrPort(to), patience)
			if err != nil || a.Result != netlab.Answered {
				t.Fatalf("%s from %s: %v, %v", to, host, a, err)
			}
			requests.Packets++
			requests.Bytes += headers4 + uint64(len("?"))
			replies.Packets++
			replies.Bytes += headers4 + uint64(len(a.Server+" "+a.Seen.String()+"\n"))
		}
	}
	return requests, replies
}

func sum(a, b nftables.Count) nftables.Count {
	return nftables.Count{Packets: a.Packets + b.Packets, Bytes: a.Bytes + b.Bytes}
}

// TestTrafficOfNodePorts: each datagram is counted once, on whichever way it comes,
// by the frontend or by the node port, and so is each answer.
func TestTrafficOfNodePorts(t *testing.T) {
	s := load(t, "node-ports")
	lab, open := nftablesNode(t, s)
	node, set := lab.Host(scenarios.NodeName), s.SetIn("nftables", model.IPv4)
	allowLoopback(t, s, node)
	x := open(nftables.Options{Traffic: 100})
	program(t, node, x, set)

	var requests, replies nftables.Count
	for run := range 2 {
		for _, q := range []struct {
			to    string
			hosts []string
		}{
			{"172.18.0.11:30100", []string{"client", "shell", "web-1", scenarios.NodeName}}, // one of them reaches itself
			{"10.96.0.100:53", []string{"shell", scenarios.NodeName}},
		} {
			asked, answered := exchanges(t, lab, 12, q.to, q.hosts...)
			requests, replies = sum(requests, asked), sum(replies, answered)
			got, leftOut := traffic(t, x, set)
			if u := got["ns/web:u/udp"]; u.Requests != requests || u.Replies != replies {
				t.Errorf("run %d, %s: requests %v, replies %v; want %v and %v", run, q.to, u.Requests, u.Replies, requests, replies)
			}
			if tcp, ok := got["ns/web/tcp"]; !ok || tcp.Requests.Packets+tcp.Replies.Packets > 0 || leftOut != 0 {
				t.Errorf("of TCP, which nobody has used: %+v, %v; left out: %d", tcp, ok, leftOut)
			}
		}
	}
}

// TestTrafficLimit: ports beyond the limit are served, and not counted.
func TestTrafficLimit(t *testing.T) {
	s := load(t, "node-ports")
	lab, open := nftablesNode(t, s)
	set := s.SetIn("nftables", model.IPv4)
	x := open(nftables.Options{Traffic: 1})
	program(t, lab.Host(scenarios.NodeName), x, set)
	exchanges(t, lab, 3, "172.18.0.11:30100", "client")
	connections(t, lab, 3, "172.18.0.11:30100", "client")
	got, leftOut := traffic(t, x, set)
	if len(got) != 1 || got["ns/web/tcp"].Requests.Packets == 0 || leftOut != set.Len()-1 {
		t.Errorf("counted: %+v, left out: %d", got, leftOut)
	}
}

// connections makes so many TCP connections, and returns how many bytes of payload
// came back.
func connections(t *testing.T, lab *netlab.Lab, times int, to string, hosts ...string) (payload uint64) {
	t.Helper()
	for _, host := range hosts {
		for range times {
			a, err := lab.Host(host).Ask(t.Context(), "tcp", netip.Addr{}, netip.MustParseAddrPort(to), patience)
			if err != nil || a.Result != netlab.Answered {
				t.Fatalf("%s from %s: %v, %v", to, host, a, err)
			}
			payload += uint64(len(a.Server + " " + a.Seen.String() + "\n"))
		}
	}
	return payload
}

// TestTrafficOfConnections: how many packets a connection takes is TCP's affair,
// within bounds: it begins with three and is ended from both sides.
func TestTrafficOfConnections(t *testing.T) {
	s := load(t, "cluster-ip")
	lab, open := nftablesNode(t, s)
	set := s.SetIn("nftables", model.IPv4)
	x := open(nftables.Options{Traffic: 100})
	program(t, lab.Host(scenarios.NodeName), x, set)
	const times, least, most, headers = 10, 3, 12, 20 + 20
	hosts := []string{"shell", "client", "web-1", scenarios.NodeName}
	var before nftables.Traffic
	for range 2 {
		payload := connections(t, lab, times, "10.96.0.10:80", hosts...)
		all, _ := traffic(t, x, set)
		got, n := all["ns/web/tcp"], uint64(times*len(hosts))
		asked, answered := got.Requests.Packets-before.Requests.Packets, got.Replies.Packets-before.Replies.Packets
		if len(all) != 1 || asked < least*n || asked > most*n || answered < 2*n || answered > most*n {
			t.Errorf("%d connections: %d packets asked, %d answered; %+v", n, asked, answered, all)
		}
		if bytes := got.Replies.Bytes - before.Replies.Bytes; bytes < payload+answered*headers || bytes > payload+answered*(headers+40) {
			t.Errorf("%d bytes in %d packets answered, of which payload %d", bytes, answered, payload)
		}
		before = got
	}
}
