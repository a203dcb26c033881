package watch

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/sluice-proxy/sluice/pkg/convert"
)

// object is a record in the dress that a Reflector asks of its objects. It
// takes the place of the API object as soon as that is decoded, so that even a
// Reflector's own temporary list holds nothing but the model.
type object struct {
	record
	resourceVersion string
}

// GetObjectKind returns nothing: nobody asks for more.
func (o *object) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

// DeepCopyObject returns the object itself, which is immutable.
func (o *object) DeepCopyObject() runtime.Object { return o }

// GetObjectMeta returns the metadata that Reflectors read.
func (o *object) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: o.namespace, Name: o.name, ResourceVersion: o.resourceVersion}
}

// newObject makes an object of metadata alone.
func newObject(m metav1.Object) *object {
	o := &object{resourceVersion: m.GetResourceVersion()}
	o.key = key{m.GetNamespace(), m.GetName()}
	if v, err := strconv.ParseUint(o.resourceVersion, 10, 64); err == nil {
		o.version = v
	}
	return o
}

// converter fills a record from an API object of its kind, and returns what
// could not be used.
type converter func(runtime.Object, *record) []string

func serviceRecord(c *convert.Converter) converter {
	return func(obj runtime.Object, r *record) (problems []string) {
		r.service, _, problems = c.Service(obj.(*corev1.Service))
		return problems
	}
}

func sliceRecord(c *convert.Converter) converter {
	return func(obj runtime.Object, r *record) (problems []string) {
		r.slice, _, problems = c.Slice(obj.(*discoveryv1.EndpointSlice))
		return problems
	}
}

func nodeRecord(c *convert.Converter, own string) converter {
	return func(obj runtime.Object, r *record) (problems []string) {
		if n := obj.(*corev1.Node); n.Name == own {
			r.node, problems = c.Node(n)
		}
		return problems
	}
}

func serviceCIDRRecord(c *convert.Converter) converter {
	return func(obj runtime.Object, r *record) (problems []string) {
		r.serviceCIDR, problems = c.ServiceCIDR(obj.(*networkingv1.ServiceCIDR))
		return problems
	}
}

// source lists and watches one kind, and converts on the way.
type source struct {
	kind           kind
	client         rest.Interface
	resource       string
	list           runtime.Object // an empty list of the kind
	namespace      string         // "": all
	labels, fields string
	fieldsOptional bool // try without if the server does not know the field
	convert        converter

	// For a kind that a server may withhold (see withheld): what does not work
	// then, and the version of Kubernetes that has it. Empty for others.
	without, since string

	conn   *connectionState
	report *reporter

	fieldsRefused atomic.Bool
	toldWithheld  atomic.Bool
}

func (s *source) request(o metav1.ListOptions) *rest.Request {
	o.LabelSelector = s.labels
	if !s.fieldsRefused.Load() {
		o.FieldSelector = s.fields
	}
	return s.client.Get().NamespaceIfScoped(s.namespace, s.namespace != "").Resource(s.resource).VersionedParams(&o, parameterCodec)
}

// retryWithoutFields says whether a request failed because the server does not
// know the field selector, and makes later ones come without. What the selector
// would have left out, the converter skips.
func (s *source) retryWithoutFields(err error) bool {
	return apierrors.IsBadRequest(err) && s.fieldsOptional && s.fieldsRefused.CompareAndSwap(false, true)
}

// List returns one page of the kind, converted.
func (s *source) List(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	list, err := s.readList(ctx, o)
	if s.retryWithoutFields(err) {
		list, err = s.readList(ctx, o)
	}
	s.result(ctx, err)
	if err != nil {
		return nil, err
	}
	return list, nil
}

func (s *source) readList(ctx context.Context, o metav1.ListOptions) (*internalversion.List, error) {
	body, err := s.request(o).Stream(ctx)
	if err != nil {
		return nil, err
	}
	out := &internalversion.List{}
	meta, err := decodeList(body, s.list, func(item runtime.Object) error {
		obj, err := s.object(item)
		if err == nil {
			out.Items = append(out.Items, obj)
		}
		return err
	})
	if err = errors.Join(err, body.Close()); err != nil {
		return nil, fmt.Errorf("read a list of %s: %w", s.resource, err)
	}
	out.ListMeta = meta
	return out, nil
}

// Watch starts a watch whose objects are converted.
func (s *source) Watch(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
	o.Watch = true
	w, err := s.request(o).Watch(ctx)
	if s.retryWithoutFields(err) {
		w, err = s.request(o).Watch(ctx)
	}
	s.result(ctx, err)
	if err != nil {
		return nil, err
	}
	s.tellGiven()
	return newConvertingWatch(w, s.event), nil
}

// object converts an API object that exists.
func (s *source) object(item runtime.Object) (*object, error) {
	m, ok := item.(metav1.Object)
	if !ok {
		return nil, fmt.Errorf("a list of %s has a %T", s.resource, item)
	}
	o := newObject(m)
	s.report.reportObject(s.kind.String()+" "+o.key.String(), s.convert(item, &o.record))
	return o, nil
}

// event converts a watch event. Errors pass as they are; objects of another
// type than asked for are left for the Reflector to refuse.
func (s *source) event(e apiwatch.Event) apiwatch.Event {
	m, ok := e.Object.(metav1.Object)
	if !ok {
		return e
	}
	switch e.Type {
	case apiwatch.Added, apiwatch.Modified:
		if o, err := s.object(e.Object); err == nil {
			e.Object = o
		}
	case apiwatch.Deleted:
		o := newObject(m)
		s.report.reportObject(s.kind.String()+" "+o.key.String(), nil)
		e.Object = o
	case apiwatch.Bookmark:
		e.Object = newObject(m)
	}
	return e
}

// convertingWatch passes a watch's events through a function. Unlike
// watch.Filter it does not leak its goroutine when the reader stops reading.
type convertingWatch struct {
	in   apiwatch.Interface
	out  chan apiwatch.Event
	stop chan struct{}
	once sync.Once
}

func newConvertingWatch(in apiwatch.Interface, f func(apiwatch.Event) apiwatch.Event) *convertingWatch {
	w := &convertingWatch{in: in, out: make(chan apiwatch.Event), stop: make(chan struct{})}
	go w.run(f)
	return w
}

func (w *convertingWatch) run(f func(apiwatch.Event) apiwatch.Event) {
	defer close(w.out)
	for {
		select {
		case e, ok := <-w.in.ResultChan():
			if !ok {
				return
			}
			select {
			case w.out <- f(e):
			case <-w.stop:
				return
			}
		case <-w.stop:
			return
		}
	}
}

// ResultChan returns the converted events.
func (w *convertingWatch) ResultChan() <-chan apiwatch.Event { return w.out }

// Stop ends the watch.
func (w *convertingWatch) Stop() {
	w.once.Do(func() { close(w.stop) })
	w.in.Stop()
}
