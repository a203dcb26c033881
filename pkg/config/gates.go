package config

import (
	"maps"

	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/component-base/featuregate"
	logsapi "k8s.io/component-base/logs/api/v1"
)

// Feature gates that kube-proxy 1.37 reads, and their defaults there.
const (
	GateAllowServiceExternalIPs = "AllowServiceExternalIPs"
	gateIPVS                    = "KubeProxyIPVS"
)

var kubeProxyGates = map[string]bool{
	GateAllowServiceExternalIPs:           true,
	gateIPVS:                              true,
	"NFTablesNetlink":                     true,
	"KubeProxyNFTablesLocalhostNodePorts": false,
	"NFTablesProxyMode":                   true,
	"PreferSameTrafficDistribution":       true,
	"MultiCIDRServiceAllocator":           true,
	"ComponentFlagz":                      false,
	"ComponentStatusz":                    false,
}

// deriveGates reads the feature gates. kube-proxy refuses to start on a name that
// it does not know; distributions pass the same gates to every component, so here
// that is only worth a warning.
func (c *Config) deriveGates(ps *problems) {
	logging, others, err := loggingGates(c.KubeProxy.FeatureGates)
	if err != nil {
		ps.add("featureGates", "%v", err)
	}
	c.FeatureGates = maps.Clone(kubeProxyGates)
	for _, name := range sortedKeys(others) {
		if _, known := kubeProxyGates[name]; known {
			c.FeatureGates[name] = others[name]
		} else {
			c.warn("feature gate %s=%t has no effect here: ignored", name, others[name])
		}
	}
	if c.Mode == ModeIPVS && !c.FeatureGates[gateIPVS] {
		c.warn("feature gate %s=false is ignored: mode ipvs was chosen and is always there", gateIPVS)
	}
	for _, e := range logsapi.Validate(&c.KubeProxy.Logging, logging, field.NewPath("logging")) {
		ps.add(e.Field, "%s", e.ErrorBody())
	}
}

// loggingGates returns the gates of the logging library as they are set, and the
// settings that are not for it.
func loggingGates(set map[string]bool) (logging featuregate.FeatureGate, others map[string]bool, err error) {
	gates := featuregate.NewFeatureGate()
	if err := logsapi.AddFeatureGates(gates); err != nil {
		panic("BUG: feature gates of logging are defined twice: " + err.Error())
	}
	known := gates.GetAll()
	own := map[string]bool{}
	others = map[string]bool{}
	for name, on := range set {
		if _, ok := known[featuregate.Feature(name)]; ok {
			own[name] = on
		} else {
			others[name] = on
		}
	}
	if len(own) > 0 {
		err = gates.SetFromMap(own)
	}
	return gates, others, err
}
