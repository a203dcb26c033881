package watch

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"

	"github.com/sluice-proxy/sluice/pkg/convert"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/state"
)

func init() {
	// The same backoff, a hundred times faster.
	backoff.Duration /= 100
	backoff.Cap /= 100
	patience.Duration /= 1000
	patience.Cap /= 1000
}

func sortStrings(s []string) { slices.Sort(s) }

func sees(t *testing.T, store *state.Store, want string) {
	t.Helper()
	var got string
	ok := func() bool { got = summary(store.Current()); return got == want }
	defer func() {
		if t.Failed() {
			t.Logf("the store has\n%s", got)
		}
	}()
	eventually(t, "\n"+want, ok)
}

func TestAPIFollowsChanges(t *testing.T) {
	f := newFakeAPI(t)
	f.set("services", apiService("web", "10.96.0.1"))
	f.set("services", apiService("headless", "None"))
	f.set("endpointslices", apiSlice("web-1", "web", "10.0.0.1"))
	f.set("nodes", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "me", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}}})
	f.set("nodes", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "other"}})
	store, stats := follow(t, f, withServiceCIDRs)
	if f.asked("limit=") == 0 || f.asked("sendInitialEvents") > 0 {
		t.Errorf("%d lists, %d streams for the first state", f.asked("limit="), f.asked("sendInitialEvents"))
	}
	sees(t, store, "web: [10.96.0.1] web-1[10.0.0.1]")
	eventually(t, "own Node", func() bool { n := store.Current().Node(); return n != nil && n.Name == "me" && n.Zone == "z1" })

	f.set("services", apiService("db", "10.96.0.2"))
	f.set("endpointslices", apiSlice("web-1", "web", "10.0.0.1", "10.0.0.2"))
	sees(t, store, "db: [10.96.0.2]\nweb: [10.96.0.1] web-1[10.0.0.1 10.0.0.2]")

	// A slice that is given to another Service leaves the first.
	f.set("endpointslices", apiSlice("web-1", "db", "10.0.0.1"))
	sees(t, store, "db: [10.96.0.2] web-1[10.0.0.1]\nweb: [10.96.0.1]")

	// Another proxy takes the Service: it leaves our selector.
	taken := apiService("web", "10.96.0.1")
	taken.Labels = map[string]string{convert.LabelServiceProxyName: "other"}
	f.set("services", taken)
	sees(t, store, "db: [10.96.0.2] web-1[10.0.0.1]")
	f.set("services", apiService("web", "10.96.0.1"))
	sees(t, store, "db: [10.96.0.2] web-1[10.0.0.1]\nweb: [10.96.0.1]")

	external := apiService("web", "10.96.0.1")
	external.Spec.Type = corev1.ServiceTypeExternalName
	f.set("services", external)
	f.del("endpointslices", apiSlice("web-1", "db"))
	sees(t, store, "db: [10.96.0.2]")

	f.del("nodes", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "me"}})
	eventually(t, "no Node", func() bool { return store.Current().Node() == nil })
	if stats.ServiceChanges.Load() < 4 || stats.SliceChanges.Load() < 3 || stats.NodeChanges.Load() != 2 {
		t.Errorf("counted %d, %d, %d", stats.ServiceChanges.Load(), stats.SliceChanges.Load(), stats.NodeChanges.Load())
	}
}

// TestAPIImportantFirst: what a new node needs most is in the store while the
// complete lists are still awaited, and nothing that those lack stays.
func TestAPIImportantFirst(t *testing.T) {
	f := newFakeAPI(t)
	place := func(o apiObject, namespace string) apiObject {
		o.SetNamespace(namespace)
		return o
	}
	hold := make(chan struct{})
	f.mu.Lock()
	f.hold = hold
	f.mu.Unlock()
	dns := place(apiService("kube-dns", "10.96.0.10"), "kube-system")
	f.set("services", place(apiService("kubernetes", "10.96.0.1"), "default"))
	f.set("services", place(apiService("other", "10.96.0.2"), "default"))
	f.set("services", dns)
	store, _ := follow(t, f, withServiceCIDRs)
	eventually(t, "the important Services", func() bool { return store.Current().Early() })
	get := func(namespace, name string) bool {
		e := store.Current().Get(model.ServiceName{Namespace: namespace, Name: name})
		return e != nil && e.Service != nil
	}
	if !get("default", "kubernetes") || !get("kube-system", "kube-dns") || get("default", "other") || store.Current().Synced() {
		t.Error("not the important Services, or not only, or taken for all")
	}
	f.del("services", dns)
	close(hold)
	eventually(t, "the complete lists", func() bool { return store.Current().Synced() })
	if !get("default", "kubernetes") || !get("default", "other") || get("kube-system", "kube-dns") {
		t.Error("the complete lists are not what is in the store")
	}
}

