package ipvs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

func (k *nlKernel) af() uint8 { return addressFamily(k.family) }

func addressFamily(f model.Family) uint8 {
	if f == model.IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// deviceIndex finds kube-ipvs0; 0: there is none.
func (k *nlKernel) deviceIndex(ctx context.Context) (uint32, error) {
	return linkIndex(ctx, k.route, device)
}

func linkIndex(ctx context.Context, c *nlbatch.Conn, name string) (uint32, error) {
	var index uint32
	err := c.Query(ctx, func(e *nlbatch.Encoder) {
		e.Begin(unix.RTM_GETLINK, 0)
		e.Raw(make([]byte, unix.SizeofIfInfomsg)...)
		e.String(unix.IFLA_IFNAME, name)
	}, func(payload []byte) error {
		if len(payload) >= unix.SizeofIfInfomsg {
			index = binary.NativeEndian.Uint32(payload[4:])
		}
		return nil
	})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return 0, fmt.Errorf("look for device %s: %w", name, err)
	}
	return index, nil
}

// makeDevice creates a dummy device; it stays down, so that nobody answers ARP
// for its addresses on its behalf.
func (k *nlKernel) makeDevice(ctx context.Context, name string) error {
	refused, err := k.route.Execute(ctx, 1, func(_ int, e *nlbatch.Encoder) {
		e.Begin(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
		e.Raw(make([]byte, unix.SizeofIfInfomsg)...)
		e.String(unix.IFLA_IFNAME, name)
		e.Nest(unix.IFLA_LINKINFO, func() { e.String(unix.IFLA_INFO_KIND, "dummy") })
	})
	if err == nil {
		err = refused[0]
	}
	switch {
	case err == nil, errors.Is(err, unix.EEXIST):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("create device %s: the kernel has no dummy devices (module dummy): %w", name, err)
	}
	return fmt.Errorf("create device %s: %w", name, err)
}

// removeDevice removes kube-ipvs0 if it holds no address of either family, but
// for the one that the kernel gives a device that is up.
func (k *nlKernel) removeDevice(ctx context.Context) error {
	index, err := k.deviceIndex(ctx)
	if err != nil || index == 0 {
		return err
	}
	list, err := k.listAddrs(ctx, unix.AF_UNSPEC, index)
	if err != nil || len(list) > 0 {
		return err
	}
	return removeLink(ctx, k.route, index)
}

func removeLink(ctx context.Context, c *nlbatch.Conn, index uint32) error {
	refused, err := c.Execute(ctx, 1, func(_ int, e *nlbatch.Encoder) {
		e.Begin(unix.RTM_DELLINK, 0)
		var h [unix.SizeofIfInfomsg]byte
		binary.NativeEndian.PutUint32(h[4:], index)
		e.Raw(h[:]...)
	})
	if err == nil {
		err = refused[0]
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove device with index %d: %w", index, err)
	}
	return nil
}

// addresses lists what is on kube-ipvs0; nil: there is no such device.
func (k *nlKernel) addresses(ctx context.Context) (map[netip.Addr]bool, error) {
	index, err := k.deviceIndex(ctx)
	if err != nil || index == 0 {
		return nil, err
	}
	list, err := k.listAddrs(ctx, k.af(), index)
	addrs := make(map[netip.Addr]bool, len(list))
	for _, a := range list {
		addrs[a] = true
	}
	return addrs, err
}

// listTries is how often a list is begun again that changed while it was read.
const listTries = 4

// listAddrs gives the addresses of a device, but for the one that the kernel
// gives a device that is up.
func (k *nlKernel) listAddrs(ctx context.Context, family uint8, index uint32) ([]netip.Addr, error) {
	var list []netip.Addr
	var err error
	for range listTries {
		list = list[:0]
		err = k.route.Dump(ctx, func(e *nlbatch.Encoder) {
			e.Begin(unix.RTM_GETADDR, 0)
			h := [unix.SizeofIfAddrmsg]byte{0: family}
			e.Raw(h[:]...)
		}, func(payload []byte) error {
			if a := parseLinkAddr(payload, index); a.IsValid() && (a.Is4() || !a.IsLinkLocalUnicast()) {
				list = append(list, a)
			}
			return nil
		})
		if !errors.Is(err, nlbatch.ErrInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", device, err)
	}
	return list, nil
}

// parseLinkAddr reads an address of a device; it is zero if it is another's.
func parseLinkAddr(payload []byte, index uint32) netip.Addr {
	if len(payload) < unix.SizeofIfAddrmsg || binary.NativeEndian.Uint32(payload[4:]) != index {
		return netip.Addr{}
	}
	var addr, local netip.Addr
	for a, v := range nlbatch.Attributes(payload[unix.SizeofIfAddrmsg:]) {
		switch a {
		case unix.IFA_ADDRESS:
			addr, _ = netip.AddrFromSlice(v)
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(v)
		}
	}
	if local.IsValid() {
		return local
	}
	return addr
}

// ifaFlags: nobody else can have the address, and its prefix needs no route.
const ifaFlags = unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE

func (k *nlKernel) applyAddrs(ctx context.Context, ops []op) (map[int]error, error) {
	index, err := k.deviceIndex(ctx)
	if err != nil {
		return nil, err
	}
	if index == 0 {
		for _, o := range ops {
			if o.kind == addAddr {
				return nil, fmt.Errorf("add addresses: device %s does not exist any more", device)
			}
		}
		return nil, nil
	}
	refused, err := k.route.Execute(ctx, len(ops), func(i int, e *nlbatch.Encoder) { encodeAddr(e, index, &ops[i]) })
	for i, why := range refused {
		if ops[i].kind == addAddr && errors.Is(why, unix.EEXIST) || ops[i].kind == delAddr && errors.Is(why, unix.EADDRNOTAVAIL) {
			delete(refused, i)
		}
	}
	if err == nil {
		err = k.awaitRoutes(ctx, ops, refused)
	}
	return refused, err
}

// routeWait is how long the local route of an IPv6 address is waited for.
const routeWait = time.Second

// awaitRoutes waits until the kernel takes packets to the IPv6 addresses that were
// added as its own: it makes their routes a moment after it has acknowledged the
// addresses, the last one's last (addrconf_dad_work). Without, packets pass by the
// virtual servers. Where the routes do not come in time they are not waited for
// again.
func (k *nlKernel) awaitRoutes(ctx context.Context, ops []op, refused map[int]error) error {
	for i := len(ops) - 1; i >= 0 && !k.routesLate; i-- {
		if ops[i].kind == addAddr && ops[i].addr.Is6() && refused[i] == nil {
			return k.awaitRoute(ctx, ops[i].addr)
		}
	}
	return nil
}

func (k *nlKernel) awaitRoute(ctx context.Context, a netip.Addr) error {
	pause := 500 * time.Microsecond
	for deadline := time.Now().Add(routeWait); ; pause = min(2*pause, 20*time.Millisecond) {
		local, err := k.isLocal(ctx, a)
		if err != nil || local {
			return err
		}
		if k.routesLate = time.Now().After(deadline); k.routesLate {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// isLocal says whether the kernel takes packets to an IPv6 address as its own.
func (k *nlKernel) isLocal(ctx context.Context, a netip.Addr) (bool, error) {
	local := false
	err := k.route.Query(ctx, func(e *nlbatch.Encoder) {
		e.Begin(unix.RTM_GETROUTE, 0)
		h := [unix.SizeofRtMsg]byte{0: unix.AF_INET6, 1: 128}
		e.Raw(h[:]...)
		e.Bytes(unix.RTA_DST, address(a))
	}, func(payload []byte) error {
		const typ = 7 // rtm_type
		local = local || len(payload) > typ && payload[typ] == unix.RTN_LOCAL
		return nil
	})
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	return err == nil && local, nil // no route at all is an error of the kernel's
}

// encodeAddr: IPv4 addresses have scope host and IPv6 ones are deprecated from
// the start, so that neither is chosen as a source where another would do.
func encodeAddr(e *nlbatch.Encoder, index uint32, o *op) {
	if o.kind == delAddr {
		e.Begin(unix.RTM_DELADDR, 0)
	} else {
		e.Begin(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	}
	h := [unix.SizeofIfAddrmsg]byte{0: unix.AF_INET, 1: 32, 3: unix.RT_SCOPE_HOST}
	if o.addr.Is6() {
		h[0], h[1], h[3] = unix.AF_INET6, 128, unix.RT_SCOPE_UNIVERSE
	}
	binary.NativeEndian.PutUint32(h[4:], index)
	e.Raw(h[:]...)
	e.Bytes(unix.IFA_ADDRESS, address(o.addr))
	e.Bytes(unix.IFA_LOCAL, address(o.addr))
	if o.addr.Is6() && o.kind == addAddr {
		e.U32(unix.IFA_FLAGS, ifaFlags)
		var life [16]byte // ifa_prefered, ifa_valid, and two times of the kernel's
		binary.NativeEndian.PutUint32(life[4:], ^uint32(0))
		e.Bytes(unix.IFA_CACHEINFO, life[:])
	}
}
