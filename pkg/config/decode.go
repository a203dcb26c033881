package config

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	"sigs.k8s.io/yaml"
)

const kubeProxyKind = "KubeProxyConfiguration"

// documents is what a configuration file says, without defaults. A document that
// is not in the file is nil.
type documents struct {
	kubeProxy *v1alpha1.KubeProxyConfiguration
	sluice    *SluiceConfiguration
	warnings  []string
}

// decode reads the bytes of a configuration file. Fields that kube-proxy once had
// become warnings; kube-proxy itself forgives every unknown field, and so turns a
// misspelt setting into a default that nobody asked for.
func decode(data []byte) (documents, []Problem) {
	var docs documents
	var ps problems
	reader := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for n := 1; ; n++ {
		raw, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			ps.add("", "read document %d: %v", n, err)
			break
		}
		docs.decodeOne(n, raw, &ps)
	}
	if docs.kubeProxy == nil && docs.sluice == nil && len(ps) == 0 {
		ps.add("", "no configuration in it: wanted a document of kind %s (%s) or %s (%s)",
			kubeProxyKind, v1alpha1.SchemeGroupVersion, SluiceKind, SluiceAPIVersion)
	}
	return docs, ps
}

func (d *documents) decodeOne(n int, raw []byte, ps *problems) {
	tree, err := parseYAML(raw)
	if err != nil {
		for _, line := range yamlErrorLines(err) {
			ps.add("", "document %d: %s", n, line)
		}
		return
	}
	if tree == nil {
		return // nothing but comments
	}
	fields, ok := tree.(map[string]any)
	if !ok {
		ps.add("", "document %d: must be a mapping of fields, not %s", n, kindOf(tree))
		return
	}
	switch id := fmt.Sprint(fields["apiVersion"], ", ", fields["kind"]); id {
	case v1alpha1.SchemeGroupVersion.String() + ", " + kubeProxyKind:
		if d.kubeProxy != nil {
			ps.add("", "document %d: a second %s", n, kubeProxyKind)
			return
		}
		d.kubeProxy = &v1alpha1.KubeProxyConfiguration{}
		d.dropRemoved(fields)
		d.convertGates(fields)
		newDecoder(d.kubeProxy, "", ps).decode(fields)
	case SluiceAPIVersion + ", " + SluiceKind:
		if d.sluice != nil {
			ps.add("", "document %d: a second %s", n, SluiceKind)
			return
		}
		d.sluice = &SluiceConfiguration{}
		newDecoder(d.sluice, SluiceKind, ps).decode(fields)
	default:
		ps.add("", "document %d: apiVersion and kind are %q and %q: wanted %q and %q, or %q and %q", n,
			stringOf(fields["apiVersion"]), stringOf(fields["kind"]),
			v1alpha1.SchemeGroupVersion, kubeProxyKind, SluiceAPIVersion, SluiceKind)
	}
}

// removedFields were in KubeProxyConfiguration in earlier releases and are still
// found in files that were written then.
var removedFields = map[string]string{
	"udpIdleTimeout":         "it belonged to the userspace mode",
	"udpTimeoutMilliseconds": "it belonged to the userspace mode",
	"resourceContainer":      "the kubelet manages cgroups",
	"conntrack.max":          "use conntrack.maxPerCore and conntrack.min",
}

func (d *documents) dropRemoved(fields map[string]any) {
	for path, why := range removedFields {
		parent, name := fields, path
		if outer, inner, nested := strings.Cut(path, "."); nested {
			parent, _ = fields[outer].(map[string]any)
			name = inner
		}
		if _, found := parent[name]; found {
			delete(parent, name)
			d.warnings = append(d.warnings, fmt.Sprintf("%s: kube-proxy has removed this field (%s): ignored", path, why))
		}
	}
	slices.Sort(d.warnings)
}

// convertGates reads featureGates as it was written before Kubernetes 1.10: a
// string of name=bool pairs (kubernetes/kubernetes#57962).
func (d *documents) convertGates(fields map[string]any) {
	old, isString := fields["featureGates"].(string)
	if !isString {
		return
	}
	gates := map[string]any{}
	for pair := range strings.SplitSeq(old, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		on, err := strconv.ParseBool(strings.TrimSpace(value))
		if err != nil {
			if pair != "" {
				d.warnings = append(d.warnings, fmt.Sprintf("featureGates: %q is not a name=true or name=false pair: ignored", pair))
			}
			continue
		}
		gates[strings.TrimSpace(name)] = on
	}
	fields["featureGates"] = gates
	d.warnings = append(d.warnings, "featureGates: a string is the notation of old releases: write a mapping of name: true or false")
}

func parseYAML(raw []byte) (any, error) {
	asJSON, err := yaml.YAMLToJSONStrict(raw)
	if err != nil {
		return nil, err
	}
	var tree any
	dec := json.NewDecoder(bytes.NewReader(asJSON))
	dec.UseNumber() // a float64 would not keep large integers
	err = dec.Decode(&tree)
	return tree, err
}

