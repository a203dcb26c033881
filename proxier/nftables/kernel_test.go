package nftables

import (
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// TestRemoveKubeProxy: the table of one family goes, everything else stays.
func TestRemoveKubeProxy(t *testing.T) {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		t.Skipf("SKIPPED: no network namespace of our own (run as root, or under unshare -Urn): %v", err)
	}
	nft := func(args ...string) string {
		out, err := exec.Command("nft", args...).CombinedOutput()
		if err != nil {
			t.Skipf("SKIPPED: nft %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	for _, table := range []string{"ip kube-proxy", "ip6 kube-proxy", "ip theirs", "inet kube-proxy"} {
		nft("add table " + table)
	}
	nft("add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100; }")
	for range 2 {
		if _, err := RemoveKubeProxy(model.IPv4); err != nil {
			t.Fatal(err)
		}
	}
	got := strings.Fields(strings.ReplaceAll(nft("list tables"), "table ", ""))
	if strings.Join(got, " ") != "ip6 kube-proxy ip theirs inet kube-proxy" {
		t.Errorf("left: %v", got)
	}
	if removed, err := RemoveKubeProxy(model.IPv6); !removed || err != nil {
		t.Errorf("IPv6: removed %v, error %v", removed, err)
	}
}
