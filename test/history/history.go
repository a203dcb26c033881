// Package history makes random histories of a cluster: Services and slices that
// come, change and go. Tests of proxiers use it to show that the order of events
// leaves no trace in the kernel.
package history

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// World makes random Services and slices, few enough that names meet again and
// many enough that what proxiers share between Services is split and merged.
type World struct {
	Rand     *rand.Rand
	Family   model.Family
	Names    int // Services there can be
	Planner  *plan.Planner
	Services map[string]*model.Service // by name
	Slices   map[string]*model.Slice   // by name: two for each Service
	Facts    plan.Facts
}

// New returns a world without Services. Each setting changes the facts of the
// node first.
func New(r *rand.Rand, family model.Family, names int, settings ...func(*plan.Facts)) *World {
	w := &World{Rand: r, Family: family, Names: names, Services: map[string]*model.Service{}, Slices: map[string]*model.Slice{}}
	w.Facts = plan.Facts{Family: family, NodeName: "node-0", Zone: "z0", NodeIP: w.Addr(192, 0),
		DetectLocal: true, NodePorts: plan.NodePortAddresses{All: true}, LocalhostNodePorts: family == model.IPv4}
	for _, set := range settings {
		set(&w.Facts)
	}
	f := w.Facts
	w.Planner = plan.NewPlanner(&f)
	return w
}

// Addr gives the nth address of a network of the world's family.
func (w *World) Addr(net byte, n int) netip.Addr {
	if w.Family == model.IPv6 {
		return netip.AddrFrom16([16]byte{0xfd, net, 12: byte(n >> 24), 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
	}
	return netip.AddrFrom4([4]byte{net, byte(n >> 16), byte(n >> 8), byte(n)})
}

func (w *World) chance(n int) bool { return w.Rand.IntN(n) == 0 }

// Service gives a random Service.
func (w *World) Service(name string) *model.Service {
	id := int(sum(name) % 5000)
	s := &model.Service{ServiceName: serviceName(name), Created: time.Unix(int64(id%7), 0),
		ClusterIPs: []netip.Addr{w.Addr(10, id)}}
	if w.chance(4) {
		s.Affinity = time.Duration(1+w.Rand.IntN(3)) * time.Hour
	}
	s.InternalLocal, s.ExternalLocal = w.chance(5), w.chance(3)
	protocols := []model.Protocol{model.TCP, model.UDP, model.SCTP}
	for i := range 1 + w.Rand.IntN(3) {
		p := model.ServicePort{Name: fmt.Sprintf("p%d", i), Protocol: protocols[w.Rand.IntN(3)], Port: uint16(80 + w.Rand.IntN(4))}
		if w.chance(2) {
			p.NodePort = uint16(30000 + w.Rand.IntN(2000))
		}
		s.Ports = append(s.Ports, p)
	}
	if w.chance(3) {
		s.LoadBalancerIPs = []netip.Addr{w.Addr(172, w.Rand.IntN(60))}
		if w.chance(2) {
			s.SourceRanges = []netip.Prefix{netip.PrefixFrom(w.Addr(11, w.Rand.IntN(3)), 24).Masked()}
		}
		if s.ExternalLocal {
			s.HealthCheckNodePort = uint16(32000 + w.Rand.IntN(500))
		}
	}
	if w.Facts.Schedulers != nil && w.chance(3) {
		s.Balance = &model.Balance{Scheduler: w.Facts.Schedulers[w.Rand.IntN(len(w.Facts.Schedulers))]}
	}
	if w.chance(6) {
		s.ExternalIPs = []netip.Addr{w.Addr(172, w.Rand.IntN(60))}
	}
	return s
}

// Slice gives a random slice of a Service, its ith.
func (w *World) Slice(svc string, i int) *model.Slice {
	sl := &model.Slice{Namespace: "ns", Name: fmt.Sprintf("%s-%d", svc, i), Service: svc, Family: w.Family}
	for i := range 3 {
		for _, p := range []model.Protocol{model.TCP, model.UDP, model.SCTP} {
			sl.Ports = append(sl.Ports, model.SlicePort{Name: fmt.Sprintf("p%d", i), Protocol: p, Port: uint16(8080 + i)})
		}
	}
	n := w.Rand.IntN(5)
	if w.chance(25) {
		n = w.Rand.IntN(200)
	}
	for range n {
		ready := !w.chance(4)
		sl.Endpoints = append(sl.Endpoints, model.Endpoint{Addr: w.Addr(10, 1<<20+w.Rand.IntN(400)), Node: fmt.Sprintf("node-%d", w.Rand.IntN(4)),
			Ready: ready, Serving: ready || w.chance(2), Terminating: !ready})
	}
	return sl
}

// serviceName puts one Service in twelve among the important ones.
func serviceName(name string) model.ServiceName {
	if sum(name)%12 == 0 {
		return model.ServiceName{Namespace: "kube-system", Name: name}
	}
	return model.ServiceName{Namespace: "ns", Name: name}
}

func sum(s string) uint32 {
	h := uint32(17)
	for _, c := range s {
		h = h*2654435761 + uint32(c)
	}
	return h >> 7
}

// Step makes one random event.
func (w *World) Step() {
	name := fmt.Sprintf("svc-%d", w.Rand.IntN(w.Names))
	switch w.Rand.IntN(10) {
	case 0:
		delete(w.Services, name)
	case 1, 2, 3:
		w.Services[name] = w.Service(name)
	case 4:
		delete(w.Slices, fmt.Sprintf("%s-%d", name, w.Rand.IntN(2)))
	case 5:
		if w.chance(40) {
			w.Facts.MasqueradeAll = !w.Facts.MasqueradeAll
			w.Facts.LocalhostNodePorts = w.Family == model.IPv4 && w.chance(2)
			if len(w.Facts.OwnAddrs) > 0 {
				w.Facts.OwnAddrs = []netip.Addr{w.Facts.NodeIP, w.Addr(192, 1+w.Rand.IntN(3))}
			}
			f := w.Facts
			if w.Planner.SetFacts(&f) {
				for n := range w.Names {
					w.Update(fmt.Sprintf("svc-%d", n))
				}
			}
		}
	default:
		sl := w.Slice(name, w.Rand.IntN(2))
		w.Slices[sl.Name] = sl
	}
	w.Update(name)
}

// Update plans a Service again, after a change of Services or Slices by hand.
func (w *World) Update(name string) {
	var list []*model.Slice
	for i := range 2 {
		if sl := w.Slices[fmt.Sprintf("%s-%d", name, i)]; sl != nil {
			list = append(list, sl)
		}
	}
	w.Planner.Update(serviceName(name), w.Services[name], list)
}

// Set is what the node must do now.
func (w *World) Set() *plan.Set { return w.Planner.Set() }
