#!/bin/bash
# demo.sh [MODE]: builds hack/demo and runs it on bin/sluice and examples/. The
# program makes its own network namespaces and takes everything away again; mode
# ipvs runs in a virtual machine where this machine's kernel has no IPVS.
set -euo pipefail
cd "$(dirname "$0")/.."
go build -o bin/demo ./hack/demo
mode=${1:-iptables}
# On a kernel without IPVS that mode is shown in User-Mode Linux, which is slow.
set --
if [ "$mode" = ipvs ]; then
	set -- --limit 5m
fi
exec bin/demo --agent bin/sluice --manifests examples --mode "$mode" "$@"
