package watch

import (
	"errors"
	"fmt"
	"net/http"
	"os"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// ClientOptions say how to reach the API server. They are kube-proxy's
// clientConnection and --master.
type ClientOptions struct {
	Kubeconfig string // path; empty: in-cluster, or Master alone
	Master     string // URL; overrides the kubeconfig's

	// ContentType and AcceptContentTypes are MIME types; empty means protobuf,
	// with JSON accepted from those who cannot.
	ContentType, AcceptContentTypes string

	QPS       float32 // 0: client-go's default; negative: no limit
	Burst     int
	UserAgent string
}

const (
	protobufType = runtime.ContentTypeProtobuf
	jsonType     = runtime.ContentTypeJSON
)

// RESTConfig works out how to reach the API server: by kubeconfig, by the URL of
// Master, by both, or, if neither is given, by the service account of the pod
// that we run in.
func RESTConfig(o ClientOptions) (*rest.Config, error) {
	cfg, err := connection(o)
	if err != nil {
		return nil, err
	}
	cfg.ContentType = o.ContentType
	if cfg.ContentType == "" {
		cfg.ContentType = protobufType
	}
	cfg.AcceptContentTypes = o.AcceptContentTypes
	if cfg.AcceptContentTypes == "" && cfg.ContentType != jsonType {
		cfg.AcceptContentTypes = cfg.ContentType + "," + jsonType
	}
	cfg.QPS = o.QPS
	cfg.Burst = o.Burst
	if o.UserAgent != "" {
		cfg.UserAgent = o.UserAgent
	}
	return cfg, nil
}

func connection(o ClientOptions) (*rest.Config, error) {
	if o.Kubeconfig == "" && o.Master == "" {
		cfg, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, errors.New("find the API server: neither a kubeconfig nor --master is given, and this is not a pod (KUBERNETES_SERVICE_HOST is not set)")
		}
		if err != nil {
			return nil, fmt.Errorf("find the API server from inside the cluster: %w", err)
		}
		return cfg, nil
	}
	if o.Kubeconfig != "" {
		// clientcmd's own message for a missing file names neither flag nor use.
		if _, err := os.Stat(o.Kubeconfig); err != nil {
			return nil, fmt.Errorf("read kubeconfig: %w", err)
		}
	}
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: o.Kubeconfig},
		&clientcmd.ConfigOverrides{ClusterInfo: clientcmdapi.Cluster{Server: o.Master}}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %q: %w", o.Kubeconfig, err)
	}
	return cfg, nil
}

// scheme knows the groups that are watched and no others: the typed clientset's
// scheme pulls in some fifty API groups, which cost binary size and memory.
var (
	scheme         = runtime.NewScheme()
	codecs         = serializer.NewCodecFactory(scheme)
	parameterCodec = runtime.NewParameterCodec(scheme)
)

func init() {
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, networkingv1.AddToScheme} {
		if err := add(scheme); err != nil {
			panic("BUG: register API types: " + err.Error())
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
}

// clients are REST clients of the groups, over one connection.
type clients struct {
	core, discovery, networking rest.Interface
}

func newClients(cfg *rest.Config) (clients, error) {
	hc, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return clients{}, fmt.Errorf("make an HTTP client for the API server: %w", err)
	}
	core, err := restClient(cfg, hc, "/api", corev1.SchemeGroupVersion)
	if err != nil {
		return clients{}, err
	}
	discovery, err := restClient(cfg, hc, "/apis", discoveryv1.SchemeGroupVersion)
	if err != nil {
		return clients{}, err
	}
	networking, err := restClient(cfg, hc, "/apis", networkingv1.SchemeGroupVersion)
	if err != nil {
		return clients{}, err
	}
	return clients{core, discovery, networking}, nil
}

func restClient(cfg *rest.Config, hc *http.Client, path string, gv schema.GroupVersion) (rest.Interface, error) {
	c := rest.CopyConfig(cfg)
	c.APIPath = path
	c.GroupVersion = &gv
	c.NegotiatedSerializer = codecs.WithoutConversion()
	if c.UserAgent == "" {
		c.UserAgent = rest.DefaultKubernetesUserAgent()
	}
	client, err := rest.RESTClientForConfigAndClient(c, hc)
	if err != nil {
		return nil, fmt.Errorf("make a REST client for %s: %w", gv, err)
	}
	return client, nil
}
