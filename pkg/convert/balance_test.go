package convert

import (
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/sluice-proxy/sluice/pkg/model"
)

func TestBalance(t *testing.T) {
	for _, tc := range []struct {
		scheduler, flags, weights string
		want                      *model.Balance // without problems
		problems                  []string       // parts of each
	}{
		{"", "", "", nil, nil},
		{" ", "\n", "\t", nil, nil},
		{"wrr", "", "", &model.Balance{Scheduler: "wrr"}, nil},
		{" rr\n", "", "", &model.Balance{Scheduler: "rr"}, nil},
		{"exactly15chars.", "", "", &model.Balance{Scheduler: "exactly15chars."}, nil},
		{"16 are too many.", "", "", &model.Balance{}, []string{`sluice.io/ipvs-scheduler: "16 are too many." cannot be`}},

		{"", "none", "", &model.Balance{FlagsSet: true}, nil},
		{"", "mh-port", "", &model.Balance{SchedFlags: []string{"mh-port"}, FlagsSet: true}, nil},
		{"", " sh-port ,sh-fallback, sh-port,", "", &model.Balance{SchedFlags: []string{"sh-fallback", "sh-port"}, FlagsSet: true}, nil},
		{"", "mh-port,none", "", &model.Balance{}, []string{`sluice.io/ipvs-sched-flags: "none" is none of`}},
		{"mh", "mh-port,flag-1", "*=2", &model.Balance{Scheduler: "mh", Weights: &model.Weights{Default: 2}}, []string{`"flag-1" is none of mh-fallback, mh-port, sh-fallback, sh-port, none`}},
		{"", ",", "", &model.Balance{FlagsSet: true}, nil},

		{"", "", "zone/eu-1a=3, zone/eu-1b=1, web-0=5, *=2", &model.Balance{Weights: &model.Weights{
			Names: map[string]uint16{"web-0": 5}, Zones: map[string]uint16{"eu-1a": 3, "eu-1b": 1}, Default: 2}}, nil},
		{"", "", "web-0=0,\nweb-1.x = 65535,\n", &model.Balance{Weights: &model.Weights{
			Names: map[string]uint16{"web-0": 0, "web-1.x": 65535}, Default: 1}}, nil},
		{"", "", "zone/Zone_A.1=2", &model.Balance{Weights: &model.Weights{Zones: map[string]uint16{"Zone_A.1": 2}, Default: 1}}, nil},
		{"", "", "zone=4", &model.Balance{Weights: &model.Weights{Names: map[string]uint16{"zone": 4}, Default: 1}}, nil},
		{"lc", "none", "web-0=-1", &model.Balance{Scheduler: "lc", FlagsSet: true}, []string{`sluice.io/ipvs-weights: the weight in "web-0=-1" is not a number from 0 to 65535`}},
		{"", "", "web-0=65536", &model.Balance{}, []string{"not a number"}},
		{"", "", "web-0=1.5", &model.Balance{}, []string{"not a number"}},
		{"", "", "web-0=", &model.Balance{}, []string{"not a number"}},
		{"", "", "web-0=1=2", &model.Balance{}, []string{"not a number"}},
		{"", "", "web-0", &model.Balance{}, []string{`"web-0" is not like KEY=WEIGHT`}},
		{"", "", "=1", &model.Balance{}, []string{`"" is neither zone/NAME`}},
		{"", "", "zone/=1", &model.Balance{}, []string{"neither"}},
		{"", "", "zone/*=1", &model.Balance{}, []string{"neither"}},
		{"", "", "Zone/a=1", &model.Balance{}, []string{"neither"}},
		{"", "", "web_0=1", &model.Balance{}, []string{"neither"}},
		{"", "", "*=1,a=1,*=1,a=2,zone/a=1,zone/a=1", &model.Balance{}, []string{`"*" is there twice`, `"a" is there twice`, `"zone/a" is there twice`}},
		{"x-and-x-and-x-and-x", "x", "x", &model.Balance{}, []string{"ipvs-scheduler", "ipvs-sched-flags", "ipvs-weights"}},
	} {
		annotations := map[string]string{AnnotationScheduler: tc.scheduler, AnnotationSchedFlags: tc.flags, AnnotationWeights: tc.weights}
		s := fromJSON[corev1.Service](t, `{"spec":{"clusterIP":"10.0.0.1"}}`)
		s.Annotations = annotations
		var c Converter
		svc, _, problems := c.Service(s)
		if len(problems) > 0 {
			t.Errorf("%q: every mode hears of %q", annotations, problems)
		}
		got := svc.Balance
		if got != nil {
			if !slices.EqualFunc(got.Problems, tc.problems, strings.Contains) {
				t.Errorf("%q: problems %q, want %q", annotations, got.Problems, tc.problems)
			}
			without := *got
			without.Problems = nil
			got = &without
		}
		if !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%q:\n got %+v\nwant %+v", annotations, got, tc.want)
		}
	}
}

