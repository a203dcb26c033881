package metrics

import (
	"runtime"

	"k8s.io/component-base/metrics"

	"github.com/sluice-proxy/sluice/pkg/model"
)

const sluice = "sluice"

var (
	programmingLatency = histogram(sluice, "programming_latency_seconds",
		"Time from receiving an event to the kernel having it in force, in seconds.",
		[]float64{0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60}, family)
	driftRepaired = counter(sluice, "drift_repaired_total",
		"Kernel objects found different from how they were left, and put right, by kind of object.", "object", family)
	servicesSetAside = gauge(sluice, "services_set_aside",
		"Services that are not in force because the kernel refused their rules.", family)
	snapshotServices  = gauge(sluice, "snapshot_services", "Services in the current snapshot.")
	snapshotEndpoints = gauge(sluice, "snapshot_endpoints", "Endpoints in the slices of the current snapshot.")
	clashes           = gauge(sluice, "clashes",
		"Frontends that a Service does not get because an older Service has the address.", family)
	plannedPorts     = gauge(sluice, "planned_ports", "Service ports that are planned on this node.", family)
	plannedEndpoints = gauge(sluice, "planned_endpoints", "Endpoints over all planned Service ports.", family)
	restoreBytes     = counter(sluice, "restore_bytes_total",
		"Bytes written to iptables-restore, by table.", "table", family)
	restoreLockWait = histogram(sluice, "restore_lock_wait_seconds",
		"Time spent waiting for the lock that all users of iptables share, in seconds.",
		[]float64{0.0001, 0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30}, family)
	syncFailures = counter(sluice, "sync_failures_total", "Sync runs that returned an error.", family)
	buildInfo    = gauge(sluice, "build_info",
		"A metric with a constant '1' value labeled by the version, revision and Go version that Sluice was built from.",
		"version", "revision", "go_version")
	proxyMode = gauge(sluice, "proxy_mode",
		"A metric with a constant '1' value labeled by the mode in force and the mode asked for; they differ after a fallback.",
		"mode", "configured")
	modeFallback = gauge(sluice, "mode_fallback",
		"A metric with a constant '1' value, there only if the mode asked for (from) cannot run here and another (to) is in force, labeled by the reason.",
		"from", "to", "reason")
	refusedSettings = gauge(sluice, "services_refused_settings",
		"Services with settings for the ipvs mode that cannot be followed here; the defaults are in force for them.", family)
)

// ProgrammingLatency is the time from an event's arrival to the kernel having
// it in force, in seconds.
func ProgrammingLatency(f model.Family) Histogram {
	return programmingLatency.WithLabelValues(f.String())
}

// DriftRepaired counts kernel objects of a kind (chain, jump, element, ...)
// that somebody else had changed and that have been put right.
func DriftRepaired(object string, f model.Family) Counter {
	return driftRepaired.WithLabelValues(object, f.String())
}

// ServicesSetAside is the number of Services that are left out because the
// kernel refused their rules.
func ServicesSetAside(f model.Family) Gauge { return servicesSetAside.WithLabelValues(f.String()) }

// SnapshotServices is the number of Services in the store's current Snapshot.
func SnapshotServices() Gauge { return snapshotServices.WithLabelValues() }

// SnapshotEndpoints is the number of endpoints in the store's current Snapshot.
func SnapshotEndpoints() Gauge { return snapshotEndpoints.WithLabelValues() }

// RestoreBytes counts what is written to iptables-restore (iptables, ipvs).
func RestoreBytes(table string, f model.Family) Counter {
	return restoreBytes.WithLabelValues(table, f.String())
}

// RestoreLockWait is the time one restore waited for the xtables lock, in
// seconds (iptables, ipvs).
func RestoreLockWait(f model.Family) Histogram { return restoreLockWait.WithLabelValues(f.String()) }

// SyncFailures counts sync runs that returned an error, in every mode:
// kube-proxy's counters of this kind leave out ipvs.
func SyncFailures(f model.Family) Counter { return syncFailures.WithLabelValues(f.String()) }

// SetBuild publishes what the program was built from. Call it after Register.
func SetBuild(version, revision string) {
	buildInfo.WithLabelValues(version, revision, runtime.Version()).Set(1)
}

// SetMode publishes the mode in force and the one that was configured. Call it
// after Register.
func SetMode(inForce, configured string) {
	proxyMode.Reset()
	proxyMode.WithLabelValues(inForce, configured).Set(1)
}

// SetModeFallback publishes that a mode cannot run here and why, in a few words
// of which there must be few. Call it after Register.
func SetModeFallback(from, to, reason string) {
	modeFallback.Reset()
	modeFallback.WithLabelValues(from, to, reason).Set(1)
}

// RefusedSettings is the number of Services with settings that cannot be followed
// here.
func RefusedSettings(f model.Family) Gauge { return refusedSettings.WithLabelValues(f.String()) }

// Draining is how many endpoints of a family only finish their connections.
type Draining struct {
	Family    model.Family
	Endpoints int
}

// RegisterDraining makes sluice_ipvs_draining_endpoints known. read is called at
// each scrape, from any goroutine.
func RegisterDraining(read func() []Draining) error {
	return registerCollector(drainingName, &drainingCollector{read: read,
		desc: metrics.NewDesc(drainingName,
			"Endpoints of virtual servers that get no new connections and are kept until theirs end or their time is up.",
			[]string{family}, nil, metrics.ALPHA, "")})
}

const drainingName = "sluice_ipvs_draining_endpoints"

type drainingCollector struct {
	metrics.BaseStableCollector
	desc *metrics.Desc
	read func() []Draining
}

// DescribeWithStability implements metrics.StableCollector.
func (c *drainingCollector) DescribeWithStability(ch chan<- *metrics.Desc) { ch <- c.desc }

// CollectWithStability implements metrics.StableCollector.
func (c *drainingCollector) CollectWithStability(ch chan<- metrics.Metric) {
	for _, d := range c.read() {
		ch <- metrics.NewLazyConstMetric(c.desc, metrics.GaugeValue, float64(d.Endpoints), d.Family.String())
	}
}
