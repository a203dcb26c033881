package config

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// YAML returns the configuration, with all defaults filled in, as a file that
// loads to the same configuration again.
//
// A minSyncPeriod that nobody asked for is written as 0s: the value that
// kube-proxy would make of it, if written down, would count as asked for. A
// listener that a flag turned off comes back with the default address, because
// kube-proxy's file has no way to say so.
func (c *Config) YAML() ([]byte, error) {
	k := c.KubeProxy.DeepCopy()
	if c.implied.iptables {
		k.IPTables.MinSyncPeriod = metav1.Duration{}
	}
	if c.implied.ipvs {
		k.IPVS.MinSyncPeriod = metav1.Duration{}
	}
	if c.implied.nftables {
		k.NFTables.MinSyncPeriod = metav1.Duration{}
	}
	first, err := yaml.Marshal(k)
	if err != nil {
		return nil, fmt.Errorf("write %s as YAML: %w", kubeProxyKind, err)
	}
	second, err := yaml.Marshal(c.Sluice)
	if err != nil {
		return nil, fmt.Errorf("write %s as YAML: %w", SluiceKind, err)
	}
	return append(append(first, "---\n"...), second...), nil
}
