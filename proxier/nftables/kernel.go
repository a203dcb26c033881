// Package nftables is to hold the nftables proxier. So far it knows kube-proxy's
// nftables mode only as something to remove: its table would translate
// connections a second time beside another mode's rules.
package nftables

import (
	"fmt"

	"github.com/google/nftables"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// kubeProxyTable is the table of kube-proxy's nftables mode, in families ip and
// ip6 (KEP-3866).
const kubeProxyTable = "kube-proxy"

// RemoveKubeProxy deletes kube-proxy's table of a family, as kube-proxy itself
// does when it starts in another mode. It says whether there was one. A kernel
// without nf_tables has none.
func RemoveKubeProxy(f model.Family) (bool, error) {
	family := nftables.TableFamilyIPv4
	if f == model.IPv6 {
		family = nftables.TableFamilyIPv6
	}
	conn, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open nf_tables: %w", err)
	}
	tables, err := conn.ListTablesOfFamily(family)
	if err != nil {
		return false, nil // no nf_tables in this kernel
	}
	for _, t := range tables {
		if t.Name != kubeProxyTable {
			continue
		}
		conn.DelTable(t)
		if err := conn.Flush(); err != nil {
			return false, fmt.Errorf("delete table %s %s: %w", f, kubeProxyTable, err)
		}
		return true, nil
	}
	return false, nil
}
