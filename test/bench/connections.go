package main

import (
	"context"
	"fmt"
	"net/netip"
)

// newConnections compares connections through Services, and beside them, with
// those of a node without rules.
func (t *trial) newConnections(ctx context.Context) error {
	name := nodeName(bare, t.variant)
	if err := t.prepareBare(ctx, t.c.lab.Host(name)); err != nil {
		return fmt.Errorf("prepare a node without rules: %w", err)
	}
	if err := t.forgetFlows(); err != nil {
		return err
	}
	direct := []netip.AddrPort{netip.AddrPortFrom(canaryEndpoint(t.c.canaryVersion), endpointPort)}
	base := &target{from: client{t.c.lab.Host(podName(name))}, to: direct}
	other := &target{from: t.from, to: direct}
	service := &target{from: t.from, to: t.sampled(20)}
	if err := timed(ctx, []*target{base, other, service}, t.s.connections); err != nil {
		return err
	}
	n := t.s.connections
	t.set("conn.base", reading{Value: micro(base.median()), N: n})
	t.set("conn.other", reading{Value: micro(other.above(base)), N: n})
	r := reading{Value: micro(service.above(base)), N: n}
	if lost := base.lost + other.lost + service.lost; lost > 0 {
		r.Note = fmt.Sprintf("%d connections lost: %d through Services, %d to none, %d where there are no rules", lost, service.lost, other.lost, base.lost)
	}
	t.set("conn.service", r)
	t.set("conn.through", reading{Value: micro(service.median()), N: n})
	t.set("conn.slowest", reading{Value: micro(service.slowestAbove(base)), N: n})
	return nil
}
