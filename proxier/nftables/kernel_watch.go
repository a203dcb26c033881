package nftables

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/proxier/internal/nlbatch"
)

// listen begins to hear of changes that others make. What is told before somebody
// calls follow is not lost: the socket keeps it.
func (k *nfKernel) listen() error {
	port, err := k.conn.Port()
	if err != nil {
		return err
	}
	k.changes, err = nlbatch.Listen(unix.NFNLGRP_NFTABLES, port)
	return err
}

// follow implements kernel.
func (k *nfKernel) follow(ctx context.Context, alarm func()) error {
	stop := context.AfterFunc(ctx, func() { _ = k.changes.Close() })
	defer stop()
	for {
		ours := false
		err := k.changes.Receive(func(_ uint16, b []byte) { ours = ours || k.concerns(b) })
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, nlbatch.ErrLost):
			ours = true // who knows
		case err != nil:
			return fmt.Errorf("follow changes of nf_tables: %w", err)
		}
		if ours {
			k.dirty.Store(true)
			alarm()
		}
	}
}

// concerns says whether a notification is about something in our table. The table is
// the first attribute of every kind of object, and of none of a generation's.
func (k *nfKernel) concerns(b []byte) bool {
	if len(b) < headerSize || b[0] != k.nfproto() {
		return false
	}
	for typ, v := range nlbatch.Attributes(b[headerSize:]) {
		return typ == attrTable && nlbatch.Text(v) == k.table
	}
	return false
}