func TestAPIOutOfReach(t *testing.T) {
	f := newFakeAPI(t)
	f.set("services", apiService("web", "10.96.0.1"))
	f.set("endpointslices", apiSlice("web-1", "web", "10.0.0.1"))
	f.set("services", apiService("old", "10.96.0.9"))
	store, stats := follow(t, f, withServiceCIDRs)
	const before = "old: [10.96.0.9]\nweb: [10.96.0.1] web-1[10.0.0.1]"
	sees(t, store, before)
	watch := emptiness(t, store)

	f.stop()
	eventually(t, "loss noticed", func() bool { return !stats.LostSince().IsZero() && stats.WatchErrors.Load() > 5 })
	if got := summary(store.Current()); got != before || !store.Current().Synced() {
		t.Errorf("without the API server the store has\n%s", got)
	}
	f.set("services", apiService("new", "10.96.0.2"))
	f.del("services", apiService("old", ""))
	f.start(t)
	sees(t, store, "new: [10.96.0.2]\nweb: [10.96.0.1] web-1[10.0.0.1]")
	eventually(t, "regained", func() bool { return stats.LostSince().IsZero() })

	// The same, with a history too short to go on from: a new complete list.
	f.stop()
	eventually(t, "second loss noticed", func() bool { return !stats.LostSince().IsZero() })
	lists := stats.Relists.Load()
	f.del("services", apiService("new", ""))
	f.set("endpointslices", apiSlice("web-1", "web", "10.0.0.7"))
	f.expire()
	f.start(t)
	sees(t, store, "web: [10.96.0.1] web-1[10.0.0.7]")
	if stats.Relists.Load() == lists {
		t.Error("history had expired, yet there was no new list")
	}
	if watch() {
		t.Error("there was a moment without the Service web")
	}
}

// emptiness watches for a Snapshot without the Service web.
func emptiness(t *testing.T, store *state.Store) func() bool {
	wake := store.Subscribe()
	stop, done := make(chan struct{}), make(chan bool, 1)
	go func() {
		empty := false
		for {
			select {
			case <-wake:
				e := store.Current().Get(model.ServiceName{Namespace: "ns", Name: "web"})
				empty = empty || e == nil || e.Service == nil || len(e.Slices) == 0
			case <-stop:
				done <- empty
				return
			}
		}
	}()
	end := sync.OnceValue(func() bool { close(stop); return <-done })
	t.Cleanup(func() { end() })
	return end
}

func TestAPIExpiredWhileConnected(t *testing.T) {
	f := newFakeAPI(t)
	f.set("services", apiService("web", "10.96.0.1"))
	store, _ := follow(t, f, withServiceCIDRs)
	for i := range 3 {
		f.expire()
		f.set("services", apiService("web", fmt.Sprint("10.96.0.", 10+i)))
		sees(t, store, fmt.Sprintf("web: [10.96.0.%d]", 10+i))
	}
}

func TestAPIWithoutTheFieldSelector(t *testing.T) {
	f := newFakeAPI(t)
	f.oldFields = true
	f.set("services", apiService("web", "10.96.0.1"))
	f.set("services", apiService("headless", "None"))
	store, _ := follow(t, f, nil)
	sees(t, store, "web: [10.96.0.1]")
	f.set("services", apiService("headless-2", "None"))
	f.set("services", apiService("web-2", "10.96.0.2"))
	sees(t, store, "web-2: [10.96.0.2]\nweb: [10.96.0.1]")
}

func TestAPIReportsProblemsOnce(t *testing.T) {
	f := newFakeAPI(t)
	bad := apiService("web", "10.96.0.1")
	bad.Spec.ExternalIPs = []string{"bad"}
	f.set("services", bad)
	var mu sync.Mutex
	var heard []string
	store, stats := follow(t, f, func(a *API) {
		a.Problems = func(object, text string) {
			mu.Lock()
			defer mu.Unlock()
			heard = append(heard, object+": "+text)
		}
	})
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(heard) }
	f.set("services", bad)
	f.set("services", apiService("mark", "10.96.0.2"))
	sees(t, store, "mark: [10.96.0.2]\nweb: [10.96.0.1]")
	if n := count(); n != 1 {
		t.Errorf("heard %q", heard)
	}
	f.set("services", apiService("web", "10.96.0.1")) // mended
	f.set("services", bad)                            // and broken again
	eventually(t, "heard again", func() bool { return count() == 2 })
	if want := `Service ns/web: spec.externalIPs[0]: "bad" is not a usable IP address`; heard[0] != want || stats.Problems.Load() != 2 {
		t.Errorf("heard %q", heard)
	}
}

