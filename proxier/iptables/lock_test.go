package iptables

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
	"github.com/sluice-proxy/sluice/test/history"
)

// TestKernelLock: somebody else holds the xtables lock for longer than one
// iptables program waits for it. The restore is tried again and succeeds.
func TestKernelLock(t *testing.T) {
	inNamespace(t)
	lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	w := history.New(nil, model.IPv4, 1)
	o := options(w)
	o.Programs = programs(t, xtables.Legacy, model.IPv4)
	waited, failed := 0, 0
	o.Stats.Failed = func() { failed++ }
	o.Stats.Waited = func(time.Duration) {
		waited++
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
			t.Error(err)
		}
	}
	set := w.Set()
	if err := New(o).Sync(context.Background(), set); err != nil {
		t.Fatal(err)
	}
	if waited == 0 || failed != 0 {
		t.Errorf("waited %d times, failed %d times", waited, failed)
	}
	if got := inKernel(t, o.Programs); !strings.Contains(got, chainServices) {
		t.Errorf("nothing was written:\n%s", got)
	}
}

// TestKernelLockedForLong: a lock that stays taken is no Service's fault. Nobody
// is suspected, let alone set aside.
func TestKernelLockedForLong(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED with -short: it waits for the lock, 5 seconds several times")
	}
	inNamespace(t)
	w := history.New(rand.New(rand.NewPCG(1, 1)), model.IPv4, 20)
	o := options(w)
	o.Programs = programs(t, xtables.Legacy, model.IPv4)
	report := history.NewReports()
	o.Report = report
	x := New(o)
	if err := x.Sync(context.Background(), w.Set()); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	for range 30 {
		w.Step()
	}
	failed := 0
	x.kernel.(*xtKernel).run.Stats.Failed = func() { failed++ }
	err = x.Sync(context.Background(), w.Set())
	var failure *xtables.RestoreError
	if !errors.As(err, &failure) || failure.Refused() {
		t.Fatalf("error %v, want one that blames nobody", err)
	}
	if failed != 2 || x.aside.Len() > 0 || len(report.Aside) > 0 {
		t.Errorf("%d restores failed, want the change and the full comparison; set aside %v", failed, report.Aside)
	}
	_ = unix.Flock(int(lock.Fd()), unix.LOCK_UN)
	set := w.Set()
	if err := x.Sync(context.Background(), set); err != nil {
		t.Fatal(err)
	}
	if got, want := inKernel(t, o.Programs), rendered(set, o); got != want {
		t.Errorf("after the lock was free:\n%s", cmp.Diff(want, got))
	}
}
