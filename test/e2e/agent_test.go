package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-proxy/sluice/test/netlab"
)

// agent is the agent of one node, as the DaemonSet would run it there.
type agent struct {
	*process
	c    *cluster
	t    *testing.T
	node string
	mode string
	dir  string // what the pod has mounted
}

// startAgent runs the agent on a node as the shipped DaemonSet says: the init
// container first, then the other with its arguments and capabilities only, the
// ConfigMap's files, and a token of the ServiceAccount. It is killed when the
// test ends.
func (c *cluster) startAgent(t *testing.T, node string) *agent {
	t.Helper()
	return c.startAgentIn(t, node, "iptables")
}

// startAgentIn is startAgent with another mode in the ConfigMap than the shipped one.
func (c *cluster) startAgentIn(t *testing.T, node, mode string) *agent {
	t.Helper()
	ds, err := c.client.AppsV1().DaemonSets("kube-system").Get(context.Background(), "sluice", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{c: c, t: t, node: node, mode: mode, dir: filepath.Join(c.dir, node)}
	if err := a.mount(ds); err != nil {
		t.Fatal(err)
	}
	for _, init := range ds.Spec.Template.Spec.InitContainers {
		p, err := a.exec(init)
		if err != nil {
			t.Fatal(err)
		}
		if <-p.done; p.err != nil {
			t.Fatalf("init container %s: %v\n%s", init.Name, p.err, p.tail())
		}
	}
	a.start()
	t.Cleanup(func() {
		a.stop(syscall.SIGKILL)
		out := a.output()
		if strings.Contains(out, "DATA RACE") {
			t.Error("the agent's race detector has found something")
		}
		if t.Failed() {
			t.Logf("end of the agent's log:\n%s", a.tail())
		}
	})
	return a
}

// start starts the agent again after it was stopped.
func (a *agent) start() {
	a.t.Helper()
	ds, err := a.c.client.AppsV1().DaemonSets("kube-system").Get(context.Background(), "sluice", metav1.GetOptions{})
	if err == nil {
		a.process, err = a.exec(ds.Spec.Template.Spec.Containers[0])
	}
	if err != nil {
		a.t.Fatal(err)
	}
}

// mount writes the files of the pod's volumes that the agent reads.
func (a *agent) mount(ds *appsv1.DaemonSet) error {
	spec := ds.Spec.Template.Spec
	files := map[string]string{}
	for _, v := range spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			cm, err := a.c.client.CoreV1().ConfigMaps(ds.Namespace).Get(context.Background(), s.ConfigMap.Name, metav1.GetOptions{})
			if err != nil && s.ConfigMap.Optional != nil && *s.ConfigMap.Optional {
				continue
			}
			if err != nil {
				return err
			}
			for k, v := range cm.Data {
				files[k] = v
			}
		}
	}
	if files["config.conf"] == "" || files["kubeconfig.conf"] == "" {
		return fmt.Errorf("the DaemonSet mounts no config.conf and kubeconfig.conf")
	}
	token, err := a.c.client.CoreV1().ServiceAccounts(ds.Namespace).CreateToken(context.Background(), spec.ServiceAccountName, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("request the agent's token: %w", err)
	}
	if other {
		// kube-proxy does not start where it cannot set this: outside of the
		// first network namespace.
		files["config.conf"] += "conntrack: {maxPerCore: 0}\n"
	}
	files["token"], files["ca.crt"] = token.Status.Token, string(a.c.config.CAData)
	if err := os.MkdirAll(a.dir, 0o755); err != nil {
		return err
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(a.dir, name), []byte(a.local(content)), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// local replaces what is different in this cluster: the values marked EDIT, the
// mode, and places inside the container by those on this machine.
func (a *agent) local(text string) string {
	return strings.NewReplacer(
		"/var/lib/kube-proxy", a.dir,
		"/var/run/secrets/kubernetes.io/serviceaccount", a.dir,
		"https://control-plane.example:6443", "https://"+a.c.apiAddr(),
		"$(NODE_NAME)", a.node,
		"mode: iptables\n", "mode: "+a.mode+"\n",
	).Replace(text)
}

// exec runs a container's arguments with its capabilities.
func (a *agent) exec(container corev1.Container) (*process, error) {
	program, args := binary, []string{}
	for _, arg := range container.Args {
		args = append(args, a.local(arg))
	}
	if ctx := container.SecurityContext; ctx.Privileged == nil || !*ctx.Privileged {
		bounding := "-all"
		for _, capability := range ctx.Capabilities.Add {
			bounding += ",+" + strings.ToLower(string(capability))
		}
		program, args = "setpriv", append([]string{"--bounding-set=" + bounding, "--inh-caps=-all", "--no-new-privs", "--", binary}, args...)
	}
	return start(a.ns(), a.logFile(""), a.env(), program, args...)
}

// logFile is the file of what the agent writes; more tells one run of it from another.
func (a *agent) logFile(more string) string {
	return filepath.Join(a.dir, strings.ReplaceAll(a.t.Name(), "/", "-")+more+".log")
}

func (a *agent) ns() *netlab.Namespace { return a.c.lab.Host(a.node) }

// env keeps the lock of iptables from the machine's.
func (a *agent) env() []string {
	return []string{"XTABLES_LOCKFILE=" + filepath.Join(a.dir, "xtables.lock"), "NODE_NAME=" + a.node}
}

// run runs the agent's binary with arguments of the test's own, until it ends.
func (a *agent) run(args ...string) (string, error) {
	p, err := start(a.ns(), a.logFile(args[0]), a.env(), binary, args...)
	if err != nil {
		return "", err
	}
	<-p.done
	return p.output(), p.err
}