func TestAPILogsLossOnce(t *testing.T) {
	f := newFakeAPI(t)
	var mu sync.Mutex
	var buf bytes.Buffer
	_, stats := follow(t, f, func(a *API) {
		a.Log = slog.New(slog.NewTextHandler(lockedWriter{&mu, &buf}, &slog.HandlerOptions{Level: slog.LevelInfo}))
	})
	f.stop()
	eventually(t, "several tries", func() bool { return stats.WatchErrors.Load() > 10 })
	f.start(t)
	eventually(t, "regained", func() bool { return stats.LostSince().IsZero() })
	mu.Lock()
	defer mu.Unlock()
	if n := strings.Count(buf.String(), "\n"); n != 2 || !strings.Contains(buf.String(), "out of reach") || !strings.Contains(buf.String(), "reached again") {
		t.Errorf("want two lines, got\n%s", &buf)
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  *bytes.Buffer
}

func (l lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// TestAPIRandom: whatever happens on the way, in the end the store has what a
// start from the final objects gives.
func TestAPIRandom(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(seed, 5))
			f := newFakeAPI(t)
			f.twice = seed%3 == 0
			store, _ := follow(t, f, withServiceCIDRs)
			for range 150 {
				name := fmt.Sprint("s", rnd.IntN(8))
				switch n := rnd.IntN(44); {
				case n < 12:
					f.set("services", apiService(name, fmt.Sprint("10.96.0.", 1+rnd.IntN(200))))
				case n < 15:
					s := apiService(name, "10.96.1.1")
					s.Labels = map[string]string{convert.LabelServiceProxyName: ""}
					f.set("services", s)
				case n < 20:
					f.del("services", apiService(name, ""))
				case n < 32:
					f.set("endpointslices", apiSlice(fmt.Sprint("e", rnd.IntN(8)), name, fmt.Sprint("10.0.0.", 1+rnd.IntN(200))))
				case n < 37:
					f.del("endpointslices", apiSlice(fmt.Sprint("e", rnd.IntN(8)), ""))
				case n == 37:
					f.expire()
				case n >= 40 && n < 43:
					f.set("servicecidrs", apiServiceCIDR(fmt.Sprint("c", n), fmt.Sprintf("10.%d.0.0/16", 90+rnd.IntN(4)), "fd00:10:96::/112"))
				case n == 43:
					f.del("servicecidrs", apiServiceCIDR(fmt.Sprint("c", 40+rnd.IntN(3))))
				case n == 38:
					f.http.CloseClientConnections()
				default:
					f.stop()
					f.start(t)
				}
			}
			sees(t, store, f.summary())
		})
	}
}

// summary is what a store must have that starts now.
func (f *fakeAPI) summary() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	store := state.NewStore()
	w := newWriter(store, &Stats{})
	var c convert.Converter
	for _, o := range f.objects["services"] {
		r := newObject(o)
		serviceRecord(&c)(o, &r.record)
		w.apply(event{kind: services, record: &r.record})
	}
	for _, o := range f.objects["endpointslices"] {
		r := newObject(o)
		sliceRecord(&c)(o, &r.record)
		w.apply(event{kind: endpointSlices, record: &r.record})
	}
	for _, o := range f.objects["servicecidrs"] {
		r := newObject(o)
		serviceCIDRRecord(&c)(o, &r.record)
		w.apply(event{kind: serviceCIDRs, record: &r.record})
	}
	store.Publish()
	return summary(store.Current())
}

// TestDecodeList: protobuf as API servers write it, and JSON, yield the same;
// what is cut off anywhere is an error and not a shorter list.
func TestDecodeList(t *testing.T) {
	list := &corev1.ServiceList{ListMeta: metav1.ListMeta{ResourceVersion: "12", Continue: "more"}}
	for i := range 50 {
		list.Items = append(list.Items, *apiService(fmt.Sprint("s", i), fmt.Sprint("10.96.0.", i+1)))
	}
	list.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceList"}
	proto := protobuf.NewSerializer(scheme, scheme)
	var asProto bytes.Buffer
	if err := proto.Encode(list, &asProto); err != nil {
		t.Fatal(err)
	}
	var asJSON bytes.Buffer
	if err := codecs.LegacyCodec(corev1.SchemeGroupVersion).Encode(list, &asJSON); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"protobuf": asProto.Bytes(), "JSON": asJSON.Bytes()} {
		decode := func(data []byte) (metav1.ListMeta, []string, error) {
			var names []string
			meta, err := decodeList(bytes.NewReader(data), &corev1.ServiceList{}, func(o runtime.Object) error {
				names = append(names, o.(*corev1.Service).Name+" "+o.(*corev1.Service).Spec.ClusterIP)
				return nil
			})
			return meta, names, err
		}
		meta, names, err := decode(data)
		if err != nil || meta.ResourceVersion != "12" || meta.Continue != "more" || len(names) != 50 || names[49] != "s49 10.96.0.50" {
			t.Errorf("%s: %v %+v %d items", name, err, meta, len(names))
		}
		for cut := 5; cut < len(data)-20; cut += 7 {
			if _, _, err := decode(data[:cut]); err == nil {
				t.Fatalf("%s: cut at %d of %d it is taken for complete", name, cut, len(data))
			}
		}
	}
}

