package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/rpc"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/test/netlab"
	"github.com/sluice-proxy/sluice/test/uml"
)

// Where the machine's own kernel has no IPVS, the nodes, their pods and the
// endpoints are in a User-Mode Linux, and so is everything that is measured. The
// control plane stays outside, for the guest has one slow CPU: they are joined by
// a tap device, and what changes endpoints is asked to by net/rpc.
const (
	insideVariable = "SLUICE_BENCH_INSIDE" // the folder that both sides see
	tapName        = "bench0"
	resultFile     = "guest.json"
	guestMemory    = 3072
)

var (
	tapHost  = netip.MustParseAddr("192.168.200.1")
	tapGuest = netip.MustParseAddr("192.168.200.2")
	rpcAddr  = netip.AddrPortFrom(tapHost, 7070)
)

func needsMachine(s *settings) bool { return s.mode == modeIPVS && !uml.Native() }

// runInMachine measures everything in a guest.
func runInMachine(ctx context.Context, s *settings, dir string, r *report) error {
	if err := uml.Supported(); err != nil {
		return fmt.Errorf("ipvs mode needs a kernel with IPVS, which this machine's is not, and %w", err)
	}
	lab, err := netlab.New(netlab.Config{Clients: []netlab.HostSpec{controlHost}})
	if err != nil {
		return err
	}
	defer lab.Close()
	ns := lab.Host(controlHost.Name)
	if err := plugIn(ns); err != nil {
		return fmt.Errorf("make a tap device: %w", err)
	}
	c, err := newControl(ctx, s, dir, ns)
	if err != nil {
		return err
	}
	defer c.close()
	if err := c.fill(ctx, s.services); err != nil {
		return err
	}
	if err := serveWriter(ctx, ns, c); err != nil {
		return err
	}
	err = boot(ctx, s, dir, ns)
	if rerr := readGuest(dir, r); rerr != nil {
		return errors.Join(rerr, err)
	}
	if err != nil {
		r.skip("%v", err)
	}
	return nil
}

// serveWriter lets the guest write.
func serveWriter(ctx context.Context, ns *netlab.Namespace, w writer) error {
	l, err := ns.Listen("tcp4", rpcAddr.String())
	if err != nil {
		return err
	}
	server := rpc.NewServer()
	if err := server.RegisterName("Writer", &Writer{ctx, w}); err != nil {
		return err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed with the lab
			}
			go server.ServeConn(conn)
		}
	}()
	return nil
}

// boot runs this program in a guest, and returns when it has ended.
func boot(ctx context.Context, s *settings, dir string, ns *netlab.Namespace) error {
	program := filepath.Join(dir, "bench")
	if err := copyFile(s.self, program); err != nil {
		return err
	}
	args := append([]string{program}, s.args...)
	args = append(args, "-sluice", s.paths[ours], "-tools", filepath.Dir(s.paths[peer]),
		"-services", fmt.Sprint(s.services), "-cold-limit", fmt.Sprint(s.coldLimit),
		"-changes", fmt.Sprint(s.changes), "-change-limit", fmt.Sprint(s.changeLimit))
	if s.profiles != "" {
		profiles := filepath.Join(dir, "profiles")
		args = append(args, "-profiles", profiles)
		defer func() { _ = os.CopyFS(s.profiles, os.DirFS(profiles)) }() // the run's error counts
	}
	progress("booting a User-Mode Linux")
	return ns.Do(func() error {
		code, err := uml.Run(ctx, uml.Machine{Memory: guestMemory, Dir: dir, Writable: dir, Env: []string{insideVariable + "=" + dir},
			Net: []uml.Tap{{Host: tapName, Guest: "eth0"}}}, args, os.Stderr)
		if err == nil && code != 0 {
			err = fmt.Errorf("the guest's part ended with status %d", code)
		}
		return err
	})
}

