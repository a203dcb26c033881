package watch

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"

	"github.com/sluice-proxy/sluice/pkg/convert"
	"github.com/sluice-proxy/sluice/pkg/state"
)

// API follows the Services and EndpointSlices of a cluster, the own Node and, if
// they are wanted, the ServiceCIDRs at an API server. Its fields are set before
// Run and not changed afterwards.
type API struct {
	Config *rest.Config // see RESTConfig
	Store  *state.Store // written by nobody else while Run runs

	// NodeName is the own Node's name; if it is empty no Node is watched.
	NodeName string

	// ServiceCIDRs says that ServiceCIDRs are wanted, too: in modes that refuse
	// connections to unallocated ClusterIPs. An API server that does not have the
	// kind, or does not let us read it, is no error and not out of reach.
	ServiceCIDRs bool

	Log      *slog.Logger
	Stats    *Stats      // nil: not counted
	Problems ProblemFunc // nil: logged

	// KeepOrigins keeps endpoints' names and zones; see convert.Converter.
	KeepOrigins bool
}

// Run follows the API server until ctx ends, and then returns nil. It returns
// an error only if it cannot start. An API server out of reach is no error: Run
// tries again, waiting up to 10 s between tries, and the store keeps what it
// has. The store is marked synced when the first complete lists of Services and
// EndpointSlices are in, and the own Node, unless the server does not let us read it.
func (a *API) Run(ctx context.Context) error {
	cl, err := newClients(a.Config)
	if err != nil {
		return err
	}
	stats := a.Stats
	if stats == nil {
		stats = &Stats{}
	}
	conn := &connectionState{log: a.Log, stats: stats, now: time.Now}
	rep := &reporter{to: a.Problems, log: a.Log, stats: stats}
	conv := &convert.Converter{KeepOrigins: a.KeepOrigins}
	events := make(chan event, 256)

	ctx = klog.NewContext(ctx, logr.FromSlogHandler(debugOnly{a.Log.Handler()}))
	var wg sync.WaitGroup
	all := a.sources(cl, conv)
	for _, s := range all {
		s.conn, s.report = conn, rep
		wg.Go(func() { s.keepListing(ctx, s.reflector(ctx, events), events) })
	}
	wg.Go(func() { a.early(ctx, all, events) })
	w := newWriter(a.Store, stats)
	if a.NodeName != "" {
		// Where node ports are can depend on the Node: who starts without it would take
		// them away for a moment.
		w.awaits = append(w.awaits, nodes)
	}
	wg.Go(func() { w.run(ctx, events) })
	wg.Wait()
	return nil
}

// sources are the kinds that are watched, with kube-proxy's selectors.
func (a *API) sources(cl clients, conv *convert.Converter) []*source {
	list := []*source{{
		kind: services, client: cl.core, resource: "services", list: &corev1.ServiceList{},
		labels: "!" + convert.LabelServiceProxyName,
		fields: fields.OneTermNotEqualSelector("spec.clusterIP", corev1.ClusterIPNone).String(),
		// Servers before 1.33 or so do not know this field.
		fieldsOptional: true,
		convert:        serviceRecord(conv),
	}, {
		kind: endpointSlices, client: cl.discovery, resource: "endpointslices", list: &discoveryv1.EndpointSliceList{},
		labels:  "!" + corev1.IsHeadlessService,
		convert: sliceRecord(conv),
	}}
	if a.NodeName != "" {
		list = append(list, &source{
			kind: nodes, client: cl.core, resource: "nodes", list: &corev1.NodeList{},
			fields:  fields.OneTermEqualSelector(metav1.ObjectNameField, a.NodeName).String(),
			convert: nodeRecord(conv, a.NodeName),
		})
	}
	if a.ServiceCIDRs {
		list = append(list, &source{
			kind: serviceCIDRs, client: cl.networking, resource: "servicecidrs", list: &networkingv1.ServiceCIDRList{},
			without: "connections to unallocated ClusterIPs will not be refused",
			since:   "1.33",
			convert: serviceCIDRRecord(conv),
		})
	}
	return list
}

// backoff is shorter at its end than client-go's (30 to 60 s): a node should
// learn of changes soon after the API server is back.
var backoff = wait.Backoff{
	Duration: 500 * time.Millisecond,
	Cap:      5 * time.Second,
	Steps:    10,
	Factor:   2,
	Jitter:   1,
}

// steady is how long a list and the watches after it must have lasted for the
// next list to come soon.
const steady = 15 * time.Second

// keepListing is the Reflector's own Run but for the pause between rounds. Run
// takes the pause that the time without an API server has led up to; but an API
// server that is back first says that the history has expired (its watch cache
// is new), and what is needed then is a list at once.
func (s *source) keepListing(ctx context.Context, r *cache.Reflector, events chan<- event) {
	short, long := backoff, patience
	for ctx.Err() == nil {
		start := time.Now()
		err := r.ListAndWatchWithContext(ctx)
		if err != nil {
			klog.FromContext(ctx).Info("Watch ended", "type", r.TypeDescription(), "err", err)
		}
		if time.Since(start) > steady {
			short = backoff
		}
		// Nobody must wait for what does not come.
		if s.kind == nodes && apierrors.IsForbidden(err) {
			select {
			case events <- event{kind: s.kind, denied: true}:
			case <-ctx.Done():
			}
		}
		pause := &short
		if s.withheld(err) {
			s.tellWithheld(err, r.LastSyncResourceVersion() != "")
			pause = &long
		} else {
			long = patience
		}
		select {
		case <-time.After(pause.Step()):
		case <-ctx.Done():
		}
	}
}

