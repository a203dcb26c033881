package convert

import (
	"slices"
	"strconv"
	"strings"

	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Annotations of a Service that say how modes with schedulers (ipvs) share out
// its new connections. A blank value is as if the annotation were not there; a
// value of which a part cannot be used is not used at all.
const (
	// AnnotationScheduler names a scheduler of the kernel: rr, wrr, lc, mh, ...
	AnnotationScheduler = "sluice.io/ipvs-scheduler"

	// AnnotationSchedFlags is a list of scheduler flags with commas between
	// (mh-port, mh-fallback, sh-port, sh-fallback), or none.
	AnnotationSchedFlags = "sluice.io/ipvs-sched-flags"

	// AnnotationWeights is a list of KEY=WEIGHT with commas between. A KEY is
	// zone/NAME, the name of an endpoint, or * for all others (1 if it is not
	// there); a WEIGHT is 0 to 65535, 0 for no new connections.
	AnnotationWeights = "sluice.io/ipvs-weights"
)

const (
	maxSchedulerName = 15     // IP_VS_SCHEDNAME_MAXLEN of linux/ip_vs.h, less its NUL
	noFlags          = "none" // of AnnotationSchedFlags
	zonePrefix       = "zone/"
)

var schedFlags = []string{"mh-fallback", "mh-port", "sh-fallback", "sh-port"}

// balance reads the annotations; nil if there is none. What is wrong with them
// goes into the Balance and not to the object's problems: it concerns only who
// looks at them.
func (c *Converter) balance(annotations map[string]string) *model.Balance {
	b := &model.Balance{}
	said := false
	var p problems
	if text := strings.TrimSpace(annotations[AnnotationScheduler]); text != "" {
		said = true
		b.Scheduler = c.scheduler(text, &p)
	}
	if text := strings.TrimSpace(annotations[AnnotationSchedFlags]); text != "" {
		said = true
		b.SchedFlags, b.FlagsSet = parseSchedFlags(text, &p)
	}
	if text := strings.TrimSpace(annotations[AnnotationWeights]); text != "" {
		said = true
		b.Weights = parseWeights(text, &p)
	}
	if !said {
		return nil
	}
	b.Problems = p.all()
	return b
}

// scheduler keeps any name that a kernel could have; which it has is for the
// planner to know.
func (c *Converter) scheduler(text string, p *problems) string {
	if len(text) > maxSchedulerName {
		p.add("annotation %s: %q cannot be a scheduler's name: it has more than %d characters", AnnotationScheduler, brief(text), maxSchedulerName)
		return ""
	}
	return c.names.get(text)
}

func parseSchedFlags(text string, p *problems) (flags []string, set bool) {
	if text == noFlags {
		return nil, true
	}
	set = true
	for _, name := range entries(text) {
		i := slices.Index(schedFlags, name)
		if i < 0 {
			p.add("annotation %s: %q is none of %s, %s", AnnotationSchedFlags, brief(name), strings.Join(schedFlags, ", "), noFlags)
			set = false
			continue
		}
		flags = append(flags, schedFlags[i])
	}
	if !set {
		return nil, false
	}
	slices.Sort(flags)
	return slices.Compact(flags), true
}

func parseWeights(text string, p *problems) *model.Weights {
	w := &model.Weights{Default: 1}
	seen := map[string]bool{}
	good := true
	for _, entry := range entries(text) {
		key, value, ok := cutWeight(entry)
		weight, err := strconv.ParseUint(value, 10, 16)
		switch {
		case !ok:
			p.add("annotation %s: %q is not like KEY=WEIGHT", AnnotationWeights, brief(entry))
		case err != nil:
			p.add("annotation %s: the weight in %q is not a number from 0 to 65535", AnnotationWeights, brief(entry))
		case seen[key]:
			p.add("annotation %s: %q is there twice", AnnotationWeights, brief(key))
		case !setWeight(w, key, uint16(weight)):
			p.add("annotation %s: %q is neither %sNAME, nor an endpoint's name, nor *", AnnotationWeights, brief(key), zonePrefix)
		default:
			seen[key] = true
			continue
		}
		good = false
	}
	if !good {
		return nil
	}
	return w
}

func cutWeight(entry string) (key, value string, ok bool) {
	key, value, ok = strings.Cut(entry, "=")
	return strings.TrimSpace(key), strings.TrimSpace(value), ok
}

// setWeight returns false if no zone or endpoint can be called so: topology
// labels are label values, Pods and hostnames are DNS names.
func setWeight(w *model.Weights, key string, weight uint16) bool {
	if key == "*" {
		w.Default = weight
		return true
	}
	if zone, ok := strings.CutPrefix(key, zonePrefix); ok {
		if zone == "" || len(validation.IsValidLabelValue(zone)) > 0 {
			return false
		}
		if w.Zones == nil {
			w.Zones = map[string]uint16{}
		}
		w.Zones[strings.Clone(zone)] = weight
		return true
	}
	if len(validation.IsDNS1123Subdomain(key)) > 0 {
		return false
	}
	if w.Names == nil {
		w.Names = map[string]uint16{}
	}
	w.Names[strings.Clone(key)] = weight
	return true
}

// entries splits a list at its commas. Blank entries do not count: a list that
// is written on several lines ends with a comma.
func entries(text string) []string {
	var out []string
	for e := range strings.SplitSeq(text, ",") {
		if e = strings.TrimSpace(e); e != "" {
			out = append(out, e)
		}
	}
	return out
}

// brief keeps what somebody wrote to a length that fits into an Event.
func brief(s string) string {
	const most = 64
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}

// origin is what weights can tell an endpoint by.
func (c *Converter) origin(e *discoveryv1.Endpoint) model.Origin {
	var o model.Origin
	switch {
	case e.TargetRef != nil && e.TargetRef.Kind == "Pod" && e.TargetRef.Name != "":
		o.Name = strings.Clone(e.TargetRef.Name) // in one slice or two: not worth a place in the interner
	case e.Hostname != nil:
		o.Name = strings.Clone(*e.Hostname)
	}
	if e.Zone != nil {
		o.Zone = c.names.get(*e.Zone)
	}
	return o
}
