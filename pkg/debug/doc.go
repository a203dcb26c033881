// Package debug serves what operators look at: on kube-proxy's metrics address
// (10249) the pages that kube-proxy has there, and under /sluice/ what this
// node does for every Service and why.
//
// It only reads: Sets and Snapshots are immutable, so a page costs the dataplane
// nothing but its own memory, and lists are written row by row. It must not
// decide anything, nor know how a ruleset is made: it is given functions.
package debug
