package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// Set by TestMain.
var (
	shared *cluster
	skip   string // why nothing of this can run here
	binary string // the agent
	other  bool   // the agent is another program than ours
)

func TestMain(m *testing.M) {
	code, err := runAll(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

// runAll starts the cluster that all tests share, and runs them.
func runAll(m *testing.M) (int, error) {
	tools := os.Getenv("SLUICE_TOOLS")
	if tools == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return 0, err
		}
		tools = filepath.Join(cache, "sluice-tools")
	}
	if err := netlab.Supported(); err != nil {
		skip = err.Error()
		return m.Run(), nil
	}
	for _, tool := range []string{"etcd", "kube-apiserver"} {
		if _, err := os.Stat(filepath.Join(tools, tool)); err != nil {
			skip = fmt.Sprintf("%v: run hack/tools.sh etcd kube-apiserver", err)
			return m.Run(), nil
		}
	}
	dir, err := os.MkdirTemp("", "sluice-e2e-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if binary, err = build(dir); err != nil {
		return 0, err
	}
	if shared, err = newCluster(dir, tools); err != nil {
		return 0, err
	}
	defer shared.close()
	for _, pod := range []string{"pod1", "pod2", "pod3", "pod4"} {
		at := netip.AddrPortFrom(shared.lab.Addr(pod, true), echoPort)
		if _, err := shared.lab.Host(pod).Serve(pod, "tcp", at); err != nil {
			return 0, err
		}
	}
	return m.Run(), nil
}

// build makes the agent's binary, or takes another that the environment names.
func build(dir string) (string, error) {
	if path := os.Getenv("SLUICE_E2E_AGENT"); path != "" {
		other = true
		return filepath.Abs(path)
	}
	path := filepath.Join(dir, "sluice")
	args := []string{"build", "-buildvcs=false", "-o", path}
	if raceDetector {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, "../../cmd/sluice")...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the agent: %w\n%s", err, out)
	}
	return path, nil
}

func newTest(t *testing.T) *cluster {
	t.Helper()
	if skip != "" {
		t.Skip("SKIPPED, needs namespaces and a real API server: ", skip)
	}
	return shared
}

func clusterIP(svc *corev1.Service) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(svc.Spec.ClusterIP), uint16(svc.Spec.Ports[0].Port))
}

func (c *cluster) nodePort(node string, svc *corev1.Service) netip.AddrPort {
	return netip.AddrPortFrom(c.lab.Addr(node, true), uint16(svc.Spec.Ports[0].NodePort))
}

// TestApply: what deploy/ ships is accepted by a real API server, and applying it
// once more changes nothing.
func TestApply(t *testing.T) {
	c := newTest(t)
	for _, name := range []string{"sluice.yaml", "config.yaml"} {
		path := filepath.Join("../../deploy", name)
		first, err := c.apply(path)
		if err != nil {
			t.Fatal(err)
		}
		second, err := c.apply(path)
		if err != nil {
			t.Fatal(err)
		}
		for i, o := range second {
			if o.GetResourceVersion() != first[i].GetResourceVersion() {
				t.Errorf("%s: applying %s %s again changed it", name, o.GetKind(), o.GetName())
			}
		}
	}
}

// TestServiceAnswers: a Service with two endpoints, one of them on another node,
// from everywhere that clients are.
func TestServiceAnswers(t *testing.T) {
	c := newTest(t)
	svc := c.service(t, "answers")
	if err := c.endpoints("answers", "pod1", "pod3"); err != nil {
		t.Fatal(err)
	}
	c.startAgent(t, "node1")
	for _, from := range []string{"pod2", "pod1", "node1"} { // pod1 also reaches itself
		answeredBy(t, c.lab.Host(from), clusterIP(svc), "pod1", "pod3")
	}
	answeredBy(t, c.lab.Host("client"), c.nodePort("node1", svc), "pod1", "pod3")
	answeredBy(t, c.lab.Host("node2"), c.nodePort("node1", svc), "pod1", "pod3")
}

