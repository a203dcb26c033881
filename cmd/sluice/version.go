package main

import (
	"fmt"
	"io"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/component-base/version"
)

// versionFlag is --version as every Kubernetes component has it: --version prints
// the version, --version=raw all that is known about the build, and --version=vX
// sets the version that is reported.
type versionFlag string

func (v *versionFlag) String() string { return string(*v) }
func (v *versionFlag) Type() string   { return "version" }
func (v *versionFlag) Set(s string) error {
	if strings.HasPrefix(s, "v") {
		if err := version.SetDynamicVersion(s); err != nil {
			return err
		}
		*v = "false"
		return nil
	}
	if s == "raw" {
		*v = "raw"
		return nil
	}
	on, err := strconv.ParseBool(s)
	if err != nil {
		return fmt.Errorf("%q is none of true, false, raw, vX.Y.Z", s)
	}
	*v = versionFlag(strconv.FormatBool(on))
	return nil
}

func (v *versionFlag) addTo(fs *pflag.FlagSet) {
	fs.Var(v, "version", "--version, --version=raw prints version information and quits; --version=vX.Y.Z... sets the reported version")
	fs.Lookup("version").NoOptDefVal = "true"
}

func (v *versionFlag) asked() bool { return *v == "true" || *v == "raw" }

func (v *versionFlag) print(out io.Writer) error {
	info := version.Get()
	if strings.Contains(info.GitVersion, "$Format") { // not set by the linker
		info.GitVersion = moduleVersion()
	}
	var err error
	if *v == "raw" {
		_, err = fmt.Fprintf(out, "%#v\n", info)
	} else {
		_, err = fmt.Fprintf(out, "Sluice %s\n", info.GitVersion)
	}
	return err
}

// moduleVersion is what the Go tool wrote into the binary, for builds that did
// not set a version themselves.
func moduleVersion() string {
	if build, ok := debug.ReadBuildInfo(); ok && build.Main.Version != "" && build.Main.Version != "(devel)" {
		return build.Main.Version
	}
	return "(devel)"
}

func versionCommand() *cobra.Command {
	v := versionFlag("true")
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return v.print(cmd.OutOrStdout()) },
	}
	return cmd
}
