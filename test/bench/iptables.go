package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// iptablesPath makes a folder in which "iptables" is the variant, and returns a
// PATH that begins with it.
func (t *trial) iptablesPath() (string, error) {
	multi, err := exec.LookPath("xtables-" + t.variant + "-multi")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(t.c.dir, t.variant)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"", "-save", "-restore"} {
			if err := os.Symlink(multi, filepath.Join(dir, family+what)); err != nil && !os.IsExist(err) {
				return "", err
			}
		}
	}
	return dir + ":" + os.Getenv("PATH"), nil
}

// bareTables are those of bareRuleset.
const bareTables = `*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:TRACKING - [0:0]
-A TRACKING -m conntrack --ctstate NEW
COMMIT
`

func (t *trial) bareIPTables(ctx context.Context, ns *netlab.Namespace) error {
	return t.restore(ctx, ns, bareTables)
}

// flushLegacy empties what nft does not know.
func (t *trial) flushLegacy(ctx context.Context) error {
	return t.restore(ctx, t.node, "*nat\nCOMMIT\n*filter\nCOMMIT\n*mangle\nCOMMIT\n")
}

func (t *trial) restore(ctx context.Context, ns *netlab.Namespace, text string) error {
	_, err := ns.RunInput(ctx, text, filepath.Join(t.c.dir, t.variant, "iptables-restore"))
	return err
}
