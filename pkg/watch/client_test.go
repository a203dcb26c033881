package watch

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
)

const kubeconfigYAML = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://192.0.2.1:6443"}}]
users: [{name: u, user: {token: secret}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`

func TestRESTConfig(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "") // not in a pod
	t.Setenv("KUBECONFIG", "/nonexistent")  // is nobody's business here
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good"), filepath.Join(dir, "bad")
	for path, text := range map[string]string{good: kubeconfigYAML, bad: "clusters: 3"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		options ClientOptions
		err     string
		check   func(*rest.Config) bool
	}{
		"kubeconfig": {ClientOptions{Kubeconfig: good, QPS: 7, Burst: 9, UserAgent: "sluice/1"}, "", func(c *rest.Config) bool {
			return c.Host == "https://192.0.2.1:6443" && c.BearerToken == "secret" && c.QPS == 7 && c.Burst == 9 && c.UserAgent == "sluice/1" &&
				c.ContentType == protobufType && c.AcceptContentTypes == protobufType+","+jsonType
		}},
		"master overrides": {ClientOptions{Kubeconfig: good, Master: "https://192.0.2.2"}, "", func(c *rest.Config) bool {
			return c.Host == "https://192.0.2.2" && c.BearerToken == "secret"
		}},
		"master alone": {ClientOptions{Master: "http://192.0.2.3:8080"}, "", func(c *rest.Config) bool { return c.Host == "http://192.0.2.3:8080" }},
		"JSON":         {ClientOptions{Kubeconfig: good, ContentType: jsonType}, "", func(c *rest.Config) bool { return c.ContentType == jsonType && c.AcceptContentTypes == "" }},
		"nothing":      {ClientOptions{}, "neither a kubeconfig nor --master is given, and this is not a pod", nil},
		"no such file": {ClientOptions{Kubeconfig: filepath.Join(dir, "none")}, "read kubeconfig: stat " + filepath.Join(dir, "none"), nil},
		"bad file":     {ClientOptions{Kubeconfig: bad}, `read kubeconfig "` + bad, nil},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, err := RESTConfig(test.options)
			switch {
			case test.err != "":
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error %v, want %q", err, test.err)
				}
			case err != nil:
				t.Error(err)
			case !test.check(cfg):
				t.Errorf("got %+v", cfg)
			}
		})
	}
}

func TestRunRefusesWhatItCannotUse(t *testing.T) {
	a := &API{Config: &rest.Config{Host: "https://192.0.2.1", TLSClientConfig: rest.TLSClientConfig{CAFile: "/nonexistent/ca.crt"}}}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "/nonexistent/ca.crt") {
		t.Errorf("a CA file that is not there: %v", err)
	}
}
