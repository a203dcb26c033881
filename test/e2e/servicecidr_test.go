package e2e

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"github.com/sluice-proxy/sluice/pkg/state"
	"github.com/sluice-proxy/sluice/pkg/watch"
)

// TestServiceCIDRs: the agent's source follows a real API server's ServiceCIDRs
// under the shipped ClusterRole, beside everything else.
func TestServiceCIDRs(t *testing.T) {
	c := newTest(t)
	store, stats := state.NewStore(), &watch.Stats{}
	stop := c.follow(t, agentUser, &watch.API{Store: store, Stats: stats, Log: slog.New(slog.DiscardHandler)})
	has := func(want string) {
		t.Helper()
		until(t, "the ServiceCIDRs are "+want, func() error {
			if got := fmt.Sprint(store.Current().ServiceCIDRs()); got != want || !store.Current().Synced() {
				return fmt.Errorf("they are %s; synced: %t", got, store.Current().Synced())
			}
			return nil
		})
	}
	has("[" + serviceCIDR + "]") // the server's own

	api := c.client.NetworkingV1().ServiceCIDRs()
	more := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "more"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.97.0.0/24"}}}
	if _, err := api.Create(t.Context(), more, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	has("[" + serviceCIDR + " 10.97.0.0/24]")
	if err := api.Delete(t.Context(), "more", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	has("[" + serviceCIDR + "]")
	stop()
	if stats.WatchErrors.Load() > 0 || stats.Problems.Load() > 0 {
		t.Errorf("%d errors, %d problems", stats.WatchErrors.Load(), stats.Problems.Load())
	}
}

// TestServiceCIDRsForbidden: a role from before ServiceCIDRs costs those alone.
func TestServiceCIDRsForbidden(t *testing.T) {
	c := newTest(t)
	const user = "agent-with-an-old-role"
	roles := c.client.RbacV1()
	role, err := roles.ClusterRoles().Get(t.Context(), "sluice", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	old := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: user},
		Rules: slices.DeleteFunc(role.Rules, func(r rbacv1.PolicyRule) bool { return slices.Contains(r.Resources, "servicecidrs") })}
	if _, err := roles.ClusterRoles().Create(t.Context(), old, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	bind := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: user},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: user},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}}}
	if _, err := roles.ClusterRoleBindings().Create(t.Context(), bind, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = roles.ClusterRoleBindings().Delete(context.Background(), user, metav1.DeleteOptions{})
		_ = roles.ClusterRoles().Delete(context.Background(), user, metav1.DeleteOptions{})
	})
	store, stats, said := state.NewStore(), &watch.Stats{}, make(chan string, 100)
	stop := c.follow(t, user, &watch.API{Store: store, Stats: stats, Log: slog.New(slog.NewTextHandler(lines(said), nil))})
	until(t, "everything else is there", func() error {
		// The server takes a moment to learn of the role, and refuses everything until then.
		if !store.Current().Synced() || store.Current().Node() == nil || !stats.LostSince().IsZero() {
			return fmt.Errorf("synced: %t, node: %v, lost since %v", store.Current().Synced(), store.Current().Node(), stats.LostSince())
		}
		return nil
	})
	told := 0
	until(t, "people are told", func() error {
		select {
		case line := <-said:
			if strings.Contains(line, "ServiceCIDR") && strings.Contains(line, "check the ClusterRole") {
				told++
			}
		default:
		}
		if told == 0 {
			return errors.New("nothing is said of ServiceCIDRs")
		}
		return nil
	})
	stop()
	if got := store.Current().ServiceCIDRs(); got != nil {
		t.Errorf("it has ServiceCIDRs %v, which the role does not allow", got)
	}
}

// follow runs the agent's source as a user of the API server, until the test ends
// or what it returns is called.
func (c *cluster) follow(t *testing.T, user string, a *watch.API) (stop func()) {
	cfg := rest.CopyConfig(c.config)
	cfg.Impersonate = rest.ImpersonationConfig{UserName: user}
	cfg.ContentType = runtime.ContentTypeProtobuf
	a.Config, a.NodeName, a.ServiceCIDRs = cfg, "node1", true
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("follow the API server as %s: %v", user, err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// lines is a writer whose writes can be received.
type lines chan string

func (l lines) Write(b []byte) (int, error) {
	l <- string(b)
	return len(b), nil
}