// TestDecodeListOfEveryKind: there is an item type for whatever is watched.
func TestDecodeListOfEveryKind(t *testing.T) {
	a := &API{NodeName: "me", ServiceCIDRs: true}
	all := a.sources(clients{}, &convert.Converter{})
	if len(all) != int(kinds) {
		t.Errorf("%d kinds are watched, there are %d", len(all), kinds)
	}
	for _, s := range all {
		item, err := newItem(s.list)
		if err != nil {
			t.Error(err)
			continue
		}
		item.(metav1.Object).SetName("a")
		list := s.list.DeepCopyObject()
		if err := meta.SetList(list, []runtime.Object{item}); err != nil {
			t.Fatal(err)
		}
		var buf bytes.Buffer
		if err := protobuf.NewSerializer(scheme, scheme).Encode(list, &buf); err != nil {
			t.Fatal(err)
		}
		var names []string
		if _, err := decodeList(&buf, s.list, func(o runtime.Object) error {
			names = append(names, o.(metav1.Object).GetName())
			return nil
		}); err != nil || !slices.Equal(names, []string{"a"}) {
			t.Errorf("%s: %q, %v", s.kind, names, err)
		}
	}
}

func FuzzDecodeList(f *testing.F) {
	var buf bytes.Buffer
	_ = protobuf.NewSerializer(scheme, scheme).Encode(&discoveryv1.EndpointSliceList{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"},
		Items:    []discoveryv1.EndpointSlice{*apiSlice("a", "b", "10.0.0.1")}}, &buf)
	f.Add(buf.Bytes())
	f.Add([]byte(`{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSliceList","items":[{}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = decodeList(bytes.NewReader(data), &discoveryv1.EndpointSliceList{}, func(o runtime.Object) error {
			if _, ok := o.(*discoveryv1.EndpointSlice); !ok {
				t.Errorf("a list of EndpointSlices yields a %T", o)
			}
			return nil
		})
	})
}

func TestRefusalIsToldFromLoss(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{
		{apierrors.NewForbidden(corev1.Resource("nodes"), "me", nil), "refuses us"},
		{apierrors.NewUnauthorized("no"), "refuses us"},
		{fmt.Errorf("connection refused"), "out of reach"},
		{apierrors.NewServiceUnavailable("starting"), "out of reach"},
		{apierrors.NewResourceExpired("410"), ""}, // the Reflector lists anew
		{apierrors.NewTooManyRequests("busy", 1), ""},
	} {
		var buf bytes.Buffer
		stats := &Stats{}
		c := &connectionState{log: slog.New(slog.NewTextHandler(&buf, nil)), stats: stats, now: time.Now}
		c.result(t.Context(), nodes, test.err)
		if !strings.Contains(buf.String(), test.want) || (test.want == "") != (buf.Len() == 0) || stats.LostSince().IsZero() != (test.want == "") {
			t.Errorf("%v: logged %q, lost since %v", test.err, &buf, stats.LostSince())
		}
	}
}

func TestLostConnectionIsTimed(t *testing.T) {
	now := time.Unix(1000, 0)
	stats := &Stats{}
	c := &connectionState{log: slog.New(slog.DiscardHandler), stats: stats, now: func() time.Time { return now }}
	refused := fmt.Errorf("connection refused")
	c.result(t.Context(), services, refused)
	now = now.Add(time.Minute)
	c.result(t.Context(), nodes, refused)
	c.result(t.Context(), services, nil)
	if got := stats.LostSince(); !got.Equal(time.Unix(1000, 0)) {
		t.Errorf("lost since %v, want since the first failure while any kind fails", got)
	}
	c.result(t.Context(), nodes, nil)
	if !stats.LostSince().IsZero() {
		t.Error("still lost")
	}
}
