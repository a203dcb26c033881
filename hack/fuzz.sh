#!/bin/bash
# fuzz.sh TIME: runs every fuzz test of the module for that long, one by one
# (go test -fuzz takes one at a time).
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-30s}
found=0
while read -r dir name; do
	found=$((found + 1))
	echo "fuzz: $name in $dir"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "./$dir/"
done < <(grep -ro --include='*_test.go' -E '^func Fuzz[A-Za-z0-9_]*\(' . |
	sed -E 's|^\./(.*)/[^/]*:func (Fuzz[A-Za-z0-9_]*)\($|\1 \2|' | sort)
if [ "$found" = 0 ]; then
	echo "fuzz: no fuzzers found" >&2
	exit 1
fi
echo "fuzz: $found fuzzers ran for $time each"
