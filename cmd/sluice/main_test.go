package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/component-base/logs"

	"github.com/sluice-proxy/sluice/pkg/config"
)

// Logging is set up once in a process, so every command line runs in a process of
// its own: the test binary, which then is the program with a fake agent.
const asProgram = "SLUICE_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) == "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop)
	status := execute(ctx, os.Args[1:], os.Stdout, os.Stderr, fakeActions)
	logs.FlushLogs()
	os.Exit(status)
}

// fakeActions print what they were called for. The node's name chooses how run
// ends.
var fakeActions = actions{
	run: func(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
		fmt.Println("run", cfg.Mode)
		switch cfg.NodeName {
		case "fails":
			return errors.New("port 10256 is taken\nby another")
		case "waits":
			<-ctx.Done()
			return fmt.Errorf("watch: %w", ctx.Err())
		case "stuck":
			<-ctx.Done()
			fmt.Println("stopping")
			select {}
		case "logs":
			log.Info("hello", "n", 1)
			log.Debug("hidden")
			log.Warn("careful")
		}
		return nil
	},
	cleanup: func(_ context.Context, cfg *config.Config, _ *slog.Logger) error {
		fmt.Println("cleanup", cfg.Mode)
		return nil
	},
	initOnly: func(_ context.Context, cfg *config.Config, _ *slog.Logger) error {
		fmt.Println("init-only", cfg.Mode)
		return nil
	},
}

func program(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	// Under the race detector a process waits a second before it exits.
	cmd.Env = append(os.Environ(), asProgram+"=1", "GORACE=atexit_sleep_ms=0")
	return cmd
}

