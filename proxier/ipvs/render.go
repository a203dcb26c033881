package ipvs

import (
	"fmt"
	"strings"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// RenderService gives what the plans of one Service compile to, for people:
// virtual servers as ipvsadm -S prints them, then the elements of the sets. The
// packet mark of a virtual server for clients inside is given away at run time
// and shown as 0x2800.
func RenderService(set *plan.Set, o Options, name model.ServiceName) string {
	c := newProxier(o, nil).compiler(set.Facts)
	var b strings.Builder
	for _, p := range set.Sorted() {
		if p.PortKey.Service() != name {
			continue
		}
		mark := uint32(0)
		if c.needsInside(p) {
			mark = insideSignature << insideShift(o.MasqueradeBit)
		}
		c.compile(p, mark).render(&b, o.Family)
	}
	return b.String()
}

func (rs ruleset) render(b *strings.Builder, f model.Family) {
	for i := range rs.servers {
		s := &rs.servers[i]
		fmt.Fprintf(b, "ipvsadm -A %s -s %s%s\n", s.option(), s.scheduler, s.settings.options())
		for _, d := range s.destinations {
			fmt.Fprintf(b, "ipvsadm -a %s -r %s -m -w %d\n", s.option(), d.at, d.weight)
		}
	}
	for _, a := range rs.addrs {
		fmt.Fprintf(b, "ip addr add %s dev %s\n", a, device)
	}
	for _, e := range rs.entries {
		fmt.Fprintf(b, "ipset add %s %s", e.set.name(f), e.entry)
		if e.mark != 0 {
			fmt.Fprintf(b, " skbmark %s", hex(e.mark))
		}
		b.WriteByte('\n')
	}
}

// option names a virtual server as ipvsadm's options do.
func (k serverKey) option() string {
	if k.mark != 0 {
		return fmt.Sprintf("-f %d", k.mark)
	}
	flag := map[model.Protocol]string{model.TCP: "-t", model.UDP: "-u", model.SCTP: "--sctp-service"}[k.protocol]
	at := k.addr.String()
	if k.addr.Is6() {
		at = "[" + at + "]"
	}
	return fmt.Sprintf("%s %s:%d", flag, at, k.port)
}

func (s settings) options() string {
	out := ""
	if s.flags&flagPersistent != 0 {
		out += fmt.Sprintf(" -p %d", s.timeout)
	}
	var flags []string
	for _, f := range []struct {
		bit  uint32
		name string
	}{{flagSched1, "fallback"}, {flagSched2, "port"}} {
		if s.flags&f.bit != 0 {
			flags = append(flags, s.scheduler+"-"+f.name)
		}
	}
	if flags != nil {
		out += " -b " + strings.Join(flags, ",")
	}
	return out
}
