package nlbatch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// inNamespace gives the test a network namespace and a socket in it. The thread
// is never given back.
func inNamespace(t *testing.T, protocol int) *Conn {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		t.Skipf("SKIPPED: no network namespace of our own (run as root, or under unshare -Urn): %v", err)
	}
	c, err := Open(protocol)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

const lo = 1 // its index in every namespace

// address encodes a request about 10.x.x.x/32 on a link.
func address(e *Encoder, typ, flags uint16, index uint32, n int) {
	e.Begin(typ, flags)
	h := [unix.SizeofIfAddrmsg]byte{0: unix.AF_INET, 1: 32}
	binary.NativeEndian.PutUint32(h[4:], index)
	e.Raw(h[:]...)
	a := []byte{10, byte(n >> 16), byte(n >> 8), byte(n)}
	e.Bytes(unix.IFA_ADDRESS, a)
	e.Bytes(unix.IFA_LOCAL, a)
}

func count(t *testing.T, c *Conn) int {
	t.Helper()
	n := 0
	err := c.Dump(context.Background(), func(e *Encoder) {
		e.Begin(unix.RTM_GETADDR, 0)
		h := [unix.SizeofIfAddrmsg]byte{0: unix.AF_INET}
		e.Raw(h[:]...)
	}, func([]byte) error { n++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestExecute: every request takes effect, the refused ones are told by index
// with their reasons, and it costs few system calls.
func TestExecute(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_ROUTE)
	const n = 5000
	add := func(i int, e *Encoder) {
		index := uint32(lo)
		if i%1000 == 999 { // also the last
			index = 4711
		}
		address(e, unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, index, i)
	}
	refused, err := c.Execute(context.Background(), n, add)
	if err != nil {
		t.Fatal(err)
	}
	if len(refused) != 5 {
		t.Errorf("refused: %v", refused)
	}
	for i, err := range refused {
		if i%1000 != 999 || !errors.Is(err, unix.ENODEV) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if calls := c.Calls(); calls > 2*n/100 {
		t.Errorf("%d system calls", calls)
	}
	if got := count(t, c); got != n-5 {
		t.Errorf("%d addresses", got)
	}
	// All are refused: their errors must fit the receive buffer.
	refused, err = c.Execute(context.Background(), n, add)
	if err != nil || len(refused) != n || !errors.Is(refused[1], unix.EEXIST) || !errors.Is(refused[999], unix.ENODEV) {
		t.Errorf("%d refused, error %v", len(refused), err)
	}
}

// TestSmallBuffer: where the receive buffer cannot be enlarged, chunks are
// smaller.
func TestSmallBuffer(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_ROUTE)
	const size = 16 << 10
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, size/2); err != nil { // the kernel doubles it
		t.Fatal(err)
	}
	c.most = size / answerBytes
	refused, err := c.Execute(context.Background(), 500, func(i int, e *Encoder) { address(e, unix.RTM_NEWADDR, unix.NLM_F_CREATE, 4711, i) })
	if err != nil || len(refused) != 500 {
		t.Errorf("%d refused, error %v", len(refused), err)
	}
}

// TestNothing: no request, no system call.
func TestNothing(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_ROUTE)
	if refused, err := c.Execute(context.Background(), 0, nil); refused != nil || err != nil || c.Calls() != 0 {
		t.Errorf("%v, %v, %d calls", refused, err, c.Calls())
	}
}

// TestCanceled: a context that is over stops between sends, and the connection
// can be used afterwards.
func TestCanceled(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_ROUTE)
	ctx, cancel := context.WithCancel(context.Background())
	sent := 0
	_, err := c.Execute(ctx, 5000, func(i int, e *Encoder) {
		sent++
		cancel()
		address(e, unix.RTM_NEWADDR, unix.NLM_F_CREATE, lo, i)
	})
	if !errors.Is(err, context.Canceled) || sent == 0 || sent >= 5000 {
		t.Errorf("error %v after %d", err, sent)
	}
	if got := count(t, c); got != sent {
		t.Errorf("%d addresses of %d", got, sent)
	}
}

