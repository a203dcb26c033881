package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// manifest is a cluster in a file.
const manifest = `apiVersion: v1
kind: Service
metadata: {name: filed, namespace: default}
spec:
  clusterIP: 10.96.77.7
  clusterIPs: [10.96.77.7]
  ports: [{port: 80, targetPort: 8080, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: filed-1
  namespace: default
  labels: {kubernetes.io/service-name: filed}
addressType: IPv4
ports: [{name: "", port: 8080, protocol: TCP}]
endpoints: [{addresses: [POD]}]
`

// TestFlags: kube-proxy's flags without a configuration file, and then none but
// the folder of manifests that Sluice also reads objects from.
func TestFlags(t *testing.T) {
	c := newTest(t)
	svc := c.service(t, "flags")
	if err := c.endpoints("flags", "pod1", "pod3"); err != nil {
		t.Fatal(err)
	}
	a := c.startAgent(t, "node1")
	a.stop(syscall.SIGTERM)
	flags := []string{"--kubeconfig=" + filepath.Join(a.dir, "kubeconfig.conf"), "--hostname-override=node1", "--cluster-cidr=" + clusterCIDR, "--proxy-mode=iptables"}
	if other { // see mount
		flags = append(flags, "--conntrack-max-per-core=0")
	}
	run := func(args ...string) *process {
		p, err := start(a.ns(), filepath.Join(a.dir, t.Name()+"-flags.log"), a.env(), binary, args...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			p.stop(syscall.SIGKILL)
			if t.Failed() {
				t.Log(p.tail())
			}
		})
		return p
	}
	p := run(flags...)
	answeredBy(t, c.lab.Host("pod2"), clusterIP(svc), "pod1", "pod3")
	if err := c.endpoints("flags", "pod4"); err != nil { // the rules above may be those of before
		t.Fatal(err)
	}
	answeredBy(t, c.lab.Host("pod2"), clusterIP(svc), "pod4")
	p.stop(syscall.SIGTERM)

	if other {
		t.Skip("SKIPPED: only Sluice has --manifests, and this is ", binary)
	}
	folder := t.TempDir()
	write := func(pod string) {
		text := strings.NewReplacer("POD", c.lab.Addr(pod, true).String()).Replace(manifest)
		if err := os.WriteFile(filepath.Join(folder, "echo.yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("pod1")
	run("--manifests="+folder, "--hostname-override=node1", "--cluster-cidr="+clusterCIDR, "--mode=iptables")
	for _, pod := range []string{"pod1", "pod3"} {
		write(pod)
		answeredBy(t, c.lab.Host("pod2"), netip.MustParseAddrPort("10.96.77.7:80"), pod)
	}
}
