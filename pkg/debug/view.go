package debug

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/pkg/state"
)

// portView is a plan as pages show it.
type portView struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Port      string `json:"port,omitempty"`
	Protocol  string `json:"protocol"`
	Family    string `json:"ipFamily"`

	Frontends []frontendView `json:"frontends"`
	Endpoints []endpointView `json:"endpoints"`

	// Scheduler is the one in force, with its flags if the Service asks for any;
	// "" in modes that have none.
	Scheduler       string `json:"scheduler,omitempty"`
	AffinitySeconds int64  `json:"affinitySeconds,omitempty"`
	HealthPort      int    `json:"healthCheckNodePort,omitempty"`
	HealthLocal     int    `json:"localReadyEndpoints,omitempty"`

	Why      []string    `json:"why,omitempty"`
	Lost     []clashView `json:"lost,omitempty"`
	SetAside string      `json:"setAside,omitempty"`
	Problems []string    `json:"ignoredSettings,omitempty"` // what the Service asks for and cannot have
}

type frontendView struct {
	Kind        string   `json:"kind"`
	Address     string   `json:"address"`
	FromPod     string   `json:"fromPod"`
	FromNode    string   `json:"fromNode"`
	FromOutside string   `json:"fromOutside"`
	Sources     []string `json:"sources,omitempty"`
	Limited     bool     `json:"sourcesLimited,omitempty"` // also by an empty list
}

type endpointView struct {
	Address string   `json:"address"`
	Local   bool     `json:"maybeOnThisNode"`
	UsedBy  []string `json:"usedBy"`           // "cluster", "local"; none: connections that exist may go on
	Weight  *uint16  `json:"weight,omitempty"` // of those in use, in modes with schedulers
}

type clashView struct {
	Frontend string `json:"frontend"`
	Winner   string `json:"winner"`
}

// rowView is a plan in the list of all.
type rowView struct {
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	Port      string   `json:"port,omitempty"`
	Protocol  string   `json:"protocol"`
	Family    string   `json:"ipFamily"`
	Frontends []string `json:"frontends"`
	Endpoints int      `json:"endpoints"`  // that new connections from here can reach
	Here      int      `json:"onThisNode"` // of these, or on a node that is not known
	Problem   bool     `json:"problem"`
	State     []string `json:"state,omitempty"`
}

// serviceView is everything known of one Service.
type serviceView struct {
	Namespace string      `json:"namespace"`
	Name      string      `json:"name"`
	Known     bool        `json:"known"` // the store has it; else only plans or slices are left
	UID       string      `json:"uid,omitempty"`
	Created   *time.Time  `json:"created,omitempty"`
	Slices    []sliceView `json:"endpointSlices"`
	Ports     []portView  `json:"ports"`
}

type sliceView struct {
	Name      string `json:"name"`
	Family    string `json:"ipFamily"`
	Endpoints int    `json:"endpoints"`
	Ready     int    `json:"ready"`
}

func (s *Server) portView(f model.Family, p *plan.Plan) portView {
	v := portView{
		Namespace: p.PortKey.Namespace, Name: p.PortKey.Name, Port: p.PortKey.Port,
		Protocol: p.Protocol.String(), Family: f.String(),
		Frontends: []frontendView{}, Endpoints: endpointViews(p),
		AffinitySeconds: int64(p.Affinity / time.Second),
		HealthPort:      int(p.HealthPort), HealthLocal: p.HealthLocal,
		Why: p.Why.Texts(), Problems: p.Problems,
	}
	if facts := s.set(f).Facts; facts != nil && facts.Schedulers != nil {
		v.Scheduler = scheduler(p.Balance, facts)
		weigh(v.Endpoints, p)
	}
	for i := range p.Frontends {
		fr := &p.Frontends[i]
		fv := frontendView{Kind: fr.Kind.String(), Address: address(fr),
			FromPod: fr.FromPod.String(), FromNode: fr.FromNode.String(), FromOutside: fr.FromOutside.String(),
			Limited: fr.Sources != nil}
		for _, src := range fr.Sources {
			fv.Sources = append(fv.Sources, src.String())
		}
		v.Frontends = append(v.Frontends, fv)
	}
	for i := range p.Lost {
		v.Lost = append(v.Lost, clashView{name(&p.Lost[i].Frontend), p.Lost[i].Winner.String()})
	}
	if err := s.setAside(f, p); err != nil {
		v.SetAside = err.Error()
	}
	return v
}

func scheduler(b plan.Balance, facts *plan.Facts) string {
	name := b.Scheduler
	if name == "" {
		name = facts.DefaultScheduler
	}
	if b.FlagsSet {
		name += ", flags " + b.Flags.String()
	}
	return name
}

// weigh fills in the weights of endpoints that are in use.
func weigh(views []endpointView, p *plan.Plan) {
	weights := map[string]uint16{}
	for _, list := range [][]plan.Endpoint{p.Cluster, p.Local} {
		for _, e := range list {
			weights[e.AddrPort.String()] = e.Weight
		}
	}
	for i := range views {
		if w, ok := weights[views[i].Address]; ok {
			views[i].Weight = &w
		}
	}
}

func (s *Server) setAside(f model.Family, p *plan.Plan) error {
	if s.opts.SetAside == nil {
		return nil
	}
	return s.opts.SetAside(f, p.PortKey)
}

