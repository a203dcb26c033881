package nlbatch

import (
	"context"
	"errors"
	"fmt"
	"math"
	"testing"

	"golang.org/x/sys/unix"
)

// missing encodes the deletion of a table that is not there, present a table.
func missing(i int, e *Encoder) {
	e.Begin(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE, 0)
	e.Raw(unix.NFPROTO_IPV4, unix.NFNETLINK_V0, 0, 0)
	e.String(unix.NFTA_TABLE_NAME, fmt.Sprint("missing-", i))
}

func present(_ int, e *Encoder) {
	e.Begin(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE)
	e.Raw(unix.NFPROTO_IPV4, unix.NFNETLINK_V0, 0, 0)
	e.String(unix.NFTA_TABLE_NAME, "present")
}

// transaction makes one, or skips the test where there is no nf_tables.
func transaction(t *testing.T, c *Conn, n int, write func(int, *Encoder)) error {
	t.Helper()
	err := c.Transaction(context.Background(), unix.NFNL_SUBSYS_NFTABLES, n, write)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("SKIPPED: no nf_tables: %v", err)
	}
	return err
}

// TestManyRefusals: a transaction of which more is wrong than the socket has room to
// tell was rolled back as any other, and leaves nothing that the next one trips over.
func TestManyRefusals(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_NETFILTER)
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 64<<10); err != nil {
		t.Fatal(err)
	}
	c.Room(8 << 20)
	for range 3 {
		err := transaction(t, c, 5000, missing)
		var rolled *Rolled
		if !errors.As(err, &rolled) || !errors.Is(err, unix.ENOENT) {
			t.Errorf("an answer that was cut short: %v", err)
		} else if n := len(rolled.Refused); n == 0 || n == 5000 {
			t.Errorf("%d were refused: the test shows nothing", n)
		}
		if err := transaction(t, c, 1, present); err != nil {
			t.Errorf("the transaction behind it: %v", err)
		}
	}
}

// TestNumbersWrap: sequence numbers begin again at 0 in the middle of a transaction.
func TestNumbersWrap(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_NETFILTER)
	for i := range uint32(4) {
		c.seq = math.MaxUint32 - i
		if err := transaction(t, c, 2, present); err != nil {
			t.Errorf("from %d: %v", math.MaxUint32-i, err)
		}
		c.seq = math.MaxUint32 - i
		err := transaction(t, c, 2, missing)
		var rolled *Rolled
		if !errors.As(err, &rolled) || len(rolled.Refused) != 2 || rolled.Refused[0] == nil || rolled.Refused[1] == nil {
			t.Errorf("from %d: %v, want two refusals", math.MaxUint32-i, err)
		}
	}
}
