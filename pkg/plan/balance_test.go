package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/sluice-proxy/sluice/pkg/model"
)

func scheduling(f *Facts) {
	f.Schedulers, f.DefaultScheduler = []string{"lc", "mh", "rr", "sh", "wrr"}, "rr"
}

func balanced(b *model.Balance) func(*model.Service) {
	return func(s *model.Service) { s.Balance = b }
}

func TestBalance(t *testing.T) {
	flags := func(names ...string) *model.Balance { return &model.Balance{SchedFlags: names, FlagsSet: true} }
	with := func(scheduler string, b *model.Balance) *model.Balance {
		b.Scheduler = scheduler
		return b
	}
	weights := func(text string) *model.Balance {
		b := &model.Balance{Weights: &model.Weights{Default: 1, Names: map[string]uint16{}}}
		for entry := range strings.FieldsSeq(text) {
			var name string
			var n uint16
			if _, err := fmt.Sscanf(entry, "%1s=%d", &name, &n); err != nil {
				t.Fatal(err)
			}
			if name == "*" {
				b.Weights.Default = n
			} else {
				b.Weights.Names[name] = n
			}
		}
		return b
	}
	for _, tc := range []struct {
		name     string
		asked    *model.Balance
		facts    func(*Facts)
		want     Balance
		problems []string
	}{
		{"nothing", nil, scheduling, Balance{}, nil},
		{"a scheduler", with("wrr", &model.Balance{}), scheduling, Balance{Scheduler: "wrr"}, nil},
		{"the default by name", with("rr", &model.Balance{}), scheduling, Balance{Scheduler: "rr"}, nil},
		{"not in the kernel", with("fo", &model.Balance{}), scheduling, Balance{},
			[]string{`this node's kernel has no scheduler "fo", rr is used: it has lc, mh, rr, sh, wrr`}},
		{"nothing in the kernel", with("fo", &model.Balance{}), func(f *Facts) { f.Schedulers = []string{} }, Balance{},
			[]string{`this node's kernel has no scheduler "fo", the default is used: it has none`}},
		{"a mode without schedulers", with("fo", &model.Balance{SchedFlags: []string{"x"}, FlagsSet: true, Problems: []string{"bad"}}), nil, Balance{}, nil},

		{"mh's flags", with("mh", flags("mh-fallback", "mh-port")), scheduling, Balance{Scheduler: "mh", Flags: SchedFallback | SchedPort, FlagsSet: true}, nil},
		{"sh's flag", with("sh", flags("sh-port")), scheduling, Balance{Scheduler: "sh", Flags: SchedPort, FlagsSet: true}, nil},
		{"no flags", with("mh", flags()), scheduling, Balance{Scheduler: "mh", FlagsSet: true}, nil},
		{"flags not said", with("mh", &model.Balance{}), scheduling, Balance{Scheduler: "mh"}, nil},
		{"no flags of the default", flags(), scheduling, Balance{FlagsSet: true}, nil},
		{"the default's flags", flags("mh-port"), func(f *Facts) { scheduling(f); f.DefaultScheduler = "mh" }, Balance{Flags: SchedPort, FlagsSet: true}, nil},
		{"flags of another", with("sh", flags("mh-port", "sh-port")), scheduling, Balance{Scheduler: "sh"},
			[]string{"scheduler sh, which is in force, has no flag mh-port: its default flags are used"}},
		{"flags of none", flags("mh-port", "sh-port"), scheduling, Balance{},
			[]string{"scheduler rr, which is in force, has no flags mh-port, sh-port: its default flags are used"}},
		{"flags of what the kernel has not", with("fo", flags("mh-port")), func(f *Facts) { scheduling(f); f.DefaultScheduler = "mh" },
			Balance{Flags: SchedPort, FlagsSet: true},
			[]string{`this node's kernel has no scheduler "fo", mh is used: it has lc, mh, rr, sh, wrr`}},

		{"unread beside what can be followed", with("mh", &model.Balance{Problems: []string{"bad"}}), scheduling, Balance{Scheduler: "mh"}, []string{"bad"}},
		{"weights for wrr", with("wrr", weights("a=3 b=2")), scheduling, Balance{Scheduler: "wrr"}, nil},
		{"weights for rr", weights("a=3"), scheduling, Balance{}, []string{"scheduler rr takes no notice of weights other than 0"}},
		{"weights for lc", with("lc", weights("a=3 *=0 b=2")), scheduling, Balance{Scheduler: "lc"}, []string{"scheduler lc takes no notice of weights other than 0"}},
		{"closed endpoints", weights("a=0"), scheduling, Balance{}, nil},
		{"equal shares", weights("a=5 b=5 c=0 *=5"), scheduling, Balance{}, nil},
		{"the only open endpoints", weights("a=5 b=5 *=0"), scheduling, Balance{}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			facts := factsWith()
			if tc.facts != nil {
				tc.facts(facts)
			}
			two := func(s *model.Service) {
				s.Ports = append(s.Ports, model.ServicePort{Name: "more", Protocol: model.TCP, Port: 81})
			}
			plans := Make(service(balanced(tc.asked), two), nil, facts)
			if len(plans) != 2 {
				t.Fatalf("%d plans", len(plans))
			}
			for _, p := range plans {
				if p.Balance != tc.want || !slices.Equal(p.Problems, tc.problems) {
					t.Errorf("%s:\n got %+v %q\nwant %+v %q", p.PortKey, p.Balance, p.Problems, tc.want, tc.problems)
				}
			}
			if tc.asked != nil && len(tc.asked.Problems) > 1 {
				t.Error("planning changed the Service")
			}
		})
	}
}

