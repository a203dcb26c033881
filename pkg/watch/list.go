package watch

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// protobufMagic starts every protobuf body of an API server.
var protobufMagic = []byte("k8s\x00")

// maxItem bounds one object: etcd takes 1.5 MB by default.
const maxItem = 64 << 20

// decodeList reads a list from an API server's response and yields its items
// one by one. A protobuf body is decoded as it arrives, item by item, so that
// the memory needed is that of one object: a server that answers from its watch
// cache ignores the page size that we ask for. Anything else is taken as JSON
// and decoded whole. like is an empty list of the kind.
func decodeList(body io.Reader, like runtime.Object, yield func(runtime.Object) error) (metav1.ListMeta, error) {
	r := bufio.NewReaderSize(body, 64<<10)
	head, err := r.Peek(len(protobufMagic))
	if err == nil && bytes.Equal(head, protobufMagic) {
		_, _ = r.Discard(len(protobufMagic))
		return decodeProtobufList(r, like, yield)
	}
	return decodeJSONList(r, like, yield)
}

func decodeJSONList(r io.Reader, like runtime.Object, yield func(runtime.Object) error) (metav1.ListMeta, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return metav1.ListMeta{}, err
	}
	obj, _, err := codecs.UniversalDeserializer().Decode(data, nil, like.DeepCopyObject())
	if err != nil {
		return metav1.ListMeta{}, err
	}
	m, err := meta.ListAccessor(obj)
	if err != nil {
		return metav1.ListMeta{}, err
	}
	out := metav1.ListMeta{ResourceVersion: m.GetResourceVersion(), Continue: m.GetContinue(), RemainingItemCount: m.GetRemainingItemCount()}
	return out, meta.EachListItem(obj, yield)
}

// unmarshaler is what generated API types are.
type unmarshaler interface {
	runtime.Object
	Unmarshal([]byte) error
}

// newItem returns an empty item of a list.
func newItem(list runtime.Object) (unmarshaler, error) {
	switch list.(type) {
	case *corev1.ServiceList:
		return &corev1.Service{}, nil
	case *corev1.NodeList:
		return &corev1.Node{}, nil
	case *discoveryv1.EndpointSliceList:
		return &discoveryv1.EndpointSlice{}, nil
	case *networkingv1.ServiceCIDRList:
		return &networkingv1.ServiceCIDR{}, nil
	}
	return nil, fmt.Errorf("BUG: no item type for %T", list)
}

// Field numbers of runtime.Unknown, the envelope, and of every list type, as
// generated.proto has them; all are length-delimited.
const (
	unknownRaw = 2
	listMeta   = 1
	listItems  = 2

	wireBytes = 2
)

// decodeProtobufList reads the envelope, and in it the list.
func decodeProtobufList(r *bufio.Reader, like runtime.Object, yield func(runtime.Object) error) (metav1.ListMeta, error) {
	var out metav1.ListMeta
	var buf []byte
	read := func(n uint64) ([]byte, error) {
		if n > maxItem {
			return nil, fmt.Errorf("a field of %d bytes", n)
		}
		if uint64(cap(buf)) < n {
			buf = make([]byte, n)
		}
		buf = buf[:n]
		_, err := io.ReadFull(r, buf)
		return buf, noEOF(err)
	}
	left := uint64(0) // bytes of the list that remain; 0: in the envelope
	for {
		number, n, used, err := readField(r)
		if errors.Is(err, io.EOF) && left == 0 {
			return out, nil
		}
		if err != nil {
			return out, fmt.Errorf("decode a protobuf list: %w", noEOF(err))
		}
		if left == 0 {
			if number == unknownRaw {
				left = n
			} else if _, err := read(n); err != nil {
				return out, fmt.Errorf("decode a protobuf envelope: %w", err)
			}
			continue
		}
		if n > left || used+n > left {
			return out, errors.New("decode a protobuf list: a field is longer than the list")
		}
		left -= used + n
		data, err := read(n)
		if err != nil {
			return out, fmt.Errorf("decode a protobuf list: %w", err)
		}
		if err := listField(number, data, like, &out, yield); err != nil {
			return out, err
		}
	}
}

func listField(number uint64, data []byte, like runtime.Object, out *metav1.ListMeta, yield func(runtime.Object) error) error {
	switch number {
	case listMeta:
		if err := out.Unmarshal(data); err != nil {
			return fmt.Errorf("decode list metadata: %w", err)
		}
	case listItems:
		item, err := newItem(like)
		if err != nil {
			return err
		}
		if err := item.Unmarshal(data); err != nil {
			return fmt.Errorf("decode a %T: %w", item, err)
		}
		return yield(item)
	}
	return nil
}

// readField reads the tag and length of a length-delimited field, and says how
// many bytes those took.
func readField(r *bufio.Reader) (number, length, used uint64, err error) {
	c := countingReader{r: r}
	tag, err := binary.ReadUvarint(&c)
	if err != nil {
		return 0, 0, 0, err
	}
	if tag&7 != wireBytes {
		return 0, 0, 0, fmt.Errorf("wire type %d in field %d", tag&7, tag>>3)
	}
	length, err = binary.ReadUvarint(&c)
	return tag >> 3, length, c.n, noEOF(err)
}

type countingReader struct {
	r *bufio.Reader
	n uint64
}

func (c *countingReader) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err == nil {
		c.n++
	}
	return b, err
}

// noEOF: an end in the middle of something is an error.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
