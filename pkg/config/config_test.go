package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"
)

const kubeProxyHeader = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
const sluiceHeader = "apiVersion: sluice.io/v1alpha1\nkind: SluiceConfiguration\n"

// parse returns the flags of a command line on a machine that is called Node-A.
func parse(t testing.TB, args ...string) *Flags {
	t.Helper()
	f, err := parseErr(args...)
	if err != nil {
		t.Fatalf("parse %q: %v", args, err)
	}
	return f
}

func parseErr(args ...string) (*Flags, error) {
	f := NewFlags()
	f.Hostname = func() (string, error) { return "Node-A\n", nil }
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	fs.SetOutput(discard{})
	f.AddTo(fs)
	return f, fs.Parse(args)
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

func load(t testing.TB, args ...string) *Config {
	t.Helper()
	c, err := parse(t, args...).Load()
	if err != nil {
		t.Fatalf("load %q: %v", args, err)
	}
	return c
}

// writeFile writes a configuration file and returns its path.
func writeFile(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.conf")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// loadFile loads a KubeProxyConfiguration with these fields.
func loadFile(t testing.TB, fields string, args ...string) *Config {
	t.Helper()
	return load(t, append([]string{"--config=" + writeFile(t, kubeProxyHeader+fields)}, args...)...)
}

// sameConfig compares what the rest of the program reads.
func sameConfig(t *testing.T, got, want *Config) {
	t.Helper()
	diff := cmp.Diff(want, got,
		cmpopts.IgnoreUnexported(Config{}),
		cmpopts.IgnoreFields(Config{}, "ConfigFile", "WriteConfigTo", "Warnings", "ModeDefaulted"),
		cmpopts.EquateEmpty(),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }))
	if diff != "" {
		t.Errorf("configurations differ (-want +got):\n%s", diff)
	}
}

func wantErrorLines(t *testing.T, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, wanted %q", want)
	}
	if diff := cmp.Diff(want, strings.Split(err.Error(), "\n")); diff != "" {
		t.Errorf("error differs (-want +got):\n%s", diff)
	}
}
