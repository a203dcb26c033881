//go:build race

package e2e

// raceDetector: if the tests run with it, so does the agent that they build.
const raceDetector = true
