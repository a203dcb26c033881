package app

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// eventWriter writes Events (events.k8s.io/v1). client-go's recorder would bring
// the scheme of every API group into the process for one POST. A nil writer
// drops everything, so that callers need not know whether there is a cluster.
type eventWriter struct {
	client   rest.Interface
	nodeName string
	host     string
	log      *slog.Logger
	queue    chan *eventsv1.Event
}

const (
	// eventQueue bounds what waits for the API server; more is dropped.
	eventQueue = 200
	// eventQuiet is how long the same Event is not written again.
	eventQuiet = 10 * time.Minute
	reporting  = "kube-proxy" // what people filter Events by
	maxNote    = 1024         // bytes; the API's limit
)

func newEventWriter(cfg *rest.Config, nodeName string, log *slog.Logger) (*eventWriter, error) {
	scheme := runtime.NewScheme()
	if err := eventsv1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("register Event types: %w", err)
	}
	c := rest.CopyConfig(cfg)
	c.APIPath = "/apis"
	c.GroupVersion = &eventsv1.SchemeGroupVersion
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("make a client for Events: %w", err)
	}
	host, _ := os.Hostname()
	return &eventWriter{client: client, nodeName: nodeName, host: host, log: log, queue: make(chan *eventsv1.Event, eventQueue)}, nil
}

// node writes an Event on the own Node, as kube-proxy does: the Node's name is
// its UID there.
func (w *eventWriter) node(kind, reason, action, note string) {
	if w == nil {
		return
	}
	w.add(corev1.ObjectReference{Kind: "Node", Name: w.nodeName, UID: types.UID(w.nodeName)}, "default", kind, reason, action, note)
}

// service writes an Event on a Service.
func (w *eventWriter) service(name model.ServiceName, uid, kind, reason, action, note string) {
	if w == nil {
		return
	}
	w.add(corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: name.Namespace, Name: name.Name, UID: types.UID(uid)},
		name.Namespace, kind, reason, action, note)
}

func (w *eventWriter) add(about corev1.ObjectReference, namespace, kind, reason, action, note string) {
	if len(note) > maxNote {
		note = note[:maxNote-3] + "..."
	}
	e := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Name:      fmt.Sprintf("%s.%x", about.Name, time.Now().UnixNano()),
			Namespace: namespace,
		},
		EventTime:           metav1.NowMicro(),
		ReportingController: reporting,
		ReportingInstance:   reporting + "-" + w.host,
		Action:              action, Reason: reason, Type: kind, Note: note, Regarding: about,
	}
	select {
	case w.queue <- e:
	default: // the API server is slow or away: Events are worth less than memory
	}
}

// run writes queued Events until ctx ends.
func (w *eventWriter) run(ctx context.Context) error {
	last := map[string]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-w.queue:
			key := e.Regarding.Kind + "/" + e.Namespace + "/" + e.Regarding.Name + "/" + e.Reason + "/" + e.Note
			if time.Since(last[key]) < eventQuiet {
				continue
			}
			for k, at := range last {
				if time.Since(at) >= eventQuiet {
					delete(last, k)
				}
			}
			last[key] = time.Now()
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			err := w.client.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(ctx).Error()
			cancel()
			if err != nil && ctx.Err() == nil {
				w.log.Warn("Could not write an Event", "reason", e.Reason, "note", e.Note, "err", err)
			}
		}
	}
}
