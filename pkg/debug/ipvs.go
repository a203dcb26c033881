package debug

import (
	"fmt"
	"html"
	"io"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// IPVS is what the ipvs mode has to show besides plans.
type IPVS struct {
	Scheduler  string   `json:"scheduler"`  // of Services that ask for none
	Schedulers []string `json:"schedulers"` // what the kernel offers
	// Draining are the endpoints that get no new connections, and stay until
	// theirs end or their time is up.
	Draining []Draining `json:"draining"`
}

// Draining is an endpoint that leaves a virtual server.
type Draining struct {
	Family     model.Family   `json:"-"`
	FamilyName string         `json:"ipFamily"` // Family's; filled in by the page
	Server     string         `json:"server"`
	Endpoint   netip.AddrPort `json:"endpoint"`
	Since      time.Time      `json:"since"`
	Until      *time.Time     `json:"until,omitempty"` // nil: until its connections end
	Active     int            `json:"active"`          // open connections
	Inactive   int            `json:"inactive"`        // closed ones that the kernel still knows
}

func (s *Server) ipvs(w http.ResponseWriter, r *http.Request) {
	f, err := formatOf(r)
	if err != nil {
		plain(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	v := s.opts.IPVS()
	if v.Draining == nil {
		v.Draining = []Draining{}
	}
	for i := range v.Draining {
		v.Draining[i].FamilyName = v.Draining[i].Family.String()
	}
	switch f {
	case asJSON:
		writeJSON(w, v)
	case asHTML:
		var b strings.Builder
		textIPVS(&b, v)
		writePage(w, "IPVS", "<pre>"+html.EscapeString(b.String())+"</pre>")
	default:
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		textIPVS(w, v)
	}
}

func textIPVS(out io.Writer, v IPVS) {
	fmt.Fprintf(out, "Scheduler   %s, unless a Service asks for another\n", v.Scheduler)
	fmt.Fprintf(out, "The kernel  has %s\n", joinOr(v.Schedulers, "no scheduler"))
	if len(v.Draining) == 0 {
		fmt.Fprintln(out, "Draining    no endpoint")
		return
	}
	fmt.Fprintf(out, "Draining    %d: no new connections go to these endpoints\n", len(v.Draining))
	table := [][]string{{"FAMILY", "VIRTUAL SERVER", "ENDPOINT", "ACTIVE", "INACTIVE", "SINCE", "UNTIL"}}
	for _, d := range v.Draining {
		until := "its connections end"
		if d.Until != nil {
			until = d.Until.UTC().Format(time.RFC3339) + " at the latest"
		}
		table = append(table, []string{d.FamilyName, d.Server, d.Endpoint.String(), strconv.Itoa(d.Active), strconv.Itoa(d.Inactive),
			d.Since.UTC().Format(time.RFC3339), until})
	}
	textTable(out, table)
}
