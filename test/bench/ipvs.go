package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/moby/ipvs"
)

// ipvsArguments gives both programs the same configuration file, kube-proxy's
// own kind, with its defaults written out: no minimum between two syncs.
func (t *trial) ipvsArguments() ([]string, error) {
	name := nodeName(t.program, t.variant)
	config, err := json.Marshal(map[string]any{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
		"clientConnection": map[string]any{"kubeconfig": filepath.Join(t.c.dir, "kubeconfig")},
		"hostnameOverride": name, "mode": modeIPVS, "clusterCIDR": clusterRange.String(),
		"enableProfiling": t.s.profiles != "",
		"ipvs":            map[string]any{"minSyncPeriod": "0s", "syncPeriod": "30s"},
		// Limits of conntrack are the machine's, and read-only in a namespace.
		"conntrack": map[string]any{"maxPerCore": 0, "min": 0},
	})
	if err != nil {
		return nil, err
	}
	file := filepath.Join(t.c.dir, name+".json")
	if err := os.WriteFile(file, config, 0o644); err != nil {
		return nil, err
	}
	return []string{"--config=" + file}, nil
}

// flushIPVS empties what would still take part in the machine's work: the table
// of virtual servers is one hash for all namespaces.
func (t *trial) flushIPVS(ctx context.Context) {
	if h, err := ipvs.New(t.node.Path()); err == nil {
		_ = h.Flush()
		h.Close()
	}
	if link, err := t.node.Netlink().LinkByName("kube-ipvs0"); err == nil {
		_ = t.node.Netlink().LinkDel(link)
	}
	_, _ = t.node.Run(ctx, "ipset", "destroy") // those in use go with the namespace
}
