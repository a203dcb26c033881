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
	logging := loggingGates()
	known := logging.GetAll()
	c.FeatureGates = maps.Clone(kubeProxyGates)
	toLogging := map[string]bool{}
	for _, name := range sortedKeys(c.KubeProxy.FeatureGates) {
		on := c.KubeProxy.FeatureGates[name]
		_, isKubeProxys := kubeProxyGates[name]
		_, isLoggings := known[featuregate.Feature(name)]
		switch {
		case isKubeProxys:
			c.FeatureGates[name] = on
		case isLoggings:
			toLogging[name] = on
		default:
			c.warn("feature gate %s=%t has no effect here: ignored", name, on)
		}
	}
	if c.Mode == ModeIPVS && !c.FeatureGates[gateIPVS] {
		c.warn("feature gate %s=false is ignored: mode ipvs was chosen and is always there", gateIPVS)
	}
	if err := logging.SetFromMap(toLogging); err != nil {
		ps.add("featureGates", "%v", err)
	}
	for _, e := range logsapi.Validate(&c.KubeProxy.Logging, logging, field.NewPath("logging")) {
		ps.add(e.Field, "%s", e.ErrorBody())
	}
}

// loggingGates returns the gates of the logging library at their defaults.
func loggingGates() featuregate.MutableVersionedFeatureGate {
	gates := featuregate.NewFeatureGate()
	if err := logsapi.AddFeatureGates(gates); err != nil {
		panic("BUG: feature gates of logging are defined twice: " + err.Error())
	}
	return gates
}
