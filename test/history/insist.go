package history

import (
	"context"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/pkg/plan"
)

// Syncer is what Insist needs of a proxier.
type Syncer interface {
	Sync(ctx context.Context, set *plan.Set) error
	Forget()
}

// Insist syncs until it succeeds, as reconcile does: after an error the proxier
// forgets what it knows of the kernel. A test whose kernel always fails ends, and
// so does one in which the proxier names a bug of its own.
func Insist(t testing.TB, x Syncer, set *plan.Set) {
	t.Helper()
	for tries := 0; ; tries++ {
		err := x.Sync(context.Background(), set)
		if err == nil {
			return
		}
		if strings.Contains(err.Error(), "BUG") || tries > 10000 {
			t.Fatal(err)
		}
		x.Forget()
	}
}