func TestWeights(t *testing.T) {
	var p problems
	w := parseWeights("zone/a=3,web-0=5,*=2", &p)
	for _, tc := range []struct {
		of   model.Origin
		want uint16
	}{
		{model.Origin{}, 2},
		{model.Origin{Name: "web-0"}, 5},
		{model.Origin{Name: "web-0", Zone: "a"}, 5},
		{model.Origin{Name: "web-1", Zone: "a"}, 3},
		{model.Origin{Name: "web-1", Zone: "b"}, 2},
		{model.Origin{Name: "zone/a"}, 2},
	} {
		if got := w.Of(tc.of); got != tc.want {
			t.Errorf("%+v has weight %d, want %d", tc.of, got, tc.want)
		}
	}
}

func TestLongAnnotationsMakeShortProblems(t *testing.T) {
	var c Converter
	b := c.balance(map[string]string{
		AnnotationScheduler:  strings.Repeat("é", 1<<17),
		AnnotationSchedFlags: strings.Repeat("x", 1<<17),
		AnnotationWeights:    strings.Repeat("x_,", 1<<16),
	})
	if n := len(strings.Join(b.Problems, "\n")); n > 4096 {
		t.Errorf("%d bytes of problems", n)
	}
	if len(b.Problems) != maxProblems+1 {
		t.Errorf("%d problems: %q", len(b.Problems), b.Problems)
	}
}

const origins4 = `{"metadata":{"labels":{"kubernetes.io/service-name":"a"}},"addressType":"IPv4","endpoints":[
 {"addresses":["10.0.0.1"],"targetRef":{"kind":"Pod","name":"web-0"},"hostname":"h","zone":"a"},
 {"addresses":["10.0.0.2"],"targetRef":{"kind":"Node","name":"n"},"hostname":"h"},
 {"addresses":["nonsense"],"hostname":"lost"},
 {"addresses":["10.0.0.3"],"zone":"a"},
 {"addresses":["10.0.0.4"]}]}`

func TestOrigins(t *testing.T) {
	c := Converter{KeepOrigins: true}
	sl, _, _ := c.Slice(fromJSON[discoveryv1.EndpointSlice](t, origins4))
	want := []model.Origin{{Name: "web-0", Zone: "a"}, {Name: "h"}, {Zone: "a"}, {}}
	if !reflect.DeepEqual(sl.Origins, want) || len(sl.Endpoints) != len(want) {
		t.Errorf("got %+v, want %+v", sl.Origins, want)
	}
	if stringData(sl.Origins[0].Zone) != stringData(sl.Origins[2].Zone) {
		t.Error("endpoints of a zone do not share its name")
	}
	if sl.OriginOf(2) != want[2] || sl.OriginOf(4) != (model.Origin{}) {
		t.Errorf("OriginOf: %+v, %+v", sl.OriginOf(2), sl.OriginOf(4))
	}
	var plain Converter
	if sl, _, _ = plain.Slice(fromJSON[discoveryv1.EndpointSlice](t, origins4)); sl.Origins != nil || len(sl.Endpoints) != len(want) {
		t.Errorf("origins %+v are kept though nobody asks for them", sl.Origins)
	}
	if sl, _, _ = c.Slice(slice(t, "IPv4", `"endpoints":[{"addresses":["10.0.0.1"]}]`)); sl.Origins != nil {
		t.Errorf("origins %+v are kept though nothing is known", sl.Origins)
	}
}

// A node holds 100,000 endpoints and more: an endpoint must not take more room
// because there is a mode that weighs them.
func TestEndpointIsSmall(t *testing.T) {
	if size := unsafe.Sizeof(model.Endpoint{}); size > 56 {
		t.Errorf("an Endpoint takes %d bytes, more than 56", size)
	}
}

// BenchmarkBytesPerEndpointWithOrigin is BenchmarkBytesPerEndpoint for modes that
// weigh endpoints. Measured as there: 147 B.
func BenchmarkBytesPerEndpointWithOrigin(b *testing.B) {
	const count, each = 10000, 10
	for b.Loop() {
		c := Converter{KeepOrigins: true}
		kept := make([]*model.Slice, count)
		before := heap()
		for i := range kept {
			kept[i], _, _ = c.Slice(bigSlice(i, each))
		}
		b.ReportMetric(float64(heap()-before)/(count*each), "B/endpoint")
		runtime.KeepAlive(kept)
	}
}
