package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"

	"github.com/sluice-proxy/sluice/test/netlab"
)

const (
	serviceCIDR = "10.96.0.0/16"
	clusterCIDR = "10.244.0.0/16"
	adminToken  = "admin"
	// agentUser is who the shipped ServiceAccount is for the API server.
	agentUser = "system:serviceaccount:kube-system:sluice"
)

// cluster is a lab with a control plane at the host "control".
type cluster struct {
	lab       *netlab.Lab
	dir       string
	tools     string
	apiserver *process
	etcd      *process
	config    *rest.Config // of the administrator
	client    *kubernetes.Clientset
	dynamic   *dynamic.DynamicClient
}

var controlAddr = netip.MustParseAddr("192.168.100.20")

// newCluster starts everything but agents, and applies what deploy/ ships.
func newCluster(dir, tools string) (_ *cluster, err error) {
	cfg := netlab.Default()
	cfg.Clients = append(cfg.Clients, netlab.HostSpec{Name: "control", Addrs: []netip.Addr{controlAddr}})
	c := &cluster{dir: dir, tools: tools}
	if c.lab, err = netlab.New(cfg); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.writeFiles(); err != nil {
		return nil, fmt.Errorf("write the control plane's files: %w", err)
	}
	c.etcd, err = start(c.lab.Host("control"), filepath.Join(dir, "etcd.log"), nil, filepath.Join(tools, "etcd"),
		"--data-dir="+filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380")
	if err != nil {
		return nil, err
	}
	if err := c.startAPIServer(); err != nil {
		return nil, err
	}
	if err := c.connect(); err != nil {
		return nil, err
	}
	if err := c.createNodes(); err != nil {
		return nil, err
	}
	for _, name := range []string{"sluice.yaml", "config.yaml"} {
		if _, err := c.apply(filepath.Join("../../deploy", name)); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *cluster) close() {
	for _, p := range []*process{c.apiserver, c.etcd} {
		if p != nil {
			p.stop(syscall.SIGKILL)
		}
	}
	c.lab.Close()
}

func (c *cluster) writeFiles() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	for name, content := range map[string]string{
		"sa.key":     string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})),
		"tokens.csv": adminToken + `,admin,admin,"system:masters"` + "\n",
		// What the agent asks for, to compare it with its role.
		"audit.yaml": `{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
"rules": [{"level": "Metadata", "users": ["` + agentUser + `"]}, {"level": "None"}]}`,
	} {
		if err := os.WriteFile(filepath.Join(c.dir, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// startAPIServer starts kube-apiserver, also once more after it was stopped, and
// waits until it is ready.
func (c *cluster) startAPIServer() (err error) {
	file := func(name string) string { return filepath.Join(c.dir, name) }
	c.apiserver, err = start(c.lab.Host("control"), file("apiserver.log"), nil, filepath.Join(c.tools, "kube-apiserver"),
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address="+controlAddr.String(), "--secure-port=6443", "--advertise-address="+controlAddr.String(),
		"--cert-dir="+file("certs"), "--token-auth-file="+file("tokens.csv"), "--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+file("sa.key"), "--service-account-signing-key-file="+file("sa.key"),
		"--service-cluster-ip-range="+serviceCIDR, "--allow-privileged=true", "--profiling=false", "--shutdown-delay-duration=0s",
		"--audit-policy-file="+file("audit.yaml"), "--audit-log-path="+file("audit.log"))
	if err != nil {
		return err
	}
	err = try(func() error {
		select {
		case <-c.apiserver.done:
			return nil // it will not become ready any more
		default:
			return c.ready()
		}
	})
	if ended := c.apiserver.ended(); ended != nil {
		return ended
	}
	if err != nil {
		return fmt.Errorf("wait for the API server: %w\n%s", err, c.apiserver.tail())
	}
	return nil
}

func (c *cluster) ready() error {
	if c.client == nil {
		if err := c.connect(); err != nil {
			return err
		}
	}
	if _, err := c.client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(context.Background()); err != nil {
		return err
	}
	// Written by the server itself, a moment after it is ready.
	if _, err := c.client.CoreV1().Services("default").Get(context.Background(), "kubernetes", metav1.GetOptions{}); err != nil {
		return err
	}
	_, err := c.client.CoreV1().Namespaces().Get(context.Background(), "kube-system", metav1.GetOptions{})
	return err
}

// connect makes clients that dial from inside the lab.
func (c *cluster) connect() error {
	ca, err := os.ReadFile(filepath.Join(c.dir, "certs", "apiserver.crt")) // it signs its own
	if err != nil {
		return err
	}
	config := &rest.Config{
		Host: "https://" + c.apiAddr(), BearerToken: adminToken, TLSClientConfig: rest.TLSClientConfig{CAData: ca},
		Dial: c.lab.Host("control").DialContext, QPS: -1,
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	dyn, err := dynamic.NewForConfig(config)
	if err != nil {
		return err
	}
	c.config, c.client, c.dynamic = config, client, dyn
	return nil
}

func (c *cluster) apiAddr() string { return net.JoinHostPort(controlAddr.String(), "6443") }

func (c *cluster) createNodes() error {
	for _, name := range []string{"node1", "node2"} {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}}}
		for _, a := range c.lab.Addrs(name) {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
		}
		if _, err := c.client.CoreV1().Nodes().Create(context.Background(), n, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create node %s: %w", name, err)
		}
	}
	return nil
}

// apply does what kubectl apply --server-side does, and returns the objects as
// the server has them then.
func (c *cluster) apply(path string) ([]*unstructured.Unstructured, error) {
	objects, err := read(path)
	if err != nil {
		return nil, err
	}
	groups, err := restmapper.GetAPIGroupResources(discovery.NewDiscoveryClientForConfigOrDie(c.config))
	if err != nil {
		return nil, fmt.Errorf("discover the API: %w", err)
	}
	mapper := restmapper.NewDiscoveryRESTMapper(groups)
	var applied []*unstructured.Unstructured
	for _, o := range objects {
		kind := o.GroupVersionKind()
		mapping, err := mapper.RESTMapping(kind.GroupKind(), kind.Version)
		if err != nil {
			return nil, fmt.Errorf("apply %s: %w", path, err)
		}
		// A namespace of "" is right for objects without one.
		got, err := c.dynamic.Resource(mapping.Resource).Namespace(o.GetNamespace()).Apply(context.Background(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "e2e"})
		if err != nil {
			return nil, fmt.Errorf("apply %s: %s %s: %w", path, kind.Kind, o.GetName(), err)
		}
		applied = append(applied, got)
	}
	return applied, nil
}

// read returns the objects of a YAML file.
func read(path string) ([]*unstructured.Unstructured, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var objects []*unstructured.Unstructured
	docs := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := docs.Decode(&o.Object)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, fmt.Errorf("parse %s: %w", path, err)
		}
		if len(o.Object) > 0 {
			objects = append(objects, o)
		}
	}
}