// yamlErrorLines gives each complaint of the YAML library a line of its own.
func yamlErrorLines(err error) []string {
	var lines []string
	for line := range strings.Lines(err.Error()) {
		line = strings.TrimSpace(line)
		line = strings.TrimPrefix(line, "yaml: ")
		if line != "" && line != "unmarshal errors:" && !strings.HasSuffix(line, "unmarshal errors:") {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		lines = []string{oneLine(err.Error())}
	}
	return lines
}

// decoder writes a tree of plain values into a struct, and names the field in
// every complaint. encoding/json alone cannot: it forgets the path as soon as a
// type has an UnmarshalJSON of its own, as durations have.
type decoder struct {
	target reflect.Value
	prefix string // of the document, for messages
	paths  []string
	ps     *problems
}

func newDecoder(into any, prefix string, ps *problems) *decoder {
	target := reflect.ValueOf(into).Elem()
	return &decoder{target: target, prefix: prefix, paths: fieldPaths(target.Type(), ""), ps: ps}
}

func (d *decoder) decode(fields map[string]any) { d.value("", fields, d.target) }

func (d *decoder) add(path, format string, args ...any) {
	d.ps.add(joinPath(d.prefix, path), format, args...)
}

func (d *decoder) value(path string, from any, into reflect.Value) {
	if from == nil {
		return // null is unset
	}
	if isLeaf(into.Type()) {
		d.leaf(path, from, into)
		return
	}
	switch into.Kind() {
	case reflect.Struct:
		d.structure(path, from, into)
	case reflect.Slice:
		items, ok := from.([]any)
		if !ok {
			d.add(path, "must be a list, not %s", kindOf(from))
			return
		}
		into.Set(reflect.MakeSlice(into.Type(), len(items), len(items)))
		for i, item := range items {
			d.value(fmt.Sprintf("%s[%d]", path, i), item, into.Index(i))
		}
	case reflect.Map:
		items, ok := from.(map[string]any)
		if !ok {
			d.add(path, "must be a mapping, not %s", kindOf(from))
			return
		}
		into.Set(reflect.MakeMap(into.Type()))
		for _, key := range sortedKeys(items) {
			item := reflect.New(into.Type().Elem()).Elem()
			d.value(joinPath(path, key), items[key], item)
			into.SetMapIndex(reflect.ValueOf(key), item)
		}
	default:
		panic("BUG: no way to decode a " + into.Type().String())
	}
}

func (d *decoder) structure(path string, from any, into reflect.Value) {
	fields, ok := from.(map[string]any)
	if !ok {
		d.add(path, "must be a mapping of fields, not %s", kindOf(from))
		return
	}
	known := map[string]reflect.Value{}
	jsonFields(into.Type(), func(name string, index []int) { known[name] = into.FieldByIndex(index) })
	for _, name := range sortedKeys(fields) {
		field, ok := known[name]
		if !ok {
			hint := ""
			if s := suggest(joinPath(path, name), d.paths); s != "" {
				hint = fmt.Sprintf(": did you mean %s?", joinPath(d.prefix, s))
			}
			d.add(joinPath(path, name), "there is no such field%s", hint)
			continue
		}
		d.value(joinPath(path, name), fields[name], field)
	}
}

func (d *decoder) leaf(path string, from any, into reflect.Value) {
	asJSON, err := json.Marshal(from)
	if err == nil {
		err = json.Unmarshal(asJSON, into.Addr().Interface())
	}
	if err == nil {
		return
	}
	if len(asJSON) > 60 {
		asJSON = append(asJSON[:57:57], "..."...)
	}
	var wrongType *json.UnmarshalTypeError
	switch t := into.Type(); {
	case t == reflect.TypeFor[metav1.Duration](), t == reflect.TypeFor[*metav1.Duration](), t == reflect.TypeFor[logsapi.TimeOrMetaDuration]():
		d.add(path, "%s is not a duration such as \"30s\" or \"1h15m\"", asJSON)
	case errors.As(err, &wrongType):
		d.add(path, "%s is not %s", asJSON, wantOf(wrongType.Type))
	default:
		d.add(path, "%s: %v", asJSON, err)
	}
}

// isLeaf says whether encoding/json can be trusted with the type: what it
// complains about is the value itself, not a field inside it.
func isLeaf(t reflect.Type) bool {
	if t.Implements(reflect.TypeFor[json.Unmarshaler]()) || reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()) {
		return true
	}
	switch t.Kind() {
	case reflect.Struct, reflect.Slice, reflect.Map:
		return false
	}
	return true
}

// jsonFields calls f for every field of a struct, and of the structs embedded in
// it, with the name that it has in JSON.
func jsonFields(t reflect.Type, f func(name string, index []int)) {
	for _, field := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if !field.IsExported() || name == "-" || (field.Anonymous && name == "") {
			continue
		}
		if name == "" {
			name = field.Name
		}
		f(name, field.Index)
	}
}

// fieldPaths lists every field of a struct type by its path.
func fieldPaths(t reflect.Type, prefix string) []string {
	var paths []string
	jsonFields(t, func(name string, index []int) {
		path := joinPath(prefix, name)
		paths = append(paths, path)
		if ft := t.FieldByIndex(index).Type; ft.Kind() == reflect.Struct && !isLeaf(ft) {
			paths = append(paths, fieldPaths(ft, path)...)
		}
	})
	return paths
}

func joinPath(prefix, name string) string {
	if prefix == "" {
		return name
	}
	if name == "" {
		return prefix
	}
	return prefix + "." + name
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func stringOf(v any) string {
	if v == nil {
		return ""
	}
	return fmt.Sprint(v)
}

func kindOf(v any) string {
	switch v.(type) {
	case string:
		return "text"
	case bool:
		return "true or false"
	case json.Number:
		return "a number"
	case []any:
		return "a list"
	case map[string]any:
		return "a mapping"
	}
	return "nothing"
}

func wantOf(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "text (put it in quotes)"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Uint32, reflect.Uint64, reflect.Uint:
		return "a whole number from 0 on in range"
	}
	return "a whole number in range"
}
