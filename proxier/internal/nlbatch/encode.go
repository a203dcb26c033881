package nlbatch

import (
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"
)

// Encoder writes one message: Begin, then fixed headers by Raw, then attributes.
type Encoder struct{ buf []byte }

func align(n int) int { return (n + 3) &^ 3 }

// open makes room for a message's header.
func (e *Encoder) open() int {
	start := len(e.buf)
	e.buf = append(e.buf, make([]byte, unix.NLMSG_HDRLEN)...)
	return start
}

func (e *Encoder) close(start int, seq uint32) {
	b := e.buf[start:]
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint32(b[8:], seq)
	e.pad()
}

func (e *Encoder) pad() {
	for len(e.buf)%4 != 0 {
		e.buf = append(e.buf, 0)
	}
}

// Content is what has been appended, where that is no message but a part of one. It
// is valid until more is.
func (e *Encoder) Content() []byte { return e.buf }

// Begin sets the type and the flags of the message; NLM_F_REQUEST is among them
// always. It must be called before anything else.
func (e *Encoder) Begin(typ, flags uint16) {
	h := e.buf[len(e.buf)-unix.NLMSG_HDRLEN:]
	binary.NativeEndian.PutUint16(h[4:], typ)
	binary.NativeEndian.PutUint16(h[6:], flags|unix.NLM_F_REQUEST)
}

// Raw appends bytes, such as the header of a protocol within netlink.
func (e *Encoder) Raw(p ...byte) {
	e.buf = append(e.buf, p...)
	e.pad()
}

// Bytes appends an attribute.
func (e *Encoder) Bytes(typ uint16, v []byte) {
	e.attribute(typ, len(v))
	e.buf = append(e.buf, v...)
	e.pad()
}

func (e *Encoder) attribute(typ uint16, size int) {
	e.buf = binary.NativeEndian.AppendUint16(e.buf, uint16(size+unix.NLA_HDRLEN))
	e.buf = binary.NativeEndian.AppendUint16(e.buf, typ)
}

// String appends an attribute: a string with its NUL.
func (e *Encoder) String(typ uint16, s string) {
	e.attribute(typ, len(s)+1)
	e.buf = append(append(e.buf, s...), 0)
	e.pad()
}

// U8 appends an attribute.
func (e *Encoder) U8(typ uint16, v uint8) {
	e.attribute(typ, 1)
	e.buf = append(e.buf, v, 0, 0, 0)
}

// U16 appends an attribute in the machine's byte order.
func (e *Encoder) U16(typ, v uint16) {
	e.attribute(typ, 2)
	e.buf = append(binary.NativeEndian.AppendUint16(e.buf, v), 0, 0)
}

// U32 appends an attribute in the machine's byte order.
func (e *Encoder) U32(typ uint16, v uint32) {
	e.attribute(typ, 4)
	e.buf = binary.NativeEndian.AppendUint32(e.buf, v)
}

// U16BE appends an attribute in network byte order.
func (e *Encoder) U16BE(typ, v uint16) {
	e.attribute(typ, 2)
	e.buf = append(binary.BigEndian.AppendUint16(e.buf, v), 0, 0)
}

// U32BE appends an attribute in network byte order.
func (e *Encoder) U32BE(typ uint16, v uint32) {
	e.attribute(typ, 4)
	e.buf = binary.BigEndian.AppendUint32(e.buf, v)
}

// U64BE appends an attribute in network byte order.
func (e *Encoder) U64BE(typ uint16, v uint64) {
	e.attribute(typ, 8)
	e.buf = binary.BigEndian.AppendUint64(e.buf, v)
}

// Nest appends an attribute that holds those which inside appends.
func (e *Encoder) Nest(typ uint16, inside func()) {
	start := len(e.buf)
	e.attribute(typ|unix.NLA_F_NESTED, 0)
	inside()
	binary.NativeEndian.PutUint16(e.buf[start:], uint16(len(e.buf)-start))
}

// Attributes iterates over the attributes in data, with their types freed of
// flags. It ends where data is not well-formed.
func Attributes(data []byte) func(func(uint16, []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for len(data) >= unix.NLA_HDRLEN {
			size := int(binary.NativeEndian.Uint16(data))
			if size < unix.NLA_HDRLEN || size > len(data) {
				return
			}
			typ := binary.NativeEndian.Uint16(data[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if !yield(typ, data[unix.NLA_HDRLEN:size]) {
				return
			}
			data = data[min(align(size), len(data)):]
		}
	}
}

// Text is the string in an attribute, without its NUL.
func Text(v []byte) string {
	s, _, _ := strings.Cut(string(v), "\x00")
	return s
}
