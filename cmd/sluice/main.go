// Command sluice is the per-node Service dataplane of a Kubernetes cluster. Its
// command line is kube-proxy's: without a subcommand it takes the same flags and
// does the same. This package turns a command line into a Config and an exit
// status; what the agent does is pkg/app's.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/component-base/logs"

	"github.com/sluice-proxy/sluice/pkg/app"
	"github.com/sluice-proxy/sluice/pkg/config"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	// The first signal asks for a clean stop; from then on a second one kills.
	context.AfterFunc(ctx, stop)
	status := execute(ctx, os.Args[1:], os.Stdout, os.Stderr, actions{app.Run, app.Cleanup, app.InitOnly})
	logs.FlushLogs()
	os.Exit(status)
}

// action is what one start of the program does with its configuration.
type action func(ctx context.Context, cfg *config.Config, log *slog.Logger) error

// actions are the doors to the agent.
type actions struct{ run, cleanup, initOnly action }

// execute runs a command line and returns the exit status: 0 after a clean end,
// 1 after an error, which is one line a problem: on stderr as it is before logging
// is set up, through the log afterwards.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer, do actions) int {
	root := newCommand(do)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var logged *loggedError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &logged):
		logged.log.Error("Sluice has stopped", "err", logged.err)
	default:
		for line := range strings.Lines(err.Error()) {
			fmt.Fprintf(stderr, "sluice: %s\n", strings.TrimSuffix(line, "\n"))
		}
	}
	return 1
}

// loggedError is an error from the time after logging was set up.
type loggedError struct {
	log *slog.Logger
	err error
}

func (e *loggedError) Error() string { return e.err.Error() }

func newCommand(do actions) *cobra.Command {
	root := configured("sluice", do, do.run)
	root.Short = "The Service dataplane of a Kubernetes node, in kube-proxy's place"
	root.Long = `Sluice watches Services and EndpointSlices and makes the kernel of this node forward
their traffic. Flags and the configuration file are kube-proxy's.`
	root.Args = func(cmd *cobra.Command, args []string) error {
		for _, arg := range args {
			if arg != "" { // kube-proxy forgives an empty argument
				return fmt.Errorf("unknown command %q: see sluice --help", arg)
			}
		}
		return nil
	}
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetGlobalNormalizationFunc(config.NormalizeFlag)

	run := configured("run", do, do.run)
	run.Short = "Run the agent (the default)"
	cleanup := configured("cleanup", do, do.cleanup)
	cleanup.Short = "Remove every rule that Sluice or kube-proxy wrote, and exit"
	root.AddCommand(run, cleanup, versionCommand())
	return root
}

// configured makes a command that takes kube-proxy's flags, and does what
// --version, --write-config-to, --cleanup and --init-only ask for, or else act.
func configured(name string, do actions, act action) *cobra.Command {
	flags := config.NewFlags()
	version := versionFlag("false")
	cmd := &cobra.Command{
		Use:  name,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if version.asked() {
				return version.print(cmd.OutOrStdout())
			}
			cfg, err := flags.Load()
			if err != nil {
				return err
			}
			log, err := config.SetupLogging(cfg)
			if err != nil {
				return err
			}
			cliflag.PrintFlags(cmd.Flags())
			for _, warning := range cfg.Warnings {
				log.Warn(warning)
			}
			if err := dispatch(cmd.Context(), cfg, log, do, act); err != nil {
				return &loggedError{log, err}
			}
			return nil
		},
	}
	flags.AddTo(cmd.Flags())
	version.addTo(cmd.Flags())
	_ = cmd.MarkFlagFilename("config", "yaml", "yml", "json")
	return cmd
}

func dispatch(ctx context.Context, cfg *config.Config, log *slog.Logger, do actions, act action) error {
	switch {
	case cfg.WriteConfigTo != "":
		return writeConfig(cfg, log)
	case cfg.Cleanup:
		act = do.cleanup
	case cfg.InitOnly:
		act = do.initOnly
	}
	err := act(ctx, cfg, log)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil // stopped because it was told to
	}
	return err
}

func writeConfig(cfg *config.Config, log *slog.Logger) error {
	text, err := cfg.YAML()
	if err != nil {
		return err
	}
	if err := os.WriteFile(cfg.WriteConfigTo, text, 0o644); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	log.Info("Wrote configuration", "file", cfg.WriteConfigTo)
	if cfg.HealthzAddr == "" || cfg.MetricsAddr == "" {
		log.Warn("A file cannot turn a listener off: with it, the one that a flag turned off listens on its default address", "file", cfg.WriteConfigTo)
	}
	return nil
}
