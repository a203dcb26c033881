package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/test/netlab"
)

func (w *world) whatChanges(ctx context.Context, p *printer) error {
	p.heading("What changes, and how long until traffic follows")
	t := p.table(wide, "       ", "")
	for _, change := range w.mode.changes {
		if err := change(w, ctx, t); err != nil {
			return err
		}
	}
	return nil
}

// wide is as wide as the longest thing that is tried.
const wide = "                                             "

func (t *table) change(what string, took time.Duration, remark string, err error) {
	t.add(row{[]string{what, brief(took), remark}, err})
}

func brief(d time.Duration) string {
	if d < time.Millisecond {
		return fmt.Sprintf("%4d µs", d.Microseconds())
	}
	return fmt.Sprintf("%4d ms", d.Milliseconds())
}

// moveEndpoint edits a manifest and watches from which connection, and which
// datagram of an open flow, on the other endpoint answers.
func (w *world) moveEndpoint(ctx context.Context, t *table) error {
	d := w.dialAllTheTime(ctx, netip.MustParseAddrPort("10.96.7.60:80"))
	defer d.stop()
	f, err := w.openFlow(ctx, "10.96.7.60:514")
	if err != nil {
		return err
	}
	defer f.stop()
	was, is := local[0], farServer
	if err := w.until(ctx, was+" answers", func() (bool, error) { return d.answeredBy(was) > 10 && f.answeredBy(was) > 10, nil }); err != nil {
		return err
	}
	at, err := w.edit("orders.yaml", "addresses: [10.244.1.11], nodeName: node-1", "addresses: [10.244.2.13], nodeName: node-2")
	if err != nil {
		return err
	}
	err = w.until(ctx, is+" answers", func() (bool, error) { return d.answeredBy(is) > 200 && f.answeredBy(is) > 10, nil })
	d.stop()
	f.stop()
	if err != nil {
		return err
	}
	t.change("an endpoint moves: orders.yaml is edited", d.first(is).Sub(at),
		fmt.Sprintf("%d connections, %d failed; 20 ms are the wait until a file is still", d.total(), d.failed()),
		errors.Join(d.clean(was, is), d.takenOver(was, is)))
	t.change("the same for a UDP flow that stays open", f.first(is).Sub(at), "its conntrack entry was deleted", f.takenOver(was, is))
	return nil
}

// flush deletes rules as other tools do by mistake.
func (w *world) flush(ctx context.Context, t *table) error {
	ns := w.lab.Host(node)
	d := w.dialAllTheTime(ctx, netip.MustParseAddrPort("10.96.7.60:80"))
	defer d.stop()
	if err := w.until(ctx, "connections are answered", func() (bool, error) { return d.total() > 10, nil }); err != nil {
		return err
	}
	if _, err := ns.Run(ctx, "iptables", "-t", "nat", "-F", "KUBE-SERVICES"); err != nil {
		return err
	}
	at, was := time.Now(), d.answeredBy(farServer)
	if err := w.until(ctx, "a flushed chain is repaired", func() (bool, error) {
		return d.failed() > 0 && d.answeredBy(farServer) > was+10, nil
	}); err != nil {
		return err
	}
	d.stop()
	m, err := w.metrics(ctx)
	if err != nil {
		return err
	}
	const drift = `sluice_drift_repaired_total{ip_family="IPv4",object="chain"}`
	if got := m.value(drift); got != 1 {
		err = fmt.Errorf("%s is %v, not 1: one chain was flushed", drift, got)
	}
	t.change("iptables -t nat -F KUBE-SERVICES, by hand", d.lastFailure().Sub(at),
		"until repaired: the agent looks every second; sluice_drift_repaired_total 1", err)
	return nil
}

