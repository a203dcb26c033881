package watch

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/sluice-proxy/sluice/pkg/convert"
)

// How long a file must have looked the same before it is read: editors write in
// several steps. An empty or vanished file is more often a step on the way than
// a wish.
const (
	settle      = 20 * time.Millisecond
	settleGone  = 100 * time.Millisecond
	settleEmpty = time.Second
)

// maxManifest bounds a file's size.
const maxManifest = 64 << 20

// stamp tells versions of a file apart. The zero stamp is a file that is not
// there.
type stamp struct {
	there    bool
	size     int64
	modified time.Time
	info     os.FileInfo
}

func stampOf(path string) stamp {
	info, err := os.Stat(path) // follows links: a mounted ConfigMap's files are some
	if err != nil || !info.Mode().IsRegular() {
		return stamp{}
	}
	return stamp{true, info.Size(), info.ModTime(), info}
}

func (s stamp) same(o stamp) bool {
	return s.there == o.there && (!s.there || (s.size == o.size && s.modified.Equal(o.modified) && os.SameFile(s.info, o.info)))
}

// file is one manifest file.
type file struct {
	name    string
	read    stamp // of what objects were made from, or was refused
	objects []*fileObject

	touched bool      // the kernel says that it changed; its stamp may not show it
	seen    stamp     // what it looked like last
	since   time.Time // since when it has looked so
}

// fileObject is an object in a file.
type fileObject struct {
	kind kind
	line int
	record
}

// pending says whether the file is to be read, and when.
func (f *file) pending() (time.Time, bool) {
	if !f.touched && f.seen.same(f.read) {
		return time.Time{}, false
	}
	wait := settle
	if len(f.objects) > 0 {
		switch {
		case !f.seen.there:
			wait = settleGone
		case f.seen.size == 0:
			wait = settleEmpty
		}
	}
	return f.since.Add(wait), true
}

// folder is what is known of a folder of manifests. It belongs to one goroutine.
type folder struct {
	dir, nodeName string
	log           *slog.Logger
	report        *reporter
	conv          convert.Converter

	files   map[string]*file
	ignored map[string]bool // kinds already named in the log
	version uint64          // of the last object that changed
	changed bool            // since the last write
	lost    bool            // the folder cannot be read
}

func newFolder(dir, nodeName string, log *slog.Logger, report *reporter) *folder {
	return &folder{dir: dir, nodeName: nodeName, log: log, report: report,
		files: map[string]*file{}, ignored: map[string]bool{}, changed: true}
}

// touch says that a file may have changed even if it does not look so; an empty
// name stands for every file.
func (d *folder) touch(name string) {
	for _, f := range d.files {
		if name == "" || name == f.name {
			f.touched = true
		}
	}
}

// next says when to look again because a file will have settled.
func (d *folder) next() (time.Time, bool) {
	var first time.Time
	found := false
	for _, f := range d.files {
		if at, ok := f.pending(); ok && (!found || at.Before(first)) {
			first, found = at, true
		}
	}
	return first, found
}

// look reads what has settled, or everything if now says so.
func (d *folder) look(now time.Time, everything bool) error {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		if !d.lost && !everything {
			d.log.Warn("manifests folder cannot be read; the last known state stays in force", "err", err)
		}
		d.lost = true
		return err
	}
	if d.lost {
		d.log.Info("manifests folder can be read again", "dir", d.dir)
		d.lost = false
	}
	for _, e := range entries {
		if name := e.Name(); isManifest(name) && d.files[name] == nil {
			d.files[name] = &file{name: name, since: now}
		}
	}
	for _, name := range d.names() {
		f := d.files[name]
		if s := stampOf(filepath.Join(d.dir, name)); !s.same(f.seen) {
			f.seen, f.since = s, now
		}
		if at, ok := f.pending(); ok && (everything || !now.Before(at)) {
			d.readFile(f, now)
		}
	}
	return nil
}