// address returns a frontend's address; a NodePort has that of every address
// that NodePorts are served on, shown as "*".
func address(f *plan.Frontend) string {
	if !f.Addr.IsValid() {
		return "*:" + strconv.Itoa(int(f.Port))
	}
	return netip.AddrPortFrom(f.Addr, f.Port).String()
}

func name(f *plan.Frontend) string { return f.Kind.String() + " " + address(f) }

// endpointViews merges the three lists of a plan, sorted by address.
func endpointViews(p *plan.Plan) []endpointView {
	at := map[netip.AddrPort]*endpointView{}
	var order []netip.AddrPort
	add := func(list []plan.Endpoint, user string) {
		for _, e := range list {
			v := at[e.AddrPort]
			if v == nil {
				v = &endpointView{Address: e.AddrPort.String(), Local: e.Local, UsedBy: []string{}}
				at[e.AddrPort] = v
				order = append(order, e.AddrPort)
			}
			if user != "" {
				v.UsedBy = append(v.UsedBy, user)
			}
		}
	}
	add(p.Cluster, "cluster")
	add(p.Local, "local")
	add(p.Serving, "")
	slices.SortFunc(order, netip.AddrPort.Compare)
	out := make([]endpointView, 0, len(order))
	for _, a := range order {
		out = append(out, *at[a])
	}
	return out
}

// inUse counts the endpoints that some route leads to, and those that may be on
// this node.
func inUse(p *plan.Plan) (all, here int) {
	for _, e := range endpointViews(p) {
		if len(e.UsedBy) > 0 {
			all++
			if e.Local {
				here++
			}
		}
	}
	return all, here
}

func (s *Server) rowView(f model.Family, p *plan.Plan) rowView {
	v := rowView{
		Namespace: p.PortKey.Namespace, Name: p.PortKey.Name, Port: p.PortKey.Port,
		Protocol: p.Protocol.String(), Family: f.String(), Frontends: []string{},
	}
	v.Endpoints, v.Here = inUse(p)
	for i := range p.Frontends {
		v.Frontends = append(v.Frontends, name(&p.Frontends[i]))
	}
	if err := s.setAside(f, p); err != nil {
		v.State = append(v.State, "set aside: "+err.Error())
	}
	for i := range p.Lost {
		v.State = append(v.State, fmt.Sprintf("%s belongs to %s", name(&p.Lost[i].Frontend), p.Lost[i].Winner))
	}
	for _, problem := range p.Problems {
		v.State = append(v.State, "ignored: "+problem)
	}
	v.Problem = len(v.State) > 0 || p.Why&(plan.NoEndpoints|plan.OnlyTerminating|plan.OnlyTerminatingLocal) != 0
	v.State = append(v.State, p.Why.Texts()...)
	return v
}

// serviceView collects what is known of a Service; false if nothing is. Plans
// are searched, not looked up: the Set can be older than the Snapshot, and the
// ports of then are not the ports of now.
func (s *Server) serviceView(n model.ServiceName) (serviceView, bool) {
	v := serviceView{Namespace: n.Namespace, Name: n.Name, Slices: []sliceView{}, Ports: []portView{}}
	entry := s.entry(n)
	if entry != nil {
		for _, sl := range entry.Slices {
			sv := sliceView{Name: sl.Name, Family: sl.Family.String(), Endpoints: len(sl.Endpoints)}
			for i := range sl.Endpoints {
				if sl.Endpoints[i].Ready {
					sv.Ready++
				}
			}
			v.Slices = append(v.Slices, sv)
		}
		if svc := entry.Service; svc != nil {
			v.Known, v.UID = true, svc.UID
			if !svc.Created.IsZero() {
				v.Created = &svc.Created
			}
		}
	}
	for _, f := range s.families() {
		var plans []*plan.Plan
		for p := range s.set(f).All {
			if p.PortKey.Service() == n {
				plans = append(plans, p)
			}
		}
		slices.SortFunc(plans, func(a, b *plan.Plan) int { return a.PortKey.Compare(b.PortKey) })
		for _, p := range plans {
			v.Ports = append(v.Ports, s.portView(f, p))
		}
	}
	return v, entry != nil || len(v.Ports) > 0
}

func (s *Server) entry(n model.ServiceName) *state.Entry {
	if s.opts.Snapshot == nil {
		return nil
	}
	return s.opts.Snapshot().Get(n)
}

// families returns those that have a Set, IPv4 first.
func (s *Server) families() []model.Family {
	var out []model.Family
	for f := range s.opts.Sets {
		if s.set(f) != nil {
			out = append(out, f)
		}
	}
	slices.SortFunc(out, func(a, b model.Family) int { return cmp.Compare(a, b) })
	return out
}

// set returns a family's Set, nil before the first.
func (s *Server) set(f model.Family) *plan.Set { return s.opts.Sets[f]() }

// title is how people write a port: namespace/name:port.
func title(namespace, name, port string) string {
	return model.PortKey{Namespace: namespace, Name: name, Port: port}.String()
}

func joinOr(list []string, none string) string {
	if len(list) == 0 {
		return none
	}
	return strings.Join(list, ", ")
}

// stateText joins a row's state by semicolons: an error text has commas.
func stateText(v rowView) string {
	if len(v.State) == 0 {
		return "ok"
	}
	return strings.Join(v.State, "; ")
}
