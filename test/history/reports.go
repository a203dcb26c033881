package history

import "github.com/sluice-proxy/sluice/pkg/model"

// Reports collects what a proxier reports.
type Reports struct {
	Aside map[model.PortKey]error // and not taken back
	Drift map[string]int
}

// NewReports returns an empty collection.
func NewReports() *Reports {
	return &Reports{Aside: map[model.PortKey]error{}, Drift: map[string]int{}}
}

// SetAside implements proxier.Reporter.
func (l *Reports) SetAside(k model.PortKey, err error) {
	if err == nil {
		delete(l.Aside, k)
	} else {
		l.Aside[k] = err
	}
}

// DriftRepaired implements proxier.Reporter.
func (l *Reports) DriftRepaired(object string, n int) { l.Drift[object] += n }