// TestQuery: a single answer, a refusal with the kernel's words, and a dump whose
// reader gives up.
func TestQuery(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_ROUTE)
	link := func(name string) (index uint32, err error) {
		err = c.Query(context.Background(), func(e *Encoder) {
			e.Begin(unix.RTM_GETLINK, 0)
			e.Raw(make([]byte, unix.SizeofIfInfomsg)...)
			e.String(unix.IFLA_IFNAME, name)
		}, func(p []byte) error {
			index = binary.NativeEndian.Uint32(p[4:])
			return nil
		})
		return index, err
	}
	if index, err := link("lo"); index != lo || err != nil {
		t.Errorf("%d, %v", index, err)
	}
	if _, err := link("none"); !errors.Is(err, unix.ENODEV) {
		t.Errorf("error %v", err)
	}
	refused, err := c.Execute(context.Background(), 1, func(_ int, e *Encoder) {
		e.Begin(unix.RTM_NEWADDR, unix.NLM_F_CREATE)
		h := [unix.SizeofIfAddrmsg]byte{0: unix.AF_INET, 1: 33, 4: lo}
		e.Raw(h[:]...)
		e.U32(unix.IFA_LOCAL, 1)
	})
	var r *Refusal
	if err != nil || !errors.Is(refused[0], unix.EINVAL) || !errors.As(refused[0], &r) || !strings.Contains(r.Error(), "prefix") {
		t.Errorf("%v, %v", refused, err)
	}
	if _, err := c.Execute(context.Background(), 2000, func(i int, e *Encoder) { address(e, unix.RTM_NEWADDR, unix.NLM_F_CREATE, lo, i) }); err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	seen := 0
	err = c.Dump(context.Background(), func(e *Encoder) {
		e.Begin(unix.RTM_GETADDR, 0)
		e.Raw(make([]byte, unix.SizeofIfAddrmsg)...)
	}, func([]byte) error { seen++; return enough })
	if !errors.Is(err, enough) || seen != 1 {
		t.Errorf("error %v after %d", err, seen)
	}
	if got := count(t, c); got != 2000 {
		t.Errorf("%d addresses after a dump that was given up", got)
	}
}

// TestNoRight: without the right to change anything there is an error at once.
func TestNoRight(t *testing.T) {
	for name, protocol := range map[string]int{"route": unix.NETLINK_ROUTE, "netfilter": unix.NETLINK_NETFILTER} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, protocol) // a thread to throw away
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var none [2]unix.CapUserData
			if err := unix.Capset(&header, &none[0]); err != nil {
				t.Fatal(err)
			}
			c, err := Open(protocol)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			refused, err := c.Execute(context.Background(), 10, func(i int, e *Encoder) { address(e, unix.RTM_NEWADDR, 0, lo, i) })
			if !errors.Is(err, unix.EPERM) && !errors.Is(refused[0], unix.EPERM) {
				t.Errorf("%v, %v", refused, err)
			}
		})
	}
}

// TestGenericFamily: one that every kernel has, and one that none has.
func TestGenericFamily(t *testing.T) {
	c := inNamespace(t, unix.NETLINK_GENERIC)
	if id, err := c.GenericFamily(context.Background(), "nlctrl"); id != unix.GENL_ID_CTRL || err != nil {
		t.Errorf("%d, %v", id, err)
	}
	if _, err := c.GenericFamily(context.Background(), "NONESUCH"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("error %v", err)
	}
}

// TestMalformed: what is cut off or lies about its length ends the iteration.
func TestMalformed(t *testing.T) {
	for _, data := range [][]byte{{}, {1}, {0, 0, 0, 0}, {3, 0, 1, 0}, {9, 0, 1, 0, 1, 2, 3, 4}, {255, 255, 255, 255, 255}} {
		for a, v := range Attributes(data) {
			t.Errorf("%v: attribute %d %v", data, a, v)
		}
		for h := range messages(append(data, make([]byte, 16)...)) {
			t.Errorf("%v: message %v", data, h)
		}
	}
	e := Encoder{}
	e.U8(1, 7)
	e.Nest(2, func() { e.String(3, "abc"); e.U16BE(4, 80) })
	e.U64BE(5, 1)
	got := ""
	for a, v := range Attributes(e.buf) {
		got += fmt.Sprint(a, v, " ")
	}
	if want := "1 [7] 2 [8 0 3 0 97 98 99 0 6 0 4 0 0 80 0 0] 5 [0 0 0 0 0 0 0 1] "; got != want {
		t.Errorf("%s", got)
	}
}
