package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/sluice-proxy/sluice/test/uml"
)

// needsMachine says that the demo has to run on another kernel than this one.
func needsMachine(o options) bool {
	return o.mode == modeIPVS && os.Getenv(insideEnv) == "" && !uml.Native()
}

// bootTime is what a machine may take to start and end, besides the demo's limit.
const bootTime = 2 * time.Minute

// inMachine runs the demo on a kernel that has IPVS, and returns its exit status.
func inMachine(ctx context.Context, o options, stdout, stderr io.Writer) int {
	if err := uml.Supported(); err != nil {
		fmt.Fprintf(stderr, "demo: mode ipvs needs a kernel with IPVS, which this machine's is not, and %v\n", err)
		return cannotRun
	}
	var err error
	if o.self == "" {
		o.self, err = os.Executable()
	}
	if err == nil {
		o.agent, err = filepath.Abs(o.agent)
	}
	if err == nil {
		o.manifests, err = filepath.Abs(o.manifests)
	}
	if err == nil {
		o.extra, err = filepath.Abs(o.extra)
	}
	if err != nil {
		fmt.Fprintf(stderr, "demo: %v\n", err)
		return cannotRun
	}
	fmt.Fprint(stdout, "This machine's kernel has no IPVS, so a User-Mode Linux that has is started. It is slow: one core, and every packet on it.\n\n")
	color := "no"
	if o.color {
		color = "yes"
	}
	m := uml.Machine{Dir: filepath.Dir(o.agent), Readable: []string{o.manifests, o.extra}, Env: []string{insideEnv + "=1", colorEnv + "=" + color}}
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit+bootTime, fmt.Errorf("it took longer than %s", o.limit+bootTime))
	defer cancel()
	status, err := uml.Run(ctx, m, []string{o.self, "--agent=" + o.agent, "--manifests=" + o.manifests, "--extra=" + o.extra,
		"--mode=" + o.mode, "--limit=" + o.limit.String()}, stdout)
	if err != nil {
		fmt.Fprintf(stderr, "demo: %v\n", err)
		return cannotRun
	}
	return status
}
