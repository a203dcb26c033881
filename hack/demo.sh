#!/bin/bash
# demo.sh [MODE]: builds hack/demo and runs it on bin/sluice and examples/. The
# program makes its own network namespaces and takes everything away again.
set -euo pipefail
cd "$(dirname "$0")/.."
go build -o bin/demo ./hack/demo
exec bin/demo --agent bin/sluice --manifests examples --mode "${1:-iptables}"
