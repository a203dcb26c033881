// Package metrics holds every metric of the agent: kube-proxy's, under
// kube-proxy's names, labels, buckets and help, so that dashboards and alerts
// keep working, and beside them our own, which start with "sluice_".
//
// Each metric is a function that returns the one series it names, so callers
// need neither the label order nor component-base. A series that is written
// before Register made its metric known swallows the value.
//
// The package knows the plan and the model. It must not know how a proxier
// works, and it decides nothing: it counts.
package metrics