// kill kills the agent and starts it again, while clients connect.
func (w *world) kill(ctx context.Context, t *table) error {
	d := w.dialAllTheTime(ctx, netip.MustParseAddrPort("10.96.7.10:80"))
	defer d.stop()
	written, err := w.mode.written(w, ctx)
	if err != nil {
		return err
	}
	w.agent.stop(syscall.SIGKILL)
	at, was := time.Now(), d.total()
	for d.total() < was+1000 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	without, n := time.Since(at), d.total()
	if _, err := w.startAgent(ctx); err != nil {
		return err
	}
	d.stop()
	t.add(row{[]string{"kill -9 of the agent", "", fmt.Sprintf("%d connections in %d ms without it, %d failed", n, without.Milliseconds(), d.failed())}, d.clean(servers...)})
	took := time.Since(at) - without
	much, err := written(w, ctx)
	t.change("the agent starts again", took,
		fmt.Sprintf("%d connections, %d failed; %s", d.total()-n, d.failed(), much), errors.Join(err, d.clean(servers...)))
	return nil
}

// answers are what a client that asks all the time has got, in order.
type answers struct {
	mu   sync.Mutex
	list []answer

	done    atomic.Bool
	stopped chan struct{}
}

type answer struct {
	at     time.Time
	server string // "" if nobody answered
	what   string
}

func (w *world) dialAllTheTime(ctx context.Context, to netip.AddrPort) *answers {
	return w.dialPatiently(ctx, to, patience)
}

// dialPatiently gives each connection so much time.
func (w *world) dialPatiently(ctx context.Context, to netip.AddrPort, each time.Duration) *answers {
	return ask(func() (string, error) {
		a, err := w.lab.Host(shell).Ask(ctx, "tcp", netip.Addr{}, to, each)
		if err == nil && a.Result != netlab.Answered {
			err = errors.New(a.String())
		}
		return a.Server, err
	})
}

// openFlow asks over UDP from one port, as a client that never pauses does: the
// kernel takes its datagrams for one flow, which it translates as it did the
// first.
func (w *world) openFlow(ctx context.Context, to string) (*answers, error) {
	conn, err := w.lab.Host(shell).DialContext(ctx, "udp", to)
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 256)
	a := ask(func() (string, error) {
		if _, err := conn.Write([]byte("?")); err != nil {
			return "", err
		}
		// A datagram that is under way when the flow is forgotten gets no answer.
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		n, err := conn.Read(buf)
		server, _, _ := strings.Cut(string(buf[:max(n, 0)]), " ")
		return server, err
	})
	go func() { <-a.stopped; conn.Close() }()
	return a, nil
}

// ask asks until it is stopped, without a pause.
func ask(once func() (server string, err error)) *answers {
	a := &answers{stopped: make(chan struct{})}
	go func() {
		defer close(a.stopped)
		for !a.done.Load() {
			server, err := once()
			got := answer{at: time.Now(), server: server}
			if err != nil {
				got.server, got.what = "", err.Error()
			}
			a.mu.Lock()
			a.list = append(a.list, got)
			a.mu.Unlock()
		}
	}()
	return a
}

func (a *answers) stop() {
	a.done.Store(true)
	<-a.stopped
}

func (a *answers) each(f func(answer)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, one := range a.list {
		f(one)
	}
}

func (a *answers) total() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.list)
}

func (a *answers) answeredBy(server string) (n int) {
	a.each(func(one answer) {
		if one.server == server {
			n++
		}
	})
	return n
}

func (a *answers) failed() int { return a.answeredBy("") }

// first is when a server answered first; the zero time if it did not.
func (a *answers) first(server string) (at time.Time) {
	a.each(func(one answer) {
		if at.IsZero() && one.server == server {
			at = one.at
		}
	})
	return at
}

func (a *answers) lastFailure() (at time.Time) {
	a.each(func(one answer) {
		if one.server == "" {
			at = one.at
		}
	})
	return at
}

// clean returns an error if a question was not answered, or by somebody else
// than servers.
func (a *answers) clean(servers ...string) (err error) {
	a.each(func(one answer) {
		switch {
		case err != nil:
		case one.server == "":
			err = fmt.Errorf("a client was not answered: %s", one.what)
		case !slices.Contains(servers, one.server):
			err = fmt.Errorf("%s answered", one.server)
		}
	})
	return err
}

// takenOver returns an error if a server still answers after the first answer of
// the one that took over from it.
func (a *answers) takenOver(from, to string) (err error) {
	first := a.first(to)
	a.each(func(one answer) {
		if one.server == from && one.at.After(first) {
			err = fmt.Errorf("%s still answers %d ms after %s has begun to", from, one.at.Sub(first).Milliseconds(), to)
		}
	})
	return err
}
