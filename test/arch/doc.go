// Package arch holds the house's import rules as a test, each with its reason.
// It parses import lines only: it must not know what the packages do.
package arch
