// Package boot is what package uml and the guest's init say to each other.
package boot

// Variable is the environment variable, given on the kernel's command line, that
// holds the path of the file with the Spec.
const Variable = "SLUICE_UML_SPEC"

// Bin is the guest's folder of programs that stand in for others; it is the
// first on PATH.
const Bin = "/run/uml/bin"

// Spec is what the guest's init has to do, as JSON.
type Spec struct {
	// Shared are folders of the host that lie under one of the guest's own file
	// systems (/tmp, say) and must be seen all the same; Writable can be
	// written as well, the rest of the host cannot.
	Shared   []string
	Writable string

	ModulesRoot string            // of modprobe: ModulesRoot/lib/modules/VERSION
	ModulesFrom string            // the folder VERSION
	Modules     []string          // to load
	Links       map[string]string // name in Bin, and what it is
	Rename      map[string]string // network interface, and its name in the guest

	Args []string
	Env  []string
	Dir  string
	Tag  string // what the line with the exit status begins with
}
