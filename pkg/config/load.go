package config

import (
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
)

// Load works out the configuration from the parsed flags and the file that they
// name. The error, if any, is an *Error that holds every problem found. Load
// touches nothing and can be called again.
func (f *Flags) Load() (*Config, error) {
	if f.configFile == "" {
		return f.load(nil)
	}
	data, err := readFile(f.configFile)
	if err != nil {
		return nil, err
	}
	return f.load(data)
}

// load is Load for a file of this content.
//
// As in kube-proxy, a KubeProxyConfiguration replaces all flags that have a field
// in it, set there or not; only hostname-override, logging and what concerns the
// process alone still count. Sluice's own flags always win over its document: they
// are new, and so nobody relies on their being ignored.
func (f *Flags) load(data []byte) (*Config, error) {
	c := &Config{
		ConfigFile:    f.configFile,
		WriteConfigTo: f.writeConfigTo,
		Master:        f.master,
		Cleanup:       f.cleanup,
		InitOnly:      f.initOnly,
		flags:         f,
	}
	var docs documents
	if f.configFile != "" {
		c.fileSum = sha256.Sum256(data)
		var ps []Problem
		if docs, ps = decode(data); len(ps) > 0 {
			return nil, &Error{Source: f.configFile, Problems: ps}
		}
	}
	w := &c.written
	w.warnings = append(f.unusedWarnings(), docs.warnings...)
	if docs.kubeProxy != nil {
		c.fromFile = true
		w.warnings = append(w.warnings, f.ignoredWarnings()...)
		c.implied = impliedIn(docs.kubeProxy)
		w.kubeProxy = docs.kubeProxy
		defaultKubeProxy(w.kubeProxy)
		if err := f.copyLogging(&w.kubeProxy.Logging); err != nil {
			return nil, err
		}
	} else {
		w.kubeProxy, c.implied = f.fromFlags(w)
	}
	w.sluice = docs.sluice
	if w.sluice == nil {
		w.sluice = &SluiceConfiguration{}
	}
	f.overrideSluice(w.sluice)
	defaultSluice(w.sluice)
	if f.hostnameOverride != "" {
		w.kubeProxy.HostnameOverride = strings.ToLower(strings.TrimSpace(f.hostnameOverride))
		if w.kubeProxy.HostnameOverride == "" {
			return nil, &Error{Problems: []Problem{{Field: "--hostname-override", Message: "must not be blank"}}}
		}
	}
	if err := c.derive(); err != nil {
		return nil, err
	}
	return c, nil
}

// impliedIn says for which modes a file leaves minSyncPeriod to the default. As
// in kube-proxy a 0 is no different from nothing there.
func impliedIn(k *v1alpha1.KubeProxyConfiguration) impliedMinSync {
	return impliedMinSync{
		iptables: k.IPTables.MinSyncPeriod.Duration == 0,
		ipvs:     k.IPVS.MinSyncPeriod.Duration == 0,
		nftables: k.NFTables.MinSyncPeriod.Duration == 0,
	}
}

// fromFlags builds the document that the flags stand for. The periods of
// iptables are those of nftables too, which has no such flags.
func (f *Flags) fromFlags(w *written) (*v1alpha1.KubeProxyConfiguration, impliedMinSync) {
	k := f.kubeProxy.DeepCopy()
	k.IPTables.MasqueradeAll, k.NFTables.MasqueradeAll = f.masqueradeAll, f.masqueradeAll
	implied := impliedMinSync{iptables: true, ipvs: true, nftables: true}
	if f.changed("iptables-sync-period") {
		k.IPTables.SyncPeriod.Duration, k.NFTables.SyncPeriod.Duration = f.iptablesSync, f.iptablesSync
	}
	if f.changed("iptables-min-sync-period") {
		k.IPTables.MinSyncPeriod.Duration, k.NFTables.MinSyncPeriod.Duration = f.iptablesMin, f.iptablesMin
		implied.iptables, implied.nftables = f.iptablesMin == 0, f.iptablesMin == 0
	}
	k.IPVS.SyncPeriod.Duration = f.ipvsSync
	if f.changed("ipvs-min-sync-period") { // else 0, as in a file; kube-proxy has iptables' second slip in
		k.IPVS.MinSyncPeriod.Duration = f.ipvsMin
		implied.ipvs = f.ipvsMin == 0
	}

	k.HealthzBindAddress = f.listener("healthz", k.HealthzBindAddress, f.healthzPort, w)
	k.MetricsBindAddress = f.listener("metrics", k.MetricsBindAddress, f.metricsPort, w)
	return k, implied
}

// listener puts a deprecated --*-port flag into an address: 0 turns the server
// off, another port counts only if the address has none. The default address has
// one, so that the port flag alone does nothing, here and in kube-proxy.
func (f *Flags) listener(name, addr string, port int32, w *written) string {
	if addr == "" || port == 0 {
		return ""
	}
	full := withPort(addr, port)
	if f.changed(name+"-port") && !strings.HasSuffix(full, fmt.Sprintf(":%d", port)) {
		w.warnings = append(w.warnings, fmt.Sprintf("--%s-port=%d has no effect, because the address %s has a port: use --%s-bind-address", name, port, addr, name))
	}
	return full
}

// copyLogging lays the logging flags that were set over a file's settings.
func (f *Flags) copyLogging(to *logsapi.LoggingConfiguration) error {
	if f.fs == nil {
		return nil
	}
	saved := *to.DeepCopy()
	var overlay pflag.FlagSet
	logsapi.AddFlags(to, &overlay) // resets the boolean options of the file
	to.Options = saved.Options
	to.VModule = nil
	var ps problems
	overlay.VisitAll(func(flag *pflag.Flag) {
		if !f.changed(flag.Name) {
			return
		}
		if err := flag.Value.Set(f.fs.Lookup(flag.Name).Value.String()); err != nil {
			ps.add("--"+flag.Name, "%v", err)
		}
	})
	to.VModule = append(to.VModule, saved.VModule...) // the first match counts
	if len(ps) > 0 {
		return &Error{Problems: ps}
	}
	return nil
}

func (f *Flags) overrideSluice(s *SluiceConfiguration) {
	if f.changed("manifests") {
		s.Manifests = f.sluice.Manifests
	}
	if f.changed("iptables-variant") {
		s.IPTables.Variant = f.sluice.IPTables.Variant
	}
	if f.changed("mode-fallback") {
		s.ModeFallback = new(f.modeFallback)
	}
	if f.changed("ipvs-drain") {
		s.IPVS.Drain = &metav1.Duration{Duration: f.ipvsDrain}
	}
	if f.changed("nftables-service-traffic") {
		s.NFTables.ServiceTraffic = f.sluice.NFTables.ServiceTraffic
	}
}

func (f *Flags) unusedWarnings() []string {
	var warnings []string
	for _, u := range unusedFlags {
		if f.changed(u.name) {
			warnings = append(warnings, fmt.Sprintf("--%s is ignored: %s", u.name, u.why))
		}
	}
	return warnings
}

func (f *Flags) ignoredWarnings() []string {
	var warnings []string
	for _, flag := range fieldFlags {
		if f.changed(flag.flag) {
			warnings = append(warnings, fmt.Sprintf("--%s is ignored because of --config: set %s in %s", flag.flag, flag.field, f.configFile))
		}
	}
	return warnings
}