// weighed prints endpoints' weights.
func weighed(eps []Endpoint) string {
	var out []string
	for _, e := range eps {
		out = append(out, fmt.Sprintf("%s=%d", e.Addr(), e.Weight))
	}
	return strings.Join(out, " ")
}

func TestWeights(t *testing.T) {
	sl := slice("10.0.0.1@node-0 ready", "10.0.0.2@b ready", "10.0.0.3@b draining", "10.0.0.4@node-0 ready")
	sl.Origins = []model.Origin{{Name: "web-0", Zone: "a"}, {Name: "web-1", Zone: "a"}, {Name: "web-2", Zone: "b"}, {}}
	// An address on its way from one slice to another, which is weighed by the
	// version that counts.
	other := slice("10.0.0.2@b gone", "10.0.0.5@b ready")
	other.Origins = []model.Origin{{Name: "web-0"}, {Name: "web-5", Zone: "b"}}
	asked := &model.Balance{Scheduler: "wrr", Weights: &model.Weights{
		Names: map[string]uint16{"web-0": 5}, Zones: map[string]uint16{"a": 3, "b": 0}, Default: 2}}

	p := one(t, Make(service(balanced(asked), externalLocal), []*model.Slice{other, sl}, factsWith(scheduling)))
	for _, tc := range []struct {
		name string
		list []Endpoint
		want string
	}{
		{"cluster", p.Cluster, "10.0.0.1=5 10.0.0.2=3 10.0.0.4=2 10.0.0.5=0"},
		{"local", p.Local, "10.0.0.1=5 10.0.0.4=2"},
		{"serving", p.Serving, "10.0.0.1=5 10.0.0.2=3 10.0.0.3=0 10.0.0.4=2 10.0.0.5=0"},
	} {
		if got := weighed(tc.list); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}

	const even = "10.0.0.1=1 10.0.0.2=1 10.0.0.4=1 10.0.0.5=1"
	for name, p := range map[string]*Plan{
		"mode without schedulers": one(t, Make(service(balanced(asked)), []*model.Slice{other, sl}, factsWith())),
		"nothing said":            one(t, Make(service(balanced(&model.Balance{Scheduler: "wrr"})), []*model.Slice{other, sl}, factsWith(scheduling))),
		"no annotation":           one(t, Make(service(), []*model.Slice{other, sl}, factsWith(scheduling))),
	} {
		if got := weighed(p.Cluster); got != even {
			t.Errorf("%s: %s, want %s", name, got, even)
		}
	}

	sl.Origins, other.Origins = nil, nil
	p = one(t, Make(service(balanced(asked)), []*model.Slice{other, sl}, factsWith(scheduling)))
	if got, want := weighed(p.Cluster), strings.ReplaceAll(even, "=1", "=2"); got != want {
		t.Errorf("origins not known: %s, want %s", got, want)
	}
}

