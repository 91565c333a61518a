#!/usr/bin/env bash
# Checks protos/: buf's lint and format rules, and that nothing breaks since the commit that this work began from.
# buf needs no network: the one import from outside is a module of its own in .tools/googleapis (see buf.yaml).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

buf=.venv/bin/buf
export BUF_CACHE_DIR="$PWD/.tools/buf-cache"

"$buf" lint
"$buf" format protos --diff --exit-code

# The merge base with origin/main, or the parent commit where that is this commit or there is no such branch.
head=$(git rev-parse HEAD)
base=$(git merge-base HEAD origin/main 2>/dev/null || true)
if [[ -z $base || $base == "$head" ]]; then
  base=$(git rev-parse --verify --quiet 'HEAD^' || true)
fi
if [[ -z $base ]] || [[ -z $(git ls-tree "$base" -- protos) ]]; then
  echo "buf breaking: no earlier protos in this clone to compare with"
  exit
fi
old=$(mktemp -d)
trap 'rm -rf "$old"' EXIT
git archive "$base" -- protos | tar -x -C "$old"
mkdir "$old/.tools"
cp buf.yaml "$old"
cp -R .tools/googleapis "$old/.tools"
"$buf" breaking --against "$old"
echo "protos: lint, format and compatibility with ${base:0:12} are fine"
