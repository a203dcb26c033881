package uml

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

const initPackage = "github.com/sluice-proxy/sluice/test/uml/guest"

func buildInit(ctx context.Context) (string, error) {
	return build(ctx, "init", func(to string) []string {
		return []string{"build", "-buildvcs=false", "-race=false", "-o", to, initPackage}
	})
}

// buildTest builds the test binary of the package in dir: without the race
// detector and cgo, for the one needs address space that User-Mode Linux has
// not, and the other libraries at their host's places.
func buildTest(ctx context.Context, dir string) (string, error) {
	name := fmt.Sprintf("%x.test", sha256.Sum256([]byte(dir)))
	return build(ctx, name[:12]+".test", func(to string) []string {
		return []string{"test", "-c", "-buildvcs=false", "-race=false", "-o", to, "."}
	})
}

// build calls the go command in the working directory, and keeps what it makes
// from one run to the next: it then sees that nothing is to be done. Runs at
// the same time take turns.
func build(ctx context.Context, name string, args func(to string) []string) (string, error) {
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("sluice-uml-%d", os.Getuid()))
	if err := os.Mkdir(dir, 0o700); err != nil && !os.IsExist(err) {
		return "", err
	}
	if fi, err := os.Lstat(dir); err != nil || !fi.IsDir() || fi.Mode().Perm() != 0o700 || int(fi.Sys().(*syscall.Stat_t).Uid) != os.Getuid() {
		return "", fmt.Errorf("%s is not a folder of this user alone (%v)", dir, err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, name+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	to := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", args(to)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go %s: %w: %s", strings.Join(cmd.Args[1:], " "), err, out)
	}
	return to, nil
}
