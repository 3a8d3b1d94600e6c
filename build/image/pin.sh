#!/usr/bin/env bash
# Writes into the Dockerfile ($1, build/Dockerfile) which digests the tags of its bases stand for now: NAME:TAG becomes NAME:TAG@sha256:….
# Started again, it takes the tags' newest digests. Pulls the bases, so it wants their registry, and docker or podman.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
dockerfile=${1:-$here/../Dockerfile}

mapfile -t bases < <(sed -n 's/^ARG [A-Z]*_IMAGE=//p' "$dockerfile")
[ ${#bases[@]} -gt 0 ] || { echo "pin: no line 'ARG …_IMAGE=' in $dockerfile" >&2; exit 1; }
declare -A pinned
for base in "${bases[@]}"; do
  tagged=${base%@*}
  "$here/container" pull --quiet "$tagged" >/dev/null || { echo "pin: $tagged cannot be pulled; $dockerfile is as it was" >&2; exit 1; }
  digest=$("$here/container" image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$tagged" |
    grep -F "${tagged%:*}@" | head -1 | grep -o 'sha256:[0-9a-f]\{64\}' || true)
  [ -n "$digest" ] || { echo "pin: the registry tells no digest of $tagged; $dockerfile is as it was" >&2; exit 1; }
  pinned[$base]=$tagged@$digest
done
for base in "${bases[@]}"; do
  sed -i "s|^\(ARG [A-Z]*_IMAGE=\)$base\$|\1${pinned[$base]}|" "$dockerfile"
  echo "pin: ${pinned[$base]}" >&2
done
