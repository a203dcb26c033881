package watch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"sort"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	sigsjson "sigs.k8s.io/json"
)

// manifest is one object of a manifest file.
type manifest struct {
	line int // on which its document starts, from 1
	obj  runtime.Object
}

// note is something to tell about a line of a manifest file.
type note struct {
	line int
	text string
}

// parsed is what a manifest file says.
type parsed struct {
	objects  []manifest
	warnings []note         // unknown or repeated fields
	ignored  map[string]int // kinds that are not used, and a line where

	maxNodes int // of all documents together, aliases followed
}

// parseError is why a manifest file cannot be used.
type parseError note

func (e *parseError) Error() string { return e.text }

// maxNodes bounds how large a document can get by its aliases: a file without
// them has no more nodes than bytes.
func maxNodes(data []byte) int { return 10000 + 4*len(data) }

// parseManifests reads the documents of a manifest file: Services,
// EndpointSlices, Nodes, ServiceCIDRs, and Lists of them. Fields that the API does not have
// are warnings; a wrong type, or YAML that does not parse, is a *parseError and
// nothing else is returned.
func parseManifests(data []byte) (*parsed, error) {
	p := &parsed{ignored: map[string]int{}, maxNodes: maxNodes(data)}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return p, nil
		}
		if err != nil {
			return nil, within(yamlError(err), data)
		}
		if err := p.document(&doc, 0); err != nil {
			return nil, err
		}
	}
}

// parserError matches those messages of the yaml package whose line it counts
// from 0 (its parser's; its scanner's are counted from 1).
var parserError = regexp.MustCompile(`^did not find expected (',' or|key|'-'|node content|<)`)

var yamlLine = regexp.MustCompile(`^(?:yaml: )?line (\d+): `)

// yamlError takes the line number out of the yaml package's message.
func yamlError(err error) *parseError {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 1
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil {
			line = max(n, 1)
			text = text[len(m[0]):]
			if parserError.MatchString(text) {
				line++
			}
		}
	}
	return &parseError{line, text}
}

// within brings the line of an error at the end of a file, which the yaml
// package counts as one more, back into the file.
func within(e *parseError, data []byte) error {
	last := bytes.Count(bytes.TrimRight(data, "\n"), []byte("\n")) + 1
	e.line = min(e.line, last)
	return e
}

// document takes one document, or one item of a List.
func (p *parsed) document(doc *yaml.Node, depth int) error {
	if doc.Kind == yaml.DocumentNode {
		if len(doc.Content) == 0 {
			return nil
		}
		doc = doc.Content[0]
	}
	if doc.Kind == yaml.AliasNode {
		doc = doc.Alias
	}
	if doc.Kind == yaml.ScalarNode && doc.ShortTag() == "!!null" {
		return nil // an empty document
	}
	if doc.Kind != yaml.MappingNode {
		return &parseError{doc.Line, "not a Kubernetes object"}
	}
	apiVersion, kind := scalarField(doc, "apiVersion"), scalarField(doc, "kind")
	if kind == "" || apiVersion == "" {
		return &parseError{doc.Line, "an object without kind or apiVersion"}
	}
	switch apiVersion + " " + kind {
	case "v1 List", "v1 ServiceList", "v1 NodeList", "discovery.k8s.io/v1 EndpointSliceList", "networking.k8s.io/v1 ServiceCIDRList":
		return p.items(doc, depth)
	case "v1 Service":
		return p.decode(doc, &corev1.Service{})
	case "v1 Node":
		return p.decode(doc, &corev1.Node{})
	case "discovery.k8s.io/v1 EndpointSlice":
		return p.decode(doc, &discoveryv1.EndpointSlice{})
	case "networking.k8s.io/v1 ServiceCIDR":
		return p.decode(doc, &networkingv1.ServiceCIDR{})
	}
	name := apiVersion + " " + kind
	if _, ok := p.ignored[name]; !ok {
		p.ignored[name] = doc.Line
	}
	return nil
}

