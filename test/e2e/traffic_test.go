package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// target is an address that clients dial, and the pods that may answer there.
type target struct {
	addr netip.AddrPort
	pods []string
}

// askTimeout is when a connection counts as lost: not before TCP has tried
// again, because a packet may be lost on a busy machine.
const askTimeout = 5 * time.Second

// ask dials once and returns which pod answered.
func ask(from *netlab.Namespace, to netip.AddrPort) (string, error) {
	a, err := from.Ask(context.Background(), "tcp", netip.Addr{}, to, askTimeout)
	if err != nil {
		return "", err
	}
	if a.Result != netlab.Answered {
		return "", fmt.Errorf("%s from %s: %s", to, from.Name, a)
	}
	return a.Server, nil
}

// answeredBy waits until exactly these pods answer at an address.
func answeredBy(t *testing.T, from *netlab.Namespace, to netip.AddrPort, pods ...string) {
	t.Helper()
	until(t, fmt.Sprintf("%v answer %s at %s", pods, from.Name, to), func() error {
		seen := map[string]bool{}
		// Each of two endpoints is missed by 30 random choices once in 10^9.
		for range 30 * len(pods) {
			pod, err := ask(from, to)
			if err != nil {
				return err
			}
			seen[pod] = true
			if !slices.Contains(pods, pod) {
				return fmt.Errorf("%s answered", pod)
			}
		}
		if len(seen) != len(pods) {
			return fmt.Errorf("only %v answered", seen)
		}
		return nil
	})
}

// traffic is a client that connects all the time, to one target after the other.
type traffic struct {
	stopped chan struct{}
	done    sync.WaitGroup

	mu       sync.Mutex
	answered int
	lost     []error
}

// connectAllTheTime starts the client, in a pod of node. The test fails if a
// connection was refused, lost or answered by a pod that it is not meant for.
//
// Who dialled a Service before its rules were there has left an unanswered flow
// in conntrack that is not translated, and is remembered for two minutes
// (nf_conntrack_tcp_timeout_syn_sent). A client that comes to the same source
// port then falls into it, whatever the proxy does; so those are forgotten first.
func connectAllTheTime(t *testing.T, node, from *netlab.Namespace, targets []target) *traffic {
	t.Helper()
	if err := node.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
		t.Fatal(err)
	}
	tr := &traffic{stopped: make(chan struct{})}
	begin := time.Now()
	tr.done.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-tr.stopped:
				return
			default:
			}
			to := targets[i%len(targets)]
			at := time.Since(begin)
			pod, err := ask(from, to.addr)
			if err == nil && !slices.Contains(to.pods, pod) {
				err = fmt.Errorf("%s: answered by %s, not one of %v", to.addr, pod, to.pods)
			}
			tr.mu.Lock()
			if err != nil {
				tr.lost = append(tr.lost, fmt.Errorf("after %v: %w", at, err))
			} else {
				tr.answered++
			}
			tr.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		close(tr.stopped)
		tr.done.Wait()
		for i, err := range tr.lost {
			if i == 10 {
				t.Errorf("and %d more", len(tr.lost)-i)
				break
			}
			t.Errorf("a connection went wrong: %v", err)
		}
		t.Logf("%d connections answered, %d went wrong", tr.answered, len(tr.lost))
	})
	return tr
}

// more waits for that many more connections, right or wrong.
func (tr *traffic) more(t *testing.T, n int) {
	t.Helper()
	count := func() int {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		return tr.answered + len(tr.lost)
	}
	for goal := count() + n; count() < goal; { // however long it takes, while it goes on
		before := count()
		until(t, "one more connection was made", func() error {
			if count() == before {
				return errors.New("none")
			}
			return nil
		})
	}
}
