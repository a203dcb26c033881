package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// introduce says what there is.
func (w *world) introduce(ctx context.Context, p *printer, took time.Duration) {
	version := "sluice"
	if out, err := w.lab.Host(node).Run(ctx, w.o.agent, "version"); err == nil {
		version, _, _ = strings.Cut(strings.TrimSpace(out), "\n")
	}
	by := ""
	if out, err := w.lab.Host(node).Run(ctx, "iptables", "--version"); err == nil && w.o.mode != modeNFTables {
		by = " by " + strings.TrimSpace(out)
	}
	p.line("%s, mode %s%s; %d ms after its start all Services of examples/ are served", p.paint(bold, version), w.o.mode, by, took.Milliseconds())
	p.line("")
	at := func(host string) string { return host + " " + w.lab.Addr(host, true).String() }
	p.line("  %-22s a node, runs sluice. Pods: %s, %s; %s asks", at(node), at(local[0]), at(local[1]), at(shell))
	p.line("  %-22s another node. Pod: %s", at(far), at(farServer))
	p.line("  %-22s a machine outside of the cluster", at(client))
}

// question is a Service and who asks for it how often.
type question struct {
	what, from string
	to         netip.AddrPort
	times      int
}

// tally counts the answers to a question.
type tally struct {
	answered int
	servers  map[string]int
	kept     int                // the server saw the client's own address
	seen     map[netip.Addr]int // addresses that servers saw
	bad      error              // the first that was not answered
}

const patience = 2 * time.Second // for one connection

func (w *world) ask(ctx context.Context, q question) (tally, error) {
	t := tally{servers: map[string]int{}, seen: map[netip.Addr]int{}}
	for range q.times {
		a, err := w.lab.Host(q.from).Ask(ctx, "tcp", netip.Addr{}, q.to, patience)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return t, err
		}
		if a.Result != netlab.Answered {
			if t.bad == nil {
				t.bad = errors.New(a.String())
			}
			continue
		}
		t.answered++
		t.servers[a.Server]++
		t.seen[a.Seen.Addr()]++
		if a.SourceKept() {
			t.kept++
		}
	}
	return t, nil
}

// who lists the servers that answered, and how often.
func (t tally) who() string {
	var out []string
	for _, s := range servers {
		if n := t.servers[s]; n > 0 {
			out = append(out, fmt.Sprintf("%s %d", s, n))
		}
	}
	if len(out) == 0 {
		return "nobody"
	}
	return strings.Join(out, "  ")
}

// source says which client the servers saw.
func (t tally) source() string {
	var addrs []string
	for a := range t.seen {
		addrs = append(addrs, a.String())
	}
	slices.Sort(addrs)
	switch {
	case t.answered == 0:
		return ""
	case t.kept == t.answered:
		return "kept"
	case t.kept == 0:
		return "masqueraded: " + strings.Join(addrs, ", ")
	}
	return "mixed: " + strings.Join(addrs, ", ")
}

// complete returns an error if a connection was not answered, or by a server
// that is none of want.
func (t tally) complete(want []string) error {
	if t.bad != nil {
		return fmt.Errorf("not every connection was answered: %w", t.bad)
	}
	for s, n := range t.servers {
		if !slices.Contains(want, s) {
			return fmt.Errorf("%s answered %d connections and should answer none", s, n)
		}
	}
	return nil
}

// even returns an error if the answers are not spread evenly over want, within
// six standard deviations: chance alone does that twice in a thousand million.
func (t tally) even(want []string) error {
	if err := t.complete(want); err != nil {
		return err
	}
	n, share := float64(t.answered), 1/float64(len(want))
	mean, deviation := n*share, math.Sqrt(n*share*(1-share))
	for _, s := range want {
		if math.Abs(float64(t.servers[s])-mean) > 6*deviation {
			return fmt.Errorf("%s answered %d connections of %d, not about %.0f", s, t.servers[s], t.answered, mean)
		}
	}
	return nil
}

func (t tally) sourceKept() error {
	if t.kept != t.answered {
		return fmt.Errorf("the client's address was kept %d times of %d", t.kept, t.answered)
	}
	return nil
}

// masqueradedBy returns an error unless all servers saw one address.
func (t tally) masqueradedBy(a netip.Addr) error {
	if t.seen[a] != t.answered {
		return fmt.Errorf("servers should have seen %s only and saw %v", a, t.seen)
	}
	return nil
}

