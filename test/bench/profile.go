package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// profile saves a page of the program's metrics server. It is up a moment after
// the start.
func (t *trial) profile(ctx context.Context, name, page string) {
	err := await(ctx, 30*time.Second, "the metrics server is up", func() error { return t.fetch(ctx, name, page) })
	if err != nil {
		progress("no profile %s: %v", name, err)
	}
}

func (t *trial) fetch(ctx context.Context, name, page string) error {
	transport := &http.Transport{DialContext: t.node.DialContext}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:10249"+page, nil)
	if err != nil {
		return err
	}
	answer, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("get %s: %s", page, answer.Status)
	}
	out, err := os.Create(filepath.Join(t.s.profiles, t.name()+"-"+t.program+"-"+name))
	if err != nil {
		return err
	}
	defer out.Close()
	_, err = io.Copy(out, answer.Body)
	return err
}
