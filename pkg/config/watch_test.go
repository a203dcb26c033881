package config

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

type change struct {
	next         *Config
	hot, restart []string
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func startWatch(t *testing.T, c *Config) (<-chan change, *logBuffer) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	changes, ended := make(chan change, 10), make(chan error)
	log := &logBuffer{}
	go func() {
		ended <- Watch(ctx, c, slog.New(slog.NewTextHandler(log, nil)), func(next *Config, hot, restart []string) {
			changes <- change{next, hot, restart}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("watch: %v", err)
		}
	})
	return changes, log
}

func nextChange(t *testing.T, changes <-chan change) change {
	t.Helper()
	select {
	case c := <-changes:
		return c
	case <-time.After(20 * time.Second):
		t.Fatal("the change of the file was not noticed")
		panic("unreachable")
	}
}

func waitForLog(t *testing.T, log *logBuffer, part string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(log.String(), part); {
		if time.Now().After(deadline) {
			t.Fatalf("log lacks %q:\n%s", part, log)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// replace changes a file as editors do, in one step.
func replace(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestWatchFile(t *testing.T) {
	path := writeFile(t, kubeProxyHeader+"mode: ipvs\n")
	changes, log := startWatch(t, load(t, "--config="+path, "-v=1"))

	replace(t, path, kubeProxyHeader+"mode: ipvs\nclusterCIDR: 10.0.0.0/8\nlogging: {verbosity: 4}\n")
	got := nextChange(t, changes)
	if diff := cmp.Diff([][]string{{"clusterCIDR"}, nil}, [][]string{got.hot, got.restart}); diff != "" {
		t.Errorf("(-want +got):\n%s", diff) // -v on the command line wins over the verbosity
	}
	if len(got.next.ClusterCIDRs) != 1 {
		t.Errorf("cluster CIDRs %v", got.next.ClusterCIDRs)
	}

	replace(t, path, kubeProxyHeader+"mod: ipvs\n")
	waitForLog(t, log, "mod: there is no such field")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	waitForLog(t, log, "Cannot read the configuration file")

	// Written in place. The difference is to the last good content.
	if err := os.WriteFile(path, []byte(kubeProxyHeader+"mode: nftables\nclusterCIDR: 10.0.0.0/8\nnodePortAddresses: [all]\nenableProfiling: true"), 0o600); err != nil {
		t.Fatal(err)
	}
	got = nextChange(t, changes)
	if diff := cmp.Diff([][]string{{"nodePortAddresses"}, {"enableProfiling", "mode"}}, [][]string{got.hot, got.restart}); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if n := strings.Count(log.String(), "is not valid"); n != 1 {
		t.Errorf("%d reports of an invalid file, want 1:\n%s", n, log)
	}
}

// TestWatchConfigMap changes the file as the kubelet does in a ConfigMap volume:
// file -> ..data/file, ..data -> a folder, and ..data is replaced.
func TestWatchConfigMap(t *testing.T) {
	volume := t.TempDir()
	publish := func(name, content string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(volume, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(volume, name, "config.conf"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(name, filepath.Join(volume, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(volume, "..data_tmp"), filepath.Join(volume, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	publish("..1", kubeProxyHeader)
	path := filepath.Join(volume, "config.conf")
	if err := os.Symlink(filepath.Join("..data", "config.conf"), path); err != nil {
		t.Fatal(err)
	}
	changes, _ := startWatch(t, load(t, "--config="+path))
	for i, name := range []string{"..2", "..3"} {
		publish(name, kubeProxyHeader+"conntrack: {min: "+strings.Repeat("1", i+1)+"}\n")
		if err := os.RemoveAll(filepath.Join(volume, ".."+string(rune('1'+i)))); err != nil {
			t.Fatal(err)
		}
		got := nextChange(t, changes)
		if diff := cmp.Diff([]string{"conntrack.min"}, got.hot); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestWatchSeesWhatChangedBeforeItStarted(t *testing.T) {
	path := writeFile(t, kubeProxyHeader)
	c := load(t, "--config="+path)
	replace(t, path, kubeProxyHeader+"mode: ipvs\n")
	changes, _ := startWatch(t, c)
	if got := nextChange(t, changes); !cmp.Equal(got.restart, []string{"mode"}) {
		t.Errorf("restart %q", got.restart)
	}
}

// An agent that fell back from ipvs is not told to restart for the mode that the
// file has asked for all along.
func TestWatchAfterFallback(t *testing.T) {
	path := writeFile(t, kubeProxyHeader+"mode: ipvs\n")
	c, err := load(t, "--config="+path).WithMode(ModeIPTables)
	if err != nil {
		t.Fatal(err)
	}
	changes, _ := startWatch(t, c)
	replace(t, path, kubeProxyHeader+"mode: ipvs\nconntrack: {min: 1}\n")
	got := nextChange(t, changes)
	if got.next.Mode != ModeIPTables || !cmp.Equal(got.hot, []string{"conntrack.min"}) || len(got.restart) > 0 {
		t.Errorf("mode %q, hot %q, restart %q", got.next.Mode, got.hot, got.restart)
	}
	replace(t, path, kubeProxyHeader+"mode: nftables\nconntrack: {min: 1}\nnodePortAddresses: [all]")
	if got := nextChange(t, changes); got.next.Mode != ModeNFTables || !cmp.Equal(got.restart, []string{"mode"}) {
		t.Errorf("mode %q, hot %q, restart %q", got.next.Mode, got.hot, got.restart)
	}
}

func TestWatchWithoutFile(t *testing.T) {
	if err := Watch(t.Context(), load(t), slog.New(slog.DiscardHandler), nil); err != nil {
		t.Error(err)
	}
}