// show asks a question, and prints a row of what came.
func (w *world) show(ctx context.Context, t *table, q question, judge func(tally) error) error {
	got, err := w.ask(ctx, q)
	if err != nil {
		return err
	}
	t.add(row{[]string{q.what, q.to.String(), q.from, fmt.Sprintf("%5d", q.times), got.who(), got.source()}, judge(got)})
	return nil
}

func (w *world) whoAnswers(ctx context.Context, p *printer) error {
	p.heading("Who answers")
	t := p.table("SERVICE                       ", "DIALLED              ", "BY    ", "TIMES", "WHO ANSWERED                  ", "CLIENT'S ADDRESS")
	show := func(q question, judge func(tally) error) error { return w.show(ctx, t, q, judge) }
	at := netip.MustParseAddrPort
	nodeAddr := w.lab.Addr(node, true)
	err := errors.Join(
		show(question{"ClusterIP", shell, at("10.96.7.10:80"), 300}, func(t tally) error {
			return errors.Join(t.even(servers), t.sourceKept())
		}),
		show(question{"ClusterIP, IPv6", shell, at("[fd00:10:96::710]:80"), 300}, func(t tally) error {
			return errors.Join(t.even(servers), t.sourceKept())
		}),
		show(question{"NodePort, from outside", client, netip.AddrPortFrom(nodeAddr, 30080), 300}, func(t tally) error {
			return errors.Join(t.even(servers), t.masqueradedBy(nodeAddr))
		}),
		show(question{"externalTrafficPolicy: Local", client, at("203.0.113.10:80"), 300}, func(t tally) error {
			return errors.Join(t.even(local), t.sourceKept())
		}),
		show(question{"sessionAffinity: ClientIP", shell, at("10.96.7.40:80"), 100}, func(t tally) error {
			if len(t.servers) != 1 {
				return errors.Join(t.complete(servers), fmt.Errorf("one client was answered by %d endpoints", len(t.servers)))
			}
			return t.complete(servers)
		}),
	)
	if err != nil {
		return err
	}
	if err := w.mode.answers(w, ctx, t); err != nil {
		return err
	}
	for _, r := range append([]refusal{{"no endpoints", "10.96.7.50:80"}}, w.mode.refused...) {
		w.showRefusal(t, r)
	}
	w.showHealthPort(ctx, t)
	return ctx.Err()
}

// refusal is an address where nobody can answer, which clients must learn at once.
type refusal struct{ what, to string }

// showRefusal dials in vain. The time is taken inside the namespace, around connect
// alone.
func (w *world) showRefusal(t *table, r refusal) {
	const times = 20
	var took []time.Duration
	err := w.lab.Host(shell).Do(func() error {
		for range times {
			begin := time.Now()
			conn, err := net.DialTimeout("tcp", r.to, patience)
			took = append(took, time.Since(begin))
			switch {
			case err == nil:
				conn.Close()
				return errors.New("somebody answered")
			case !errors.Is(err, syscall.ECONNREFUSED):
				return fmt.Errorf("the client was not refused: %w", err)
			}
		}
		return nil
	})
	slices.Sort(took)
	median := took[len(took)/2]
	if err == nil && median > patience/10 {
		err = fmt.Errorf("a refusal that takes %s is none", median)
	}
	answer := fmt.Sprintf("nobody: refused after %d µs", median.Microseconds())
	if err != nil {
		answer = "?"
	}
	t.add(row{[]string{r.what, r.to, shell, fmt.Sprintf("%5d", len(took)), answer}, err})
}

// showHealthPort asks as a load balancer does whether the node has endpoints.
func (w *world) showHealthPort(ctx context.Context, t *table) {
	to := netip.AddrPortFrom(w.lab.Addr(node, true), 32090).String()
	_, header, err := get(ctx, w.web, "http://"+to)
	const weight = "X-Load-Balancing-Endpoint-Weight"
	answer := "?"
	if err == nil {
		answer = fmt.Sprintf("200, %s local endpoints", header.Get(weight))
		if header.Get(weight) != fmt.Sprint(len(local)) {
			err = fmt.Errorf("%s is %q, not %d", weight, header.Get(weight), len(local))
		}
	}
	t.add(row{[]string{"healthCheckNodePort", to, client, fmt.Sprintf("%5d", 1), answer}, err})
}