// TestAPIServerByClusterIP: the Service and slice that the API server itself
// writes, with TLS through it.
func TestAPIServerByClusterIP(t *testing.T) {
	c := newTest(t)
	c.startAgent(t, "node1")
	ca := x509.NewCertPool()
	ca.AppendCertsFromPEM(c.config.CAData)
	client := http.Client{Timeout: askTimeout, Transport: &http.Transport{
		DialContext: c.lab.Host("pod1").DialContext, TLSClientConfig: &tls.Config{RootCAs: ca}, DisableKeepAlives: true,
	}}
	until(t, "the API server answers at its ClusterIP", func() error {
		resp, err := client.Get("https://10.96.0.1/version")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
}

// TestEndpointChange: traffic follows the endpoints, and is refused when there
// are none.
func TestEndpointChange(t *testing.T) {
	c := newTest(t)
	svc := c.service(t, "change")
	c.startAgent(t, "node1")
	from := c.lab.Host("pod1")
	for _, pods := range [][]string{{"pod1", "pod2"}, {"pod3"}, {"pod2", "pod3", "pod4"}, {"pod4"}} {
		if err := c.endpoints("change", pods...); err != nil {
			t.Fatal(err)
		}
		answeredBy(t, from, clusterIP(svc), pods...)
	}
	if err := c.endpoints("change"); err != nil {
		t.Fatal(err)
	}
	until(t, "connections are refused", func() error {
		a, err := from.Ask(t.Context(), "tcp", netip.Addr{}, clusterIP(svc), askTimeout)
		if err == nil && a.Result != netlab.Refused {
			err = fmt.Errorf("%s", a)
		}
		return err
	})
}

// TestAPIServerOutage: the API server goes away; when it comes back, the agent
// does not reach it yet and so misses changes, a deletion among them. Traffic
// never stops, and the changes arrive. SLUICE_E2E_OUTAGE is how many connections
// long it lasts.
func TestAPIServerOutage(t *testing.T) {
	c := newTest(t)
	length := 300
	if s := os.Getenv("SLUICE_E2E_OUTAGE"); s != "" {
		var err error
		if length, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	steady, changed, deleted := c.service(t, "steady"), c.service(t, "changed"), c.service(t, "deleted")
	for _, name := range []string{"steady", "changed", "deleted"} {
		if err := c.endpoints(name, "pod1", "pod2"); err != nil {
			t.Fatal(err)
		}
	}
	a := c.startAgent(t, "node1")
	from := c.lab.Host("pod2")
	for _, svc := range []*corev1.Service{steady, changed, deleted} {
		answeredBy(t, from, clusterIP(svc), "pod1", "pod2")
	}
	client := connectAllTheTime(t, c.lab.Host("node1"), from, []target{{clusterIP(steady), []string{"pod1", "pod2"}}, {clusterIP(changed), []string{"pod1", "pod2", "pod3"}}})
	client.more(t, length)

	c.apiserver.stop(syscall.SIGKILL)
	client.more(t, length)
	reconnect := c.cutOff(t, "node1")
	if err := c.startAPIServer(); err != nil {
		t.Fatal(err)
	}
	if err := c.endpoints("changed", "pod3"); err != nil {
		t.Fatal(err)
	}
	if err := c.client.CoreV1().Services("default").Delete(t.Context(), "deleted", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	client.more(t, length)
	if err := a.ended(); err != nil {
		t.Fatal(err)
	}
	reconnect()
	answeredBy(t, from, clusterIP(changed), "pod3")
	until(t, "the deleted Service does not answer any more", func() error {
		if pod, err := ask(from, clusterIP(deleted)); err == nil {
			return fmt.Errorf("%s answers", pod)
		}
		return nil
	})
	client.more(t, length)
}

// cutOff makes the API server unreachable from a node, which is told so at once.
func (c *cluster) cutOff(t *testing.T, node string) (reconnect func()) {
	t.Helper()
	h := c.lab.Host(node).Netlink()
	dst := &net.IPNet{IP: controlAddr.AsSlice(), Mask: net.CIDRMask(32, 32)}
	route := &netlink.Route{Dst: dst, Type: unix.RTN_UNREACHABLE}
	if err := h.RouteAdd(route); err != nil {
		t.Fatal(err)
	}
	on := true
	reconnect = func() {
		if on {
			on = false
			if err := h.RouteDel(route); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(reconnect)
	return reconnect
}

// TestKill: the agent is killed at any moment and started again, with 1,000
// Services in the cluster and changes under way. No connection is refused, none
// goes to a wrong pod.
func TestKill(t *testing.T) {
	c := newTest(t)
	const services = 1000
	targets := c.crowd(t, services)
	a := c.startAgent(t, "node1")
	from := c.lab.Host("pod1")
	for _, to := range targets[services-10:] {
		answeredBy(t, from, to.addr, to.pods...)
	}
	for _, to := range targets {
		until(t, "every Service answers", func() error {
			_, err := ask(from, to.addr)
			return err
		})
	}
	client := connectAllTheTime(t, c.lab.Host("node1"), from, targets)
	client.more(t, 100)
	// Endpoints of one Service change all the time between sets that share pod2.
	stop, sets := make(chan struct{}), [][]string{{"pod2"}, {"pod2", "pod4"}}
	var changes errgroup.Group
	changes.Go(func() error {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return nil
			default:
			}
			if err := c.endpoints("crowd-0", sets[i%2]...); err != nil {
				return err
			}
		}
	})
	for i := range 8 {
		// Sometimes right after the start, sometimes in the middle of work.
		a.stop([]syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM}[i%3])
		client.more(t, 50)
		a.start()
		client.more(t, 40*i)
	}
	close(stop)
	if err := changes.Wait(); err != nil {
		t.Fatal(err)
	}
	// Up to date again.
	if err := c.endpoints("crowd-0", "pod2", "pod4"); err != nil {
		t.Fatal(err)
	}
	answeredBy(t, from, targets[0].addr, "pod2", "pod4")
	if err := a.ended(); err != nil {
		t.Error(err)
	}
}

// crowd creates many Services, named crowd-N, and deletes them after the test.
func (c *cluster) crowd(t *testing.T, n int) []target {
	t.Helper()
	all := metav1.ListOptions{LabelSelector: "test=e2e"}
	t.Cleanup(func() {
		for _, kind := range []schema.GroupVersionResource{
			corev1.SchemeGroupVersion.WithResource("services"), discoveryv1.SchemeGroupVersion.WithResource("endpointslices"),
		} {
			if err := c.dynamic.Resource(kind).Namespace("default").DeleteCollection(context.Background(), metav1.DeleteOptions{}, all); err != nil {
				t.Error(err)
			}
		}
	})
	targets := make([]target, n)
	var work errgroup.Group
	work.SetLimit(16)
	for i := range n {
		work.Go(func() error {
			name := fmt.Sprintf("crowd-%d", i)
			svc, err := c.createService(name, corev1.ServiceTypeClusterIP)
			if err != nil {
				return err
			}
			pods := [][]string{{"pod2", "pod4"}, {"pod1"}, {"pod3"}, {"pod1", "pod3", "pod4"}}[i%4]
			targets[i] = target{clusterIP(svc), pods}
			return c.endpoints(name, pods...)
		})
	}
	if err := work.Wait(); err != nil {
		t.Fatal(err)
	}
	return targets
}

// TestPorts: what probes, load balancers and Prometheus ask for.
func TestPorts(t *testing.T) {
	c := newTest(t)
	c.startAgent(t, "node1")
	health := netip.AddrPortFrom(c.lab.Addr("node1", true), 10256).String()
	const metrics = "127.0.0.1:10249"
	outside, node := c.lab.Host("client"), c.lab.Host("node1")

	until(t, "/healthz is 200", func() error { return get(outside, health, "/healthz", 200, `"healthy":`, `"nodeEligible":`) })
	until(t, "/livez is 200", func() error { return get(outside, health, "/livez", 200, `"healthy":`) })
	until(t, "/metrics are there", func() error {
		return get(node, metrics, "/metrics", 200, "kubeproxy_sync_proxy_rules_duration_seconds_count", "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
			"kubernetes_build_info", "process_resident_memory_bytes", "rest_client_requests_total")
	})
	for path, content := range map[string]string{"/healthz": "ok", "/proxyMode": "iptables", "/configz": "kubeproxy"} {
		if err := get(node, metrics, path, 200, content); err != nil {
			t.Error(err)
		}
	}
	if err := get(outside, netip.AddrPortFrom(c.lab.Addr("node1", true), 10249).String(), "/metrics", 200); err == nil {
		t.Error("metrics answer from outside of the node")
	}

	// A node that is about to go gets no new connections of load balancers, and
	// is no reason to restart the agent (KEP-3836).
	c.taint(t, "node1", corev1.Taint{Key: "ToBeDeletedByClusterAutoscaler", Effect: corev1.TaintEffectNoSchedule})
	until(t, "/healthz is 503", func() error { return get(outside, health, "/healthz", 503) })
	if err := get(outside, health, "/livez", 200); err != nil {
		t.Error(err)
	}
}

// taint taints a node until the test ends.
func (c *cluster) taint(t *testing.T, node string, taint corev1.Taint) {
	t.Helper()
	set := func(taints []corev1.Taint) {
		n, err := c.client.CoreV1().Nodes().Get(context.Background(), node, metav1.GetOptions{})
		if err == nil {
			n.Spec.Taints = taints
			_, err = c.client.CoreV1().Nodes().Update(context.Background(), n, metav1.UpdateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	set([]corev1.Taint{taint})
	t.Cleanup(func() { set(nil) })
}

// get asks for a page and returns an error if it is not as wanted.
func get(from *netlab.Namespace, addr, path string, code int, contains ...string) error {
	client := http.Client{Timeout: askTimeout, Transport: &http.Transport{DialContext: from.DialContext, DisableKeepAlives: true}}
	resp, err := client.Get("http://" + addr + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != code {
		return fmt.Errorf("%s: %s, want %d: %s", path, resp.Status, code, body)
	}
	for _, s := range contains {
		if !strings.Contains(string(body), s) {
			return fmt.Errorf("%s: no %q in %.2000s", path, s, body)
		}
	}
	return nil
}

// TestRole: with RBAC on, the shipped ClusterRole allows all that the agent asks
// for, and little that it does not.
func TestRole(t *testing.T) {
	c := newTest(t)
	before, err := c.requests()
	if err != nil {
		t.Fatal(err)
	}
	svc := c.service(t, "role")
	if err := c.endpoints("role", "pod1"); err != nil {
		t.Fatal(err)
	}
	a := c.startAgent(t, "node1")
	answeredBy(t, c.lab.Host("node1"), clusterIP(svc), "pod1")

	used := map[string]bool{}
	until(t, "the agent has written its first Event", func() error { // the last thing it does for the first time
		all, err := c.requests()
		if err != nil {
			return err
		}
		for _, r := range all[len(before):] {
			if r.Response.Code == 401 || r.Response.Code == 403 {
				t.Errorf("refused with %d: %s %s", r.Response.Code, r.Verb, r.URI)
			}
			used[r.Verb+" "+r.ObjectRef.Resource] = true
		}
		if !used["create events"] {
			return fmt.Errorf("it has done: %v", used)
		}
		return nil
	})
	if out := a.output(); strings.Contains(strings.ToLower(out), "forbidden") {
		t.Errorf("the agent's log says forbidden:\n%s", a.tail())
	}
	role, err := c.client.RbacV1().ClusterRoles().Get(t.Context(), "sluice", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, unused := range unusedRights(role, used) {
		t.Errorf("the role allows to %s, which the agent has not done", unused)
	}
}

// unusedRights lists what a role allows and nobody used.
func unusedRights(role *rbacv1.ClusterRole, used map[string]bool) (unused []string) {
	rare := []string{
		"patch events",                            // an Event that happens again
		"list servicecidrs", "watch servicecidrs", // only a mode that needs the range: see TestServiceCIDRs
	}
	for _, rule := range role.Rules {
		for _, verb := range rule.Verbs {
			for _, resource := range rule.Resources {
				right := verb + " " + resource
				if !used[right] && !slices.Contains(rare, right) {
					unused = append(unused, right)
				}
			}
		}
	}
	return unused
}