func (p *parsed) items(doc *yaml.Node, depth int) error {
	if depth > 8 {
		return &parseError{doc.Line, "Lists too deep in one another"}
	}
	items := field(doc, "items")
	if items == nil || items.ShortTag() == "!!null" {
		return nil
	}
	if items.Kind != yaml.SequenceNode {
		return &parseError{items.Line, "items is not a list"}
	}
	for _, item := range items.Content {
		if err := p.document(item, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// decode reads a document into obj, by way of JSON, which is what the API's
// types are defined by.
func (p *parsed) decode(doc *yaml.Node, obj runtime.Object) error {
	j := &jsonWriter{paths: map[string]int{}, left: p.maxNodes}
	err := j.node(doc, "", 0)
	p.maxNodes = j.left
	if err != nil {
		return err
	}
	strict, err := sigsjson.UnmarshalStrict(j.buf.Bytes(), obj)
	if err != nil {
		return &parseError{j.errorLine(err, doc.Line), strings.TrimPrefix(err.Error(), "json: ")}
	}
	for _, w := range strict {
		p.warnings = append(p.warnings, note{j.warningLine(w, doc.Line), w.Error()})
	}
	p.objects = append(p.objects, manifest{doc.Line, obj})
	return nil
}

func field(m *yaml.Node, name string) *yaml.Node {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == name {
			v := m.Content[i+1]
			if v.Kind == yaml.AliasNode {
				v = v.Alias
			}
			return v
		}
	}
	return nil
}

func scalarField(m *yaml.Node, name string) string {
	if v := field(m, name); v != nil && v.Kind == yaml.ScalarNode {
		return v.Value
	}
	return ""
}

// jsonWriter writes a YAML tree as JSON and remembers which line everything
// came from, so that what the JSON decoder finds can be told with its line.
type jsonWriter struct {
	buf   bytes.Buffer
	marks []mark         // ascending by offset
	paths map[string]int // "spec.ports[0].port" -> line
	left  int            // how many more nodes may come
}

type mark struct{ offset, line int }

func (j *jsonWriter) node(n *yaml.Node, path string, depth int) error {
	if j.left--; j.left < 0 || depth > 1000 {
		return &parseError{n.Line, "document too large or too deep (aliases that refer to one another?)"}
	}
	j.marks = append(j.marks, mark{j.buf.Len(), n.Line})
	switch n.Kind {
	case yaml.AliasNode:
		return j.node(n.Alias, path, depth+1)
	case yaml.ScalarNode:
		return j.scalar(n)
	case yaml.SequenceNode:
		j.buf.WriteByte('[')
		for i, c := range n.Content {
			if i > 0 {
				j.buf.WriteByte(',')
			}
			if err := j.node(c, path+"["+strconv.Itoa(i)+"]", depth+1); err != nil {
				return err
			}
		}
		j.buf.WriteByte(']')
		return nil
	case yaml.MappingNode:
		return j.mapping(n, path, depth)
	}
	return &parseError{n.Line, "unexpected YAML"}
}

func (j *jsonWriter) mapping(n *yaml.Node, path string, depth int) error {
	j.buf.WriteByte('{')
	first := true
	err := j.pairs(n, path, depth, &first, nil)
	j.buf.WriteByte('}')
	return err
}

// pairs writes a mapping's keys and values, without those in hidden. Merge keys
// ("<<") are written after the mapping's own keys, which hide theirs.
func (j *jsonWriter) pairs(n *yaml.Node, path string, depth int, first *bool, hidden map[string]bool) error {
	var merges []*yaml.Node
	own := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		if k.Kind != yaml.ScalarNode {
			return &parseError{k.Line, "a key that is not a string"}
		}
		if k.ShortTag() == "!!merge" {
			merges = append(merges, v)
			continue
		}
		if hidden[k.Value] {
			continue
		}
		own[k.Value] = true
		if !*first {
			j.buf.WriteByte(',')
		}
		*first = false
		at := k.Value
		if path != "" {
			at = path + "." + k.Value
		}
		j.paths[at] = k.Line
		j.marks = append(j.marks, mark{j.buf.Len(), k.Line})
		j.string(k.Value)
		j.buf.WriteByte(':')
		if err := j.node(v, at, depth+1); err != nil {
			return err
		}
	}
	for k := range hidden {
		own[k] = true
	}
	return j.merge(merges, path, depth, first, own)
}

func (j *jsonWriter) merge(merges []*yaml.Node, path string, depth int, first *bool, hidden map[string]bool) error {
	for _, m := range merges {
		if m.Kind == yaml.AliasNode {
			m = m.Alias
		}
		list := []*yaml.Node{m}
		if m.Kind == yaml.SequenceNode {
			list = m.Content
		}
		for _, c := range list {
			if c.Kind == yaml.AliasNode {
				c = c.Alias
			}
			if c.Kind != yaml.MappingNode {
				return &parseError{m.Line, "<< needs a mapping"}
			}
			if j.left--; j.left < 0 || depth > 1000 {
				return &parseError{m.Line, "document too large or too deep (aliases that refer to one another?)"}
			}
			if err := j.pairs(c, path, depth+1, first, hidden); err != nil {
				return err
			}
			for i := 0; i+1 < len(c.Content); i += 2 {
				hidden[c.Content[i].Value] = true
			}
		}
	}
	return nil
}

func (j *jsonWriter) string(s string) {
	b, _ := json.Marshal(s) // cannot fail: invalid UTF-8 becomes U+FFFD
	j.buf.Write(b)
}

func (j *jsonWriter) scalar(n *yaml.Node) error {
	var v any
	switch n.ShortTag() {
	case "!!null":
		j.buf.WriteString("null")
		return nil
	case "!!bool", "!!int", "!!float":
		if err := n.Decode(&v); err != nil {
			return yamlError(err)
		}
		b, err := json.Marshal(v)
		if err != nil {
			return &parseError{n.Line, fmt.Sprintf("%s is not a JSON number", n.Value)} // .inf, .nan
		}
		j.buf.Write(b)
		return nil
	}
	j.string(n.Value) // strings, and timestamps as they are written
	return nil
}

// errorLine finds the line of a decoding error by its offset into the JSON.
func (j *jsonWriter) errorLine(err error, otherwise int) int {
	offset := -1
	var typeErr *json.UnmarshalTypeError
	if errors.As(err, &typeErr) {
		offset = int(typeErr.Offset)
	} else if isSyntax, o := sigsjson.SyntaxErrorOffset(err); isSyntax {
		offset = int(o)
	}
	if offset < 0 {
		return otherwise
	}
	// The offset is that of the end of the value.
	i := sort.Search(len(j.marks), func(i int) bool { return j.marks[i].offset >= offset })
	if i == 0 {
		return otherwise
	}
	return j.marks[i-1].line
}

var quotedField = regexp.MustCompile(`field "(.*)"$`)

// warningLine finds the line of an unknown or repeated field by its path.
func (j *jsonWriter) warningLine(err error, otherwise int) int {
	if m := quotedField.FindStringSubmatch(err.Error()); m != nil {
		if line, ok := j.paths[m[1]]; ok {
			return line
		}
	}
	return otherwise
}
