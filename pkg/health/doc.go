// Package health tells load balancers and probes how this node's dataplane is:
// the proxy health server (/healthz and /livez), one server for each Service
// with a healthCheckNodePort, and the question whether another service proxy is
// already alive on this node.
//
// It knows plans and the own Node. It must not know how rules get into the
// kernel, nor where objects come from: it is told when a change was queued and
// when it was in force.
package health
