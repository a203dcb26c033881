// Package netlab builds little clusters out of network namespaces, inside the
// calling process: nodes, their pods, and clients outside, with routes between
// them, echo servers and dialers. Tests and the demo run proxiers in them.
//
// It knows Linux and nothing of Services or proxiers: a lab carries packets,
// and what a node does to them is its user's affair.
//
// Namespaces have no names and no mounts: only the process holds them. So
// nothing of a lab outlives the process, not even after SIGKILL, and labs of
// several processes never meet. It needs CAP_SYS_ADMIN and CAP_NET_ADMIN: root,
// or a user inside "unshare -Ur"; Supported says whether they are there.
package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Supported returns nil if labs can be built here, and else why not, for a
// test's Skip.
func Supported() error {
	n, err := newNamespace("probe")
	if err != nil {
		return fmt.Errorf("network namespaces cannot be made here: %w", err)
	}
	defer n.close()
	if err := n.Sysctl("net.ipv4.ip_forward", "1"); err != nil {
		return fmt.Errorf("sysctls of a network namespace cannot be set here: %w", err)
	}
	return nil
}

// Namespace is one network namespace. Its methods are safe for concurrent use.
type Namespace struct {
	Name string

	nsMu sync.RWMutex // a dial that nobody waits for may still enter when all ends
	ns   netns.NsHandle
	link *netlink.Handle

	mu      sync.Mutex
	closers []func()
	links   int
}

func newNamespace(name string) (*Namespace, error) {
	n := &Namespace{Name: name, ns: netns.None()}
	err := onThread(func() error {
		ns, err := netns.New() // also moves this thread into it
		n.ns = ns
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	n.link, err = netlink.NewHandleAt(n.ns, unix.NETLINK_ROUTE)
	if err != nil {
		n.close()
		return nil, fmt.Errorf("open netlink in namespace %s: %w", name, err)
	}
	lo, err := n.link.LinkByName("lo")
	if err == nil {
		err = n.link.LinkSetUp(lo)
	}
	if err != nil {
		n.close()
		return nil, fmt.Errorf("bring up lo in namespace %s: %w", name, err)
	}
	return n, nil
}

// onThread calls f on a thread of its own, which f may move between network
// namespaces, and waits. A thread that cannot be brought back is not given back
// to the Go runtime: it ends with its goroutine.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("BUG: function left its goroutine")
		defer func() { done <- err }()
		runtime.LockOSThread()
		home, herr := netns.Get()
		if herr != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("find the thread's network namespace: %w", herr)
			return
		}
		defer home.Close()
		err = f()
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return <-done
}

// Do calls f on a thread that is in the namespace. What f opens there (sockets,
// netlink handles, processes) stays there; goroutines that f starts are not.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		n.nsMu.RLock()
		err := netns.Set(n.ns)
		n.nsMu.RUnlock()
		if err != nil {
			return fmt.Errorf("enter namespace %s: %w", n.Name, err)
		}
		return f()
	})
}

// Path returns a file by which other programs can enter the namespace, with
// "nsenter --net=PATH" say, while this process lives.
func (n *Namespace) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(n.ns)) }

// Netlink returns a handle for links, addresses, routes and rules in the
// namespace. It is closed with the lab.
func (n *Namespace) Netlink() *netlink.Handle { return n.link }

// Start starts a command in the namespace. The caller waits for it; if it still
// runs when the lab is closed it is killed.
func (n *Namespace) Start(cmd *exec.Cmd) error {
	if err := n.Do(cmd.Start); err != nil {
		return fmt.Errorf("start %s in namespace %s: %w", cmd.Path, n.Name, err)
	}
	n.onClose(func() { _ = cmd.Process.Kill() })
	return nil
}

// Run runs a command in the namespace, waits for it and returns what it wrote
// to stdout. The error contains what it wrote to stderr.
func (n *Namespace) Run(ctx context.Context, name string, args ...string) (string, error) {
	return n.RunInput(ctx, "", name, args...)
}

// RunInput is Run with a text for the command's stdin.
func (n *Namespace) RunInput(ctx context.Context, stdin, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := n.Do(cmd.Start); err != nil {
		return "", fmt.Errorf("start %s in namespace %s: %w", name, n.Name, err)
	}
	if err := cmd.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("%s in namespace %s: %w: %s", name, n.Name, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Sysctl sets a kernel parameter in the namespace, by its dotted name.
func (n *Namespace) Sysctl(name, value string) error {
	path := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
	err := n.Do(func() error { return os.WriteFile(path, []byte(value), 0) })
	if err != nil {
		return fmt.Errorf("set %s=%s in namespace %s: %w", name, value, n.Name, err)
	}
	return nil
}

// DialContext is net.Dialer's, from inside the namespace; it fits
// http.Transport. The address must be numeric.
func (n *Namespace) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return n.dial(ctx, &net.Dialer{}, network, address)
}

func (n *Namespace) dial(ctx context.Context, d *net.Dialer, network, address string) (conn net.Conn, err error) {
	err = n.Do(func() error {
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen is net.Listen inside the namespace. The listener is closed with the lab.
func (n *Namespace) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() error {
		l, err = net.Listen(network, address)
		return err
	})
	if err == nil {
		n.onClose(func() { l.Close() })
	}
	return l, err
}

// ListenPacket is net.ListenPacket inside the namespace. The connection is
// closed with the lab.
func (n *Namespace) ListenPacket(network, address string) (c net.PacketConn, err error) {
	err = n.Do(func() error {
		c, err = net.ListenPacket(network, address)
		return err
	})
	if err == nil {
		n.onClose(func() { c.Close() })
	}
	return c, err
}

func (n *Namespace) onClose(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closers = append(n.closers, f)
}

// close gives up everything that keeps the namespace alive.
func (n *Namespace) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, f := range n.closers {
		f()
	}
	n.closers = nil
	if n.link != nil {
		n.link.Close()
		n.link = nil
	}
	n.nsMu.Lock()
	defer n.nsMu.Unlock()
	if n.ns.IsOpen() {
		n.ns.Close()
	}
}