// listed tells a Reflector to read the first state as a list, and not as a stream of
// events (KEP-3157), which costs the API server more than twice the CPU time and takes
// longer: docs/decisions/0024.
type listed struct{}

// IsWatchListSemanticsUnSupported is what the Reflector asks.
func (listed) IsWatchListSemanticsUnSupported() bool { return true }

func (s *source) reflector(ctx context.Context, events chan<- event) *cache.Reflector {
	log := klog.FromContext(ctx)
	lw := &cache.ListWatch{ListWithContextFunc: s.List, WatchFuncWithContext: s.Watch}
	return cache.NewReflectorWithOptions(
		cache.ToListWatcherWithWatchListSemantics(lw, listed{}), &object{}, &sink{ctx, s.kind, events},
		cache.ReflectorOptions{
			Logger:          &log,
			Name:            s.resource,
			TypeDescription: s.kind.String(),
			Clock:           stoppableClock{clock.RealClock{}, ctx},
			Backoff:         &backoff,
		})
}

// debugOnly makes every record a debug record. Reflectors log each failed try
// as an error; people get one line when the API server is lost and one when it
// is back (connectionState).
type debugOnly struct{ slog.Handler }

func (h debugOnly) Enabled(ctx context.Context, _ slog.Level) bool {
	return h.Handler.Enabled(ctx, slog.LevelDebug)
}

func (h debugOnly) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return h.Handler.Handle(ctx, r)
}

func (h debugOnly) WithAttrs(a []slog.Attr) slog.Handler { return debugOnly{h.Handler.WithAttrs(a)} }
func (h debugOnly) WithGroup(g string) slog.Handler      { return debugOnly{h.Handler.WithGroup(g)} }

// stoppableClock makes a Reflector's waits end with the context: it waits for
// its backoff without looking at it.
type stoppableClock struct {
	clock.RealClock
	ctx context.Context
}

func (c stoppableClock) After(d time.Duration) <-chan time.Time {
	ch := make(chan time.Time, 1)
	t := time.NewTimer(d)
	go func() {
		defer t.Stop()
		select {
		case now := <-t.C:
			ch <- now
		case <-c.ctx.Done():
			ch <- time.Now()
		}
	}()
	return ch
}

// sink hands what a Reflector says to the writer. It is the Reflector's store
// and keeps nothing.
type sink struct {
	ctx    context.Context
	kind   kind
	events chan<- event
}

var _ cache.ReflectorStore = (*sink)(nil)

func (s *sink) send(e event) error {
	select {
	case s.events <- e:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// Add hands on a new object.
func (s *sink) Add(obj any) error { return s.send(event{kind: s.kind, record: &obj.(*object).record}) }

// Update hands on an object's new version.
func (s *sink) Update(obj any) error { return s.Add(obj) }

// Delete says that an object is gone.
func (s *sink) Delete(obj any) error {
	return s.send(event{kind: s.kind, gone: true, record: &obj.(*object).record})
}

// Replace hands on the complete list.
func (s *sink) Replace(list []any, _ string) error {
	all := make([]*record, len(list))
	for i, obj := range list {
		all[i] = &obj.(*object).record
	}
	return s.send(event{kind: s.kind, all: all})
}

// Resync does nothing: the store below misses no event.
func (s *sink) Resync() error { return nil }

// connectionState knows whether the API server can be reached, and logs when
// that changes.
type connectionState struct {
	log   *slog.Logger
	stats *Stats
	now   func() time.Time

	mu   sync.Mutex
	lost [kinds]bool
}

// result takes the outcome of a request for a kind.
func (c *connectionState) result(ctx context.Context, k kind, err error) {
	if err != nil {
		if ctx.Err() != nil || errors.Is(err, context.Canceled) {
			return
		}
		c.stats.WatchErrors.Add(1)
		if answered(err) {
			return
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.lost != [kinds]bool{}
	c.lost[k] = err != nil
	after := c.lost != [kinds]bool{}
	switch {
	case after && !before:
		c.stats.lostSince.Store(c.now().UnixNano())
		text := "API server out of reach; the last known state stays in force"
		if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
			text = "API server refuses us (check the ClusterRole and credentials); the last known state stays in force"
		}
		c.log.Warn(text, "kind", k.String(), "err", err)
	case before && !after:
		c.log.Info("API server reached again", "after", c.now().Sub(c.stats.LostSince()).Round(time.Millisecond))
		c.stats.lostSince.Store(0)
	}
}

// answered says that a failed request shows a living server, and a course that
// the Reflector takes by itself: history expired, too busy.
func answered(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) ||
		apierrors.IsBadRequest(err) || apierrors.IsTooManyRequests(err) || apierrors.IsTimeout(err) ||
		apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge) || errors.Is(err, io.EOF)
}
