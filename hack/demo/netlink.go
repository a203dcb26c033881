package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// watcher hears every change of nf_tables on the node, by whomever.
type watcher struct{ sock *nl.NetlinkSocket }

func (w *world) watchTables() (*watcher, error) {
	out := &watcher{}
	err := w.lab.Host(node).Do(func() (err error) {
		out.sock, err = nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen to nf_tables: %w", err)
	}
	return out, nil
}

// changes is how many there were of tables of a name, up to now: a change of the
// demo's own comes last.
func (c *watcher) changes(ctx context.Context, w *world, table string) (n int, err error) {
	defer c.sock.Close()
	const last = "demo-ends"
	if _, err := w.lab.Host(node).Run(ctx, "nft", "add table ip "+last+"; delete table ip "+last); err != nil {
		return 0, err
	}
	if err := c.sock.SetReceiveTimeout(&unix.Timeval{Sec: 5}); err != nil {
		return 0, err
	}
	for {
		list, _, err := c.sock.Receive()
		if err != nil {
			return n, fmt.Errorf("listen to nf_tables: %w", err)
		}
		for _, m := range list {
			if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
				continue
			}
			switch nameOf(m.Data) {
			case table:
				n++
			case last:
				return n, nil
			}
		}
	}
}

// nameOf is the table that a message is of: the first attribute of every kind of
// object, after the header that all messages of nfnetlink have.
func nameOf(m []byte) string {
	const header = 4
	attrs, err := nl.ParseRouteAttr(m[min(header, len(m)):])
	for _, a := range attrs {
		if err == nil && a.Attr.Type&^unix.NLA_F_NESTED == 1 && len(a.Value) > 0 {
			return string(a.Value[:len(a.Value)-1])
		}
	}
	return ""
}

// tables lists the agent's tables. (nft list tables parses all rules first, and ends
// by an assertion where it cannot: nft 1.0.6 to 1.1.)
func (w *world) tables(context.Context) (list []string, err error) {
	err = w.lab.Host(node).Do(func() error {
		req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP)
		req.AddRawData([]byte{unix.NFPROTO_UNSPEC, unix.NFNETLINK_V0, 0, 0})
		msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
		for _, m := range msgs {
			if name := nameOf(m); name == "sluice" {
				list = append(list, fmt.Sprintf("table %s of family %d", name, m[0]))
			}
		}
		return err
	})
	return list, err
}

// tablesWritten watches the agent's tables.
func tablesWritten(w *world, _ context.Context) (func(*world, context.Context) (string, error), error) {
	c, err := w.watchTables()
	if err != nil {
		return nil, err
	}
	return func(w *world, ctx context.Context) (string, error) {
		n, err := c.changes(ctx, w, "sluice")
		if n > 0 && err == nil {
			err = errors.New("its tables were written where nothing had changed")
		}
		return fmt.Sprintf("it finds its tables: %d changes of them", n), err
	}, nil
}
