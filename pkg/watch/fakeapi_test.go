package watch

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"github.com/sluice-proxy/sluice/pkg/state"
)

// apiObject is what the fake server keeps.
type apiObject interface {
	runtime.Object
	metav1.Object
}

// fakeAPI is an HTTP server that lists and watches like an API server: with
// resource versions, selectors (an object that stops matching is DELETED for the
// watcher), a history that can expire. It speaks JSON.
type fakeAPI struct {
	addr string
	http *httptest.Server
	down chan struct{} // closed by stop: every watch ends

	mu        sync.Mutex
	version   uint64
	expired   uint64 // history up to here is gone
	objects   map[string]map[key]apiObject
	history   []fakeChange
	changed   chan struct{}             // closed and replaced with every change
	oldFields bool                      // refuses the field selector spec.clusterIP
	twice     bool                      // sends every watch event twice
	hold      chan struct{}             // if not nil, requests for all namespaces wait until it is closed
	withhold  func(http.ResponseWriter) // if not nil, answers for ServiceCIDRs
	nodeless  bool                      // Nodes are forbidden
	requests  []string
}

type fakeChange struct {
	resource string
	version  uint64
	old, new apiObject
}

func newFakeAPI(t *testing.T) *fakeAPI {
	f := &fakeAPI{version: 100, objects: map[string]map[key]apiObject{}, changed: make(chan struct{}), addr: "127.0.0.1:0"}
	f.start(t)
	t.Cleanup(f.stop)
	return f
}

// start listens, at the same address as before.
func (f *fakeAPI) start(t *testing.T) {
	t.Helper()
	var l net.Listener
	eventually(t, "listen at "+f.addr, func() bool {
		var err error
		l, err = net.Listen("tcp", f.addr)
		return err == nil
	})
	f.addr = l.Addr().String()
	down := make(chan struct{})
	f.mu.Lock()
	f.down = down
	f.mu.Unlock()
	f.http = &httptest.Server{Listener: l, Config: &http.Server{Handler: f}}
	f.http.Start()
}

// stop breaks every connection and refuses new ones.
func (f *fakeAPI) stop() {
	f.mu.Lock()
	select {
	case <-f.down:
	default:
		close(f.down)
	}
	f.mu.Unlock()
	f.http.CloseClientConnections()
	f.http.Close()
}

func (f *fakeAPI) config() *rest.Config { return &rest.Config{Host: "http://" + f.addr, QPS: -1} }

// set adds or replaces an object; del removes it.
func (f *fakeAPI) set(resource string, obj apiObject) { f.change(resource, obj, false) }
func (f *fakeAPI) del(resource string, obj apiObject) { f.change(resource, obj, true) }

func (f *fakeAPI) change(resource string, obj apiObject, gone bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++
	k := key{obj.GetNamespace(), obj.GetName()}
	if f.objects[resource] == nil {
		f.objects[resource] = map[key]apiObject{}
	}
	c := fakeChange{resource: resource, version: f.version, old: f.objects[resource][k]}
	if gone {
		if c.old == nil {
			return
		}
		delete(f.objects[resource], k)
	} else {
		c.new = obj.DeepCopyObject().(apiObject)
		c.new.SetResourceVersion(strconv.FormatUint(f.version, 10))
		f.objects[resource][k] = c.new
	}
	f.history = append(f.history, c)
	close(f.changed)
	f.changed = make(chan struct{})
}

// expire makes all history so far unavailable: 410 Gone.
func (f *fakeAPI) expire() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++ // as other kinds' objects would
	f.expired = f.version
	f.history = nil
}

func (f *fakeAPI) asked(substring string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, r := range f.requests {
		if strings.Contains(r, substring) {
			n++
		}
	}
	return n
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	resource := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	f.mu.Lock()
	f.requests = append(f.requests, r.URL.String())
	oldFields, hold, withhold, nodeless := f.oldFields, f.hold, f.withhold, f.nodeless
	f.mu.Unlock()
	_, namespace, _ := strings.Cut(r.URL.Path, "/namespaces/")
	namespace, _, _ = strings.Cut(namespace, "/")
	if hold != nil && namespace == "" {
		<-hold
	}
	w.Header().Set("Content-Type", "application/json")
	fieldSelector := q.Get("fieldSelector")
	switch {
	case nodeless && resource == "nodes":
		fail(w, http.StatusForbidden, metav1.StatusReasonForbidden, "nodes is forbidden")
		return
	case withhold != nil && resource == "servicecidrs":
		withhold(w)
		return
	case oldFields && strings.Contains(fieldSelector, "spec.clusterIP"):
		fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, "field label not supported: spec.clusterIP")
		return
	}
	sel, err := labels.Parse(q.Get("labelSelector"))
	if err != nil {
		fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
		return
	}
	matches := func(o apiObject) bool {
		if o == nil || !sel.Matches(labels.Set(o.GetLabels())) || namespace != "" && namespace != o.GetNamespace() {
			return false
		}
		if name, ok := strings.CutPrefix(fieldSelector, "metadata.name="); ok {
			return o.GetName() == name
		}
		s, isService := o.(*corev1.Service)
		return !isService || fieldSelector != "spec.clusterIP!=None" || s.Spec.ClusterIP != "None"
	}
	if q.Get("watch") != "" {
		f.watch(w, r, resource, matches)
		return
	}
	f.list(w, q.Get("limit"), q.Get("continue"), resource, matches)
}

func fail(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(status(code, reason, message))
}

func status(code int, reason metav1.StatusReason, message string) *metav1.Status {
	return &metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Code: int32(code), Reason: reason, Message: message}
}

