package e2e

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-proxy/sluice/test/uml"
)

// TestModeFallback: on a kernel without IPVS the agent says so, in all the ways
// that people look, and serves in iptables mode; or it refuses, if it is told to.
func TestModeFallback(t *testing.T) {
	c := newTest(t)
	if other {
		t.Skip("SKIPPED: only Sluice has --mode-fallback, and this is ", binary)
	}
	if uml.Native() {
		t.Skip("SKIPPED: this machine's kernel has IPVS, so nothing has to fall back")
	}
	svc := c.service(t, "fallback")
	if err := c.endpoints("fallback", "pod1", "pod3"); err != nil {
		t.Fatal(err)
	}
	a := c.startAgent(t, "node1")
	a.stop(syscall.SIGTERM)
	flags := []string{"--kubeconfig=" + filepath.Join(a.dir, "kubeconfig.conf"), "--hostname-override=node1", "--cluster-cidr=" + clusterCIDR, "--proxy-mode=ipvs"}

	p, err := start(a.ns(), filepath.Join(a.dir, t.Name()+"-refused.log"), a.env(), binary, append(flags, "--mode-fallback=false")...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.stop(syscall.SIGKILL) })
	until(t, "the agent refuses to start", func() error {
		if p.ended() == nil {
			return errors.New("it runs")
		}
		return nil
	})
	var exit *exec.ExitError
	if !errors.As(p.err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("it ended with %v, want exit status 1", p.err)
	}
	refusals := 0
	for line := range strings.Lines(p.output()) {
		if strings.Contains(line, "mode ipvs cannot run here: ") && strings.Contains(line, "modeFallback is off") {
			refusals++
		}
	}
	if refusals != 1 {
		t.Errorf("%d lines say why it does not start, want 1:\n%s", refusals, p.output())
	}

	p, err = start(a.ns(), filepath.Join(a.dir, t.Name()+"-fallback.log"), a.env(), binary, flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.stop(syscall.SIGKILL)
		if t.Failed() {
			t.Log(p.tail())
		}
	})
	answeredBy(t, c.lab.Host("pod2"), clusterIP(svc), "pod1", "pod3")
	if err := c.endpoints("fallback", "pod4"); err != nil { // the rules above may be those of before
		t.Fatal(err)
	}
	answeredBy(t, c.lab.Host("pod2"), clusterIP(svc), "pod4")
	if n := strings.Count(p.output(), "The chosen mode cannot run here; iptables mode is used instead"); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
	const metrics = "127.0.0.1:10249"
	until(t, "the fallback is in the metrics", func() error {
		return get(a.ns(), metrics, "/metrics", 200, `sluice_mode_fallback{from="ipvs",reason="`, `to="iptables"} 1`,
			`sluice_proxy_mode{configured="ipvs",mode="iptables"} 1`)
	})
	if err := get(a.ns(), metrics, "/proxyMode", 200, "iptables"); err != nil {
		t.Error(err)
	}
	until(t, "an Event tells of the fallback", func() error {
		events, err := c.client.EventsV1().Events("default").List(context.Background(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.Reason == "ModeFallback" && e.Type == "Warning" && e.Regarding.Kind == "Node" && e.Regarding.Name == "node1" &&
				strings.Contains(e.Note, "mode ipvs cannot run here") {
				return nil
			}
		}
		return fmt.Errorf("none among %d Events", len(events.Items))
	})
}
