package aside

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/test/history"
	"math/rand/v2"
)

// TestPlans: a plan that is refused stays away for a minute, then for twice as long
// each time, up to an hour; a changed one is tried at once; and what was told is taken
// back when it holds no more.
func TestPlans(t *testing.T) {
	w := history.New(rand.New(rand.NewPCG(1, 1)), model.IPv4, 5)
	for range 40 {
		w.Step()
	}
	set := w.Set()
	p := set.Sorted()[0]
	var reports []string
	a := New(func(k model.PortKey, err error) { reports = append(reports, fmt.Sprint(k == p.PortKey, " ", err)) })
	now := time.Unix(0, 0)
	no := errors.New("no")
	if a.Has(p) || !a.Keep(p) || a.Due(now) {
		t.Fatal("nothing is set aside")
	}
	a.Refuse(p, no, now)
	wait := Retry
	for range 10 {
		now = now.Add(wait - time.Second)
		if !a.Has(p) || a.Keep(p) || a.Due(now) || len(a.Try(set, now)) > 0 {
			t.Fatalf("it is tried before %s are over", wait)
		}
		now = now.Add(time.Second)
		if !a.Due(now) || len(a.Try(set, now)) != 1 || !a.Keep(p) || !a.Has(p) {
			t.Fatalf("it is not tried after %s", wait)
		}
		a.Again(p, now)
		a.Settle()
		a.TakeBack(nil)
		if a.Len() != 1 {
			t.Fatal("a plan that is refused again is not settled")
		}
		wait = min(2*wait, time.Hour)
	}
	now = now.Add(wait)
	if again := a.Try(plan.EmptySet(set.Facts), now); len(again) > 0 {
		t.Fatal("a plan that nobody wants is tried")
	}
	a.Try(set, now)
	a.Settle()
	if a.Len() > 0 {
		t.Fatal("what was tried and not refused is still set aside")
	}
	a.Tell(p.PortKey, no)
	a.TakeBack(func(model.PortKey) bool { return true })
	if !a.Told(p.PortKey) {
		t.Error("what still holds was taken back")
	}
	a.TakeBack(nil)
	if got, want := fmt.Sprint(reports), "[true no true no true <nil>]"; got != want {
		t.Errorf("reports %s, want %s", got, want)
	}
	a.Refuse(p, no, now)
	before := a.Clone()
	a.Leave(plan.EmptySet(set.Facts))
	if a.Has(p) || !before.Has(p) {
		t.Error("a plan that nobody wants stays, or a clone has changed")
	}
	a.Refuse(p, no, now)
	if a.Accept(p); a.Has(p) {
		t.Error("what the kernel has taken is set aside")
	}
}
