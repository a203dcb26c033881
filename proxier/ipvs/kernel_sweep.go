package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/ipset"
)

// What a Probe makes and removes again. Whoever finds it later knows it by its
// names and by trialTimeout: the Probe was killed.
const (
	probeDevice = "kube-ipvs-probe"
	chainProbe  = "SLUICE-IPVS-TRIAL" // nothing leads there
	setPrefix   = "SLUICE-PROBE-"
	// trialTimeout tells a virtual server of a Probe from anybody's: nobody wants 14
	// days, 6 hours, 56 minutes and 7 seconds of persistence.
	trialTimeout = 1234567
	// probePorts are how many ports are tried: somebody else may use one.
	probePorts = 64
)

func trialSettings(scheduler string) settings {
	return settings{scheduler: scheduler, flags: flagPersistent, timeout: trialTimeout}
}

// trial says whether a virtual server at one of the throwAways is a Probe's.
func (l *liveServer) trial() bool {
	return l.settings == trialSettings(l.scheduler) && len(l.destinations) == 0
}

// throwAways are virtual servers at an address for documentation (RFC 5737, RFC
// 3849) that no host has.
func throwAways(family model.Family) []serverKey {
	a := netip.MustParseAddr("198.51.100.0")
	if family == model.IPv6 {
		a = netip.MustParseAddr("2001:db8::c633:6400")
	}
	list := make([]serverKey, probePorts)
	for i := range list {
		list[i] = serverKey{addr: a, port: 20000 + uint16(i), protocol: model.TCP}
	}
	return list
}

func trialSet(family model.Family, pid, i int) string {
	return fmt.Sprintf("%s%d-%d-%d", setPrefix, family, pid, i)
}

// isTrialSet says whether a set is one that a Probe of a family made.
func isTrialSet(family model.Family, name string) bool {
	rest, ok := strings.CutPrefix(name, fmt.Sprintf("%s%d-", setPrefix, family))
	pid, i, both := strings.Cut(rest, "-")
	p, err1 := strconv.Atoi(pid)
	n, err2 := strconv.Atoi(i)
	return ok && both && errors.Join(err1, err2) == nil && name == trialSet(family, p, n)
}

// sweepServers removes the virtual servers that Probes left.
func (k *nlKernel) sweepServers(ctx context.Context) error {
	found, err := k.lookup(ctx, throwAways(k.family))
	if err != nil {
		return err
	}
	var errs []error
	for key, s := range found {
		if !s.trial() {
			continue
		}
		refused, err := k.applyServers(ctx, []op{{kind: delServer, key: key}})
		if err = errors.Join(err, refused[0]); err != nil {
			errs = append(errs, fmt.Errorf("remove virtual server %s of a probe: %w", key, err))
		}
	}
	return errors.Join(errs...)
}

// sweepSets removes the sets that Probes left.
func (k *nlKernel) sweepSets(ctx context.Context) error {
	have, err := k.sets.Headers(ctx)
	if errors.Is(err, ipset.ErrUnsupported) {
		return nil
	}
	errs := []error{err}
	for name := range have {
		if isTrialSet(k.family, name) {
			errs = append(errs, k.sets.Destroy(ctx, name))
		}
	}
	return errors.Join(errs...)
}

// sweepDevice removes the device that a Probe left.
func (k *nlKernel) sweepDevice(ctx context.Context) error {
	index, err := linkIndex(ctx, k.route, probeDevice)
	if err != nil || index == 0 {
		return err
	}
	return removeLink(ctx, k.route, index)
}

// ipvsTable is there while the kernel has IPVS. /proc/net is of the process's
// first thread.
const ipvsTable = "/proc/thread-self/net/ip_vs"

// hasIPVS says whether virtual servers can be asked for. Asking would load IPVS,
// and cleaning up must not do that to a host that never had it.
func (k *nlKernel) hasIPVS() (bool, error) {
	if !k.everywhere {
		return true, nil
	}
	_, err := os.Stat(ipvsTable)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for IPVS: %w", err)
	}
	return true, nil
}

// hasSets is hasIPVS for sets.
func (k *nlKernel) hasSets() (bool, error) {
	if !k.everywhere {
		return true, nil
	}
	return ipset.Loaded()
}

// clear removes the sets and devices that are ours, and what Probes left.
func (k *nlKernel) clear(ctx context.Context) error {
	errs := []error{k.clearSets(ctx), k.removeDevice(ctx), k.sweepDevice(ctx)}
	if has, err := k.hasIPVS(); err != nil || has {
		errs = append(errs, err)
		if err := k.sweepServers(ctx); !errors.Is(err, unix.ENOENT) { // no IPVS
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (k *nlKernel) clearSets(ctx context.Context) error {
	if has, err := k.hasSets(); err != nil || !has {
		return err
	}
	names := []string{nameFor(setLoadBalancerSourceIP, k.family)}
	for id := range setCount {
		names = append(names, id.name(k.family))
	}
	errs := []error{k.sweepSets(ctx)}
	for _, name := range names {
		if err := k.sets.Destroy(ctx, name); !errors.Is(err, ipset.ErrUnsupported) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