// typed is the object with the apiVersion and kind that JSON needs.
func typed(o apiObject) apiObject {
	o = o.DeepCopyObject().(apiObject)
	switch o := o.(type) {
	case *corev1.Service:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}
	case *corev1.Node:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}
	case *discoveryv1.EndpointSlice:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"}
	case *networkingv1.ServiceCIDR:
		o.TypeMeta = metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "ServiceCIDR"}
	}
	return o
}

// list serves pages of the wanted size, by name.
func (f *fakeAPI) list(w http.ResponseWriter, limit, from, resource string, matches func(apiObject) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	byName := map[string]apiObject{}
	for k, o := range f.objects[resource] {
		if name := k.String(); matches(o) && name > from {
			names = append(names, name)
			byName[name] = o
		}
	}
	sortStrings(names)
	meta := metav1.ListMeta{ResourceVersion: strconv.FormatUint(f.version, 10)}
	if n, err := strconv.Atoi(limit); err == nil && n > 0 && len(names) > n {
		names = names[:n]
		meta.Continue = names[n-1]
	}
	out := map[string]any{"metadata": meta}
	var items []any
	for _, name := range names {
		items = append(items, byName[name])
	}
	out["items"] = items
	switch resource {
	case "services":
		out["apiVersion"], out["kind"] = "v1", "ServiceList"
	case "nodes":
		out["apiVersion"], out["kind"] = "v1", "NodeList"
	case "servicecidrs":
		out["apiVersion"], out["kind"] = "networking.k8s.io/v1", "ServiceCIDRList"
	default:
		out["apiVersion"], out["kind"] = "discovery.k8s.io/v1", "EndpointSliceList"
	}
	_ = json.NewEncoder(w).Encode(out)
}

func (f *fakeAPI) watch(w http.ResponseWriter, r *http.Request, resource string, matches func(apiObject) bool) {
	enc := json.NewEncoder(w)
	send := func(kind string, obj any) {
		_ = enc.Encode(map[string]any{"type": kind, "object": obj})
	}
	q := r.URL.Query()
	after, _ := strconv.ParseUint(q.Get("resourceVersion"), 10, 64)
	f.mu.Lock()
	down := f.down
	if after < f.expired {
		send("ERROR", status(http.StatusGone, metav1.StatusReasonExpired, "too old resource version"))
		f.mu.Unlock()
		return
	}
	f.mu.Unlock()
	for {
		w.(http.Flusher).Flush()
		f.mu.Lock()
		wait := f.changed
		if after < f.expired {
			f.mu.Unlock()
			return
		}
		for _, c := range f.history {
			if c.version <= after || c.resource != resource {
				continue
			}
			for range map[bool]int{false: 1, true: 2}[f.twice] {
				sendChange(send, c, matches)
			}
		}
		after = f.version
		f.mu.Unlock()
		w.(http.Flusher).Flush()
		select {
		case <-wait:
		case <-r.Context().Done():
			return
		case <-down:
			return
		}
	}
}

func sendChange(send func(string, any), c fakeChange, matches func(apiObject) bool) {
	was, is := matches(c.old), matches(c.new)
	switch {
	case is && was:
		send("MODIFIED", typed(c.new))
	case is:
		send("ADDED", typed(c.new))
	case was:
		old := typed(c.old)
		old.SetResourceVersion(strconv.FormatUint(c.version, 10))
		send("DELETED", old)
	}
}

// eventually fails the test unless ok becomes true in time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	again := time.NewTicker(2 * time.Millisecond)
	defer again.Stop()
	for !ok() {
		select {
		case <-again.C:
		case <-deadline.C:
			t.Fatalf("never: %s", what)
		}
	}
}

// withServiceCIDRs is for follow.
func withServiceCIDRs(a *API) { a.ServiceCIDRs = true }

// follow runs an API source against the fake server until the test ends.
func follow(t *testing.T, f *fakeAPI, change func(*API)) (*state.Store, *Stats) {
	t.Helper()
	store, stats := state.NewStore(), &Stats{}
	a := &API{Config: f.config(), Store: store, NodeName: "me", Stats: stats, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	if change != nil {
		change(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("Run does not end with its context")
		}
	})
	f.mu.Lock()
	held := f.hold != nil
	f.mu.Unlock()
	eventually(t, "synced", func() bool { return held || store.Current().Synced() })
	return store, stats
}

func apiService(name, clusterIP string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name},
		Spec: corev1.ServiceSpec{ClusterIP: clusterIP, ClusterIPs: []string{clusterIP}, Ports: []corev1.ServicePort{{Port: 80}}}}
}

func apiSlice(name, service string, endpoints ...string) *discoveryv1.EndpointSlice {
	port, portName := int32(8080), ""
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "ns", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
	}
	for _, e := range endpoints {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{e}})
	}
	return s
}

func apiServiceCIDR(name string, cidrs ...string) *networkingv1.ServiceCIDR {
	return &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: cidrs}}
}

// summary says what a Snapshot holds, in a line per Service and one for all
// ServiceCIDRs.
func summary(s *state.Snapshot) string {
	var lines []string
	s.All(func(e *state.Entry) bool {
		line := e.Name.Name + ":"
		if e.Service != nil {
			line += fmt.Sprint(" ", e.Service.ClusterIPs)
		}
		for _, sl := range e.Slices {
			line += " " + sl.Name + "["
			for _, ep := range sl.Endpoints {
				line += ep.Addr.String() + " "
			}
			line = strings.TrimSuffix(line, " ") + "]"
		}
		lines = append(lines, line)
		return true
	})
	sortStrings(lines)
	if cidrs := s.ServiceCIDRs(); cidrs != nil {
		lines = append(lines, fmt.Sprint("ServiceCIDRs: ", cidrs))
	}
	return strings.Join(lines, "\n")
}
