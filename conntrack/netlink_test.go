package conntrack

import (
	"net/netip"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// FuzzDecode: whatever bytes come, decode does not panic, and what it accepts
// has addresses.
func FuzzDecode(f *testing.F) {
	for _, seed := range []Flow{
		flow("10.1.1.1:1", "10.96.0.1:53", "10.244.0.1:5353"),
		flow("[fd00::1]:1", "[fd00:96::1]:53", "[fd00:244::1]:5353"),
	} {
		for _, own := range []bool{false, true} {
			seed.Zone, seed.ZoneOfOriginal, seed.ID = 7, own, 99
			f.Add(encode(&seed))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var got Flow
		if !decode(b, &got) {
			return
		}
		if !got.Dst.IsValid() || !got.ReplySrc.IsValid() || !tracked(got.Protocol) {
			t.Errorf("accepted %+v", got)
		}
	})
}

// encode makes a message as the kernel's, without its netlink header.
func encode(f *Flow) []byte {
	m := message{}
	m.begin(ctNew, 0, 1, model.FamilyOf(f.Dst.Addr()))
	m.flow(f)
	m.tuple(ctaTupleReply, f.Protocol, f.ReplySrc, f.Src, false, 0)
	return m.end()[16:]
}

func TestDecode(t *testing.T) {
	for _, want := range []Flow{
		flow("10.1.1.1:1", "10.96.0.1:53", "10.244.0.1:5353"),
		flow("[fd00::1]:1", "[fd00:96::1]:53", "[fd00:244::1]:5353"),
		{Protocol: model.SCTP, Src: toOne.Src, Dst: toOne.Dst, ReplySrc: toOne.ReplySrc, Zone: 300, ID: 1 << 31},
		{Protocol: model.UDP, Src: toOne.Src, Dst: toOne.Dst, ReplySrc: toOne.ReplySrc, Zone: 300, ZoneOfOriginal: true},
	} {
		b := encode(&want)
		var got Flow
		if !decode(b, &got) || got != want {
			t.Errorf("decoded %+v, want %+v", got, want)
		}
		for n := range len(b) {
			decode(b[:n], &got) // cut off anywhere: no panic
		}
	}
	tcp := toOne
	tcp.Protocol = model.TCP
	if b := encode(&tcp); decode(b, &tcp) {
		t.Error("a TCP flow was accepted")
	}
}

// TestDumps: how much the kernel is asked to sort out.
func TestDumps(t *testing.T) {
	set := func(list ...Frontend) map[Frontend]struct{} {
		m := map[Frontend]struct{}{}
		for _, f := range list {
			m[f] = struct{}{}
		}
		return m
	}
	v4 := func(i int) Frontend {
		return Frontend{model.UDP, netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), 53}
	}
	v6 := func(i int) Frontend {
		return Frontend{model.UDP, netip.AddrFrom16([16]byte{0xfd, 15: byte(i)}), 53}
	}
	sctp := v4(9)
	sctp.Protocol = model.SCTP
	var many, many6 []Frontend
	for i := range 20 {
		many, many6 = append(many, v4(i)), append(many6, v6(i))
	}
	for _, test := range []struct {
		name  string
		want  map[Frontend]struct{}
		works bool
		dumps int
		first filter
	}{
		{"nothing", set(), true, 0, filter{}},
		{"one", set(v4(1)), true, 1, filter{model.UDP, v4(1).Addr, 53}},
		{"a few", set(v4(1), v4(2), sctp), true, 3, filter{}},
		{"many", set(many...), true, 1, filter{protocol: model.UDP}},
		{"many of two protocols", set(append(many, sctp)...), true, 2, filter{}},
		{"many IPv6 ones at one port", set(many6...), true, 1, filter{protocol: model.UDP, port: 53}},
		{"no help by the kernel", set(v4(1), sctp), false, 1, filter{}},
	} {
		got := dumps(test.want, test.works)
		if len(got) != test.dumps || (test.dumps == 1 && got[0] != test.first) {
			t.Errorf("%s: %v, want %d, the only one being %v", test.name, got, test.dumps, test.first)
		}
	}
}
