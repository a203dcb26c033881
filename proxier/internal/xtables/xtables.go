// Package xtables runs the iptables programs for the proxiers that write
// xtables rules (iptables, and the few static rules of ipvs): it finds out
// which variant of iptables the host uses, restores payloads, and reads rules
// back. It knows text and processes; it does not know what the rules mean.
package xtables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// Variant is which kernel interface the iptables programs use. A host must use
// one for everything: rules of both are evaluated, one after the other.
type Variant string

// The variants. Auto is for Detect's caller only.
const (
	Auto   Variant = "auto"
	Legacy Variant = "legacy" // setsockopt, x_tables
	NFT    Variant = "nft"    // nf_tables through its compatibility layer
)

// Programs are the three commands of one variant and family. Each is a path,
// or a path and an applet name for a multi-call binary.
type Programs struct {
	Family  model.Family
	Variant Variant
	Command []string // iptables
	Restore []string // iptables-restore
	Save    []string // iptables-save
}

// ErrNotFound says that a variant's programs are not installed.
var ErrNotFound = errors.New("no iptables programs found")

// Find returns the programs of a variant. It looks for iptables-legacy-restore
// and the like, then for the plain names if those are of this variant, then for
// the multi-call binaries xtables-legacy-multi and xtables-nft-multi.
func Find(variant Variant, family model.Family) (Programs, error) {
	base := "iptables"
	if family == model.IPv6 {
		base = "ip6tables"
	}
	p := Programs{Family: family, Variant: variant}
	named := base + "-" + string(variant)
	if a, err := exec.LookPath(named); err == nil {
		r, err1 := exec.LookPath(named + "-restore")
		s, err2 := exec.LookPath(named + "-save")
		if err1 == nil && err2 == nil {
			p.Command, p.Restore, p.Save = []string{a}, []string{r}, []string{s}
			return p, nil
		}
	}
	if m, err := exec.LookPath("xtables-" + string(variant) + "-multi"); err == nil {
		p.Command, p.Restore, p.Save = []string{m, base}, []string{m, base + "-restore"}, []string{m, base + "-save"}
		return p, nil
	}
	if a, err := exec.LookPath(base); err == nil && plainVariant(a) == variant {
		r, err1 := exec.LookPath(base + "-restore")
		s, err2 := exec.LookPath(base + "-save")
		if err1 == nil && err2 == nil {
			p.Command, p.Restore, p.Save = []string{a}, []string{r}, []string{s}
			return p, nil
		}
	}
	return Programs{}, fmt.Errorf("%w: %s, variant %s", ErrNotFound, base, variant)
}

// plainVariant asks `iptables --version`, which ends in (legacy) or (nf_tables);
// versions before 1.8 say nothing and are legacy.
func plainVariant(path string) Variant {
	out, err := exec.Command(path, "--version").Output()
	switch {
	case err != nil:
		return ""
	case strings.Contains(string(out), "nf_tables"):
		return NFT
	}
	return Legacy
}

// Detect returns the variant that the host uses, with the reason. The kubelet
// leaves a hint chain in the mangle table of the right one (KEP-3178); after
// that the variant with more rules wins, since whoever runs there decided; an
// empty host gets its distribution's default.
func Detect(ctx context.Context, family model.Family) (Variant, string, error) {
	nft, errNFT := Find(NFT, family)
	legacy, errLegacy := Find(Legacy, family)
	switch {
	case errNFT != nil && errLegacy != nil:
		return "", "", errNFT
	case errNFT != nil:
		return Legacy, "only the legacy programs are installed", nil
	case errLegacy != nil:
		return NFT, "only the nft programs are installed", nil
	}
	inNFT, inLegacy := census(ctx, nft), census(ctx, legacy)
	switch {
	case inNFT.hint:
		return NFT, "the kubelet's hint chain is in nf_tables", nil
	case inLegacy.hint:
		return Legacy, "the kubelet's hint chain is in the legacy tables", nil
	case inNFT.rules > inLegacy.rules:
		return NFT, "the host has its rules in nf_tables", nil
	case inLegacy.rules > inNFT.rules:
		return Legacy, "the host has its rules in the legacy tables", nil
	}
	if a, err := exec.LookPath(strings.TrimSuffix(nft.base(), "-restore")); err == nil {
		if v := plainVariant(a); v != "" {
			return v, "it is the host's default", nil
		}
	}
	return NFT, "both are installed, neither is in use", nil
}

func (p Programs) base() string {
	if p.Family == model.IPv6 {
		return "ip6tables"
	}
	return "iptables"
}

type tally struct {
	hint  bool
	rules int
}

// census counts rules without loading the legacy modules where they are not in
// use: reading a legacy table would create it.
func census(ctx context.Context, p Programs) tally {
	var t tally
	if p.Variant == Legacy && !LegacyInUse(p.Family) {
		return t
	}
	out, err := command(ctx, p.Save).Output()
	if err != nil {
		return t
	}
	for line := range strings.Lines(string(out)) {
		switch {
		case strings.HasPrefix(line, ":KUBE-IPTABLES-HINT"), strings.HasPrefix(line, ":KUBE-KUBELET-CANARY"):
			t.hint = true
		case strings.HasPrefix(line, "-A"):
			t.rules++
		}
	}
	return t
}

// LegacyInUse says whether any legacy table of a family exists. Reading one would
// create it.
func LegacyInUse(family model.Family) bool {
	file := "/proc/thread-self/net/ip_tables_names" // /proc/net is of the process's first thread
	if family == model.IPv6 {
		file = "/proc/thread-self/net/ip6_tables_names"
	}
	data, err := os.ReadFile(file)
	return err == nil && len(data) > 0
}

func command(ctx context.Context, argv []string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, argv[0], append(argv[1:len(argv):len(argv)], args...)...)
}

// Probe returns a go-iptables handle on the programs, for probing features and
// for removing single rules. It cannot drive multi-call binaries.
func (p Programs) Probe() (*goiptables.IPTables, error) {
	if len(p.Command) != 1 {
		return nil, fmt.Errorf("probe %s: it is a multi-call binary", p.Command[0])
	}
	proto := goiptables.ProtocolIPv4
	if p.Family == model.IPv6 {
		proto = goiptables.ProtocolIPv6
	}
	return goiptables.New(goiptables.IPFamily(proto), goiptables.Timeout(5), goiptables.Path(p.Command[0]))
}
