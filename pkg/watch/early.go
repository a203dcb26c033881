package watch

import (
	"context"
	"fmt"
	"sync"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

// earlyTimeout bounds the early lists; the complete ones come anyway.
const earlyTimeout = 10 * time.Second

// early reads, beside the complete lists that a large cluster takes a second
// for, what every pod of a new node needs first: the API server's own Service
// and those of kube-system (DNS). A failure costs nothing but the head start.
func (a *API) early(ctx context.Context, sources []*source, events chan<- event) {
	ctx, cancel := context.WithTimeout(ctx, earlyTimeout)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var found []event
	for _, s := range sources {
		for _, part := range s.important() {
			wg.Go(func() {
				list, err := part.readList(ctx, metav1.ListOptions{ResourceVersion: "0"})
				if err != nil {
					a.Log.Debug("Could not read the important objects ahead of the others", "kind", s.kind, "err", err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				for _, obj := range list.Items {
					found = append(found, event{early: true, kind: s.kind, record: &obj.(*object).record})
				}
			})
		}
	}
	wg.Wait()
	for _, e := range append(found, event{early: true}) {
		select {
		case events <- e:
		case <-ctx.Done():
			return
		}
	}
}

// important returns sources for the important objects of s's kind: those of
// namespace kube-system, and Service default/kubernetes or its slices.
func (s *source) important() []*source {
	system, own := s.sub("kube-system"), s.sub(metav1.NamespaceDefault)
	switch s.kind {
	case services:
		own.fields = fields.OneTermEqualSelector(metav1.ObjectNameField, "kubernetes").String()
	case endpointSlices:
		own.labels = fmt.Sprintf("%s,%s=kubernetes", s.labels, discoveryv1.LabelServiceName)
	default:
		return nil
	}
	return []*source{system, own}
}

// sub returns a source of one namespace's objects, for lists.
func (s *source) sub(namespace string) *source {
	return &source{kind: s.kind, client: s.client, resource: s.resource, list: s.list, namespace: namespace,
		labels: s.labels, convert: s.convert, conn: s.conn, report: s.report}
}
