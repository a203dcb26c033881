package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/sluice-proxy/sluice/test/netlab"
)

const (
	adminToken = "admin"
	etcdURL    = "http://127.0.0.1:2379"
)

var controlAddr = netip.MustParseAddr("192.168.100.20")

// control is a real control plane without controllers, and who writes to it.
type control struct {
	s       *settings
	dir     string
	ns      *netlab.Namespace // which has controlAddr
	procs   []*process
	client  *kubernetes.Clientset
	pattern pattern // of the numbered Services
	filled  int     // how many of them there are
}

// newControl starts it and creates everything but the numbered Services.
func newControl(ctx context.Context, s *settings, dir string, ns *netlab.Namespace) (c *control, err error) {
	c = &control{s: s, dir: dir, ns: ns}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err = c.start(ctx); err != nil {
		return c, err
	}
	if err = c.createNodes(ctx, nodeSpecs(s)); err != nil {
		return c, err
	}
	return c, c.createOthers(ctx)
}

func (c *control) close() {
	for _, p := range c.procs {
		p.stop(syscall.SIGKILL, 10*time.Second)
	}
}

func (c *control) start(ctx context.Context) error {
	if err := c.writeFiles(); err != nil {
		return fmt.Errorf("write the control plane's files: %w", err)
	}
	file := func(name string) string { return filepath.Join(c.dir, name) }
	progress("starting etcd and kube-apiserver")
	etcd, err := start(c.ns, file("etcd.log"), nil, filepath.Join(c.s.tools, "etcd"),
		"--data-dir="+file("etcd"), "--unsafe-no-fsync", "--log-level=warn", "--quota-backend-bytes=4294967296",
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL, "--listen-peer-urls=http://127.0.0.1:2380")
	if err != nil {
		return err
	}
	c.procs = append(c.procs, etcd)
	api, err := start(c.ns, file("apiserver.log"), nil, filepath.Join(c.s.tools, "kube-apiserver"),
		"--etcd-servers="+etcdURL, "--bind-address="+controlAddr.String(), "--secure-port=6443", "--advertise-address="+controlAddr.String(),
		"--cert-dir="+file("certs"), "--token-auth-file="+file("tokens.csv"), "--authorization-mode=AlwaysAllow", "--enable-priority-and-fairness=false",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+file("sa.key"), "--service-account-signing-key-file="+file("sa.key"),
		"--service-cluster-ip-range="+serviceRange.String(), "--profiling=false", "--shutdown-delay-duration=0s")
	if err != nil {
		return err
	}
	c.procs = append(c.procs, api)
	return await(ctx, 2*time.Minute, "the API server is ready", func() error {
		if err := api.ended(); err != nil {
			return err
		}
		return c.connect(ctx)
	})
}

func (c *control) writeFiles() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	kubeconfig, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "bench",
		"clusters": []any{map[string]any{"name": "bench", "cluster": map[string]any{
			"server": c.server(), "certificate-authority": filepath.Join(c.dir, "certs", "apiserver.crt")}}},
		"users":    []any{map[string]any{"name": "bench", "user": map[string]any{"token": adminToken}}},
		"contexts": []any{map[string]any{"name": "bench", "context": map[string]any{"cluster": "bench", "user": "bench"}}},
	})
	if err != nil {
		return err
	}
	for name, content := range map[string]string{
		"sa.key":     string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})),
		"tokens.csv": adminToken + `,admin,admin,"system:masters"` + "\n",
		"kubeconfig": string(kubeconfig),
	} {
		if err := os.WriteFile(filepath.Join(c.dir, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (c *control) server() string { return "https://" + net.JoinHostPort(controlAddr.String(), "6443") }

// connect makes the client, and fails while the API server is not ready.
func (c *control) connect(ctx context.Context) error {
	ca, err := os.ReadFile(filepath.Join(c.dir, "certs", "apiserver.crt")) // it signs its own
	if err != nil {
		return err
	}
	c.client, err = kubernetes.NewForConfig(&rest.Config{
		Host: c.server(), BearerToken: adminToken, TLSClientConfig: rest.TLSClientConfig{CAData: ca},
		Dial: c.ns.DialContext, QPS: -1,
		ContentConfig: rest.ContentConfig{ContentType: runtime.ContentTypeProtobuf, AcceptContentTypes: runtime.ContentTypeProtobuf},
	})
	if err != nil {
		return err
	}
	if _, err := c.client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); err != nil {
		return err
	}
	// Written by the server itself, a moment after it is ready.
	if _, err = c.client.CoreV1().Services("default").Get(ctx, "kubernetes", metav1.GetOptions{}); err != nil {
		return err
	}
	_, err = c.client.CoreV1().Namespaces().Get(ctx, "kube-system", metav1.GetOptions{})
	return err
}

func (c *control) createNodes(ctx context.Context, specs []netlab.NodeSpec) error {
	for _, spec := range specs {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: spec.Name, Labels: map[string]string{corev1.LabelHostname: spec.Name}}}
		n.Spec.PodCIDR = spec.PodCIDRs[0].String()
		n.Spec.PodCIDRs = []string{n.Spec.PodCIDR}
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: spec.Addrs[0].String()}}
		if _, err := c.client.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create node %s: %w", spec.Name, err)
		}
	}
	return nil
}

// createOthers creates what the numbered Services are beside.
func (c *control) createOthers(ctx context.Context) error {
	for i := range namespaces {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespaceOf(i)}}
		if _, err := c.client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create namespace %s: %w", ns.Name, err)
		}
	}
	if err := c.create(ctx, dns, c.s.layout().dns()); err != nil {
		return err
	}
	return c.create(ctx, canary, []netip.Addr{canaryEndpoint(0)})
}

func (c *control) create(ctx context.Context, r serviceRef, endpoints []netip.Addr) error {
	if _, err := c.client.CoreV1().Services(r.namespace).Create(ctx, serviceObject(r), metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create service %s/%s: %w", r.namespace, r.name, err)
	}
	if _, err := c.client.DiscoveryV1().EndpointSlices(r.namespace).Create(ctx, sliceObject(r, endpoints), metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create endpoints of %s/%s: %w", r.namespace, r.name, err)
	}
	return nil
}

func (c *control) update(ctx context.Context, r serviceRef, endpoints []netip.Addr) error {
	if _, err := c.client.DiscoveryV1().EndpointSlices(r.namespace).Update(ctx, sliceObject(r, endpoints), metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("change endpoints of %s/%s: %w", r.namespace, r.name, err)
	}
	return nil
}

// setCanary gives the canary the endpoint of a version.
func (c *control) setCanary(ctx context.Context, version int) error {
	return c.update(ctx, canary, []netip.Addr{canaryEndpoint(version)})
}

// setEndpoints gives the i-th Service the endpoints of a version.
func (c *control) setEndpoints(ctx context.Context, i, version int) error {
	return c.update(ctx, numbered(i), c.s.layout().of(i, version))
}

// await calls f until it returns nil.
func await(ctx context.Context, limit time.Duration, what string, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gave up waiting until %s: %w", what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
