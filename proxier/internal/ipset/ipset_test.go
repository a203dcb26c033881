package ipset

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// inNamespace gives the test a network namespace and a connection in it. The
// thread is never given back.
func inNamespace(t *testing.T) *Conn {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		t.Skipf("SKIPPED: no network namespace of our own (run as root, or under unshare -Urn): %v", err)
	}
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := c.Headers(context.Background()); err != nil {
		t.Skipf("SKIPPED: no ipset in this kernel: %v", err)
	}
	return c
}

// program runs the real ipset.
func program(t *testing.T, args ...string) string {
	t.Helper()
	p, err := exec.LookPath("ipset")
	if err != nil {
		t.Skipf("SKIPPED: the ipset program is not installed: %v", err)
	}
	out, err := exec.Command(p, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("ipset %v: %v: %s", args, err, out)
	}
	return string(out)
}

// members are the program's lines of a set's elements, sorted.
func members(t *testing.T, name string) []string {
	t.Helper()
	var out []string
	for l := range strings.Lines(program(t, "save", name)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(l), "add "+name+" "); ok {
			out = append(out, rest)
		}
	}
	slices.Sort(out)
	return out
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

var kinds = []struct {
	name    string
	typ     Type
	v6      bool
	marks   bool
	entries []Entry
	text    []string
}{
	{"ip4", HashIP, false, false, []Entry{{Addr: ip("10.0.0.1")}, {Addr: ip("10.0.0.2")}}, []string{"10.0.0.1", "10.0.0.2"}},
	{"ip6", HashIP, true, false, []Entry{{Addr: ip("2001:db8::1")}}, []string{"2001:db8::1"}},
	{"port4", HashIPPort, false, false, []Entry{{Addr: ip("10.0.0.1"), Protocol: 6, Port: 80}, {Addr: ip("10.0.0.1"), Protocol: 17, Port: 53}, {Addr: ip("10.0.0.1"), Protocol: 132, Port: 1}},
		[]string{"10.0.0.1,sctp:1", "10.0.0.1,tcp:80", "10.0.0.1,udp:53"}},
	{"port6", HashIPPort, true, false, []Entry{{Addr: ip("2001:db8::1"), Protocol: 6, Port: 65535}}, []string{"2001:db8::1,tcp:65535"}},
	{"loop4", HashIPPortIP, false, false, []Entry{{Addr: ip("10.0.0.1"), Protocol: 6, Port: 80, With: netip.MustParsePrefix("10.0.0.1/32")}}, []string{"10.0.0.1,tcp:80,10.0.0.1"}},
	{"loop6", HashIPPortIP, true, false, []Entry{{Addr: ip("2001:db8::1"), Protocol: 6, Port: 80, With: netip.MustParsePrefix("2001:db8::1/128")}}, []string{"2001:db8::1,tcp:80,2001:db8::1"}},
	{"net4", HashIPPortNet, false, false, []Entry{{Addr: ip("10.0.0.1"), Protocol: 6, Port: 80, With: netip.MustParsePrefix("192.168.0.0/16")}, {Addr: ip("10.0.0.1"), Protocol: 6, Port: 80, With: netip.MustParsePrefix("192.168.0.1/32")}},
		[]string{"10.0.0.1,tcp:80,192.168.0.0/16", "10.0.0.1,tcp:80,192.168.0.1"}},
	{"net6", HashIPPortNet, true, false, []Entry{{Addr: ip("2001:db8::1"), Protocol: 6, Port: 80, With: netip.MustParsePrefix("2001:db8:1::/48")}}, []string{"2001:db8::1,tcp:80,2001:db8:1::/48"}},
	{"bits", BitmapPort, false, false, []Entry{{Port: 30000}, {Port: 0}, {Port: 65535}}, []string{"0", "30000", "65535"}},
	{"mark4", HashIPPort, false, true, []Entry{{Addr: ip("10.0.0.1"), Protocol: 6, Port: 80, Mark: 0x2801, Mask: 0x3fff}}, []string{"10.0.0.1,tcp:80 skbmark 0x2801/0x3fff"}},
	{"mark6", HashIPPort, true, true, []Entry{{Addr: ip("2001:db8::1"), Protocol: 6, Port: 80, Mark: 0x14008000, Mask: 0x1fff8000}}, []string{"2001:db8::1,tcp:80 skbmark 0x14008000/0x1fff8000"}},
}

