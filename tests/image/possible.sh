#!/usr/bin/env bash
# Whether this machine lets containers be built and run at all, tried with the engine alone, which needs no base; if not, prints why.
set -euo pipefail
cd "$(dirname "$0")/../.."
container=build/image/container
image=localhost/bitnet-possible
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cp build/out/bitnet "$folder"
printf 'FROM scratch\nCOPY bitnet /bitnet\nRUN ["/bitnet", "--version"]\n' >"$folder/Dockerfile"
why() { tail -n 1 "$folder/log"; exit 1; }
"$container" build --no-cache --tag "$image" "$folder" >"$folder/log" 2>&1 || why
"$container" run --rm --network none --read-only "$image" /bitnet --version >"$folder/log" 2>&1 || why
"$container" run --rm --publish 127.0.0.1::8080 "$image" /bitnet --version >"$folder/log" 2>&1 || why
"$container" rmi --force "$image" >/dev/null
