package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
)

// look is a page, and what it must say.
type look struct{ path, wants string }

// whatToSee shows some of what a person can look at on a node.
func (w *world) whatToSee(ctx context.Context, p *printer) error {
	p.heading("What you can look at on a node")
	looks := []look{
		{"/proxyMode", w.o.mode},
		{"/sluice/services", "default/web:http"},
		{"/sluice/services/default/front", "because: externalTrafficPolicy Local"},
	}
	for _, look := range append(looks, w.mode.looks...) {
		text, err := w.page(ctx, look.path)
		if err != nil {
			return err
		}
		p.command("curl -s localhost:10249"+look.path, text)
		if !strings.Contains(text, look.wants) {
			p.fail(look.path, fmt.Errorf("the page does not say %q", look.wants))
		}
	}
	return w.mode.see(w, ctx, p)
}

// showChain prints the chain of a Service as the kernel has it.
func (w *world) showChain(ctx context.Context, p *printer) error {
	ns := w.lab.Host(node)
	services, err := ns.Run(ctx, "iptables", "-t", "nat", "-S", "KUBE-SERVICES")
	if err != nil {
		return err
	}
	for line := range strings.Lines(services) {
		_, chain, ok := strings.Cut(strings.TrimSpace(line), " -j KUBE-SVC-")
		if !ok || !strings.Contains(line, "default/web:http cluster IP") {
			continue
		}
		text, err := ns.Run(ctx, "iptables", "-t", "nat", "-S", "KUBE-SVC-"+chain)
		if err != nil {
			return err
		}
		p.command("iptables -t nat -S KUBE-SVC-"+chain, text)
		return nil
	}
	return errors.New("KUBE-SERVICES has no rule for the Service default/web:http")
}

// end stops the agent in good order and cleans up.
func (w *world) end(ctx context.Context, p *printer) error {
	p.heading("The end")
	t := p.table(wide, "       ", "")
	had, err := w.mode.list(w, ctx)
	if err != nil {
		return err
	}
	w.agent.stop(syscall.SIGTERM)
	left, err := w.mode.list(w, ctx)
	if err != nil {
		return err
	}
	stopped := w.agent.err
	if !slices.Equal(left, had) {
		stopped = errors.Join(stopped, fmt.Errorf("of %d %s %d are left", len(had), w.mode.objects, len(left)))
	}
	t.add(row{[]string{"SIGTERM: the agent stops, its rules stay", "", fmt.Sprintf("%d %s before, %d after", len(had), w.mode.objects, len(left))}, stopped})
	_, err = w.lab.Host(node).Run(ctx, w.o.agent, "--cleanup")
	if err == nil {
		if left, err = w.mode.list(w, ctx); err == nil && len(left) > 0 {
			err = fmt.Errorf("left: %s", strings.Join(left, ", "))
		}
	}
	t.add(row{[]string{"sluice --cleanup: they go", "", fmt.Sprintf("%d %s", len(left), w.mode.objects)}, err})
	return nil
}

func (w *world) chainsAndServers(ctx context.Context) ([]string, error) {
	chains, err := w.chains(ctx)
	if err != nil {
		return chains, err
	}
	servers, err := w.virtualServers(ctx)
	return append(chains, servers...), err
}

// chains lists the agent's chains on the node, of both families. KUBE-FIREWALL is
// the kubelet's as well, and stays. In an empty namespace the agent takes the
// variant that the command iptables is.
func (w *world) chains(ctx context.Context) (list []string, err error) {
	for _, program := range []string{"iptables-save", "ip6tables-save"} {
		text, err := w.lab.Host(node).Run(ctx, program)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, ":KUBE-") && !strings.HasPrefix(line, ":KUBE-FIREWALL ") {
				name, _, _ := strings.Cut(line[1:], " ")
				list = append(list, name)
			}
		}
	}
	return list, nil
}
