package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// schedulers shows what a Service can ask for in ipvs mode.
func (w *world) schedulers(ctx context.Context, t *table) error {
	show := func(q question, judge func(tally) error) error { return w.show(ctx, t, q, judge) }
	at := netip.MustParseAddrPort
	return errors.Join(
		show(question{"scheduler wrr, weights 3 1 1", shell, at("10.96.7.70:80"), 300}, func(t tally) error {
			if t.servers[servers[0]] != 180 || t.servers[servers[1]] != 60 || t.servers[servers[2]] != 60 {
				return errors.Join(t.complete(servers), errors.New("weights 3, 1 and 1 of 300 connections are 180, 60 and 60"))
			}
			return t.complete(servers)
		}),
		show(question{"scheduler sh: by source", shell, at("10.96.7.71:80"), 100}, func(t tally) error {
			if len(t.servers) != 1 {
				return errors.Join(t.complete(servers), fmt.Errorf("one source was answered by %d endpoints", len(t.servers)))
			}
			return t.complete(servers)
		}),
		show(question{"unknown scheduler: the default", shell, at("10.96.7.72:80"), 300}, func(t tally) error {
			return t.even(servers)
		}),
	)
}

const chatPort = 7000

// chats is how many connections are open while an endpoint leaves.
const chats = 20

// open opens connections to the Service chat, and says how many each pod has.
func (w *world) open(ctx context.Context, n int) (conns []*netlab.Conn, by map[string]int, err error) {
	by = map[string]int{}
	for range n {
		c, err := w.lab.Host(shell).Open(ctx, netip.Addr{}, netip.MustParseAddrPort("10.96.7.73:7000"), patience)
		if err != nil {
			return conns, by, err
		}
		conns = append(conns, c)
		by[c.Server]++
	}
	return conns, by, nil
}

// leave removes an endpoint that has open connections.
func (w *world) leave(ctx context.Context, t *table) error {
	leaves, stays := local[0], farServer
	for _, pod := range []string{leaves, stays} {
		if _, err := w.lab.Host(pod).ServeOpen(pod, netip.AddrPortFrom(w.lab.Addr(pod, true), chatPort)); err != nil {
			return err
		}
	}
	conns, before, err := w.open(ctx, chats)
	if err != nil {
		return err
	}
	begin, err := w.edit("chat.yaml", "- {addresses: [10.244.1.11], nodeName: node-1}\n", "")
	if err != nil {
		return err
	}
	drains := fmt.Sprintf("%s:%d", w.lab.Addr(leaves, true), chatPort)
	if err := w.until(ctx, drains+" drains", func() (bool, error) {
		page, err := w.page(ctx, "/sluice/ipvs")
		return err == nil && strings.Contains(page, drains), nil
	}); err != nil {
		return err
	}
	took := time.Since(begin)
	_, after, err := w.open(ctx, chats)
	if err == nil && (after[stays] != chats || before[leaves] == 0) {
		err = fmt.Errorf("before: %v, new connections: %v", before, after)
	}
	kept := 0
	for _, c := range conns {
		if ended := c.Echo(patience); ended != nil {
			err = errors.Join(err, fmt.Errorf("an open connection to %s ended: %w", c.Server, ended))
		} else if c.Server == leaves {
			kept++
		}
	}
	t.change("an endpoint with open connections is removed", took,
		fmt.Sprintf("its %d connections go on; %d new ones: all to %s", kept, after[stays], stays), err)
	return nil
}

// cutDevice takes the addresses of all Services away, as other tools do by
// mistake.
func (w *world) cutDevice(ctx context.Context, t *table) error {
	d := w.dialAllTheTime(ctx, netip.MustParseAddrPort("10.96.7.60:80"))
	defer d.stop()
	if err := w.until(ctx, "connections are answered", func() (bool, error) { return d.total() > 10, nil }); err != nil {
		return err
	}
	if _, err := w.lab.Host(node).Run(ctx, "ip", "link", "del", "kube-ipvs0"); err != nil {
		return err
	}
	at, was := time.Now(), d.answeredBy(farServer)
	repaired := func(m metrics) float64 {
		return m.value(`sluice_drift_repaired_total{ip_family="IPv4",object="address"}`)
	}
	if err := w.until(ctx, "kube-ipvs0 is back", func() (bool, error) {
		m, err := w.metrics(ctx)
		return err == nil && repaired(m) > 0 && d.answeredBy(farServer) > was+10, nil
	}); err != nil {
		return err
	}
	took := time.Since(at)
	d.stop()
	if last := d.lastFailure(); !last.IsZero() {
		took = last.Sub(at)
	}
	m, err := w.metrics(ctx)
	if err != nil {
		return err
	}
	t.change("ip link del kube-ipvs0, by hand", took,
		fmt.Sprintf("until repaired: the agent looks every second; sluice_drift_repaired_total %.0f", repaired(m)), nil)
	return nil
}

// showServer prints the virtual server of a Service as the kernel has it.
func (w *world) showServer(ctx context.Context, p *printer) error {
	text, err := w.lab.Host(node).Run(ctx, "ipvsadm", "-L", "-n", "-t", "10.96.7.70:80")
	if err != nil {
		return err
	}
	p.command("ipvsadm -L -n -t 10.96.7.70:80", text)
	if !strings.Contains(text, "10.96.7.70:80 wrr") {
		p.fail("ipvsadm", errors.New("the virtual server does not have the scheduler wrr"))
	}
	return nil
}

// virtualServers lists those on the node, of both families, and the device that
// has their addresses.
func (w *world) virtualServers(ctx context.Context) (list []string, err error) {
	text, err := w.lab.Host(node).Run(ctx, "ipvsadm", "-S", "-n")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "-A ") {
			list = append(list, strings.TrimSpace(line))
		}
	}
	if _, err := w.lab.Host(node).Run(ctx, "ip", "link", "show", "kube-ipvs0"); err == nil {
		list = append(list, "kube-ipvs0")
	}
	return list, nil
}
