package nlbatch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

const nftables = unix.NFNL_SUBSYS_NFTABLES

// table encodes a request about a table of IPv4.
func table(e *Encoder, typ, flags uint16, name string) {
	e.Begin(nftables<<8|typ, flags)
	e.Raw(unix.NFPROTO_IPV4, unix.NFNETLINK_V0, 0, 0)
	e.String(unix.NFTA_TABLE_NAME, name)
}

func there(t *testing.T, c *Conn, name string) bool {
	t.Helper()
	err := c.Query(context.Background(), func(e *Encoder) { table(e, unix.NFT_MSG_GETTABLE, 0, name) }, func([]byte) error { return nil })
	if err != nil && !errors.Is(err, unix.ENOENT) {
		t.Skipf("SKIPPED: no nf_tables: %v", err)
	}
	return err == nil
}

// TestTransaction: all of it takes effect or nothing, the culprits are named, and
// what one transaction leaves unread does not disturb the next.
func TestTransaction(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_NETFILTER)
	there(t, c, "x")
	ctx := context.Background()
	add := func(bad ...int) func(int, *Encoder) {
		return func(i int, e *Encoder) {
			typ := uint16(unix.NFT_MSG_NEWTABLE)
			for _, b := range bad {
				if i == b {
					typ = unix.NFT_MSG_DELTABLE // of what is not there
				}
			}
			table(e, typ, unix.NLM_F_CREATE, fmt.Sprintf("t%d", i))
		}
	}
	for _, bad := range [][]int{{0}, {99}, {3, 50, 99}} {
		err := c.Transaction(ctx, nftables, 100, add(bad...))
		var rolled *Rolled
		if !errors.As(err, &rolled) || len(rolled.Refused) != len(bad) || !errors.Is(err, unix.ENOENT) {
			t.Fatalf("%v: %#v", bad, err)
		}
		for _, b := range bad {
			if rolled.Refused[b] == nil {
				t.Errorf("%v: %v", bad, rolled.Refused)
			}
		}
		if there(t, c, "t1") {
			t.Fatalf("%v: a part is in force", bad)
		}
	}
	before := c.Calls()
	if err := c.Transaction(ctx, nftables, 100, add()); err != nil {
		t.Fatal(err)
	}
	if calls := c.Calls() - before; calls > 3 {
		t.Errorf("%d system calls", calls)
	}
	if !there(t, c, "t0") || !there(t, c, "t99") {
		t.Error("not all is in force")
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if err := c.Transaction(canceled, nftables, 1, add()); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over: %v", err)
	}
}

// TestTransactionTooLarge: what does not fit the send buffer is told so.
func TestTransactionTooLarge(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_NETFILTER)
	there(t, c, "x")
	room := c.Room(32 << 10)
	write := func(i int, e *Encoder) { table(e, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, fmt.Sprintf("t%d", i)) }
	if err := c.Transaction(context.Background(), nftables, 100_000, write); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("4 MB with room for %d: %v", room, err)
	}
	if there(t, c, "t0") {
		t.Error("a part is in force")
	}
	if err := c.Transaction(context.Background(), nftables, 100, write); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// TestListen: what others change is told, what the own socket changes is not, and
// who listens too slowly learns that something was lost.
func TestListen(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_NETFILTER)
	there(t, c, "x")
	port, err := c.Port()
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(unix.NFNLGRP_NFTABLES, port)
	if err != nil {
		t.Fatal(err)
	}
	other, err := Open(unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	add := func(c *Conn, n int, name string) {
		t.Helper()
		if err := c.Transaction(context.Background(), nftables, n, func(i int, e *Encoder) {
			table(e, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, fmt.Sprintf("%s%d", name, i))
		}); err != nil {
			t.Fatal(err)
		}
	}
	add(c, 1, "mine")
	add(other, 1, "theirs")
	var heard []string
	for len(heard) == 0 {
		if err := l.Receive(func(typ uint16, b []byte) {
			for a, v := range Attributes(b[4:]) {
				if typ == nftables<<8|unix.NFT_MSG_NEWTABLE && a == unix.NFTA_TABLE_NAME {
					heard = append(heard, Text(v))
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	if heard[0] != "theirs0" {
		t.Errorf("heard %v", heard)
	}
	lost := false
	for i := 0; i < 100 && !lost; i++ { // the kernel keeps 2 MB of them
		for range 10 {
			add(other, 500, "more")
			if err := other.Transaction(context.Background(), nftables, 500, func(i int, e *Encoder) {
				table(e, unix.NFT_MSG_DELTABLE, 0, fmt.Sprintf("more%d", i))
			}); err != nil {
				t.Fatal(err)
			}
		}
		lost = errors.Is(l.Receive(func(uint16, []byte) {}), ErrLost)
	}
	if !lost {
		t.Error("nothing was lost of a million notifications that nobody read")
	}
	done := make(chan error)
	go func() {
		for {
			if err := l.Receive(func(uint16, []byte) {}); err != nil {
				done <- err
				return
			}
		}
	}()
	l.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
