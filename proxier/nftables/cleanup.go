package nftables

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Cleanup removes the family's table of this proxier, and of kube-proxy's nftables
// mode. All that either ever wrote is in there.
func (x *Proxier) Cleanup(context.Context) error {
	x.Forget()
	x.ledger = newLedger()
	return CleanupHost(x.o.Family)
}

// CleanupHost removes what Cleanup removes.
func CleanupHost(f model.Family) error {
	_, err := RemoveObjects(f)
	_, peer := RemoveKubeProxy(f)
	return errors.Join(err, peer)
}

// RemoveObjects removes our table, for a change to another mode. It says whether
// there was one.
func RemoveObjects(f model.Family) (bool, error) { return removeTable(f, table) }

// RemoveKubeProxy deletes kube-proxy's table of a family, as kube-proxy itself
// does when it starts in another mode. It says whether there was one. A kernel
// without nf_tables has none.
func RemoveKubeProxy(f model.Family) (bool, error) { return removeTable(f, kubeProxyTable) }

func removeTable(f model.Family, name string) (bool, error) {
	k, err := openKernel(f, name)
	if err != nil {
		return false, fmt.Errorf("open nf_tables: %w", err)
	}
	defer k.conn.Close()
	there, err := k.there(context.Background())
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.EAFNOSUPPORT) {
		return false, nil // no nf_tables in this kernel
	}
	if err != nil || !there {
		return false, err
	}
	if err := k.deleteUnentered(context.Background()); err != nil {
		return false, fmt.Errorf("delete table %s %s: %w", word(f), name, err)
	}
	return true, nil
}

// deleteUnentered deletes a table in two transactions. In the first, packets cease to
// enter it. While a table that they enter is deleted, its rules run for about a
// millisecond after lookups in its maps have ceased to find anything (seen with Linux
// 6.18): a ClusterIP is then one with no such port, and clients are refused whom
// another mode would serve.
func (k *nfKernel) deleteUnentered(ctx context.Context) error {
	names, err := k.baseChains(ctx)
	if err != nil {
		return err
	}
	var list []message
	for _, name := range names {
		list = append(list, message{what: flushChain, name: name})
	}
	if err := k.commit(ctx, list); err != nil {
		return err
	}
	return k.commit(ctx, []message{{what: deleteTable}})
}
