package ipvs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/ipset"
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// Probe finds out whether this node can do ipvs mode for a family, by doing once
// all that it takes, on throw-away objects: libraries are silent where a kernel
// has no IPVS. variant is that of iptables: "legacy", "nft" or "auto". Modules
// are loaded where they can be. If something is missing, the error is an
// *Unavailable that says what, and what to do. If that cannot be found out, after
// some tries, it is another. What an earlier Probe left that was killed is
// removed.
func Probe(ctx context.Context, family model.Family, variant string) (Host, error) {
	var h Host
	err := persist(ctx, func() (err error) { h, err = probeOnce(ctx, family, variant); return err })
	return h, err
}

func probeOnce(ctx context.Context, family model.Family, variant string) (Host, error) {
	x, err := xtables.Choose(ctx, family, variant)
	if askPrograms.lacking(err) {
		return Host{}, &Unavailable{err}
	}
	if err != nil {
		return Host{}, err
	}
	h := Host{Programs: x.Programs, Why: x.Why, RandomFully: x.RandomFully}
	k, err := newKernel(family, x.Programs, xtables.Stats{})
	if askSockets.lacking(err) {
		return Host{}, unavailable("this kernel lacks a protocol that ipvs mode takes (module nfnetlink): %w", err)
	}
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

type probe struct {
	*nlKernel
	host *Host
}

// modprobe loads a module where the program for it is installed. In a container
// without, the kernel may still load those that it asks for itself. Whether it is
// there then is tried afterwards; the error is for a program that could not do
// its work this time.
func modprobe(ctx context.Context, module string) error {
	program, err := exec.LookPath("modprobe")
	if err != nil || os.Geteuid() != 0 {
		return nil
	}
	out, err := exec.CommandContext(ctx, program, "-q", module).CombinedOutput()
	if err == nil || ended(err) && !xtables.Passing(string(out)) {
		return nil
	}
	return fmt.Errorf("load module %s: %w: %s", module, err, bytes.TrimSpace(out))
}

// ended says whether a program came to its end by itself.
func ended(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.Exited()
}

// load asks a question; where the answer is no, once more with a module loaded.
func (p probe) load(ctx context.Context, q question, module string, ask func() error) error {
	err := ask()
	if !q.lacking(err) {
		return err
	}
	if err := modprobe(ctx, module); err != nil {
		return err
	}
	return ask()
}

// ipvs: the kernel loads module ip_vs when it is asked for the family, by its
// alias.
func (p probe) ipvs(ctx context.Context) error {
	var id uint16
	err := p.load(ctx, askFamily, "ip_vs", func() (err error) { id, err = p.ipvsFamily(ctx); return err })
	if askFamily.lacking(err) {
		return unavailable("this kernel has no IPVS: load module ip_vs (modprobe ip_vs), or run a kernel with CONFIG_IP_VS")
	}
	if err != nil {
		return err
	}
	if _, err := os.Stat(ipvsTable); errors.Is(err, os.ErrNotExist) {
		return unavailable("this kernel's IPVS does not show its table: %w", err)
	} else if err != nil {
		return fmt.Errorf("look for the table of IPVS: %w", err)
	}
	if err := p.version(ctx, id); err != nil {
		return err
	}
	if err := p.sweepServers(ctx); err != nil {
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

// schedulers adds a virtual server with each. The kernel loads the scheduler's
// module by itself if it can.
func (p probe) schedulers(ctx context.Context, id uint16) error {
	for _, name := range schedulers {
		err := p.load(ctx, askScheduler, "ip_vs_"+name, func() error { return p.tryServer(ctx, id, name) })
		switch {
		case err == nil:
			p.host.Schedulers = append(p.host.Schedulers, name)
		case askScheduler.lacking(err):
		case askServer.lacking(err):
			return unavailable("this kernel's IPVS does not do %s: run a kernel with CONFIG_IP_VS_IPV6, or configure IPv4 only", p.family)
		case errors.Is(err, unix.EPERM) && inUserNamespace():
			return unavailable("the kernel lets nobody change IPVS from a user namespace of its own (as in a rootless container): %w", err)
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("try a virtual server: CAP_NET_ADMIN is needed: %w", err)
		default:
			return fmt.Errorf("try a virtual server with scheduler %s: %w", name, err)
		}
	}
	if len(p.host.Schedulers) == 0 {
		return unavailable("this kernel's IPVS has no scheduler: load module ip_vs_rr (modprobe ip_vs_rr)")
	}
	return nil
}

// inUserNamespace says whether this process is in another user namespace than
// the machine's first, for which alone generic netlink accepts a capability.
func inUserNamespace() bool {
	data, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && !slices.Equal(strings.Fields(string(data)), []string{"0", "0", "4294967295"})
}

// tryServer adds a virtual server, reads it back and deletes it. One that exists
// is somebody's, and another port is tried.
func (p probe) tryServer(ctx context.Context, id uint16, scheduler string) error {
	for _, key := range throwAways(p.family) {
		o := op{kind: putServer, key: key, settings: trialSettings(scheduler)}
		err := p.command(ctx, id, cmdNewService, &o)
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return err
		}
		got, err := lookupServer(ctx, p.genl, id, p.af(), o.key)
		if err == nil && (got == nil || got.settings != o.settings) {
			err = errors.New("a virtual server that was added cannot be read back")
		}
		return errors.Join(err, p.command(context.WithoutCancel(ctx), id, cmdDelService, &o))
	}
	return fmt.Errorf("all ports of %s that are tried have virtual servers", throwAways(p.family)[0].addr)
}

func (p probe) command(ctx context.Context, id uint16, cmd uint8, o *op) error {
	refused, err := p.genl.Execute(ctx, 1, func(_ int, e *nlbatch.Encoder) { encodeCommand(e, id, p.af(), cmd, o) })
	if err != nil {
		return err
	}
	return refused[0]
}

func (p probe) device(ctx context.Context) error {
	if err := p.sweepDevice(ctx); err != nil {
		return err
	}
	index, err := p.deviceIndex(ctx)
	if err != nil || index != 0 {
		return err // kube-ipvs0 is there: nothing needs to be created
	}
	err = p.load(ctx, askDevice, "dummy", func() error { return p.makeDevice(ctx, probeDevice) })
	if askDevice.lacking(err) {
		return unavailable("this kernel has no dummy devices: load module dummy (modprobe dummy), or run a kernel with CONFIG_DUMMY")
	}
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if index, err = linkIndex(ctx, p.route, probeDevice); err != nil || index == 0 {
		return errors.Join(err, errors.New("a dummy device that was created cannot be found"))
	}
	return removeLink(ctx, p.route, index)
}

// rules tries the set types, and rules with them.
func (p probe) rules(ctx context.Context) (err error) {
	// Not before: rules of a Probe that was killed hold on to sets until tryRule.
	defer func() { err = errors.Join(err, p.sweepSets(context.WithoutCancel(ctx))) }()
	set := func(i int) string { return trialSet(p.family, os.Getpid(), i) }
	for i, typ := range probeSets {
		err := p.trySet(ctx, ipset.Spec{Name: set(i), Type: typ})
		if askSet.lacking(err) {
			return unavailable("this kernel cannot do what ipvs mode needs of ipset (modules ip_set and ip_set_*): %w", err)
		}
		if err != nil {
			return err
		}
	}
	if err := p.tryCount(ctx, set(1)); err != nil {
		return err
	}
	marked := set(len(probeSets))
	errMarked := p.trySet(ctx, ipset.Spec{Name: marked, Type: ipset.HashIPPort, Marks: true})
	matches := trial{tableFilter, "-m set --match-set " + set(1) + " dst,dst -j RETURN"}
	maps := trial{tableMangle, "-j SET --map-set " + marked + " dst,dst --map-mark"}
	if errMarked == nil && p.tryRules(ctx, matches, maps) == nil {
		p.host.Inside = true
		return nil
	}
	// Which of them is it, and why?
	err = p.tryRules(ctx, matches)
	if askRule.lacking(err) {
		return unavailable("iptables cannot match sets (module xt_set): %w", err)
	}
	if err != nil {
		return err
	}
	if err = errMarked; err == nil {
		err = p.tryRules(ctx, maps)
	}
	if err != nil && !askSet.lacking(err) && !askRule.lacking(err) {
		return err
	}
	if p.host.Inside = err == nil; err != nil {
		p.host.Missing = append(p.host.Missing, fmt.Sprintf("The kernel or iptables cannot map sets to packet marks (ipset skbinfo, SET --map-mark; Linux 3.18): "+
			"this node and its pods get only local endpoints of Services with externalTrafficPolicy Local. %v", err))
	}
	return nil
}

var probeSets = []ipset.Type{ipset.HashIP, ipset.HashIPPort, ipset.HashIPPortIP, ipset.HashIPPortNet, ipset.BitmapPort}

// trySet creates a set. The module of a type has an alias: ip_set_hash:ip.
func (p probe) trySet(ctx context.Context, s ipset.Spec) error {
	s.IPv6, s.HashSize, s.MaxElem = p.family == model.IPv6, 64, 64
	return p.load(ctx, askSet, "ip_set_"+string(s.Type), func() error { return p.sets.Create(ctx, s) })
}

// tryCount finds out whether the kernel counts a set's elements: drift is found by
// that.
func (p probe) tryCount(ctx context.Context, set string) error {
	key := throwAways(p.family)[0]
	refused, err := p.sets.Apply(ctx, 1, func(int) ipset.Change {
		return ipset.Change{Set: set, Type: ipset.HashIPPort, Entry: ipset.Entry{Addr: key.addr, Protocol: uint8(key.protocol), Port: key.port}}
	})
	if err := errors.Join(err, refused[0]); err != nil {
		return fmt.Errorf("add an element to set %s: %w", set, err)
	}
	h, err := p.sets.Header(ctx, set)
	if err != nil {
		return err
	}
	return checkCount(h)
}

func checkCount(h ipset.Header) error {
	if h.Elements == 1 {
		return nil
	}
	return unavailable("this kernel does not count the elements of sets, by which ipvs mode sees that somebody changed them (a set of one has %d): run Linux 4.10 or later", h.Elements)
}

// trial is a rule that is tried.
type trial struct{ table, rule string }

// tryRules loads rules where no packet comes, and removes them.
func (p probe) tryRules(ctx context.Context, list ...trial) error {
	return p.run.Restore(ctx, func(w *bufio.Writer) {
		for _, r := range list {
			_, _ = fmt.Fprintf(w, "*%s\n:%s - [0:0]\n-A %s %s\nCOMMIT\n", r.table, chainProbe, chainProbe, r.rule)
			_, _ = fmt.Fprintf(w, "*%s\n:%s - [0:0]\n-X %s\nCOMMIT\n", r.table, chainProbe, chainProbe)
		}
	})
}