func runProgram(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := program(t.Context(), args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

func TestCommandLines(t *testing.T) {
	quiet := "--nodeport-addresses=primary" // without it there is a warning
	bad := filepath.Join(t.TempDir(), "bad.conf")
	if err := os.WriteFile(bad, []byte("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmod: ipvs\niptables: {syncPeriod: 1}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args   string
		stdout string
		stderr string
		status int
	}{
		{quiet, "run iptables\n", "", 0},
		{"--mode=ipvs " + quiet, "run ipvs\n", "", 0},
		{"--proxy_mode=nftables", "run nftables\n", "", 0},
		{"run --mode=nftables", "run nftables\n", "", 0},
		{"--mode=nftables run", "run nftables\n", "", 0},
		{"--cleanup --mode=nftables", "cleanup nftables\n", "", 0},
		{"cleanup --mode=nftables", "cleanup nftables\n", "", 0},
		{"--init-only --mode=nftables", "init-only nftables\n", "", 0},
		{"--foo", "", "sluice: unknown flag: --foo\n", 1},
		{"foo", "", "sluice: unknown command \"foo\": see sluice --help\n", 1},
		{"run foo", "", "sluice: unknown command \"foo\" for \"sluice run\"\n", 1},
		{"--mode=x --oom-score-adj=9999", "", "sluice: --proxy-mode: \"x\" is none of iptables, ipvs, nftables\nsluice: --oom-score-adj: 9999 is not within -1000 to 1000\n", 1},
		{"--config=" + bad, "", "sluice: " + bad + ": iptables.syncPeriod: 1 is not a duration such as \"30s\" or \"1h15m\"\nsluice: " + bad + ": mod: there is no such field: did you mean mode?\n", 1},
		{"--config=/nonexistent", "", "sluice: --config: open /nonexistent: no such file or directory\n", 1},
		{"--version=x", "", "sluice: invalid argument \"x\" for \"--version\" flag: \"x\" is none of true, false, raw, vX.Y.Z\n", 1},
	} {
		stdout, stderr, status := runProgram(t, strings.Fields(tc.args)...)
		if stdout != tc.stdout || stderr != tc.stderr || status != tc.status {
			t.Errorf("sluice %s: status %d, want %d\nstdout %q, want %q\nstderr %q, want %q", tc.args, status, tc.status, stdout, tc.stdout, stderr, tc.stderr)
		}
	}
}

func TestEmptyArgumentIsForgiven(t *testing.T) {
	if stdout, stderr, status := runProgram(t, "--mode=nftables", ""); stdout != "run nftables\n" || status != 0 {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

func TestVersion(t *testing.T) {
	for _, args := range []string{"--version", "--version=true", "version", "run --version"} {
		stdout, _, status := runProgram(t, strings.Fields(args)...)
		if rest, ok := strings.CutPrefix(stdout, "Sluice "); status != 0 || !ok || strings.TrimSpace(rest) == "" || strings.Contains(rest, "$Format") {
			t.Errorf("%s: status %d, %q", args, status, stdout)
		}
	}
	if stdout, _, _ := runProgram(t, "--version=raw"); !strings.HasPrefix(stdout, "version.Info{Major:") {
		t.Errorf("raw: %q", stdout)
	}
	if stdout, stderr, _ := runProgram(t, "--version=v0.0.0-test", "--mode=nftables"); stdout != "run nftables\n" {
		t.Errorf("setting the version: %q %q", stdout, stderr)
	}
}

func TestErrorOfTheAgentIsOneLine(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		_, stderr, status := runProgram(t, "--hostname-override=fails", "--mode=nftables", "--logging-format="+format)
		if status != 1 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, "port 10256 is taken") {
			t.Errorf("%s: status %d, stderr %q", format, status, stderr)
		}
	}
}

func TestLogging(t *testing.T) {
	_, stderr, _ := runProgram(t, "--hostname-override=logs", "--mode=nftables", "--enable-dsr")
	for i, want := range []string{`W.*"--enable-dsr is ignored`, `I."hello" n=1`, `W."careful"`} {
		line := strings.Split(stderr, "\n")[i]
		level, text, _ := strings.Cut(want, ".")
		if !strings.HasPrefix(line, level) || !strings.Contains(line, strings.TrimPrefix(text, "*")) {
			t.Errorf("line %d: %q lacks %s", i, line, want)
		}
	}
	if strings.Contains(stderr, "hidden") {
		t.Errorf("a debug message is in the log without -v=4:\n%s", stderr)
	}
	if _, stderr, _ := runProgram(t, "--hostname-override=logs", "--mode=nftables", "-v=4"); !strings.Contains(stderr, `"hidden"`) {
		t.Errorf("a debug message is missing with -v=4:\n%s", stderr)
	}
	_, stderr, _ = runProgram(t, "--hostname-override=logs", "--mode=nftables", "--logging-format=json")
	for line := range strings.Lines(stderr) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry["msg"] == nil {
			t.Errorf("not JSON: %q", line)
		}
	}
}

func TestWriteConfigTo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "defaults.conf")
	if stdout, stderr, status := runProgram(t, "--mode=nftables", "--write-config-to="+path); status != 0 || stdout != "" {
		t.Fatalf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
	if stdout, stderr, status := runProgram(t, "--config="+path); status != 0 || stdout != "run nftables\n" || stderr != "" {
		t.Errorf("with the file: status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
	if _, stderr, _ := runProgram(t, "--metrics-bind-address=", "--write-config-to="+path); !strings.Contains(stderr, "cannot turn a listener off") {
		t.Errorf("without a metrics server: stderr %q", stderr)
	}
	if _, stderr, status := runProgram(t, "--mode=nftables", "--write-config-to=/nonexistent/f"); status != 1 || !strings.Contains(stderr, "write configuration") {
		t.Errorf("to nowhere: status %d, stderr %q", status, stderr)
	}
}

func startProgram(t *testing.T, args ...string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	cmd := program(ctx, args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); line != "run nftables\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return cmd, lines
}

func TestSignalsEndCleanly(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		cmd, lines := startProgram(t, "--hostname-override=waits", "--mode=nftables")
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, lines)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %v, want status 0", sig, err)
		}
	}
}

func TestSecondSignalKills(t *testing.T) {
	cmd, lines := startProgram(t, "--hostname-override=stuck", "--mode=nftables")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if line, err := lines.ReadString('\n'); line != "stopping\n" {
		t.Fatalf("%q, %v", line, err)
	}
	// The handler is taken away just after ctx ends: signal until it is.
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
			if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGTERM {
				t.Errorf("ended by %v, want SIGTERM", cmd.ProcessState)
			}
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}
