package debug

import (
	"bufio"
	"fmt"
	"html"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The pages are put together by hand, every value through html.EscapeString:
// html/template would keep the linker from dropping unused methods, which costs
// every node megabytes (golang/go#72895).

const style = `
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5d6b7c;--line:#dfe5ec;--card:#fff;--page:#f5f7fa;--link:#0b62c4;--bad:#b3261e;--good:#1a7f4b}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--soft:#97a4b5;--line:#2f3946;--card:#1b222c;--page:#12171e;--link:#7db4ff;--bad:#ff8a80;--good:#6fd6a0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 56px}
h1{font-size:24px;margin:0 0 2px}h2{font-size:16px;margin:32px 0 10px}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
.sub{color:var(--soft);margin:0 0 20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.card b{display:block;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums}.card span{color:var(--soft);font-size:13px}
.scroll{background:var(--card);border:1px solid var(--line);border-radius:8px;overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:7px 14px;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-size:13px;font-weight:500;white-space:nowrap}tr:last-child td{border-bottom:0}
td:first-child,td.w{white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;overflow-x:auto;margin:0}
.bad{color:var(--bad)}.good{color:var(--good)}.soft{color:var(--soft)}
`

func pageHead(title string) string {
	return `<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>` +
		html.EscapeString(title) + ` · Sluice</title><style>` + style + `</style></head><body><main>`
}

const pageFoot = "</main></body></html>\n"

func htmlHeaders(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
}

// writePage writes a page below the index; body is HTML.
func writePage(w http.ResponseWriter, title, body string) {
	htmlHeaders(w)
	_, _ = io.WriteString(w, pageHead(title)+`<h1>`+html.EscapeString(title)+`</h1><p class="sub"><a href="/sluice/">Sluice</a> · <a href="/sluice/services">all Services</a> · <a href="?format=json">JSON</a> · <a href="?format=text">text</a></p>`+body+pageFoot)
}

func htmlServices(w http.ResponseWriter, out *bufio.Writer, rows func(func(rowView))) {
	htmlHeaders(w)
	fmt.Fprint(out, pageHead("Services"), `<h1>Services</h1><p class="sub"><a href="/sluice/">Sluice</a> · <a href="/sluice/services">all</a> · <a href="?problems">problems</a> · <a href="?format=json">JSON</a> · <a href="?format=text">text</a></p>`,
		`<div class="scroll"><table><tr><th>Service port</th><th>Family</th><th>Frontends</th><th class="n">Endpoints</th><th class="n">Here</th><th>State</th></tr>`)
	none := true
	rows(func(v rowView) {
		none = false
		class, state := "soft", stateText(v)
		if v.Problem {
			class = "bad"
		} else if len(v.State) == 0 {
			class = "good"
		}
		fmt.Fprintf(out, `<tr><td><a href="/sluice/services/%s/%s">%s</a> <span class="soft">%s</span></td><td>%s</td><td class="w">`,
			html.EscapeString(url.PathEscape(v.Namespace)), html.EscapeString(url.PathEscape(v.Name)),
			html.EscapeString(title(v.Namespace, v.Name, v.Port)), v.Protocol, v.Family)
		for i, f := range v.Frontends {
			if i > 0 {
				fmt.Fprint(out, "<br>")
			}
			kind, addr, _ := strings.Cut(f, " ")
			fmt.Fprintf(out, `<code>%s</code> <span class="soft">%s</span>`, html.EscapeString(addr), html.EscapeString(kind))
		}
		fmt.Fprintf(out, `</td><td class="n">%d</td><td class="n">%d</td><td class="%s">%s</td></tr>`+"\n",
			v.Endpoints, v.Here, class, html.EscapeString(state))
	})
	if none {
		fmt.Fprint(out, `<tr><td colspan="6" class="soft">None.</td></tr>`)
	}
	fmt.Fprint(out, "</table></div>", pageFoot)
}

func (s *Server) index(w http.ResponseWriter, _ *http.Request) {
	var b strings.Builder
	b.WriteString(pageHead("This node"))
	b.WriteString("<h1>Sluice</h1>")
	s.indexSubtitle(&b)
	totals := s.totals()
	s.indexCards(&b, totals)
	s.indexFamilies(&b, totals)
	s.indexLinks(&b)
	b.WriteString(pageFoot)
	htmlHeaders(w)
	_, _ = io.WriteString(w, b.String())
}

func (s *Server) indexSubtitle(b *strings.Builder) {
	var parts []string
	add := func(text string) {
		if text != "" {
			parts = append(parts, html.EscapeString(text))
		}
	}
	if s.opts.Mode != nil {
		add("mode " + s.opts.Mode())
	}
	add(s.opts.Version)
	for _, f := range s.families() {
		if facts := s.set(f).Facts; facts != nil && facts.NodeName != "" {
			add("node " + facts.NodeName)
			break
		}
	}
	fmt.Fprintf(b, `<p class="sub">%s</p>`, strings.Join(parts, " · "))
}

func card(b *strings.Builder, figure, caption, class string) {
	fmt.Fprintf(b, `<div class="card"><b class="%s">%s</b><span>%s</span></div>`, class, html.EscapeString(figure), html.EscapeString(caption))
}

func (s *Server) indexCards(b *strings.Builder, totals []totals) {
	b.WriteString(`<div class="cards">`)
	if s.opts.Health != nil {
		if s.opts.Health().Healthy {
			card(b, "healthy", "no change waits too long", "good")
		} else {
			card(b, "stale", "a change has been waiting too long", "bad")
		}
	}
	if s.opts.Snapshot != nil {
		snap := s.opts.Snapshot()
		services, endpoints := 0, 0
		for e := range snap.All {
			if e.Service != nil {
				services++
			}
			for _, sl := range e.Slices {
				endpoints += len(sl.Endpoints)
			}
		}
		card(b, strconv.Itoa(services), "Services known", "")
		card(b, strconv.Itoa(endpoints), "endpoints in their slices", "")
		if !snap.Synced() {
			card(b, "waiting", "no complete list has arrived yet", "bad")
		}
	}
	aside, clashes := 0, 0
	for _, t := range totals {
		aside += t.aside
		clashes += t.clashes
	}
	card(b, strconv.Itoa(aside), "ports set aside", worse(aside))
	card(b, strconv.Itoa(clashes), "address clashes", worse(clashes))
	b.WriteString(`</div>`)
}

func worse(n int) string {
	if n > 0 {
		return "bad"
	}
	return ""
}

func (s *Server) indexFamilies(b *strings.Builder, totals []totals) {
	if len(totals) == 0 {
		return
	}
	b.WriteString(`<h2>What this node does</h2><div class="scroll"><table><tr><th>Family</th><th class="n">Service ports</th><th class="n">Endpoints</th><th class="n">Without endpoints</th><th class="n">Set aside</th><th class="n">Clashes</th></tr>`)
	for _, t := range totals {
		fmt.Fprintf(b, `<tr><td>%s</td><td class="n">%d</td><td class="n">%d</td><td class="n">%d</td><td class="n %s">%d</td><td class="n %s">%d</td></tr>`,
			t.family, t.ports, t.endpoints, t.endsEmpty, worse(t.aside), t.aside, worse(t.clashes), t.clashes)
	}
	b.WriteString(`</table></div>`)
	if s.opts.Health == nil {
		return
	}
	r := s.opts.Health()
	b.WriteString(`<p class="soft">`)
	for i, f := range slices.Sorted(maps.Keys(r.Status)) {
		if i > 0 {
			b.WriteString(" · ")
		}
		if at := r.Status[f].LastUpdated; at.IsZero() {
			fmt.Fprintf(b, "%s: never in force yet", html.EscapeString(f))
		} else {
			fmt.Fprintf(b, "%s: last change in force %s ago", html.EscapeString(f), r.CurrentTime.Sub(at).Round(time.Second))
		}
	}
	b.WriteString(`</p>`)
}

func (s *Server) indexLinks(b *strings.Builder) {
	type link struct{ href, text string }
	links := []link{
		{"/sluice/services", "every Service port: frontends, endpoints, state"},
		{"/sluice/services?problems", "those with a clash, without endpoints, or refused by the kernel"},
		{"/sluice/services/NAMESPACE/NAME", "one Service: who may reach it how, and why"},
	}
	if s.opts.Ruleset != nil {
		links = append(links, link{"/sluice/ruleset?service=NAMESPACE/NAME", "the kernel objects wanted for it"})
	}
	if s.opts.IPVS != nil {
		links = append(links, link{"/sluice/ipvs", "schedulers, and endpoints that only finish their connections"})
	}
	links = append(links, link{"/metrics", "metrics, under kube-proxy's names and our own"}, link{"/metrics/slis", "component SLIs"})
	if s.opts.Mode != nil {
		links = append(links, link{"/proxyMode", "the mode in force"})
	}
	if s.opts.Configz != nil {
		links = append(links, link{"/configz", "the configuration in force"})
	}
	if s.opts.Profiling {
		links = append(links, link{"/debug/pprof/", "Go profiles"})
	}
	b.WriteString(`<h2>Pages</h2><div class="scroll"><table>`)
	for _, l := range links {
		if strings.Contains(l.href, "NAMESPACE") {
			fmt.Fprintf(b, `<tr><td><code>%s</code></td><td class="soft">%s</td></tr>`, html.EscapeString(l.href), html.EscapeString(l.text))
			continue
		}
		fmt.Fprintf(b, `<tr><td><a href="%s"><code>%s</code></a></td><td class="soft">%s</td></tr>`,
			html.EscapeString(l.href), html.EscapeString(l.href), html.EscapeString(l.text))
	}
	b.WriteString(`</table></div><p class="soft">Lists come as text, JSON or HTML: <code>?format=</code> or the Accept header decides.</p>`)
}