// TestProgramAgrees: what is written is what the ipset program shows, what is
// listed is what was written, and what the program creates is adopted.
func TestProgramAgrees(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			c := inNamespace(t)
			ctx := context.Background()
			spec := Spec{Name: k.name, Type: k.typ, IPv6: k.v6, Marks: k.marks}
			for range 2 { // the second adopts
				if err := c.Create(ctx, spec); err != nil {
					t.Fatal(err)
				}
			}
			apply(t, c, k.name, k.typ, false, k.entries)
			apply(t, c, k.name, k.typ, false, k.entries)
			if got := members(t, k.name); !slices.Equal(got, k.text) {
				t.Errorf("the program shows %q, want %q", got, k.text)
			}
			got, err := c.List(ctx, k.name)
			if err != nil || !slices.Equal(sorted(got), sorted(k.entries)) {
				t.Errorf("listed %v, %v", got, err)
			}
			h, err := c.Header(ctx, k.name)
			if err != nil || h.Type != k.typ || int(h.Elements) != len(k.entries) || h.Marks != k.marks || h.References != 0 {
				t.Errorf("header %+v, %v", h, err)
			}
			apply(t, c, k.name, k.typ, true, k.entries)
			apply(t, c, k.name, k.typ, true, k.entries)
			if got := members(t, k.name); len(got) > 0 {
				t.Errorf("left after the deletion: %q", got)
			}
			for range 2 {
				if err := c.Destroy(ctx, k.name); err != nil {
					t.Error(err)
				}
			}
			adoptProgram(t, c, spec)
		})
	}
}

func adoptProgram(t *testing.T, c *Conn, s Spec) {
	t.Helper()
	args := []string{"create", s.Name, string(s.Type)}
	if s.Type == BitmapPort {
		args = append(args, "range", "0-65535")
	} else {
		args = append(args, "family", map[bool]string{false: "inet", true: "inet6"}[s.IPv6], "hashsize", "64", "maxelem", "4711")
	}
	if s.Marks {
		args = append(args, "skbinfo")
	}
	program(t, args...)
	if err := c.Create(context.Background(), s); err != nil {
		t.Errorf("a set that the program created is not adopted: %v", err)
	}
}

func apply(t *testing.T, c *Conn, set string, typ Type, del bool, entries []Entry) {
	t.Helper()
	refused, err := c.Apply(context.Background(), len(entries), func(i int) Change { return Change{set, typ, del, entries[i]} })
	if err != nil || len(refused) > 0 {
		t.Fatalf("refused %v, error %v", refused, err)
	}
}

