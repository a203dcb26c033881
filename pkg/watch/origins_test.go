package watch

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-proxy/sluice/pkg/convert"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/state"
)

const weighedYAML = `
apiVersion: v1
kind: Service
metadata: {namespace: ns, name: web, annotations: {sluice.io/ipvs-weights: "zone/a=3"}}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: ns, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints:
- {addresses: [10.0.0.1], zone: a, targetRef: {kind: Pod, name: web-0}}
- {addresses: [10.0.0.2]}
`

// TestOrigins: from either source the store has what endpoints are weighed by,
// if it was asked for, and the Service's own word in any case.
func TestOrigins(t *testing.T) {
	name := model.ServiceName{Namespace: "ns", Name: "web"}
	check := func(t *testing.T, store *state.Store, keep bool) {
		t.Helper()
		complete := func() bool {
			e := store.Current().Get(name)
			return e != nil && e.Service != nil && len(e.Slices) == 1
		}
		eventually(t, "Service and slice", complete)
		e := store.Current().Get(name)
		if b := e.Service.Balance; b == nil || b.Weights == nil || b.Weights.Zones["a"] != 3 {
			t.Errorf("balance %+v", b)
		}
		var want []model.Origin
		if keep {
			want = []model.Origin{{Name: "web-0", Zone: "a"}, {}}
		}
		if got := e.Slices[0].Origins; !reflect.DeepEqual(got, want) {
			t.Errorf("keep %t: origins %+v", keep, got)
		}
	}
	for _, keep := range []bool{false, true} {
		f := newFakeAPI(t)
		svc := apiService("web", "10.96.0.1")
		svc.Annotations = map[string]string{convert.AnnotationWeights: "zone/a=3"}
		f.set("services", svc)
		slice, zone := apiSlice("web-1", "web", "10.0.0.1", "10.0.0.2"), "a"
		slice.Endpoints[0].Zone = &zone
		slice.Endpoints[0].TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: "web-0"}
		f.set("endpointslices", slice)
		store, _ := follow(t, f, func(a *API) { a.KeepOrigins = keep })
		check(t, store, keep)

		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "web.yaml"), []byte(weighedYAML), 0o600); err != nil {
			t.Fatal(err)
		}
		m := &Manifests{Dir: dir, Store: state.NewStore(), Log: slog.New(slog.DiscardHandler), KeepOrigins: keep}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- m.Run(ctx) }()
		check(t, m.Store, keep)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
