// Package e2e runs the agent's binary, in the role and with the arguments that
// deploy/ ships, against a real kube-apiserver and etcd, and looks at what the
// traffic of pods and clients does. The cluster is a netlab.Lab; nodes that run
// the agent are its namespaces, Pods are echo servers in theirs, and Services and
// EndpointSlices are written by the tests themselves.
//
// It must not know how the agent works: it sees flags, ports, the API, and
// packets. Any other proxy with kube-proxy's flags can be put in its place, to
// try the tests: SLUICE_E2E_AGENT=/path/to/kube-proxy.
package e2e
