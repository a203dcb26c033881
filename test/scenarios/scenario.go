// Package scenarios holds what Sluice must do, as files that people can read:
// Kubernetes objects, the settings of one node, and flows that say who reaches
// whom. One suite serves all proxiers: each is checked against the same flows,
// by following packets through its rules and on a real kernel.
//
// The package reads the files and knows the little cluster they play in. It
// decides nothing about Services: plans come from pkg/plan.
//
// A scenario is a txtar archive; the text before the first file says what it is
// about. See README.md for the files in it.
package scenarios

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/tools/txtar"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Scenario is one file of the suite.
type Scenario struct {
	Name     string // file name without .txtar
	About    string
	Settings Settings
	Services []*corev1.Service
	Slices   []*discoveryv1.EndpointSlice
	CIDRs    []*networkingv1.ServiceCIDR
	Node     *corev1.Node // the own node; never nil
	Flows    []Flow
	Cluster  Cluster

	path    string
	archive *txtar.Archive
}

// Settings are those of the node, under KubeProxyConfiguration's names where it
// has them.
type Settings struct {
	ClusterCIDR         string   `json:"clusterCIDR"`
	DetectLocalMode     string   `json:"detectLocalMode"` // also "None"
	BridgeInterface     string   `json:"bridgeInterface"`
	InterfaceNamePrefix string   `json:"interfaceNamePrefix"`
	MasqueradeAll       bool     `json:"masqueradeAll"`
	NodePortAddresses   []string `json:"nodePortAddresses"`
	LocalhostNodePorts  bool     `json:"localhostNodePorts"`
	RefuseExternalIPs   bool     `json:"refuseExternalIPs"` // feature gate AllowServiceExternalIPs off

	// ForwardPolicy is that of the filter table's FORWARD chain, which is not the
	// proxier's: "DROP", or "ACCEPT" if not given.
	ForwardPolicy string `json:"forwardPolicy"`

	// Pods are pods that are no endpoints, by name: where packets can come from.
	Pods map[string][]netip.Addr `json:"pods"`
}

// The node that scenarios look at, and the pod ranges of the cluster.
const (
	NodeName    = "node1"
	clusterCIDR = "10.244.0.0/16,fd00:10:244::/48"
)

func defaults() Settings {
	return Settings{
		ClusterCIDR:        clusterCIDR,
		DetectLocalMode:    "ClusterCIDR",
		LocalhostNodePorts: true,
		Pods: map[string][]netip.Addr{
			"shell":     {netip.MustParseAddr("10.244.1.200"), netip.MustParseAddr("fd00:10:244:1::200")},
			"far-shell": {netip.MustParseAddr("10.244.2.200"), netip.MustParseAddr("fd00:10:244:2::200")},
		},
	}
}

// Names of the files in an archive.
const (
	fileSettings = "settings.yaml"
	fileObjects  = "objects.yaml"
	fileFlows    = "flows"
)

// LoadAll reads every scenario of a folder, in the order of names.
func LoadAll(dir string) ([]*Scenario, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.txtar"))
	if err != nil || len(paths) == 0 {
		return nil, fmt.Errorf("find scenarios in %s: none (%w)", dir, err)
	}
	var list []*Scenario
	var errs []error
	for _, p := range paths {
		s, err := Load(p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		list = append(list, s)
	}
	return list, errors.Join(errs...)
}

// Load reads one scenario.
func Load(path string) (*Scenario, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read scenario: %w", err)
	}
	s, err := Parse(strings.TrimSuffix(filepath.Base(path), ".txtar"), data)
	if err != nil {
		return nil, fmt.Errorf("scenario %s: %w", path, err)
	}
	s.path = path
	return s, nil
}

