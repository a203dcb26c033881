#!/bin/bash
# install.sh [GROUP...]: installs what building and testing needs and this
# machine lacks; silent when all is there. Groups: build, test (the
# default), image.
# On Debian and Ubuntu it uses apt; elsewhere, or without root and sudo, it says
# what to install. It never fails if everything needed is there already.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$PATH:/usr/sbin:/sbin:/usr/local/go/bin
[ $# -gt 0 ] || set -- test

# commands lists what a group needs: command, then the Debian package that has it.
commands() {
	case $1 in
	build) ;; # Go only
	test) cat <<-'END' ;;
		gcc                  gcc
		ip                   iproute2
		iptables             iptables
		ip6tables            iptables
		xtables-legacy-multi iptables
		xtables-nft-multi    iptables
		nft                  nftables
		ipset                ipset
		conntrack            conntrack
		modprobe             kmod
		sysctl               procps
		unshare              util-linux
		flock                util-linux
	END
	image) cat <<-'END' ;;
		buildah     buildah
		debootstrap debootstrap
	END
	*) echo "install.sh: unknown group $1" >&2; return 1 ;;
	esac
}

# wishes are what a group can do without: tests that need it skip themselves.
wishes() {
	case $1 in
	# A kernel with IPVS, for machines whose own has none; there is one for amd64.
	test) [ "$(uname -m)" != x86_64 ] || cat <<-'END' ;;
		linux.uml user-mode-linux
		ipvsadm   ipvsadm
	END
	esac
}

check_go() {
	local need have
	need=$(awk '$1 == "go" { print $2 }' "$root/go.mod")
	if ! command -v go >/dev/null; then
		echo "install.sh: Go $need or later is needed and not on PATH: https://go.dev/dl/" >&2
		return 1
	fi
	have=$(cd "$root" && go env GOVERSION) # with GOTOOLCHAIN=auto, the one that go downloads
	have=${have#go}
	if [ "$(printf '%s\n' "$need" "${have%%[ -]*}" | sort -V | head -1)" != "$need" ]; then
		echo "install.sh: Go $need or later is needed, this is go$have: https://go.dev/dl/" >&2
		return 1
	fi
}

lists=$(for group in "$@"; do commands "$group"; done)
missing=() packages=()
while read -r command package; do
	[ -n "$command" ] || continue
	command -v "$command" >/dev/null && continue
	missing+=("$command")
	case " ${packages[*]-} " in *" $package "*) ;; *) packages+=("$package") ;; esac
done <<<"$lists"
# -race needs the C library's headers, which no command stands for.
if [[ " $* " = *" test "* ]] && ! echo '#include <stdlib.h>' | ${CC:-gcc} -E - >/dev/null 2>&1; then
	missing+=("C headers")
	packages+=(libc6-dev)
fi

wished=()
while read -r command package; do
	[ -n "$command" ] || continue
	command -v "$command" >/dev/null || wished+=("$package")
done <<<"$(for group in "$@"; do wishes "$group"; done)"

# become_root sets sudo, or fails where there is no way to install.
become_root() {
	sudo=()
	[ "$(id -u)" = 0 ] && return
	sudo -n true 2>/dev/null || return 1
	sudo=(sudo -n)
}
apt() { "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@" >>"$log" 2>&1; }

if [ ${#packages[@]} -gt 0 ]; then
	if ! command -v apt-get >/dev/null; then
		echo "install.sh: missing: ${missing[*]}. This is no Debian or Ubuntu: install them with your package manager (Debian's packages: ${packages[*]})." >&2
		exit 1
	fi
	if ! become_root; then
		echo "install.sh: missing: ${missing[*]}. Run as root: apt-get install ${packages[*]}" >&2
		exit 1
	fi
	echo "install.sh: installing ${packages[*]}" >&2
	log=$(mktemp)
	trap 'rm -f "$log"' EXIT
	# The lists of a fresh machine are empty or old: update once, then install.
	apt update || true
	if ! apt install -y --no-install-recommends "${packages[@]}"; then
		tail -20 "$log" >&2
		echo "install.sh: apt-get install ${packages[*]} failed" >&2
		exit 1
	fi
fi
if [ ${#wished[@]} -gt 0 ] && command -v apt-get >/dev/null && become_root; then
	echo "install.sh: installing ${wished[*]}" >&2
	log=${log:-$(mktemp)}
	trap 'rm -f "$log"' EXIT
	[ ${#packages[@]} -gt 0 ] || apt update || true # the lists, as above
	for package in "${wished[@]}"; do
		apt install -y --no-install-recommends "$package" && continue
		echo "install.sh: $package cannot be installed: tests that need it will be skipped" >&2
	done
elif [ ${#wished[@]} -gt 0 ]; then
	echo "install.sh: not installed: ${wished[*]} (Debian's packages); tests that need it will be skipped" >&2
fi
check_go
