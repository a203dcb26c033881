package iptables

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
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
	w := newWorld(nil, model.IPv4, 1)
	o := w.options()
	o.Programs = programs(t, xtables.Legacy, model.IPv4)
	waited, failed := 0, 0
	o.Stats.Failed = func() { failed++ }
	o.Stats.Waited = func(time.Duration) {
		waited++
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
			t.Error(err)
		}
	}
	set := w.planner.Set()
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
