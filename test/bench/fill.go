package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes/scheme"
)

// The numbered Services are written into etcd, as the API server would write them:
// it counts all addresses that are taken whenever it gives one away
// (ipallocator.Allocator.Used), so that 40,000 Services would take it half an hour
// of CPU time. The first one it makes itself; that is the pattern for all others.
type pattern struct {
	service *corev1.Service
	address *networkingv1.IPAddress
	slice   *discoveryv1.EndpointSlice
}

// put is an object to store.
type put struct {
	Key   []byte `json:"key"`
	Value []byte `json:"value"`
}

// fill creates numbered Services and their slices until there are as many as
// wanted.
func (c *control) fill(ctx context.Context, services int) error {
	if c.filled >= services {
		return nil
	}
	progress("creating Services %d to %d with %d endpoints each", c.filled+1, services, c.s.endpoints)
	limit := 2*time.Minute + time.Duration(services-c.filled)*10*time.Millisecond
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done in %s", limit))
	defer cancel()
	if c.filled == 0 {
		if err := c.createPattern(ctx); err != nil {
			return err
		}
		c.filled = 1
	}
	p := c.pattern
	// The API server reports and repairs Services whose addresses it does not know.
	last := numbered(services - 1)
	if err := c.store(ctx, "addresses", c.filled, services, p.addressOf); err != nil {
		return err
	}
	if err := await(ctx, time.Minute, "the API server has all addresses", func() error {
		_, err := c.client.NetworkingV1().IPAddresses().Get(ctx, last.ip.String(), cached)
		return err
	}); err != nil {
		return err
	}
	if err := c.store(ctx, "Services", c.filled, services, func(i int) ([]put, error) { return p.serviceOf(i, c.s.layout()) }); err != nil {
		return err
	}
	c.filled = services
	return await(ctx, time.Minute, "the API server has all Services", func() error { return c.has(ctx, last) })
}

// createPattern creates the first Service and reads what has come of it.
func (c *control) createPattern(ctx context.Context) (err error) {
	first, p := numbered(0), &c.pattern
	if err := c.create(ctx, first, c.s.layout().of(0, 0)); err != nil {
		return err
	}
	if p.service, err = c.client.CoreV1().Services(first.namespace).Get(ctx, first.name, metav1.GetOptions{}); err != nil {
		return err
	}
	if p.address, err = c.client.NetworkingV1().IPAddresses().Get(ctx, first.ip.String(), metav1.GetOptions{}); err != nil {
		return err
	}
	p.slice, err = c.client.DiscoveryV1().EndpointSlices(first.namespace).Get(ctx, sliceName(first), metav1.GetOptions{})
	return err
}

func (p pattern) addressOf(i int) ([]put, error) {
	r, a := numbered(i), p.address.DeepCopy()
	a.Name, a.UID, a.ResourceVersion = r.ip.String(), uuid.NewUUID(), ""
	a.Spec.ParentRef.Namespace, a.Spec.ParentRef.Name = r.namespace, r.name
	a.APIVersion, a.Kind = "networking.k8s.io/v1", "IPAddress"
	return encode("/registry/ipaddresses/"+a.Name, a, nil)
}

func (p pattern) serviceOf(i int, l layout) ([]put, error) {
	r, s, e := numbered(i), p.service.DeepCopy(), p.slice.DeepCopy()
	s.Namespace, s.Name, s.UID, s.ResourceVersion = r.namespace, r.name, uuid.NewUUID(), ""
	s.Spec.ClusterIP, s.Spec.ClusterIPs = r.ip.String(), []string{r.ip.String()}
	s.APIVersion, s.Kind = "v1", "Service"
	own := sliceObject(r, l.of(i, 0))
	e.Namespace, e.Name, e.UID, e.ResourceVersion = own.Namespace, own.Name, uuid.NewUUID(), ""
	e.Labels, e.Endpoints = own.Labels, own.Endpoints
	e.APIVersion, e.Kind = "discovery.k8s.io/v1", "EndpointSlice"
	puts, err := encode("/registry/services/specs/"+s.Namespace+"/"+s.Name, s, nil)
	if err != nil {
		return nil, err
	}
	return encode("/registry/endpointslices/"+e.Namespace+"/"+e.Name, e, puts)
}

// encode adds an object in the form in which the API server stores it.
func encode(key string, o runtime.Object, to []put) ([]put, error) {
	var value bytes.Buffer
	err := protobuf.NewSerializer(scheme.Scheme, scheme.Scheme).Encode(o, &value)
	return append(to, put{[]byte(key), value.Bytes()}), err
}

// store writes what belongs to Services, from one to before another. They come in
// order, so that who has seen the last has seen all.
func (c *control) store(ctx context.Context, what string, from, to int, of func(int) ([]put, error)) error {
	const together = 40 // etcd takes 128 writes, and 1.5 MiB, at once
	etcd := &http.Client{Transport: &http.Transport{DialContext: c.ns.DialContext}}
	defer etcd.CloseIdleConnections()
	for first := from; first < to; first += together {
		var all []put
		for i := first; i < min(first+together, to); i++ {
			puts, err := of(i)
			if err != nil {
				return err
			}
			all = append(all, puts...)
		}
		if err := transact(ctx, etcd, all); err != nil {
			return fmt.Errorf("write %s into etcd: %w", what, err)
		}
		if next := first + together; next/5000 > first/5000 && next < to {
			progress("%d of %d %s written", next/5000*5000, to, what)
		}
	}
	return nil
}

// transact writes objects in one transaction, by etcd's JSON gateway.
func transact(ctx context.Context, etcd *http.Client, all []put) error {
	type request struct {
		Put put `json:"requestPut"`
	}
	var txn struct {
		Success []request `json:"success"`
	}
	for _, p := range all {
		txn.Success = append(txn.Success, request{p})
	}
	body, err := json.Marshal(txn)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, etcdURL+"/v3/kv/txn", bytes.NewReader(body))
	if err != nil {
		return err
	}
	answer, err := etcd.Do(req)
	if err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", answer.Status, text)
	}
	return err
}

// cached asks the API server for what it knows without asking etcd: that is what it
// tells the programs.
var cached = metav1.GetOptions{ResourceVersion: "0"}

// has says whether the API server knows a Service, and its slice.
func (c *control) has(ctx context.Context, r serviceRef) error {
	if _, err := c.client.CoreV1().Services(r.namespace).Get(ctx, r.name, cached); err != nil {
		return err
	}
	_, err := c.client.DiscoveryV1().EndpointSlices(r.namespace).Get(ctx, sliceName(r), cached)
	return err
}
