package watch

import (
	"context"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/wait"
)

// patience is how long to wait before a kind that the server withholds is asked
// for again: what has to happen first is an upgrade, or a hand at the ClusterRole.
// It begins shorter, because an API server that has just started can refuse for
// a moment what its roles allow.
var patience = wait.Backoff{
	Duration: 5 * time.Second,
	Cap:      5 * time.Minute,
	Steps:    10,
	Factor:   4,
	Jitter:   0.2,
}

// withheld says that a request failed because the server does not have the kind
// or does not let us read it, and that we can do without.
func (s *source) withheld(err error) bool {
	return s.without != "" && (apierrors.IsNotFound(err) || apierrors.IsForbidden(err))
}

// result takes the outcome of a request. A server that withholds a kind can be
// reached.
func (s *source) result(ctx context.Context, err error) {
	if s.withheld(err) {
		err = nil
	}
	s.conn.result(ctx, s.kind, err)
}

// tellWithheld tells people once that the server withholds the kind; known says
// that it has not always done so.
func (s *source) tellWithheld(err error, known bool) {
	if s.toldWithheld.Swap(true) {
		return
	}
	consequence := s.without
	if known {
		consequence = "the last known ones stay in force"
	}
	why := "the API server does not have this kind; Kubernetes has it since " + s.since
	if apierrors.IsForbidden(err) {
		why = "the API server refuses us; check the ClusterRole"
	}
	s.conn.log.Warn(s.kind.String()+"s cannot be followed: "+consequence, "why", why, "retryEvery", patience.Cap, "err", err)
}

// tellGiven takes back what tellWithheld has told. It is called when a watch has
// begun: a list alone can be allowed where a watch is not.
func (s *source) tellGiven() {
	if s.toldWithheld.Swap(false) {
		s.conn.log.Info(s.kind.String() + "s are followed now")
	}
}
