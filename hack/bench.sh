#!/bin/bash
# bench.sh MODE [flags of test/bench]: measures Sluice and kube-proxy side by side
# (test/bench/README.md says how) and prints the table. MODE is iptables, ipvs or
# nftables. The defaults take about twenty minutes, most of them for kube-proxy.
# Where the kernel has no IPVS, ipvs mode is measured in a User-Mode Linux.
# It needs root over network namespaces; a plain user gets that from a user
# namespace, where the kernel allows it.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-iptables}
[ $# -eq 0 ] || shift
hack/tools.sh etcd kube-apiserver kube-proxy
[ -x bin/sluice ] || make --no-print-directory build
SLUICE_TOOLS=$(hack/tools.sh --dir)
export SLUICE_TOOLS
go build -o bin/bench ./test/bench

inside=()
if [ "$(id -u)" != 0 ]; then
	inside=(unshare --user --map-root-user --net --mount --pid --fork --mount-proc bash -c
		'mount -t tmpfs tmpfs /run && mount -t sysfs sysfs /sys && ip link set lo up && exec "$@"' --)
	if ! "${inside[@]}" true 2>/dev/null; then
		echo "bench.sh: not root, and this kernel gives plain users no namespaces: run it as root" >&2
		exit 1
	fi
fi
exec "${inside[@]}" bin/bench -mode "$mode" "$@"
