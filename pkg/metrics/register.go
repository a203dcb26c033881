package metrics

import (
	"context"
	"fmt"
	"sync"

	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/component-base/metrics/prometheus/feature"
	_ "k8s.io/component-base/metrics/prometheus/restclient" // rest_client_*
	_ "k8s.io/component-base/metrics/prometheus/version"    // kubernetes_build_info

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Modes that Register knows: the values of kube-proxy's --proxy-mode.
const (
	IPTables = "iptables"
	IPVS     = "ipvs"
	NFTables = "nftables"
)

// ShowHidden makes metrics appear that are deprecated and hidden by default
// (--show-hidden-metrics-for-version, whatever version it names: checking that
// is the configuration's business). Call it before Register.
func ShowHidden() { metrics.SetShowHidden() }

// registered remembers what has been registered: a fallback to another mode
// registers again.
var registered = struct {
	sync.Mutex
	metrics map[any]bool
}{metrics: map[any]bool{}}

// Register makes the metrics of a mode known to the registry that the metrics
// server reads, with the process's and the Go runtime's, kubernetes_build_info
// and rest_client_*. Calling it again, for the same or another mode, adds what
// is missing. Failure counters of the families start at 0, so that the first
// failure is seen as an increase.
func Register(mode string, families ...model.Family) error {
	list, failures, err := of(mode)
	if err != nil {
		return err
	}
	if err := register(list); err != nil {
		return err
	}
	for _, f := range families {
		for _, c := range failures {
			c.WithLabelValues(f.String())
		}
		servicesSetAside.WithLabelValues(f.String())
	}
	for _, g := range []*metrics.GaugeVec{endpointChangesPending, serviceChangesPending, snapshotServices, snapshotEndpoints} {
		g.WithLabelValues()
	}
	for _, c := range []*metrics.CounterVec{endpointChangesTotal, serviceChangesTotal} {
		c.WithLabelValues()
	}
	if mode == IPTables {
		return registerNFAcct(systemNFAcct{})
	}
	return nil
}

// of returns the metrics of a mode, and those of them that count failures by
// family. Which mode has which is kube-proxy's choice.
func of(mode string) (list []metrics.Registerable, failures []*metrics.CounterVec, err error) {
	list = []metrics.Registerable{
		syncDuration, syncLastQueuedTimestamp, syncLastTimestamp,
		endpointChangesPending, endpointChangesTotal, serviceChangesPending, serviceChangesTotal,
		healthzTotal, livezTotal, networkProgramming, noLocalEndpoints,
		conntrackDuration, conntrackDeleted,
		programmingLatency, driftRepaired, servicesSetAside, snapshotServices, snapshotEndpoints,
		clashes, plannedPorts, plannedEndpoints, syncFailures, buildInfo, proxyMode, modeFallback,
	}
	failures = []*metrics.CounterVec{syncFailures}
	switch mode {
	case IPTables:
		list = append(list, syncFullDuration, syncPartialDuration,
			iptablesRestoreFailures, iptablesPartialRestoreFailures, iptablesRules, iptablesRulesLast,
			restoreBytes, restoreLockWait)
		failures = append(failures, iptablesRestoreFailures, iptablesPartialRestoreFailures)
	case IPVS:
		list = append(list, iptablesRestoreFailures, restoreBytes, restoreLockWait, refusedSettings)
		failures = append(failures, iptablesRestoreFailures)
	case NFTables:
		list = append(list, syncFullDuration, syncPartialDuration, nftablesSyncFailures, nftablesCleanupFailures)
		failures = append(failures, nftablesSyncFailures, nftablesCleanupFailures)
	default:
		return nil, nil, fmt.Errorf("register metrics: no mode %q", mode)
	}
	return list, failures, nil
}

func register(list []metrics.Registerable) error {
	registered.Lock()
	defer registered.Unlock()
	for _, m := range list {
		if registered.metrics[m] {
			continue
		}
		if err := legacyregistry.Register(m); err != nil {
			return fmt.Errorf("register metric %s: %w", m.FQName(), err)
		}
		registered.metrics[m] = true
	}
	return nil
}

// registerCollector registers a collector once under a name.
func registerCollector(name string, c metrics.StableCollector) error {
	registered.Lock()
	defer registered.Unlock()
	if registered.metrics[name] {
		return nil
	}
	if err := legacyregistry.CustomRegister(c); err != nil {
		return fmt.Errorf("register metric %s: %w", name, err)
	}
	registered.metrics[name] = true
	return nil
}

// SetFeature publishes a feature gate in kubernetes_feature_enabled. stage is
// "ALPHA", "BETA", "DEPRECATED" or, for GA, "".
func SetFeature(name, stage string, enabled bool) {
	feature.RecordFeatureInfo(context.Background(), name, stage, enabled)
}