// service creates a Service with a ClusterIP and a NodePort for TCP port 80, and
// deletes it when the test ends.
func (c *cluster) service(t *testing.T, name string) *corev1.Service {
	t.Helper()
	svc, err := c.createService(name, corev1.ServiceTypeNodePort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.client.CoreV1().Services("default").Delete(context.Background(), name, metav1.DeleteOptions{})
		_ = c.client.DiscoveryV1().EndpointSlices("default").Delete(context.Background(), name, metav1.DeleteOptions{})
	})
	return svc
}

func (c *cluster) createService(name string, kind corev1.ServiceType) (*corev1.Service, error) {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"test": "e2e"}},
		Spec: corev1.ServiceSpec{
			Type:  kind,
			Ports: []corev1.ServicePort{{Name: "echo", Port: 80, TargetPort: intstr.FromInt32(echoPort), Protocol: corev1.ProtocolTCP}},
		},
	}
	return c.client.CoreV1().Services("default").Create(context.Background(), svc, metav1.CreateOptions{})
}

// echoPort is where every pod of the lab answers with its name.
const echoPort = 8080

// endpoints makes the pods the ready endpoints of a Service.
func (c *cluster) endpoints(service string, pods ...string) error {
	name, port, proto, ready := "echo", int32(echoPort), corev1.ProtocolTCP, true
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service, Labels: map[string]string{discoveryv1.LabelServiceName: service, "test": "e2e"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &proto}},
	}
	for _, pod := range pods {
		node := "node1"
		if pod == "pod3" || pod == "pod4" {
			node = "node2"
		}
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{c.lab.Addr(pod, true).String()}, NodeName: &node,
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &ready},
		})
	}
	slices := c.client.DiscoveryV1().EndpointSlices("default")
	_, err := slices.Update(context.Background(), slice, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = slices.Create(context.Background(), slice, metav1.CreateOptions{})
	}
	if err != nil {
		return fmt.Errorf("write endpoints of %s: %w", service, err)
	}
	return nil
}

// request is what the audit log says of one request of the agent.
type request struct {
	Verb      string
	ObjectRef struct{ Resource, APIGroup string }
	Response  struct{ Code int } `json:"responseStatus"`
	URI       string             `json:"requestURI"`
}

// requests returns all requests that the agents have made.
func (c *cluster) requests() ([]request, error) {
	data, err := os.ReadFile(filepath.Join(c.dir, "audit.log"))
	if err != nil {
		return nil, err
	}
	var all []request
	for line := range strings.Lines(string(data)) {
		var r request
		if !strings.HasSuffix(line, "\n") {
			break // not yet written to its end
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			return nil, fmt.Errorf("parse audit log: %w", err)
		}
		all = append(all, r)
	}
	return all, nil
}
