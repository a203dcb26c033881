// Package docs checks what the documents say: that the flags, targets, metrics,
// pages, files and names in them exist, that rules and commands that they quote are
// those of the sources, or of a kernel with IPVS, and that examples parse. It must not know how anything
// works.
package docs
