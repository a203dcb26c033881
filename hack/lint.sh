#!/bin/bash
# lint.sh: formatting, go vet and staticcheck at the version of hack/tools/lint.
set -euo pipefail
cd "$(dirname "$0")/.."
files=$(git ls-files '*.go' | xargs gofmt -l)
if [ -n "$files" ]; then
	echo "not formatted by gofmt: $files" >&2
	exit 1
fi
go vet ./...
bin=$(hack/tools.sh --dir)/staticcheck
mkdir -p "$(dirname "$bin")"
# Building is quick when Go's cache has it, and always the pinned version.
(cd hack/tools/lint && go build -o "$bin" honnef.co/go/tools/cmd/staticcheck)
"$bin" ./...
if command -v shellcheck >/dev/null; then
	shellcheck hack/*.sh .ci/run
fi
echo "lint: clean"