// readGuest takes over what the guest has measured.
func readGuest(dir string, r *report) error {
	data, err := os.ReadFile(filepath.Join(dir, resultFile))
	if err != nil {
		return fmt.Errorf("no results: %w", err)
	}
	var guest report
	if err := json.Unmarshal(data, &guest); err != nil {
		return fmt.Errorf("read results: %w", err)
	}
	r.Guest, r.Results = "User-Mode Linux "+guest.Kernel+", one CPU", guest.Results
	r.Skipped = append(guest.Skipped, r.Skipped...)
	return nil
}

// plugIn makes the tap device and routes the guest's addresses to it.
func plugIn(ns *netlab.Namespace) error {
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: tapName}, Mode: netlink.TUNTAP_MODE_TAP}
	// The device is in the namespace of the thread that opens it.
	if err := ns.Do(func() error { return netlink.LinkAdd(link) }); err != nil {
		return err
	}
	return join(ns, tapName, tapHost, tapGuest, nodeRange, clusterRange, netip.PrefixFrom(podsAddr, 32))
}

// join gives an interface its address, and routes what is behind its peer.
func join(ns *netlab.Namespace, name string, own, peer netip.Addr, behind ...netip.Prefix) error {
	h := ns.Netlink()
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(own, 30))}
	if err := h.AddrAdd(link, addr); err != nil {
		return err
	}
	if err := h.LinkSetUp(link); err != nil {
		return err
	}
	for _, p := range behind {
		r := &netlink.Route{Dst: ipNet(p), LinkIndex: link.Attrs().Index, Gw: peer.AsSlice(), Flags: unix.RTNH_F_ONLINK}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("route %s: %w", p, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// runInside is the guest's part. Its results go to a file.
func runInside(ctx context.Context, s *settings, dir string) error {
	if s.profiles != "" {
		if err := os.MkdirAll(s.profiles, 0o755); err != nil {
			return err
		}
	}
	r := newReport(s)
	c, err := newCluster(s, dir)
	if err != nil {
		return err
	}
	defer c.lab.Close()
	// The card moves to the router of the lab.
	card, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := moveTo(c.lab.Fabric, card); err != nil {
		return fmt.Errorf("move the card: %w", err)
	}
	if err := join(c.lab.Fabric, card.Attrs().Name, tapGuest, tapHost, netip.PrefixFrom(controlAddr, 32)); err != nil {
		return fmt.Errorf("set up the card: %w", err)
	}
	conn, err := c.lab.Fabric.DialContext(ctx, "tcp4", rpcAddr.String())
	if err != nil {
		return err
	}
	c.writer = remote{rpc.NewClient(conn)}
	return measureAll(ctx, c, r, func() error { return r.write(filepath.Join(dir, resultFile)) })
}

func moveTo(ns *netlab.Namespace, link netlink.Link) error {
	f, err := os.Open(ns.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	return netlink.LinkSetNsFd(link, int(f.Fd()))
}

// Writer is what the guest calls; net/rpc wants it exported.
type Writer struct {
	ctx context.Context
	to  writer
}

// Endpoints names the Service, and the version of its endpoints to set.
type Endpoints struct{ Service, Version int }

// Canary sets the canary's endpoint.
func (w *Writer) Canary(version int, _ *bool) error { return w.to.setCanary(w.ctx, version) }

// Endpoints sets those of a numbered Service.
func (w *Writer) Endpoints(e Endpoints, _ *bool) error {
	return w.to.setEndpoints(w.ctx, e.Service, e.Version)
}

// remote is the writer on the guest's side.
type remote struct{ client *rpc.Client }

func (r remote) setCanary(ctx context.Context, version int) error {
	return r.call(ctx, "Writer.Canary", version)
}

func (r remote) setEndpoints(ctx context.Context, i, version int) error {
	return r.call(ctx, "Writer.Endpoints", Endpoints{i, version})
}

func (r remote) call(ctx context.Context, method string, args any) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case call := <-r.client.Go(method, args, new(bool), make(chan *rpc.Call, 1)).Done:
		return call.Error
	}
}
