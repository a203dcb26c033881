package uml

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// node is a test of the run that is shown, with what happened in it so far: an
// endless queue, so that tests that run at the same time can be shown one after
// the other.
type node struct {
	name   string
	mu     sync.Mutex
	more   *sync.Cond
	events []event
}

// event is one thing that happened in a test: a line, a subtest that began, or
// the end.
type event struct {
	line   string
	child  *node
	result string // PASS, FAIL, SKIP; ended if the run ended before the test
}

const ended = "ENDED"

func newNode(name string) *node {
	n := &node{name: name}
	n.more = sync.NewCond(&n.mu)
	return n
}

func (n *node) add(e event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, e)
	n.more.Signal()
}

func (n *node) next() event {
	n.mu.Lock()
	defer n.mu.Unlock()
	for len(n.events) == 0 {
		n.more.Wait()
	}
	e := n.events[0]
	n.events = n.events[1:]
	return e
}

// play makes t live through what the node does, until its end, and returns how
// many subtests there were.
func (n *node) play(t *testing.T) (tests int) {
	t.Helper()
	for {
		switch e := n.next(); {
		case e.child != nil:
			tests++
			t.Run(lastName(e.child.name), func(t *testing.T) { e.child.play(t) })
		case e.result == "":
			fmt.Fprintln(t.Output(), e.line)
		case e.result == "PASS":
			return tests
		case e.result == "SKIP":
			t.SkipNow()
		case e.result == "FAIL":
			t.Fail()
			return tests
		case n.name == "":
			return tests
		default:
			t.Error("the run ended before this test did")
			return tests
		}
	}
}

// parser reads what a test binary writes under -test.v=test2json: lines of the
// testing package begin with the byte mark, which is put there for this purpose.
type parser struct {
	root    *node
	open    map[string]*node
	current *node // whose output is being read
	rest    []byte
}

const mark = 0x16

func newParser(root *node) *parser {
	return &parser{root: root, open: map[string]*node{"": root}, current: root}
}

// Write is for one goroutine.
func (p *parser) Write(data []byte) (int, error) {
	p.rest = append(p.rest, data...)
	for {
		line, rest, ok := bytes.Cut(p.rest, []byte("\n"))
		if !ok {
			return len(data), nil
		}
		p.line(strings.TrimSuffix(string(line), "\r"))
		p.rest = rest
	}
}

// close ends what did not end.
func (p *parser) close() {
	if len(p.rest) > 0 {
		p.line(string(p.rest))
	}
	for _, n := range p.open {
		n.add(event{result: ended})
	}
}

var (
	switchLine = regexp.MustCompile(`^=== (RUN|NAME|CONT|PAUSE)\s+(\S*)$`)
	resultLine = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)
)

func (p *parser) line(line string) {
	// A test that writes half a line has the mark in its middle.
	text, said, marked := strings.Cut(line, string(rune(mark)))
	if !marked {
		p.output(line)
		return
	}
	if text != "" {
		p.output(text)
	}
	if m := switchLine.FindStringSubmatch(said); m != nil {
		p.turn(m[1], m[2])
		return
	}
	m := resultLine.FindStringSubmatch(said)
	n := p.open[name(m)]
	if m == nil || n == nil {
		p.output(said)
		return
	}
	n.add(event{result: m[1]})
	delete(p.open, n.name)
	p.current = p.parent(n.name)
}

func name(match []string) string {
	if match == nil {
		return "" // the root's, which has no result
	}
	return match[2]
}

// turn begins or goes on with a test.
func (p *parser) turn(verb, name string) {
	if verb == "PAUSE" {
		p.current = p.parent(name)
		return
	}
	if p.open[name] == nil && verb == "RUN" {
		n := newNode(name)
		p.open[name] = n
		p.parent(name).add(event{child: n})
	}
	if n := p.open[name]; n != nil {
		p.current = n
	}
}

// parent is the nearest test around a name that has not ended.
func (p *parser) parent(name string) *node {
	for {
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return p.root
		}
		name = name[:i]
		if n := p.open[name]; n != nil {
			return n
		}
	}
}

func (p *parser) output(line string) {
	switch {
	case line == "PASS" && p.current == p.root, line == "FAIL" && p.current == p.root:
	case strings.HasPrefix(line, "ok  \t"):
	default:
		p.current.add(event{line: strings.TrimRight(line, " ")})
	}
}

// lastName is the name of a test in its parent.
func lastName(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }
