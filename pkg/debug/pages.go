package debug

import (
	"bufio"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
)

// sluicePages are ours.
func (s *Server) sluicePages(mux *http.ServeMux) {
	mux.Handle("GET /sluice", http.RedirectHandler("/sluice/", http.StatusFound))
	mux.HandleFunc("GET /sluice/{$}", s.index)
	mux.HandleFunc("GET /sluice/services", s.services)
	mux.HandleFunc("GET /sluice/services/{namespace}/{name}", s.service)
	if s.opts.Ruleset != nil {
		mux.HandleFunc("GET /sluice/ruleset", s.ruleset)
	}
	if s.opts.IPVS != nil {
		mux.HandleFunc("GET /sluice/ipvs", s.ipvs)
	}
}

type format int

const (
	asText format = iota
	asJSON
	asHTML
)

// formatOf obeys ?format=, then the Accept header; text is for everybody who
// does not say, curl above all.
func formatOf(r *http.Request) (format, error) {
	switch f := r.URL.Query().Get("format"); f {
	case "text":
		return asText, nil
	case "json":
		return asJSON, nil
	case "html":
		return asHTML, nil
	case "":
	default:
		return asText, fmt.Errorf("no format %q: there are text, json and html", f)
	}
	for part := range strings.SplitSeq(r.Header.Get("Accept"), ",") {
		kind, _, _ := strings.Cut(part, ";")
		switch strings.TrimSpace(kind) {
		case "application/json":
			return asJSON, nil
		case "text/html":
			return asHTML, nil
		case "text/plain":
			return asText, nil
		}
	}
	return asText, nil
}

