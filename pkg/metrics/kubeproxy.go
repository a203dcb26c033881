package metrics

import (
	"strconv"

	"k8s.io/component-base/metrics"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Histogram, Counter and Gauge are single series.
type (
	Histogram = metrics.ObserverMetric
	Counter   = metrics.CounterMetric
	Gauge     = metrics.GaugeMetric
)

const (
	kubeProxy = "kubeproxy"
	family    = "ip_family"
)

func syncBuckets() []float64 { return metrics.ExponentialBuckets(0.001, 2, 15) }

func histogram(subsystem, name, help string, buckets []float64, labels ...string) *metrics.HistogramVec {
	return metrics.NewHistogramVec(&metrics.HistogramOpts{
		Subsystem: subsystem, Name: name, Help: help, Buckets: buckets, StabilityLevel: metrics.ALPHA,
	}, labels)
}

func counter(subsystem, name, help string, labels ...string) *metrics.CounterVec {
	return metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: subsystem, Name: name, Help: help, StabilityLevel: metrics.ALPHA,
	}, labels)
}

func gauge(subsystem, name, help string, labels ...string) *metrics.GaugeVec {
	return metrics.NewGaugeVec(&metrics.GaugeOpts{
		Subsystem: subsystem, Name: name, Help: help, StabilityLevel: metrics.ALPHA,
	}, labels)
}

// The help texts are kube-proxy 1.37's, letter by letter, also where they say
// "kube-proxy": they are part of what is scraped.
var (
	syncDuration = histogram(kubeProxy, "sync_proxy_rules_duration_seconds",
		"SyncProxyRules latency in seconds", syncBuckets(), family)
	syncFullDuration = histogram(kubeProxy, "sync_full_proxy_rules_duration_seconds",
		"SyncProxyRules latency in seconds for full resyncs", syncBuckets(), family)
	syncPartialDuration = histogram(kubeProxy, "sync_partial_proxy_rules_duration_seconds",
		"SyncProxyRules latency in seconds for partial resyncs", syncBuckets(), family)
	syncLastTimestamp = gauge(kubeProxy, "sync_proxy_rules_last_timestamp_seconds",
		"The last time proxy rules were successfully synced", family)
	syncLastQueuedTimestamp = gauge(kubeProxy, "sync_proxy_rules_last_queued_timestamp_seconds",
		"The last time a sync of proxy rules was queued", family)
	networkProgramming = histogram(kubeProxy, "network_programming_duration_seconds",
		"In Cluster Network Programming Latency in seconds", metrics.MergeBuckets(
			metrics.LinearBuckets(0.25, 0.25, 2),
			metrics.LinearBuckets(1, 1, 59),
			metrics.LinearBuckets(60, 5, 12),
			metrics.LinearBuckets(120, 30, 7),
		), family)
	endpointChangesPending = gauge(kubeProxy, "sync_proxy_rules_endpoint_changes_pending",
		"Pending proxy rules Endpoint changes")
	endpointChangesTotal = counter(kubeProxy, "sync_proxy_rules_endpoint_changes_total",
		"Cumulative proxy rules Endpoint changes")
	serviceChangesPending = gauge(kubeProxy, "sync_proxy_rules_service_changes_pending",
		"Pending proxy rules Service changes")
	serviceChangesTotal = counter(kubeProxy, "sync_proxy_rules_service_changes_total",
		"Cumulative proxy rules Service changes")
	noLocalEndpoints = gauge(kubeProxy, "sync_proxy_rules_no_local_endpoints_total",
		"Number of services with a Local traffic policy and no endpoints", "traffic_policy", family)
	healthzTotal = counter(kubeProxy, "proxy_healthz_total", "Cumulative proxy healthz HTTP status", "code")
	livezTotal   = counter(kubeProxy, "proxy_livez_total", "Cumulative proxy livez HTTP status", "code")

	iptablesRestoreFailures = counter(kubeProxy, "sync_proxy_rules_iptables_restore_failures_total",
		"Cumulative proxy iptables restore failures", family)
	iptablesPartialRestoreFailures = counter(kubeProxy, "sync_proxy_rules_iptables_partial_restore_failures_total",
		"Cumulative proxy iptables partial restore failures", family)
	iptablesRules = gauge(kubeProxy, "sync_proxy_rules_iptables_total",
		"Total number of iptables rules owned by kube-proxy", "table", family)
	iptablesRulesLast = gauge(kubeProxy, "sync_proxy_rules_iptables_last",
		"Number of iptables rules written by kube-proxy in last sync", "table", family)

	nftablesSyncFailures = counter(kubeProxy, "sync_proxy_rules_nftables_sync_failures_total",
		"Cumulative proxy nftables sync failures", family)
	nftablesCleanupFailures = counter(kubeProxy, "sync_proxy_rules_nftables_cleanup_failures_total",
		"Cumulative proxy nftables cleanup failures", family)
	localhostListeners = gauge(kubeProxy, "nftables_localhost_nodeport_listeners",
		"Number of active localhost NodePort userspace proxy listeners.", family)
	localhostListenerFailures = counter(kubeProxy, "nftables_localhost_nodeport_listener_creation_failures_total",
		"Number of localhost NodePort userspace proxy listener creation failures.", family)

	conntrackDuration = histogram(kubeProxy, "conntrack_reconciler_sync_duration_seconds",
		"ReconcileConntrackFlowsLatency latency in seconds", syncBuckets(), family)
	conntrackDeleted = counter(kubeProxy, "conntrack_reconciler_deleted_entries_total",
		"Cumulative conntrack flows deleted by conntrack reconciler", family)
)

