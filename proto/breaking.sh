#!/usr/bin/env bash
# Holds the contracts against the last ones that others could have seen: where this branch left main; on main, the commit before.
set -euo pipefail
cd "$(dirname "$0")/.."
buf="${BUF:-.venv/bin/buf}"
main=$(git rev-parse --verify -q refs/remotes/origin/main || git rev-parse --verify -q refs/heads/main || true)
[ -n "$main" ] || { echo "breaking.sh: no main to compare with; fetch it" >&2; exit 1; }
base=$(git merge-base HEAD "$main")
if [ "$base" = "$(git rev-parse HEAD)" ]; then
  base=$(git rev-parse --verify -q HEAD^1) || { echo "breaking.sh: the first commit breaks nothing"; exit 0; }
fi
before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
git archive "$base" proto buf.yaml | tar -x -C "$before"
"$buf" breaking --against "$before"
