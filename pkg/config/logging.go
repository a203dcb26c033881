package config

import (
	"flag"
	"fmt"
	"log/slog"
	"strconv"

	"github.com/go-logr/logr"
	"k8s.io/component-base/logs"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/component-base/logs/klogflags"
	"k8s.io/klog/v2"
)

// SetupLogging makes klog, the standard log package and slog's default write
// one stream in the configured format, and returns a logger on it. slog.LevelDebug
// is klog's verbosity 4. It may be called once in a process, before anything logs.
func SetupLogging(c *Config) (*slog.Logger, error) {
	gates, _, err := loggingGates(c.KubeProxy.FeatureGates)
	if err != nil {
		return nil, fmt.Errorf("set up logging: %w", err)
	}
	logs.InitLogs()
	if err := logsapi.ValidateAndApply(&c.KubeProxy.Logging, gates); err != nil {
		return nil, fmt.Errorf("set up logging: %w", err)
	}
	return slog.New(logr.ToSlogHandler(klog.Background())), nil
}

// ApplyVerbosity brings logging.verbosity and logging.vmodule of a changed
// configuration into force. SetupLogging must have been called.
func ApplyVerbosity(c *Config) error {
	logging := &c.KubeProxy.Logging
	if _, err := logs.GlogSetter(strconv.FormatUint(uint64(logging.Verbosity), 10)); err != nil {
		return fmt.Errorf("apply logging.verbosity: %w", err)
	}
	var fs flag.FlagSet
	klogflags.Init(&fs)
	if err := fs.Set("vmodule", logsapi.VModuleConfigurationPflag(&logging.VModule).String()); err != nil {
		return fmt.Errorf("apply logging.vmodule: %w", err)
	}
	return nil
}