// services lists all plans, or those of ?namespace=, or those with ?problems.
// Rows are written as they are made.
func (s *Server) services(w http.ResponseWriter, r *http.Request) {
	f, err := formatOf(r)
	if err != nil {
		plain(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	out := bufio.NewWriterSize(w, 16<<10)
	defer out.Flush()
	rows := s.rows(r.URL.Query())
	switch f {
	case asJSON:
		w.Header().Set("Content-Type", "application/json")
		first := true
		fmt.Fprint(out, `{"ports":[`)
		rows(func(v rowView) {
			if !first {
				fmt.Fprint(out, ",")
			}
			first = false
			body, err := json.Marshal(v)
			if err != nil {
				panic("BUG: a row cannot be encoded: " + err.Error())
			}
			fmt.Fprintf(out, "\n%s", body)
		})
		fmt.Fprint(out, "\n]}\n")
	case asHTML:
		htmlServices(w, out, rows)
	default:
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		textServices(out, rows)
	}
}

// rows returns a function that yields the asked-for rows in order: sorted
// within a family.
func (s *Server) rows(query url.Values) func(func(rowView)) {
	namespace := query.Get("namespace")
	return func(yield func(rowView)) {
		for _, f := range s.families() {
			for _, p := range s.set(f).Sorted() {
				if namespace != "" && p.PortKey.Namespace != namespace {
					continue
				}
				if v := s.rowView(f, p); v.Problem || !query.Has("problems") {
					yield(v)
				}
			}
		}
	}
}

func textServices(out io.Writer, rows func(func(rowView))) {
	columns := func(v rowView) [6]string {
		return [6]string{title(v.Namespace, v.Name, v.Port), v.Family, v.Protocol, joinOr(v.Frontends, "none"),
			fmt.Sprintf("%d (%d here)", v.Endpoints, v.Here), stateText(v)}
	}
	header := [6]string{"SERVICE", "FAMILY", "PROTO", "FRONTENDS", "ENDPOINTS", "STATE"}
	var width [6]int
	measure := func(c [6]string) {
		for i := range c {
			width[i] = max(width[i], utf8.RuneCountInString(c[i]))
		}
	}
	measure(header)
	rows(func(v rowView) { measure(columns(v)) })
	write := func(c [6]string) {
		for i, text := range c {
			if i == len(c)-1 {
				fmt.Fprintln(out, text)
				break
			}
			fmt.Fprintf(out, "%-*s  ", width[i], text)
		}
	}
	write(header)
	rows(func(v rowView) { write(columns(v)) })
}

func (s *Server) service(w http.ResponseWriter, r *http.Request) {
	f, err := formatOf(r)
	if err != nil {
		plain(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	n := model.ServiceName{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")}
	v, found := s.serviceView(n)
	if !found {
		plain(w, http.StatusNotFound, fmt.Sprintf("%s is not known here: it does not exist, or no node forwards for it "+
			"(headless, ExternalName, without a ClusterIP, or with the label service.kubernetes.io/service-proxy-name)\n", n))
		return
	}
	switch f {
	case asJSON:
		writeJSON(w, v)
	case asHTML:
		var b strings.Builder
		textService(&b, v)
		body := "<pre>" + html.EscapeString(b.String()) + "</pre>"
		if s.opts.Ruleset != nil {
			body += "<p><a href=\"/sluice/ruleset?service=" + html.EscapeString(url.QueryEscape(n.String())) + "\">Its ruleset</a></p>"
		}
		writePage(w, n.String(), body)
	default:
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		textService(w, v)
	}
}

func textService(out io.Writer, v serviceView) {
	fmt.Fprintf(out, "Service   %s/%s\n", v.Namespace, v.Name)
	if v.Created != nil {
		fmt.Fprintf(out, "Created   %s\n", v.Created.UTC().Format("2006-01-02 15:04:05 MST"))
	}
	if v.UID != "" {
		fmt.Fprintf(out, "UID       %s\n", v.UID)
	}
	if !v.Known {
		fmt.Fprintln(out, "          The Service itself is not known: it was deleted, has not arrived yet, or no node forwards for it.")
	}
	for _, sl := range v.Slices {
		fmt.Fprintf(out, "Slice     %s: %s, %d of %d endpoints ready\n", sl.Name, sl.Family, sl.Ready, sl.Endpoints)
	}
	if len(v.Ports) == 0 {
		fmt.Fprintln(out, "\nThis node does nothing for it: it has no port, or no ClusterIP of a family that is served here.")
	}
	for _, p := range v.Ports {
		textPort(out, p)
	}
}

func textPort(out io.Writer, p portView) {
	fmt.Fprintf(out, "\n%s  %s  %s\n", title(p.Namespace, p.Name, p.Port), p.Protocol, p.Family)
	if p.SetAside != "" {
		fmt.Fprintf(out, "  SET ASIDE: the kernel refused it, other Services are not affected: %s\n", p.SetAside)
	}
	for _, why := range p.Why {
		fmt.Fprintf(out, "  because: %s\n", why)
	}
	for _, l := range p.Lost {
		fmt.Fprintf(out, "  CLASH: %s belongs to %s, which is older\n", l.Frontend, l.Winner)
	}
	for _, problem := range p.Problems {
		fmt.Fprintf(out, "  IGNORED: %s\n", problem)
	}
	if p.Scheduler != "" {
		fmt.Fprintf(out, "  scheduler: %s\n", p.Scheduler)
	}
	if p.AffinitySeconds > 0 {
		fmt.Fprintf(out, "  affinity: a client keeps its endpoint for %d s\n", p.AffinitySeconds)
	}
	if p.HealthPort != 0 {
		fmt.Fprintf(out, "  health port: %d, ready endpoints on this node: %d\n", p.HealthPort, p.HealthLocal)
	}
	table := [][]string{{"FRONTEND", "ADDRESS", "FROM POD", "FROM NODE", "FROM OUTSIDE", "SOURCES"}}
	for _, f := range p.Frontends {
		sources := "any"
		if f.Limited {
			sources = joinOr(f.Sources, "nobody")
		}
		table = append(table, []string{f.Kind, f.Address, f.FromPod, f.FromNode, f.FromOutside, sources})
	}
	textTable(out, table)
	textTable(out, endpointTable(p))
}

func endpointTable(p portView) [][]string {
	table := [][]string{{"ENDPOINT", "USED BY", "WHERE"}}
	for _, e := range p.Endpoints {
		where := "elsewhere"
		if e.Local {
			where = "this node, or unknown"
		}
		table = append(table, []string{e.Address, joinOr(e.UsedBy, "existing connections only"), where})
	}
	if p.Scheduler == "" {
		return table
	}
	table[0] = append(table[0], "WEIGHT")
	for i, e := range p.Endpoints {
		weight := "-"
		if e.Weight != nil {
			weight = strconv.Itoa(int(*e.Weight))
		}
		table[i+1] = append(table[i+1], weight)
	}
	return table
}

// textTable writes rows in columns, and nothing for a header alone.
func textTable(out io.Writer, rows [][]string) {
	if len(rows) < 2 {
		return
	}
	width := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, c := range r {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	fmt.Fprintln(out)
	for _, r := range rows {
		fmt.Fprint(out, "  ")
		for i, c := range r {
			if i == len(r)-1 {
				fmt.Fprintln(out, c)
				break
			}
			fmt.Fprintf(out, "%-*s  ", width[i], c)
		}
	}
}

func (s *Server) ruleset(w http.ResponseWriter, r *http.Request) {
	namespace, svc, ok := strings.Cut(r.URL.Query().Get("service"), "/")
	if !ok || namespace == "" || svc == "" || strings.Contains(svc, "/") {
		plain(w, http.StatusBadRequest, "which Service? ask for /sluice/ruleset?service=NAMESPACE/NAME\n")
		return
	}
	n := model.ServiceName{Namespace: namespace, Name: svc}
	text, err := s.opts.Ruleset(r.Context(), n)
	switch {
	case err != nil:
		plain(w, http.StatusInternalServerError, fmt.Sprintf("make the ruleset of %s: %v\n", n, err))
	case text == "":
		plain(w, http.StatusNotFound, fmt.Sprintf("%s has no ruleset on this node; /sluice/services/%s says why\n", n, n))
	default:
		plain(w, http.StatusOK, text)
	}
}

// totals are the index's figures of one family.
type totals struct {
	family                                      string
	ports, endpoints, clashes, aside, endsEmpty int
}

func (s *Server) totals() []totals {
	var out []totals
	for _, f := range s.families() {
		set := s.set(f)
		t := totals{family: f.String(), ports: set.Len(), endpoints: set.Endpoints}
		for p := range set.All {
			t.clashes += len(p.Lost)
			if s.setAside(f, p) != nil {
				t.aside++
			}
			if p.Why&plan.NoEndpoints != 0 {
				t.endsEmpty++
			}
		}
		out = append(out, t)
	}
	return out
}
