package watch

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/sluice-proxy/sluice/pkg/state"
)

// Manifests follows a folder of YAML (or JSON) files that hold Services,
// EndpointSlices, ServiceCIDRs and the own Node, several to a file or in a List.
// Files end in .yaml, .yml or .json; subfolders and names that start with a dot
// do not count. Its fields are set before Run and not changed afterwards.
//
// A file that does not parse is reported with its line, and its last good
// content stays in force. Of an object that is in two files, the one in the
// file that comes first by name counts.
type Manifests struct {
	Dir   string
	Store *state.Store // written by nobody else while Run runs

	// NodeName says which Node is the own one; others are ignored.
	NodeName string

	Log      *slog.Logger
	Stats    *Stats      // nil: not counted
	Problems ProblemFunc // nil: logged

	// KeepOrigins keeps endpoints' names and zones; see convert.Converter.
	KeepOrigins bool

	// notify, if not nil, takes fsnotify's place in tests.
	notify func(dir string) notifier
}

// Run follows the folder until ctx ends, and then returns nil. It returns an
// error only if the folder cannot be read at the start; if that happens later,
// the store keeps what it has. The store is marked synced after the first look.
func (m *Manifests) Run(ctx context.Context) error {
	stats := m.Stats
	if stats == nil {
		stats = &Stats{}
	}
	f := newFolder(m.Dir, m.NodeName, m.Log, &reporter{to: m.Problems, log: m.Log, stats: stats})
	f.conv.KeepOrigins = m.KeepOrigins
	open := m.notify
	if open == nil {
		open = func(dir string) notifier { return openFsnotify(dir, m.Log) }
	}
	n := open(m.Dir) // before the first look, so that nothing falls in between
	defer n.close()
	if err := f.look(time.Now(), true); err != nil {
		return fmt.Errorf("read manifests: %w", err)
	}
	w := newWriter(m.Store, stats)
	f.write(w)

	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	rearm := func() {
		again.Stop()
		if at, ok := f.next(); ok {
			again.Reset(max(time.Until(at), time.Millisecond))
		}
	}
	rearm()
	for {
		select {
		case <-ctx.Done():
			return nil
		case name := <-n.changed(): // the kernel saw a change
			f.touch(name)
		case <-poll.C: // it may have missed one: another machine's, on NFS
			n.renew()
		case <-again.C: // a file may have settled
		}
		if err := f.look(time.Now(), false); err != nil {
			m.Log.Debug("manifests folder cannot be read", "err", err)
		}
		f.write(w)
		rearm()
	}
}

// pollEvery is how often the folder is looked at without being told of a
// change.
const pollEvery = 10 * time.Second

// notifier tells of changes in a folder.
type notifier interface {
	changed() <-chan string // names of files that may have changed
	renew()                 // the folder may be a new one of the same name
	close()
}

type fsNotifier struct {
	dir     string
	watcher *fsnotify.Watcher // nil: only polling is left
	names   chan string
	done    chan struct{}
}

func openFsnotify(dir string, log *slog.Logger) notifier {
	n := &fsNotifier{dir: dir, names: make(chan string, 64), done: make(chan struct{})}
	w, err := fsnotify.NewWatcher()
	if err == nil {
		if err = w.Add(dir); err != nil {
			_ = w.Close()
		}
	}
	if err != nil {
		log.Warn("manifests folder cannot be watched, changes are found by polling", "dir", dir, "every", pollEvery, "err", err)
		return n
	}
	n.watcher = w
	go n.run()
	return n
}

func (n *fsNotifier) run() {
	for {
		name := ""
		select {
		case <-n.done:
			return
		case e, ok := <-n.watcher.Events:
			if !ok {
				return
			}
			name = filepath.Base(e.Name)
		case _, ok := <-n.watcher.Errors: // too many events: some are lost
			if !ok {
				return
			}
		}
		select {
		case n.names <- name:
		case <-n.done:
			return
		}
	}
}

func (n *fsNotifier) changed() <-chan string { return n.names }

func (n *fsNotifier) renew() {
	if n.watcher != nil {
		_ = n.watcher.Add(n.dir) // the same folder twice is once
	}
}

func (n *fsNotifier) close() {
	close(n.done)
	if n.watcher != nil {
		_ = n.watcher.Close()
	}
}

// isManifest says whether a file of the folder counts: not what editors leave
// beside it (.x.swp, x.yaml~, 4913), nor the ..data of a mounted ConfigMap.
func isManifest(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	switch strings.ToLower(filepath.Ext(name)) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}
