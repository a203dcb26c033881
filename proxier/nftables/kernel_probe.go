package nftables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// Probe finds out whether the kernel can do what this proxier needs of it. If not,
// the error is an *Unavailable with a sentence for each thing; if that cannot be
// found out it is another.
func Probe(ctx context.Context, f model.Family) (Host, error) {
	k, err := openKernel(f, probeTable)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return Host{}, &Unavailable{[]string{"this kernel has no nfnetlink: load module nfnetlink, or run a kernel with CONFIG_NETFILTER_NETLINK"}}
	}
	if err != nil {
		return Host{}, err
	}
	defer k.conn.Close()
	if err := k.try(ctx); err != nil {
		if lacking(err) {
			err = &Unavailable{[]string{fmt.Sprintf("this kernel has no nf_tables for %s: load module nf_tables, or run a kernel with CONFIG_NF_TABLES", f)}}
		}
		return Host{}, err
	}
	var missing []string
	for _, ft := range features(f) {
		err := k.try(ctx, ft.try...)
		if lacking(err) {
			missing = append(missing, fmt.Sprintf("this kernel's nf_tables lacks, for %s, %s: %v", f, ft.what, err))
			continue
		}
		if err != nil {
			return Host{}, err
		}
	}
	if missing != nil {
		return Host{}, &Unavailable{missing}
	}
	return k.host(ctx)
}

// try makes a table with some content and deletes it, in one transaction.
func (k *nfKernel) try(ctx context.Context, content ...message) error {
	list := append([]message{{what: putTable}}, content...)
	err := k.commit(ctx, append(list, message{what: deleteTable}))
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("try a table of nf_tables: CAP_NET_ADMIN is needed: %w", err)
	}
	if err != nil {
		return fmt.Errorf("try a table of nf_tables: %w", err)
	}
	return nil
}

// host looks for what others have, and this mode cannot help.
func (k *nfKernel) host(ctx context.Context) (Host, error) {
	var h Host
	for _, family := range []uint8{k.nfproto(), unix.NFPROTO_INET} {
		err := k.conn.DumpThrough(ctx, func(e *nlbatch.Encoder) {
			e.Begin(message16(unix.NFT_MSG_GETCHAIN), 0)
			e.Raw(family, unix.NFNETLINK_V0, 0, 0)
		}, func(b []byte) error {
			if name, drops := dropsForwarded(b); drops {
				h.Limits = append(h.Limits, fmt.Sprintf("%s drops by its policy what is forwarded and no rule there lets pass; "+
					"no other table can let it pass, so that Services work only as far as the rules there allow it", name))
			}
			return nil
		})
		if err != nil {
			return h, fmt.Errorf("list others' chains: %w", err)
		}
	}
	return h, nil
}

// dropsForwarded says whether a chain is one of FORWARD whose policy is to drop.
func dropsForwarded(b []byte) (string, bool) {
	if len(b) < headerSize {
		return "", false
	}
	var table, name string
	hooked, drops := false, false
	for t, v := range nlbatch.Attributes(b[headerSize:]) {
		switch t {
		case attrTable:
			table = nlbatch.Text(v)
		case unix.NFTA_CHAIN_NAME:
			name = nlbatch.Text(v)
		case unix.NFTA_CHAIN_HOOK:
			number := first(v, unix.NFTA_HOOK_HOOKNUM)
			hooked = len(number) == 4 && binary.BigEndian.Uint32(number) == unix.NF_INET_FORWARD
		case unix.NFTA_CHAIN_POLICY:
			drops = len(v) == 4 && binary.BigEndian.Uint32(v) == 0
		}
	}
	return fmt.Sprintf("chain %s of table %s", name, table), hooked && drops
}
