#!/bin/bash
# tools.sh [NAME...]: builds the pinned programs that tests and benchmarks run
# (their versions: hack/tools/go.mod) into the tools folder, and skips what is
# there and current. `tools.sh --dir` prints that folder: $SLUICE_TOOLS, by
# default ~/.cache/sluice-tools. The first build of kube-apiserver and etcd
# takes about ten minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/tools"
dir=${SLUICE_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/sluice-tools}
[ "${1:-}" != --dir ] || { echo "$dir"; exit; }

package() {
	case $1 in
	etcd) echo go.etcd.io/etcd/server/v3 ;;
	kube-apiserver | kube-controller-manager | kube-proxy | kubectl) echo "k8s.io/kubernetes/cmd/$1" ;;
	*) echo "tools.sh: unknown program $1" >&2; return 1 ;;
	esac
}

# version_flags gives the programs the version that they would have from their own build.
version_flags() {
	local version path=k8s.io/component-base/version
	version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
	echo "-s -w -X $path.gitVersion=$version -X $path.gitMajor=1 -X $path.gitMinor=$(cut -d. -f2 <<<"$version") -X $path.gitTreeState=clean"
}

pins=$(cat go.mod go.sum | sha256sum | cut -c1-16)
mkdir -p "$dir"
exec 9>"$dir/.lock"
flock 9 # two makes at the same time
for name in "$@"; do
	path=$(package "$name")
	[ -x "$dir/$name" ] && [ "$(cat "$dir/$name.pins" 2>/dev/null)" = "$pins" ] && continue
	echo "tools.sh: building $name into $dir" >&2
	GOFLAGS='' GOWORK=off go build -buildvcs=false -ldflags "$(version_flags)" -o "$dir/.$name.new" "$path"
	mv "$dir/.$name.new" "$dir/$name"
	echo "$pins" >"$dir/$name.pins"
done