func sorted(list []Entry) []Entry {
	return slices.SortedFunc(slices.Values(list), func(a, b Entry) int { return cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
}

// TestMark: adding an element again changes its mark.
func TestMark(t *testing.T) {
	c := inNamespace(t)
	if err := c.Create(context.Background(), Spec{Name: "m", Type: HashIPPort, Marks: true}); err != nil {
		t.Fatal(err)
	}
	n := Entry{Addr: ip("10.0.0.1"), Protocol: 6, Port: 80, Mark: 1, Mask: 0xff}
	apply(t, c, "m", HashIPPort, false, []Entry{n})
	n.Mark = 2
	apply(t, c, "m", HashIPPort, false, []Entry{n})
	if got := members(t, "m"); !slices.Equal(got, []string{"10.0.0.1,tcp:80 skbmark 0x2/0xff"}) {
		t.Errorf("%q", got)
	}
}

// TestMismatch: a set of another kind is an error that says so.
func TestMismatch(t *testing.T) {
	c := inNamespace(t)
	ctx := context.Background()
	program(t, "create", "a", "hash:ip,port")
	for _, s := range []Spec{{Name: "a", Type: HashIP}, {Name: "a", Type: HashIPPort, IPv6: true}, {Name: "a", Type: HashIPPort, Marks: true}} {
		err := c.Create(ctx, s)
		if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "set a ") {
			t.Errorf("%+v: %v", s, err)
		}
	}
	if err := c.Create(ctx, Spec{Name: strings.Repeat("x", 32), Type: HashIP}); err == nil {
		t.Error("a name of 32 characters was accepted")
	}
}

// TestRefusals: what the kernel refuses among many is found, the rest is done.
func TestRefusals(t *testing.T) {
	c := inNamespace(t)
	ctx := context.Background()
	if err := c.Create(ctx, Spec{Name: "full", Type: HashIP, HashSize: 64, MaxElem: 3000}); err != nil {
		t.Fatal(err)
	}
	at := func(i int) Change {
		ch := Change{Set: "full", Type: HashIP, Entry: Entry{Addr: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})}}
		if i%1000 == 7 {
			ch.Set = "missing"
		}
		return ch
	}
	refused, err := c.Apply(ctx, 4000, at)
	if err != nil {
		t.Fatal(err)
	}
	full, missing := 0, 0
	for i, err := range refused {
		switch {
		case errors.Is(err, unix.ENOSPC):
			full++
		case errors.Is(err, unix.ENOENT) && i%1000 == 7:
			missing++
		default:
			t.Fatalf("%d: %v", i, err)
		}
	}
	if full != 4000-4-3000 || missing != 4 {
		t.Errorf("refused for being full: %d, for the missing set: %d", full, missing)
	}
	if h, err := c.Header(ctx, "full"); err != nil || h.Elements != 3000 {
		t.Errorf("%+v, %v", h, err)
	}
	if list, err := c.List(ctx, "full"); err != nil || len(list) != 3000 {
		t.Errorf("%d listed, %v", len(list), err)
	}
	for _, err := range []error{missingError(c.List(ctx, "missing")), missingError(c.Header(ctx, "missing"))} {
		if !errors.Is(err, unix.ENOENT) {
			t.Error(err)
		}
	}
}

func missingError[T any](_ T, err error) error { return err }

// TestInUse: a set that another refers to stays.
func TestInUse(t *testing.T) {
	c := inNamespace(t)
	program(t, "create", "inner", "hash:ip")
	program(t, "create", "outer", "list:set")
	program(t, "add", "outer", "inner")
	if err := c.Destroy(context.Background(), "inner"); !errors.Is(err, unix.EBUSY) {
		t.Errorf("error %v", err)
	}
	h, err := c.Headers(context.Background())
	if err != nil || h["inner"].References != 1 || h["outer"].Type != "list:set" {
		t.Errorf("%v, %v", h, err)
	}
}

func BenchmarkApply(b *testing.B) {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		b.Skip(err)
	}
	c, err := Open()
	if err != nil {
		b.Fatal(err)
	}
	ctx := context.Background()
	if err := c.Create(ctx, Spec{Name: "b", Type: HashIPPort}); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	calls := c.Calls()
	for n := 0; n < b.N; n += 10000 {
		for _, del := range []bool{false, true} {
			if _, err := c.Apply(ctx, 5000, func(i int) Change {
				return Change{"b", HashIPPort, del, Entry{Addr: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), Protocol: 6, Port: 80}}
			}); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(c.Calls()-calls)/float64(max(b.N, 10000)), "syscalls/op")
}

// TestLoaded: whoever has a connection that works has ipset.
func TestLoaded(t *testing.T) {
	inNamespace(t)
	if got, err := Loaded(); !got || err != nil {
		t.Errorf("%t, %v", got, err)
	}
}

// TestNoType: a type that the kernel does not have is told apart from everything
// else.
func TestNoType(t *testing.T) {
	c := inNamespace(t)
	if err := c.Create(context.Background(), Spec{Name: "x", Type: "hash:nonesuch"}); !errors.Is(err, ErrNoType) {
		t.Errorf("error %v", err)
	}
	if err := c.Create(context.Background(), Spec{Name: "x", Type: HashIP, HashSize: 1, MaxElem: 1}); err != nil {
		t.Error(err)
	}
}
