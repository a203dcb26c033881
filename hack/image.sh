#!/bin/bash
# image.sh TAG [pull|debootstrap]: builds the image TAG with buildah, no daemon
# needed. With `pull` the Dockerfile does all of it. Where its base images cannot
# be had, `debootstrap` makes a Debian base from packages (root needed) and puts
# bin/sluice on it: the same content. Without the second argument it tries one,
# then the other, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin
tag=${1:?usage: image.sh TAG [pull|debootstrap]}
base=${2:-}
version=${tag##*:}
export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} # works inside containers too

# The packages and what is cut away are the Dockerfile's.
packages=$(sed -n 's/.*--no-install-recommends \([a-z ,]*\) \\$/\1/p' Dockerfile | tr ' ' ,)
suite=$(sed -n 's/^ARG BASE=.*:\([a-z]*\)-slim$/\1/p' Dockerfile)

pull() {
	buildah build --build-arg "VERSION=$version" --tag "$tag" .
}

# from_debian makes the base once and keeps it as an image of its own.
from_debian() {
	[ "$(id -u)" = 0 ] || { echo "image.sh: debootstrap needs root" >&2; return 1; }
	[ -x bin/sluice ] || { echo "image.sh: bin/sluice is not there: make build" >&2; return 1; }
	local name="localhost/sluice-base:$suite" root container
	if ! buildah inspect --type image "$name" >/dev/null 2>&1; then
		root=$(mktemp -d)
		# shellcheck disable=SC2064 # root is local
		trap "rm -rf '$root'" RETURN
		debootstrap --variant=minbase --include="$packages" "$suite" "$root" >"$root.log" 2>&1 ||
			{ tail -5 "$root.log" >&2; return 1; }
		rm -rf "$root.log" "$root"/var/lib/apt/lists/* "$root"/var/cache/* "$root"/var/log/* \
			"$root"/usr/share/{doc,man,locale}
		container=$(buildah from scratch)
		buildah copy -q "$container" "$root" / >/dev/null
		buildah commit -q --rm "$container" "$name" >/dev/null
	fi
	container=$(buildah from "$name")
	buildah copy -q "$container" LICENSE /usr/share/licenses/sluice/LICENSE >/dev/null
	buildah copy -q --chmod 755 "$container" bin/sluice /usr/bin/sluice >/dev/null
	buildah config --entrypoint '["/usr/bin/sluice"]' --cmd '' "$container"
	buildah commit -q --rm "$container" "$tag" >/dev/null
}

case $base in
pull) pull ;;
debootstrap) from_debian ;;
'')
	if ! pull; then
		echo "image.sh: the Dockerfile's base images cannot be had here; making the base by debootstrap" >&2
		from_debian
	fi
	;;
*) echo "image.sh: unknown base $base" >&2; exit 1 ;;
esac
# What was built must at least start.
container=$(buildah from "$tag")
trap 'buildah rm "$container" >/dev/null' EXIT
buildah run "$container" -- /usr/bin/sluice --version
buildah images "$tag"
