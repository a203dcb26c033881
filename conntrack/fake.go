package conntrack

import (
	"context"
	"slices"
	"sync"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Fake is a Table in memory. The zero Fake is empty. It is safe for concurrent
// use, like the real one.
type Fake struct {
	mu    sync.Mutex
	flows []Flow
	fail  []error
	lists [][]Frontend
}

// NewFake returns a Fake that holds flows.
func NewFake(flows ...Flow) *Fake { return &Fake{flows: slices.Clone(flows)} }

// Add puts flows in.
func (t *Fake) Add(flows ...Flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.flows = append(t.flows, flows...)
}

// Flows returns what is in the table.
func (t *Fake) Flows() []Flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.flows)
}

// Fail makes the next calls of List or Delete return these errors, one each,
// without doing anything.
func (t *Fake) Fail(errs ...error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fail = append(t.fail, errs...)
}

// Lists returns what each List so far asked for.
func (t *Fake) Lists() [][]Frontend {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.lists)
}

// List is Table's.
func (t *Fake) List(_ context.Context, family model.Family, want []Frontend, visit func(*Flow)) error {
	for _, f := range t.Flows() {
		if model.FamilyOf(f.Dst.Addr()) == family && matches(&f, want) {
			visit(&f)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lists = append(t.lists, slices.Clone(want))
	return t.failure()
}

func matches(f *Flow, want []Frontend) bool {
	return slices.Contains(want, Frontend{f.Protocol, f.Dst.Addr(), f.Dst.Port()}) ||
		slices.Contains(want, Frontend{Protocol: f.Protocol, Port: f.Dst.Port()})
}

// Delete is Table's.
func (t *Fake) Delete(_ context.Context, flows []Flow) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.failure(); err != nil {
		return 0, err
	}
	before := len(t.flows)
	t.flows = slices.DeleteFunc(t.flows, func(f Flow) bool { return slices.Contains(flows, f) })
	return before - len(t.flows), nil
}

func (t *Fake) failure() error {
	if len(t.fail) == 0 {
		return nil
	}
	err := t.fail[0]
	t.fail = t.fail[1:]
	return err
}
