package config

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// An editor or a kubelet needs several steps to change a file. Events are
	// gathered for a moment so that it is read once, and complete.
	settleTime = 50 * time.Millisecond
	// Notifications are lost where a folder is deleted and made again, and do not
	// exist on some network file systems.
	recheckTime = time.Minute
)

// Watch follows the configuration file until ctx ends, and calls onChange, on its
// own goroutine, with every new configuration and the fields that changed since
// the one before, as Diff names them. A file that cannot be read or does not
// validate is logged, once for each content, and the configuration before it
// stays in force. Without a file Watch returns at once.
//
// The folder is watched, not the file: editors replace files by renaming, and a
// ConfigMap volume changes by swapping a symbolic link beside them.
func Watch(ctx context.Context, current *Config, log *slog.Logger, onChange func(next *Config, hot, restart []string)) error {
	if current.ConfigFile == "" {
		return nil
	}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", current.ConfigFile, err)
	}
	defer notify.Close()
	w := &watcher{current: current, seen: current.fileSum, log: log, notify: notify, onChange: onChange}
	w.watchFolders()
	w.check() // it may have changed since it was loaded
	w.run(ctx)
	return nil
}

// watcher is owned by the goroutine that runs it.
type watcher struct {
	current  *Config
	seen     [sha256.Size]byte // content that was last judged, good or bad
	failure  string            // last error of reading, to log it once
	log      *slog.Logger
	notify   *fsnotify.Watcher
	onChange func(next *Config, hot, restart []string)
}

func (w *watcher) run(ctx context.Context) {
	recheck := time.NewTicker(recheckTime)
	defer recheck.Stop()
	var settled <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.notify.Events: // something in a folder changed: look soon
			if settled == nil {
				settled = time.After(settleTime)
			}
		case err := <-w.notify.Errors: // an overflow: events were lost
			w.log.Warn("Notifications of the configuration file failed", "file", w.current.ConfigFile, "err", err)
			if settled == nil {
				settled = time.After(settleTime)
			}
		case <-settled:
			settled = nil
			w.watchFolders()
			w.check()
		case <-recheck.C:
			w.watchFolders()
			w.check()
		}
	}
}

// watchFolders watches the folders of the file and of what it is a link to, which
// changes whenever a link on the way is swapped.
func (w *watcher) watchFolders() {
	folders := []string{filepath.Dir(w.current.ConfigFile)}
	if target, err := filepath.EvalSymlinks(w.current.ConfigFile); err == nil {
		if folder := filepath.Dir(target); folder != folders[0] {
			folders = append(folders, folder)
		}
	}
	have := w.notify.WatchList()
	for _, folder := range have {
		if !slices.Contains(folders, folder) {
			_ = w.notify.Remove(folder) // it may be gone already
		}
	}
	for _, folder := range folders {
		if err := w.notify.Add(folder); err != nil {
			w.log.Debug("Cannot watch a folder of the configuration file", "folder", folder, "err", err)
		}
	}
}

func (w *watcher) check() {
	data, err := os.ReadFile(w.current.ConfigFile)
	if err != nil {
		if w.failure != err.Error() {
			w.failure = err.Error()
			w.log.Error("Cannot read the configuration file, the last configuration stays in force", "err", err)
		}
		return
	}
	w.failure = ""
	sum := sha256.Sum256(data)
	if sum == w.seen {
		return
	}
	w.seen = sum
	next, err := w.current.flags.load(data)
	if err != nil {
		w.log.Error("The changed configuration file is not valid, the last configuration stays in force", "err", err)
		return
	}
	if chosen := w.current.chosen; chosen != "" && chosen == next.Mode {
		// Fallen back to another mode, and still asked for the one that is
		// impossible: no reason to restart.
		if next, err = next.WithMode(w.current.Mode); err != nil {
			w.log.Error("The changed configuration file is not valid, the last configuration stays in force", "err", err)
			return
		}
	}
	for _, warning := range next.Warnings {
		if !slices.Contains(w.current.Warnings, warning) {
			w.log.Warn(warning)
		}
	}
	hot, restart := Diff(w.current, next)
	w.current = next
	if len(hot)+len(restart) > 0 {
		w.onChange(next, hot, restart)
	}
}