// A change that Equal does not see would never reach the kernel.
func TestBalanceIsPartOfEqual(t *testing.T) {
	make := func(b *model.Balance) *Plan {
		sl := slice("10.0.0.1@node-0 ready")
		sl.Origins = []model.Origin{{Name: "web-0"}}
		return one(t, Make(service(balanced(b)), []*model.Slice{sl}, factsWith(scheduling)))
	}
	base := make(nil)
	for name, b := range map[string]*model.Balance{
		"scheduler": {Scheduler: "mh"},
		"flags set": {FlagsSet: true},
		"weight":    {Weights: &model.Weights{Default: 2}},
		"problem":   {Problems: []string{"bad"}},
	} {
		if p := make(b); p.Equal(base) || base.Equal(p) {
			t.Errorf("%s: two plans that differ in it are equal", name)
		}
	}
	mh := func(flags ...string) *Plan {
		return make(&model.Balance{Scheduler: "mh", SchedFlags: flags, FlagsSet: true})
	}
	if mh("mh-port").Equal(mh("mh-fallback")) {
		t.Error("two plans that differ in flags are equal")
	}
}

func TestFactsEqual(t *testing.T) {
	base := factsWith(scheduling, func(f *Facts) { f.OwnAddrs = addrs("192.168.0.1") })
	for name, change := range map[string]func(*Facts){
		"family":      func(f *Facts) { f.Family = model.IPv6 },
		"node":        func(f *Facts) { f.NodeName = "other" },
		"zone":        func(f *Facts) { f.Zone = "other" },
		"node IP":     func(f *Facts) { f.NodeIP = addrs("192.168.0.2")[0] },
		"detector":    noDetector,
		"masquerade":  masqueradeAll,
		"externalIPs": func(f *Facts) { f.RefuseExternalIPs = true },
		"node ports":  func(f *Facts) { f.NodePorts = NodePortAddresses{} },
		"ports' own":  func(f *Facts) { f.NodePorts.Addrs = addrs("192.168.0.1") },
		"localhost":   func(f *Facts) { f.LocalhostNodePorts = true },
		"schedulers":  func(f *Facts) { f.Schedulers = f.Schedulers[1:] },
		"no mode":     func(f *Facts) { f.Schedulers = nil },
		"default":     func(f *Facts) { f.DefaultScheduler = "mh" },
		"own":         func(f *Facts) { f.OwnAddrs = addrs("192.168.0.1", "192.168.0.2") },
		"ranges":      func(f *Facts) { f.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")} },
	} {
		other := *base
		change(&other)
		if base.Equal(&other) || other.Equal(base) {
			t.Errorf("%s: two facts that differ in it are equal", name)
		}
	}
	none, empty := factsWith(), factsWith(func(f *Facts) { f.Schedulers = []string{} })
	if none.Equal(empty) {
		t.Error("a mode without schedulers and a kernel without any are equal")
	}
	if !base.Equal(factsWith(scheduling, func(f *Facts) { f.OwnAddrs = addrs("192.168.0.1") })) {
		t.Error("facts made twice are not equal")
	}
}

func TestSchedFlagsString(t *testing.T) {
	for f, want := range map[SchedFlags]string{0: "none", SchedPort: "port", SchedFallback | SchedPort: "fallback,port"} {
		if got := f.String(); got != want {
			t.Errorf("%d: %q, want %q", f, got, want)
		}
	}
}

// A node can have 100,000 endpoints, each in up to three lists, and as many plans
// as Service ports: what only one mode needs must fit into what was padding. The
// sizes are those that the allocator gives.
func TestPlansAreSmall(t *testing.T) {
	if size := unsafe.Sizeof(Endpoint{}); size > 40 {
		t.Errorf("an Endpoint takes %d bytes, more than 40", size)
	}
	if size := unsafe.Sizeof(Plan{}); size > 320 {
		t.Errorf("a Plan takes %d bytes, more than 320", size)
	}
}
