package config

import (
	"reflect"
	"slices"
	"strings"

	logsapi "k8s.io/component-base/logs/api/v1"
)

// hotFields can be changed under a running agent, with everything below them. The
// others decide what is built at the start: the proxier, the listeners, the
// client.
var hotFields = []string{
	"logging.verbosity",
	"logging.vmodule",
	"nodePortAddresses",
	"clusterCIDR",
	"detectLocalMode",
	"detectLocal",
	"iptables.masqueradeAll",
	"iptables.localhostNodePorts",
	"iptables.syncPeriod",
	"iptables.minSyncPeriod",
	"ipvs.syncPeriod",
	"ipvs.minSyncPeriod",
	"nftables.masqueradeAll",
	"nftables.syncPeriod",
	"nftables.minSyncPeriod",
	"conntrack",
	"featureGates." + GateAllowServiceExternalIPs,
	SluiceKind + ".checkPeriod",
	SluiceKind + ".resyncPeriod",
	SluiceKind + ".conntrack",
	SluiceKind + ".ipvs.drain",
}

// inertFields have no effect, so neither has a change of them.
var inertFields = []string{"portRange", "winkernel", "windowsRunAsService", "kind", "apiVersion", SluiceKind + ".kind", SluiceKind + ".apiVersion"}

// Diff names the fields in which two configurations differ, defaults filled in,
// by their path in the file and sorted: those that can be applied to a running
// agent, and those that need a restart. Both are empty if nothing of effect
// changed.
func Diff(from, to *Config) (hot, restart []string) {
	var changed []string
	diffValue("", reflect.ValueOf(from.KubeProxy).Elem(), reflect.ValueOf(to.KubeProxy).Elem(), &changed)
	diffValue(SluiceKind, reflect.ValueOf(from.Sluice).Elem(), reflect.ValueOf(to.Sluice).Elem(), &changed)
	if section := string(to.Mode) + ".minSyncPeriod"; from.MinSyncExplicit != to.MinSyncExplicit && !slices.Contains(changed, section) {
		changed = append(changed, section) // the same second, but now somebody asks for it
	}
	slices.Sort(changed)
	for _, path := range changed {
		switch {
		case under(path, inertFields):
		case under(path, hotFields):
			hot = append(hot, path)
		default:
			restart = append(restart, path)
		}
	}
	return hot, restart
}

func under(path string, roots []string) bool {
	return slices.ContainsFunc(roots, func(root string) bool {
		return path == root || strings.HasPrefix(path, root+".")
	})
}

func diffValue(path string, a, b reflect.Value, changed *[]string) {
	t := a.Type()
	switch {
	case t.Kind() == reflect.Struct && !isLeaf(t):
		jsonFields(t, func(name string, index []int) {
			diffValue(joinPath(path, name), a.FieldByIndex(index), b.FieldByIndex(index), changed)
		})
		return
	case t.Kind() == reflect.Map:
		keys := map[string]bool{}
		for _, key := range append(a.MapKeys(), b.MapKeys()...) {
			keys[key.String()] = true
		}
		for _, key := range sortedKeys(keys) {
			av, bv := a.MapIndex(reflect.ValueOf(key)), b.MapIndex(reflect.ValueOf(key))
			if !av.IsValid() || !bv.IsValid() || !av.Equal(bv) {
				*changed = append(*changed, joinPath(path, key))
			}
		}
		return
	case t.Kind() == reflect.Slice && a.Len() == 0 && b.Len() == 0:
		return // nil and empty mean the same
	}
	if !sameLeaf(a, b) {
		*changed = append(*changed, path)
	}
}

// sameLeaf compares by meaning: a quantity keeps a private cache of its text, and
// a flush frequency remembers whether it was written as a number.
func sameLeaf(a, b reflect.Value) bool {
	if d, ok := a.Interface().(logsapi.TimeOrMetaDuration); ok {
		return d.Duration == b.Interface().(logsapi.TimeOrMetaDuration).Duration
	}
	if m, ok := a.Interface().(interface{ MarshalJSON() ([]byte, error) }); ok {
		if a.Kind() == reflect.Pointer && (a.IsNil() || b.IsNil()) {
			return a.IsNil() && b.IsNil()
		}
		x, errX := m.MarshalJSON()
		y, errY := b.Interface().(interface{ MarshalJSON() ([]byte, error) }).MarshalJSON()
		return errX == nil && errY == nil && string(x) == string(y)
	}
	return reflect.DeepEqual(a.Interface(), b.Interface())
}
