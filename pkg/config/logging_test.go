package config

import (
	"testing"

	"k8s.io/klog/v2"
)

func TestApplyVerbosity(t *testing.T) {
	apply := func(c *Config) {
		t.Helper()
		if err := ApplyVerbosity(c); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { apply(load(t)) })
	apply(load(t, "-v=6"))
	if !klog.V(6).Enabled() || klog.V(7).Enabled() {
		t.Errorf("-v=6: V(6) %t, V(7) %t", klog.V(6).Enabled(), klog.V(7).Enabled())
	}
	apply(load(t, "-v=1", "--vmodule=logging_test=9"))
	if !klog.V(9).Enabled() {
		t.Errorf("--vmodule=logging_test=9 has no effect on this file")
	}
	apply(load(t, "-v=1"))
	if klog.V(2).Enabled() {
		t.Errorf("V(2) is enabled after -v=1")
	}
}
