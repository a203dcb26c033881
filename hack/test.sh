#!/bin/bash
# test.sh [go test arguments]: runs go test and names at the end what was skipped.
# Tests of the kernel need root over a network namespace. A plain user gets that
# from a user namespace, where the kernel allows it; where it does not, those
# tests skip and say so.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${TMPDIR:-/tmp}
[ $# -gt 0 ] || set -- ./...
report=$(mktemp "$out/testreport.XXXXXX")
trap 'rm -f "$report"' EXIT
go build -o "$report" ./hack/testreport

SLUICE_TOOLS=$(hack/tools.sh --dir)
export SLUICE_TOOLS

inside=()
if [ "$(id -u)" != 0 ]; then
	if unshare --user --map-root-user --net --mount true 2>/dev/null; then
		# There is no network inside: fetch and compile everything before.
		go test -race -run '^$' "$@" >/dev/null
		export GOPROXY=off
		# /run is root's; iptables (xtables.lock) and ip netns write there.
		# /sys shows the devices of the namespace that mounted it.
		inside=(unshare --user --map-root-user --net --mount --pid --fork --mount-proc bash -c
			'mount -t tmpfs tmpfs /run && mount -t sysfs sysfs /sys && ip link set lo up && exec "$@"' --)
	else
		echo "test.sh: not root, and this kernel gives plain users no namespaces: the tests of the kernel will be skipped" >&2
	fi
fi
status=0
"${inside[@]}" go test -race -timeout 30m -json "$@" | "$report" || status=1
exit $status
