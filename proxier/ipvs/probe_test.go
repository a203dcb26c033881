package ipvs

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/proxier/internal/ipset"
	"github.com/sluice-proxy/sluice/proxier/internal/xtables"
)

// TestLacking: which errors answer a question, and which do not.
func TestLacking(t *testing.T) {
	exit := func(script string) error { return exec.Command("/bin/sh", "-c", script).Run() }
	refused := &xtables.RestoreError{Output: "No chain/target/match by that name.", Err: exit("exit 1")}
	locked := &xtables.RestoreError{Output: "holding the xtables lock", Err: exit("exit 4")}
	killed := &xtables.RestoreError{Err: exit("kill -9 $$")}
	yes := map[question][]error{
		askPrograms:  {xtables.ErrNotFound, &xtables.SaveError{Table: "nat", Output: "Table does not exist", Err: exit("exit 1")}},
		askSockets:   {unix.EPROTONOSUPPORT},
		askFamily:    {unix.ENOENT},
		askScheduler: {unix.ENOENT},
		askServer:    {unix.EAFNOSUPPORT},
		askDevice:    {unix.EOPNOTSUPP},
		askSet:       {ipset.ErrUnsupported, ipset.ErrNoType},
		askRule:      {refused},
	}
	never := []error{nil, unix.EINTR, unix.ENOMEM, unix.ENOBUFS, unix.EAGAIN, unix.EBUSY, unix.EMFILE, unix.EPERM, unix.ENOSPC,
		context.Canceled, context.DeadlineExceeded, locked, killed, errors.New("the kernel does not answer")}
	for q := askPrograms; q <= askRule; q++ {
		if len(yes[q]) == 0 {
			t.Errorf("question %d is not tested", q)
		}
		for _, err := range yes[q] {
			if !q.lacking(fmt.Errorf("wrapped: %w", err)) {
				t.Errorf("question %d: %v is an answer", q, err)
			}
		}
		for _, err := range never {
			if q.lacking(err) {
				t.Errorf("question %d: %v is no answer", q, err)
			}
		}
	}
}

// TestPersist: what is no answer is asked again, a few times, with pauses.
func TestPersist(t *testing.T) {
	busy, missing := errors.New("busy"), unavailable("no IPVS")
	for _, tc := range []struct {
		name  string
		says  []error
		want  error
		after time.Duration
	}{
		{"at once", []error{nil}, nil, 0},
		{"missing", []error{missing}, missing, 0},
		{"busy, then there", []error{busy, busy, nil}, nil, 1500 * time.Millisecond},
		{"busy, then missing", []error{busy, missing}, missing, 500 * time.Millisecond},
		{"busy for good", []error{busy, busy, busy, busy}, busy, 3500 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, asked := time.Now(), 0
				err := persist(t.Context(), func() error { asked++; return tc.says[asked-1] })
				if err != tc.want || asked != len(tc.says) || time.Since(start) != tc.after {
					t.Errorf("%v after %d and %v", err, asked, time.Since(start))
				}
			})
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := persist(ctx, func() error { return busy }); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// TestCheckCount: before Linux 4.10 a header does not tell the number.
func TestCheckCount(t *testing.T) {
	if err := checkCount(ipset.Header{Elements: 1}); err != nil {
		t.Error(err)
	}
	if err, missing := checkCount(ipset.Header{}), (*Unavailable)(nil); !errors.As(err, &missing) {
		t.Errorf("error %v", err)
	}
}

func TestIsTrialSet(t *testing.T) {
	for name, want := range map[string]bool{
		trialSet(model.IPv4, 1, 0):              true,
		trialSet(model.IPv4, 4194304, 5):        true,
		trialSet(model.IPv6, 1, 0):              false,
		"SLUICE-PROBE-4-1":                      false,
		"SLUICE-PROBE-4-1-":                     false,
		"SLUICE-PROBE-4-1-0-x":                  false,
		"SLUICE-PROBE-4-01-0":                   false,
		"SLUICE-PROBE-4--1-0":                   false,
		"SLUICE-PROBE-":                         false,
		"KUBE-CLUSTER-IP":                       false,
		"X" + trialSet(model.IPv4, 1, 0):        false,
		trialSet(model.IPv4, 1, 0) + " ":        false,
		"sluice-probe-4-1-0":                    false,
		"SLUICE-PROBE-4-99999999999999999999-0": false,
	} {
		if got := isTrialSet(model.IPv4, name); got != want {
			t.Errorf("%q: %t", name, got)
		}
	}
}