func (d *folder) names() []string {
	names := make([]string, 0, len(d.files))
	for name := range d.files {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (d *folder) readFile(f *file, now time.Time) {
	path := filepath.Join(d.dir, f.name)
	if !f.seen.there {
		d.report.report(path, nil)
		delete(d.files, f.name)
		d.changed = d.changed || len(f.objects) > 0
		return
	}
	if f.seen.size > maxManifest {
		d.refuse(f, path, 1, fmt.Sprintf("larger than %d bytes", maxManifest))
		return
	}
	data, err := os.ReadFile(path)
	if s := stampOf(path); !s.same(f.seen) {
		f.seen, f.since = s, now // it was being written meanwhile
		return
	}
	if err != nil {
		d.refuse(f, path, 1, err.Error())
		return
	}
	p, err := parseManifests(data)
	var bad *parseError
	if errors.As(err, &bad) {
		d.refuse(f, path, bad.line, bad.text)
		return
	}
	f.read, f.touched = f.seen, false
	d.accept(f, path, p)
}

// refuse reports a file that cannot be used. What it said before stays.
func (d *folder) refuse(f *file, path string, line int, why string) {
	f.read, f.touched = f.seen, false
	text := why
	if len(f.objects) > 0 {
		text += "; the file's last good content stays in force"
	}
	d.report.report(path, []problem{{fmt.Sprintf("%s:%d", path, line), text}})
}

// accept takes what a file says now. An object that is as before keeps its
// record, and so goes unnoticed further down.
func (d *folder) accept(f *file, path string, p *parsed) {
	var found []problem
	for _, w := range p.warnings {
		found = append(found, problem{fmt.Sprintf("%s:%d", path, w.line), w.text})
	}
	for name, line := range p.ignored {
		if !d.ignored[name] {
			d.ignored[name] = true
			d.log.Info("manifest of a kind that is not used", "kind", name, "file", fmt.Sprintf("%s:%d", path, line))
		}
	}
	before := map[objectID]*fileObject{}
	for _, o := range f.objects {
		before[o.id()] = o
	}
	var objects []*fileObject
	for _, m := range p.objects {
		o, texts := d.convert(m)
		for _, text := range texts {
			found = append(found, problem{fmt.Sprintf("%s:%d", path, m.line), text})
		}
		if o == nil {
			continue
		}
		if was := before[o.id()]; was != nil && was.sameAs(o) {
			o.record = was.record
		} else {
			d.version++
			o.version = d.version
		}
		objects = append(objects, o)
	}
	f.objects = objects
	d.changed = true
	d.report.report(path, found)
}

// objectID names an object among those of all kinds.
type objectID struct {
	kind kind
	key  key
}

func (o *fileObject) id() objectID { return objectID{o.kind, o.key} }

func (o *fileObject) sameAs(other *fileObject) bool {
	return reflect.DeepEqual(o.service, other.service) &&
		reflect.DeepEqual(o.slice, other.slice) && reflect.DeepEqual(o.node, other.node) &&
		reflect.DeepEqual(o.serviceCIDR, other.serviceCIDR)
}

// convert completes an object as the API server would, and converts it. It
// returns nil for one that is not used.
func (d *folder) convert(m manifest) (*fileObject, []string) {
	o := &fileObject{line: m.line}
	var skip convert.Skip
	var texts []string
	switch obj := m.obj.(type) {
	case *corev1.Service:
		if obj.Namespace == "" {
			obj.Namespace = corev1.NamespaceDefault
		}
		o.kind, o.key = services, key{obj.Namespace, obj.Name}
		o.service, skip, texts = d.conv.Service(obj)
	case *discoveryv1.EndpointSlice:
		if obj.Namespace == "" {
			obj.Namespace = corev1.NamespaceDefault
		}
		for i := range obj.Ports {
			discoveryDefaults(&obj.Ports[i])
		}
		o.kind, o.key = endpointSlices, key{obj.Namespace, obj.Name}
		o.slice, skip, texts = d.conv.Slice(obj)
	case *corev1.Node:
		if d.nodeName == "" || obj.Name != d.nodeName {
			return nil, nil
		}
		o.kind, o.key = nodes, key{"", obj.Name}
		o.node, texts = d.conv.Node(obj)
	case *networkingv1.ServiceCIDR:
		o.kind, o.key = serviceCIDRs, key{"", obj.Name}
		o.serviceCIDR, texts = d.conv.ServiceCIDR(obj)
	}
	object := o.kind.String() + " " + o.key.String()
	if o.name == "" {
		return nil, []string{o.kind.String() + " without metadata.name is ignored"}
	}
	for i := range texts {
		texts[i] = object + ": " + texts[i]
	}
	switch skip {
	case "":
		return o, texts
	case convert.SkipNoClusterIP, convert.SkipNoService, convert.SkipAddressType:
		// No controller will come and fill it in.
		texts = append(texts, fmt.Sprintf("%s is ignored: %s", object, skip))
	}
	return nil, texts
}

// discoveryDefaults does what the API server's defaulting of discovery.k8s.io/v1
// does to a port: without a name it has the empty one.
func discoveryDefaults(p *discoveryv1.EndpointPort) {
	if p.Name == nil {
		p.Name = new(string)
	}
}

// write gives the store what all files together say.
func (d *folder) write(w *writer) {
	if !d.changed {
		return
	}
	d.changed = false
	type place struct {
		file string
		line int
	}
	first := map[objectID]place{}
	var all [kinds][]*record
	for _, name := range d.names() {
		f := d.files[name]
		path := filepath.Join(d.dir, name)
		var repeats []problem
		for _, o := range f.objects {
			at := o.id()
			if p, ok := first[at]; ok {
				repeats = append(repeats, problem{fmt.Sprintf("%s:%d", path, o.line),
					fmt.Sprintf("%s %s is ignored: it is already in %s:%d", o.kind, o.key, p.file, p.line)})
				continue
			}
			first[at] = place{name, o.line}
			all[o.kind] = append(all[o.kind], &o.record)
		}
		d.report.report("repeats in "+path, repeats)
	}
	for k, list := range all {
		w.replace(kind(k), list)
	}
	w.store.Publish()
}
