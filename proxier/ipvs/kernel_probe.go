package ipvs

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/ipset"
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// Probe finds out whether this node can do ipvs mode for a family, by doing once
// all that it takes, on throw-away objects: libraries are silent where a kernel
// has no IPVS. variant is that of iptables: "legacy", "nft" or "auto". Modules
// are loaded where they can be. The error says what is missing and what to do.
func Probe(ctx context.Context, family model.Family, variant string) (Host, error) {
	x, err := xtables.Choose(ctx, family, variant)
	if err != nil {
		return Host{}, err
	}
	h := Host{Programs: x.Programs, Why: x.Why, RandomFully: x.RandomFully}
	k, err := newKernel(family, x.Programs, xtables.Stats{})
	if err != nil {
		return Host{}, err
	}
	defer k.close()
	p := probe{nlKernel: k, host: &h}
	for _, try := range []func(context.Context) error{p.ipvs, p.device, p.rules} {
		if err := try(ctx); err != nil {
			return Host{}, err
		}
	}
	return h, nil
}

// Schedulers gives the schedulers that the kernel offers, sorted.
func Schedulers(ctx context.Context, family model.Family) ([]string, error) {
	k, err := newKernel(family, xtables.Programs{Family: family}, xtables.Stats{})
	if err != nil {
		return nil, err
	}
	defer k.close()
	var h Host
	p := probe{nlKernel: k, host: &h}
	err = p.ipvs(ctx)
	return h.Schedulers, err
}

type probe struct {
	*nlKernel
	host *Host
}

// modprobe loads a module where the program for it is installed. In a container
// without, the kernel may still load those that it asks for itself.
func modprobe(ctx context.Context, module string) {
	if program, err := exec.LookPath("modprobe"); err == nil && os.Geteuid() == 0 {
		_ = exec.CommandContext(ctx, program, "-q", module).Run() // what matters is tried afterwards
	}
}

// ipvs: the kernel loads module ip_vs when it is asked for the family, by its
// alias.
func (p probe) ipvs(ctx context.Context) error {
	id, err := p.ipvsFamily(ctx)
	if err != nil {
		modprobe(ctx, "ip_vs")
		id, err = p.ipvsFamily(ctx)
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return errors.New("this kernel has no IPVS: load module ip_vs (modprobe ip_vs), or run a kernel with CONFIG_IP_VS")
	case err != nil:
		return err
	}
	if _, err := os.Stat("/proc/thread-self/net/ip_vs"); err != nil {
		return fmt.Errorf("this kernel's IPVS does not show its table: %w", err)
	}
	if err := p.version(ctx, id); err != nil {
		return err
	}
	return p.schedulers(ctx, id)
}