// SyncDuration is the time of one sync run, full or partial, in seconds.
func SyncDuration(f model.Family) Histogram { return syncDuration.WithLabelValues(f.String()) }

// SyncFullDuration is the time of one sync run that read the kernel's state or
// started from nothing. Not in ipvs mode.
func SyncFullDuration(f model.Family) Histogram { return syncFullDuration.WithLabelValues(f.String()) }

// SyncPartialDuration is the time of one sync run that wrote a difference only.
// Not in ipvs mode.
func SyncPartialDuration(f model.Family) Histogram {
	return syncPartialDuration.WithLabelValues(f.String())
}

// SyncLast is when rules were last in force: SetToCurrentTime after each
// successful sync.
func SyncLast(f model.Family) Gauge { return syncLastTimestamp.WithLabelValues(f.String()) }

// SyncLastQueued is when a sync was last asked for. Far above SyncLast,
// something hangs.
func SyncLastQueued(f model.Family) Gauge {
	return syncLastQueuedTimestamp.WithLabelValues(f.String())
}

// NetworkProgramming is the SLO of sig-scalability: from the change that made
// the slice controller write (Slice.Triggered) to rules in force, once for each
// such change. It includes clock skew between the nodes.
func NetworkProgramming(f model.Family) Histogram {
	return networkProgramming.WithLabelValues(f.String())
}

// EndpointChangesPending is the number of slice changes received and not yet
// in force.
func EndpointChangesPending() Gauge { return endpointChangesPending.WithLabelValues() }

// EndpointChanges counts slice changes received.
func EndpointChanges() Counter { return endpointChangesTotal.WithLabelValues() }

// ServiceChangesPending is the number of Service changes received and not yet
// in force.
func ServiceChangesPending() Gauge { return serviceChangesPending.WithLabelValues() }

// ServiceChanges counts Service changes received.
func ServiceChanges() Counter { return serviceChangesTotal.WithLabelValues() }

// HealthzResponses counts answers of /healthz by HTTP status code.
func HealthzResponses(code int) Counter { return healthzTotal.WithLabelValues(strconv.Itoa(code)) }

// LivezResponses counts answers of /livez by HTTP status code.
func LivezResponses(code int) Counter { return livezTotal.WithLabelValues(strconv.Itoa(code)) }

// RestoreFailures counts runs of iptables-restore that failed (iptables, ipvs).
func RestoreFailures(f model.Family) Counter {
	return iptablesRestoreFailures.WithLabelValues(f.String())
}

// PartialRestoreFailures counts those of them that would have written a
// difference only (iptables).
func PartialRestoreFailures(f model.Family) Counter {
	return iptablesPartialRestoreFailures.WithLabelValues(f.String())
}

// IPTablesRules is how many rules of ours a table holds (iptables).
func IPTablesRules(table string, f model.Family) Gauge {
	return iptablesRules.WithLabelValues(table, f.String())
}

// IPTablesRulesLast is how many rules the last sync wrote to a table (iptables).
func IPTablesRulesLast(table string, f model.Family) Gauge {
	return iptablesRulesLast.WithLabelValues(table, f.String())
}

// NFTablesSyncFailures counts transactions the kernel refused (nftables).
func NFTablesSyncFailures(f model.Family) Counter {
	return nftablesSyncFailures.WithLabelValues(f.String())
}

// NFTablesCleanupFailures counts failed deletions of what is no longer needed
// (nftables).
func NFTablesCleanupFailures(f model.Family) Counter {
	return nftablesCleanupFailures.WithLabelValues(f.String())
}

// LocalhostListeners is the number of open localhost NodePort listeners
// (nftables, see RegisterLocalhostNodePorts).
func LocalhostListeners(f model.Family) Gauge { return localhostListeners.WithLabelValues(f.String()) }

// LocalhostListenerFailures counts localhost NodePort listeners that could not
// be opened (nftables, see RegisterLocalhostNodePorts).
func LocalhostListenerFailures(f model.Family) Counter {
	return localhostListenerFailures.WithLabelValues(f.String())
}

// ConntrackDuration is the time of one search for stale flows, in seconds.
func ConntrackDuration(f model.Family) Histogram {
	return conntrackDuration.WithLabelValues(f.String())
}

// ConntrackDeleted counts stale flows that were deleted.
func ConntrackDeleted(f model.Family) Counter { return conntrackDeleted.WithLabelValues(f.String()) }
