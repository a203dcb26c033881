package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// localhostNodePort dials a node port as programs on the node do that know it as
// localhost.
func (w *world) localhostNodePort(ctx context.Context, t *table) error {
	own := w.lab.Addrs(node)[0]
	return w.show(ctx, t, question{"NodePort, on the node itself", node, netip.MustParseAddrPort("127.0.0.1:30080"), 300}, func(t tally) error {
		return errors.Join(t.even(servers), t.masqueradedBy(own))
	})
}

// mischief is what somebody does by hand, as a command of nft, and what the agent
// says then of how many objects it has put right.
type mischief struct {
	what, command string
	object        string
	times         float64
}

func (w *world) deleteElement(ctx context.Context, t *table) error {
	return w.repaired(ctx, t, mischief{"nft delete element of a Service, by hand", "delete element ip sluice services { 10.96.7.60 . tcp . 80 }", "element", 1})
}

// flushRuleset is what a firewall's script often begins with.
func (w *world) flushRuleset(ctx context.Context, t *table) error {
	return w.repaired(ctx, t, mischief{"nft flush ruleset, by hand", "flush ruleset", "table", 2}) // of both families
}

// repaired has somebody break something while a client connects all the time, and
// waits until it is put right.
func (w *world) repaired(ctx context.Context, t *table, broken mischief) error {
	// Who waits for TCP to try again, after a second, does not see when it is repaired.
	d := w.dialPatiently(ctx, netip.MustParseAddrPort("10.96.7.60:80"), 10*time.Millisecond)
	defer d.stop()
	if err := w.until(ctx, "connections are answered", func() (bool, error) { return d.total() > 10, nil }); err != nil {
		return err
	}
	was, err := w.drift(ctx, broken.object)
	if err != nil {
		return err
	}
	if _, err := w.lab.Host(node).Run(ctx, "nft", broken.command); err != nil {
		return err
	}
	var repaired float64
	if err := w.until(ctx, "what was broken is put right", func() (bool, error) {
		now, err := w.drift(ctx, broken.object)
		repaired = now - was
		return repaired >= broken.times, err
	}); err != nil {
		return err
	}
	answered := d.answeredBy(farServer)
	if err := w.until(ctx, "connections are answered again", func() (bool, error) { return d.answeredBy(farServer) > answered+10, nil }); err != nil {
		return err
	}
	d.stop()
	if repaired != broken.times {
		err = fmt.Errorf("it says that it has repaired %v, not %v", repaired, broken.times)
	}
	t.change(broken.what, d.outage(),
		fmt.Sprintf("until repaired: the kernel tells the agent; sluice_drift_repaired_total %.0f; failed until then: %d", repaired, d.failed()), err)
	return nil
}

// drift is how many objects of a kind the agent has put right, in both families.
func (w *world) drift(ctx context.Context, object string) (n float64, err error) {
	m, err := w.metrics(ctx)
	for _, family := range []string{"IPv4", "IPv6"} {
		n += m.value(fmt.Sprintf("sluice_drift_repaired_total{ip_family=%q,object=%q}", family, object))
	}
	return n, err
}

// showTable prints some of the table as the kernel has it, and what it has counted.
// The whole is long: each Service's elements, and for each kind of policy a chain.
func (w *world) showTable(ctx context.Context, p *printer) error {
	leads := "" // the chain that the Service web has
	const chain, services, endpoints = "nft list chain ip sluice services", "nft list map ip sluice services", "nft list map ip sluice endpoints"
	for _, see := range []struct{ command, only, wants string }{
		{chain, "", "vmap @services"},
		{services, "10.96.7.10 ", "tcp . 80 : goto to-"},
		{endpoints, "10.96.7.10 ", "tcp . 80 . 2 : 10.244.2.13 . 8080"},
	} {
		f := strings.Fields(see.command)
		text, err := w.lab.Host(node).Run(ctx, f[0], f[1:]...)
		if err != nil {
			return err
		}
		p.filtered(see.command, see.only, text, see.wants)
		if _, to, ok := strings.Cut(text, "10.96.7.10 . tcp . 80 : goto "); ok {
			leads, _, _ = strings.Cut(to, "\n")
			leads = strings.Trim(leads, ", ")
		}
	}
	if err := w.showChainOnce(ctx, p, leads); err != nil {
		return err
	}
	const packets = `sluice_service_packets_total{`
	text, err := w.page(ctx, "/metrics")
	if err != nil {
		return err
	}
	p.filtered("curl -s localhost:10249/metrics", `sluice_service_packets_total.*IPv4.*service="web"`, text, packets)
	return nil
}

// showChainOnce prints a chain in which rules repeat: each picks one number of a few
// more than there are endpoints, and the next one is there for numbers without.
func (w *world) showChainOnce(ctx context.Context, p *printer, name string) error {
	command := "nft list chain ip sluice " + name + " | uniq -c"
	text, err := w.lab.Host(node).Run(ctx, "sh", "-c", command)
	if err != nil {
		return err
	}
	p.filtered(command, "", text, "map @endpoints")
	return nil
}

// outage is how long it took from the first failure to the first answer after the
// last one; zero if nothing failed.
func (a *answers) outage() time.Duration {
	var begin, end time.Time
	a.each(func(one answer) {
		switch {
		case one.server == "" && begin.IsZero():
			begin = one.at
		case one.server == "":
			end = time.Time{}
		case !begin.IsZero() && end.IsZero():
			end = one.at
		}
	})
	return end.Sub(begin)
}