// Parse reads a scenario from memory.
func Parse(name string, data []byte) (*Scenario, error) {
	s := &Scenario{Name: name, Settings: defaults(), archive: txtar.Parse(data)}
	s.About = strings.TrimSpace(string(s.archive.Comment))
	if s.About == "" {
		return nil, errors.New("it does not say what it is about, before the first file")
	}
	seen := map[string]bool{}
	for _, f := range s.archive.Files {
		if seen[f.Name] {
			return nil, fmt.Errorf("file %s is there twice", f.Name)
		}
		seen[f.Name] = true
	}
	if text, ok := s.Golden(fileSettings); ok {
		if err := yaml.UnmarshalStrict([]byte(text), &s.Settings); err != nil {
			return nil, fmt.Errorf("%s: %w", fileSettings, err)
		}
		if _, err := nodePortSpec(s.Settings.NodePortAddresses); err != nil {
			return nil, fmt.Errorf("%s: %w", fileSettings, err)
		}
	}
	objects, ok := s.Golden(fileObjects)
	if !ok {
		return nil, fmt.Errorf("no %s", fileObjects)
	}
	if err := s.decode(objects); err != nil {
		return nil, fmt.Errorf("%s: %w", fileObjects, err)
	}
	if s.Node == nil {
		s.Node = defaultNode()
	}
	var err error
	if s.Cluster, err = newCluster(s); err != nil {
		return nil, err
	}
	flows, _ := s.Golden(fileFlows)
	for i, line := range strings.Split(flows, "\n") {
		line, _, _ = strings.Cut(line, "#")
		if strings.TrimSpace(line) == "" {
			continue
		}
		flow, err := parseFlow(line, &s.Cluster)
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %q: %w", fileFlows, i+1, strings.TrimSpace(line), err)
		}
		s.Flows = append(s.Flows, flow)
	}
	return s, nil
}

func (s *Scenario) decode(text string) error {
	for i, doc := range strings.Split("\n"+text, "\n---") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		var meta metav1.TypeMeta
		err := yaml.Unmarshal([]byte(doc), &meta)
		if err == nil {
			err = s.decodeKind(meta.Kind, []byte(doc))
		}
		if err != nil {
			return fmt.Errorf("document %d: %w", i+1, err)
		}
	}
	return nil
}

func (s *Scenario) decodeKind(kind string, doc []byte) error {
	switch kind {
	case "Service":
		o := &corev1.Service{}
		s.Services = append(s.Services, o)
		return yaml.UnmarshalStrict(doc, o)
	case "EndpointSlice":
		o := &discoveryv1.EndpointSlice{}
		s.Slices = append(s.Slices, o)
		return yaml.UnmarshalStrict(doc, o)
	case "ServiceCIDR":
		o := &networkingv1.ServiceCIDR{}
		s.CIDRs = append(s.CIDRs, o)
		return yaml.UnmarshalStrict(doc, o)
	case "Node":
		o := &corev1.Node{}
		if err := yaml.UnmarshalStrict(doc, o); err != nil {
			return err
		}
		if o.Name != NodeName || s.Node != nil {
			return fmt.Errorf("only one Node can be given, named %s", NodeName)
		}
		s.Node = o
		return nil
	}
	return fmt.Errorf("unknown kind %q", kind)
}

func defaultNode() *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: NodeName},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24", "fd00:10:244:1::/64"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: "172.18.0.11"},
			{Type: corev1.NodeInternalIP, Address: "fd00:172:18::11"},
		}},
	}
}

// Golden returns the content of a file of the archive.
func (s *Scenario) Golden(name string) (string, bool) {
	i := slices.IndexFunc(s.archive.Files, func(f txtar.File) bool { return f.Name == name })
	if i < 0 {
		return "", false
	}
	return string(s.archive.Files[i].Data), true
}

// SetGolden replaces a file of the archive, or removes it if text is empty, and
// writes the scenario back.
func (s *Scenario) SetGolden(name, text string) error {
	i := slices.IndexFunc(s.archive.Files, func(f txtar.File) bool { return f.Name == name })
	switch {
	case text == "" && i >= 0:
		s.archive.Files = slices.Delete(s.archive.Files, i, i+1)
	case text == "":
	case i < 0:
		s.archive.Files = append(s.archive.Files, txtar.File{Name: name, Data: []byte(text)})
	default:
		s.archive.Files[i].Data = []byte(text)
	}
	if err := os.WriteFile(s.path, txtar.Format(s.archive), 0o644); err != nil {
		return fmt.Errorf("update %s of scenario %s: %w", name, s.Name, err)
	}
	return nil
}

// Families returns the families that the scenario's Services have addresses of.
func (s *Scenario) Families() []model.Family {
	var out []model.Family
	for _, f := range []model.Family{model.IPv4, model.IPv6} {
		for _, a := range s.Cluster.ServiceAddrs {
			if model.FamilyOf(a) == f {
				out = append(out, f)
				break
			}
		}
	}
	return out
}