func (p probe) version(ctx context.Context, id uint16) error {
	const getInfo, attrVersion = 15, 1 // IPVS_CMD_GET_INFO, IPVS_INFO_ATTR_VERSION
	err := p.genl.Query(ctx, func(e *nlbatch.Encoder) { beginIPVS(e, id, getInfo) }, func(payload []byte) error {
		for a, v := range nlbatch.Attributes(payload[min(unix.GENL_HDRLEN, len(payload)):]) {
			if a == attrVersion && len(v) >= 4 {
				p.host.Version = versionText(binary.NativeEndian.Uint32(v))
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("ask IPVS for its version: %w", err)
	}
	return nil
}

// throwAway is an address for documentation (RFC 5737, RFC 3849) that no host has.
func throwAway(family model.Family, try uint16) serverKey {
	a := netip.MustParseAddr("198.51.100.0")
	if family == model.IPv6 {
		a = netip.MustParseAddr("2001:db8::c633:6400")
	}
	return serverKey{addr: a, port: 20000 + try, protocol: model.TCP}
}

// probePorts are how many ports are tried: somebody else may probe as well.
const probePorts = 64

// schedulers adds a virtual server with each. The kernel loads the scheduler's
// module by itself if it can.
func (p probe) schedulers(ctx context.Context, id uint16) error {
	for _, name := range schedulers {
		err := p.tryServer(ctx, id, name)
		if errors.Is(err, unix.ENOENT) {
			modprobe(ctx, "ip_vs_"+name)
			err = p.tryServer(ctx, id, name)
		}
		switch {
		case err == nil:
			p.host.Schedulers = append(p.host.Schedulers, name)
		case errors.Is(err, unix.ENOENT):
		case errors.Is(err, unix.EAFNOSUPPORT) && p.family == model.IPv6:
			return errors.New("this kernel's IPVS does not do IPv6: run a kernel with CONFIG_IP_VS_IPV6, or configure IPv4 only")
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("try a virtual server: CAP_NET_ADMIN is needed: %w", err)
		default:
			return fmt.Errorf("try a virtual server with scheduler %s: %w", name, err)
		}
	}
	if len(p.host.Schedulers) == 0 {
		return errors.New("this kernel's IPVS has no scheduler: load module ip_vs_rr (modprobe ip_vs_rr)")
	}
	return nil
}

// tryServer adds a virtual server, reads it back and deletes it. One that exists
// is somebody's, and another port is tried.
func (p probe) tryServer(ctx context.Context, id uint16, scheduler string) error {
	for try := range uint16(probePorts) {
		o := op{kind: putServer, key: throwAway(p.family, try), settings: settings{scheduler: scheduler}}
		err := p.command(ctx, id, cmdNewService, &o)
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return err
		}
		got, err := lookupServer(ctx, p.genl, id, p.af(), o.key)
		if err == nil && (got == nil || got.scheduler != scheduler) {
			err = errors.New("a virtual server that was added cannot be read back")
		}
		return errors.Join(err, p.command(context.WithoutCancel(ctx), id, cmdDelService, &o))
	}
	return fmt.Errorf("all ports of %s have virtual servers", throwAway(p.family, 0).addr)
}

func (p probe) command(ctx context.Context, id uint16, cmd uint8, o *op) error {
	refused, err := p.genl.Execute(ctx, 1, func(_ int, e *nlbatch.Encoder) { encodeCommand(e, id, p.af(), cmd, o) })
	if err != nil {
		return err
	}
	return refused[0]
}

// probeDevice is created and removed again.
const probeDevice = "kube-ipvs-probe"

func (p probe) device(ctx context.Context) error {
	index, err := p.deviceIndex(ctx)
	if err != nil || index != 0 {
		return err // kube-ipvs0 is there: nothing needs to be created
	}
	err = p.makeDevice(ctx, probeDevice)
	if errors.Is(err, unix.EOPNOTSUPP) {
		modprobe(ctx, "dummy")
		err = p.makeDevice(ctx, probeDevice)
	}
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return errors.New("this kernel has no dummy devices: load module dummy (modprobe dummy), or run a kernel with CONFIG_DUMMY")
	case err != nil:
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if index, err = linkIndex(ctx, p.route, probeDevice); err != nil || index == 0 {
		return errors.Join(err, errors.New("a dummy device that was created cannot be found"))
	}
	return removeLink(ctx, p.route, index)
}

// chainProbe holds trial rules. Nothing leads there.
const chainProbe = "SLUICE-IPVS-TRIAL"

// rules tries the set types, and rules with them.
func (p probe) rules(ctx context.Context) (err error) {
	set := func(i int) string { return fmt.Sprintf("SLUICE-PROBE-%d-%d-%d", p.family, os.Getpid(), i) }
	defer func() {
		for i := range len(probeSets) + 1 {
			err = errors.Join(err, p.sets.Destroy(context.WithoutCancel(ctx), set(i)))
		}
	}()
	v6 := p.family == model.IPv6
	for i, typ := range probeSets {
		if err := p.sets.Create(ctx, ipset.Spec{Name: set(i), Type: typ, IPv6: v6, HashSize: 64, MaxElem: 64}); err != nil {
			return fmt.Errorf("this kernel cannot do what ipvs mode needs of ipset: %w", err)
		}
	}
	if err := p.tryRule(ctx, tableFilter, "-m set --match-set "+set(1)+" dst,dst -j RETURN"); err != nil {
		return fmt.Errorf("iptables cannot match sets (module xt_set): %w", err)
	}
	marked := len(probeSets)
	err = p.sets.Create(ctx, ipset.Spec{Name: set(marked), Type: ipset.HashIPPort, IPv6: v6, Marks: true, HashSize: 64, MaxElem: 64})
	if err == nil {
		err = p.tryRule(ctx, tableMangle, "-j SET --map-set "+set(marked)+" dst,dst --map-mark")
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if p.host.Inside = err == nil; err != nil {
		p.host.Missing = append(p.host.Missing, fmt.Sprintf("The kernel or iptables cannot map sets to packet marks (ipset skbinfo, SET --map-mark; Linux 3.18): "+
			"this node and its pods get only local endpoints of Services with externalTrafficPolicy Local. %v", err))
	}
	return nil
}

var probeSets = []ipset.Type{ipset.HashIP, ipset.HashIPPort, ipset.HashIPPortIP, ipset.HashIPPortNet, ipset.BitmapPort}

// tryRule loads a rule where no packet comes, and removes it.
func (p probe) tryRule(ctx context.Context, table, rule string) error {
	err := p.run.Restore(ctx, func(w *bufio.Writer) {
		_, _ = fmt.Fprintf(w, "*%s\n:%s - [0:0]\n-A %s %s\nCOMMIT\n", table, chainProbe, chainProbe, rule)
	})
	if err != nil {
		return err
	}
	return p.run.Restore(context.WithoutCancel(ctx), func(w *bufio.Writer) {
		_, _ = fmt.Fprintf(w, "*%s\n:%s - [0:0]\n-X %s\nCOMMIT\n", table, chainProbe, chainProbe)
	})
}
