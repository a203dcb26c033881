// Package app wires a Config to the parts of the agent and runs them. Nobody but
// cmd/sluice imports it.
package app

import (
	"context"
	"errors"
	"log/slog"

	"github.com/sluice-proxy/sluice/pkg/config"
)

var errNotWired = errors.New("the agent is not wired yet")

// Run runs the agent until ctx ends, and leaves the dataplane in place.
func Run(ctx context.Context, cfg *config.Config, log *slog.Logger) error { return errNotWired }

// Cleanup removes everything that Sluice or kube-proxy wrote to the node.
func Cleanup(ctx context.Context, cfg *config.Config, log *slog.Logger) error { return errNotWired }

// InitOnly does the initialization that needs full privileges.
func InitOnly(ctx context.Context, cfg *config.Config, log *slog.Logger) error { return errNotWired }
