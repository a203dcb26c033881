package app

import (
	"context"
	"fmt"
	runtimedebug "runtime/debug"
	"strings"
	"sync"
	"time"

	"k8s.io/component-base/logs"

	"github.com/sluice-proxy/sluice/pkg/metrics"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/reconcile"
)

// observer turns what a loop does into health and metrics.
type observer struct {
	a     *agent
	first bool // counts what is not told apart by family

	services, slices uint64 // of the watch's counters, already exported
}

// Queued implements reconcile.Observer.
func (o *observer) Queued(f model.Family) {
	o.a.health.QueuedUpdate(f)
	metrics.SyncLastQueued(f).SetToCurrentTime()
	o.count()
}

// Synced implements reconcile.Observer.
func (o *observer) Synced(r reconcile.Result) {
	f := r.Family
	if r.Err != nil {
		metrics.SyncFailures(f).Inc()
		if !r.First {
			metrics.PartialRestoreFailures(f).Inc()
		}
		return
	}
	o.a.health.Updated(f)
	metrics.SyncLast(f).SetToCurrentTime()
	metrics.SyncDuration(f).Observe(r.Took.Seconds())
	if r.First {
		metrics.SyncFullDuration(f).Observe(r.Took.Seconds())
	} else {
		metrics.SyncPartialDuration(f).Observe(r.Took.Seconds())
	}
	metrics.ProgrammingLatency(f).Observe(r.Waited.Seconds())
	for _, at := range r.Triggered {
		metrics.NetworkProgramming(f).Observe(time.Since(at).Seconds())
	}
	o.a.log.Debug("Rules are in force", "ipFamily", f, "took", r.Took, "ports", r.Set.Len(), "endpoints", r.Set.Endpoints)
	if r.First {
		o.a.log.Info("All Services are served", "ipFamily", f, "took", r.Took, "ports", r.Set.Len(), "endpoints", r.Set.Endpoints)
	}
	if r.First {
		// The first load leaves more garbage than all that follows.
		boundMemory(true)
		go runtimedebug.FreeOSMemory()
	}
	if o.first {
		o.count()
		metrics.ServiceChangesPending().Set(0)
		metrics.EndpointChangesPending().Set(0)
		o.a.snapshotSize()
	}
}

// count exports the sources' counters.
func (o *observer) count() {
	if !o.first {
		return
	}
	services, slices := o.a.stats.ServiceChanges.Load(), o.a.stats.SliceChanges.Load()
	metrics.ServiceChanges().Add(float64(services - o.services))
	metrics.EndpointChanges().Add(float64(slices - o.slices))
	metrics.ServiceChangesPending().Set(float64(services - o.services))
	metrics.EndpointChangesPending().Set(float64(slices - o.slices))
	o.services, o.slices = services, slices
}

// snapshotSize exports how much the store holds. Endpoints are those of the last
// Sets: counting the store's would walk it for every change.
func (a *agent) snapshotSize() {
	metrics.SnapshotServices().Set(float64(a.store.Current().Len()))
	endpoints := 0
	for _, l := range a.loops {
		if set := l.loop.Set(); set != nil {
			endpoints += set.Endpoints
		}
	}
	metrics.SnapshotEndpoints().Set(float64(endpoints))
}

// clashReporter tells people of frontends that two Services claim.
type clashReporter struct {
	a    *agent
	last *plan.Set
}

// Sync implements reconcile.Sink.
func (c *clashReporter) Sync(_ context.Context, want *plan.Set) error {
	plan.Changes(c.last, want, func(old, new *plan.Plan) bool {
		if new == nil || old != nil && len(old.Lost) == len(new.Lost) {
			return true
		}
		for _, lost := range new.Lost {
			at := fmt.Sprintf("%s %s port %d", lost.Frontend.Kind, lost.Frontend.Addr, lost.Frontend.Port)
			if lost.Frontend.Kind == plan.NodePort {
				at = fmt.Sprintf("nodePort %d", lost.Frontend.Port)
			}
			c.a.log.Warn("Two Services claim one address; the older keeps it", "address", at, "service", new.PortKey, "keptBy", lost.Winner)
			c.a.events.service(new.PortKey.Service(), new.UID(), "Warning", "FrontendClash", "PlanService",
				fmt.Sprintf("%s is served for %s, which is older", at, lost.Winner))
		}
		return true
	})
	c.last = want
	return nil
}

// problemReporter tells people of settings of a Service that cannot be followed
// here, once for the Service: its ports, in both families, have the same.
type problemReporter struct {
	a    *agent
	mu   sync.Mutex
	told map[model.ServiceName]string
}

// of returns the sink of one family.
func (r *problemReporter) of() *problemSink { return &problemSink{r: r} }

// problemSink implements reconcile.Sink.
type problemSink struct {
	r    *problemReporter
	last *plan.Set
}

// Sync implements reconcile.Sink.
func (s *problemSink) Sync(_ context.Context, want *plan.Set) error {
	plan.Changes(s.last, want, func(old, new *plan.Plan) bool {
		if new != nil {
			s.r.report(new.PortKey.Service(), new.UID(), strings.Join(new.Problems, "; "))
		} else {
			s.r.report(old.PortKey.Service(), "", "")
		}
		return true
	})
	s.last = want
	return nil
}

func (r *problemReporter) report(name model.ServiceName, uid, problems string) {
	r.mu.Lock()
	changed := r.told[name] != problems
	if problems == "" {
		delete(r.told, name)
	} else {
		r.told[name] = problems
	}
	r.mu.Unlock()
	if !changed || problems == "" {
		return
	}
	r.a.log.Warn("A Service has settings that cannot be followed; the defaults are in force for them", "service", name, "problems", problems)
	r.a.events.service(name, uid, "Warning", "InvalidIPVSSettings", "PlanService", problems)
}

func setVerbosity(level string) error {
	_, err := logs.GlogSetter(level)
	return err
}
