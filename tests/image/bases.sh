#!/usr/bin/env bash
# Prints the build arguments that name the image's bases: none where they are here or can be pulled; else those of a stand-in, a
# Debian bookworm with Python by debootstrap, slimmed as Debian's own slim image is. Needs root for that.
set -euo pipefail
cd "$(dirname "$0")/../.."
container=build/image/container
standin=localhost/bitnet-standin:bookworm

say() { printf 'bases: %s\n' "$*" >&2; }

available=1
for base in $(sed -n 's/^ARG [A-Z]*_IMAGE=//p' build/Dockerfile); do
  "$container" image inspect "$base" >/dev/null 2>&1 || timeout 120 "$container" pull --quiet "$base" >/dev/null 2>&1 || available=
done
[ -z "$available" ] || exit 0

if ! "$container" image inspect "$standin" >/dev/null 2>&1; then
  say "the bases cannot be pulled; making $standin in their place (a minute or two)"
  command -v debootstrap >/dev/null || { say "debootstrap is needed: apt-get install --yes debootstrap"; exit 1; }
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  chmod 755 "$root" # it becomes the image's /, and mktemp's 700 would let nobody but root in
  mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' | grep -v security | head -1 || true)
  debootstrap --variant=minbase --include=ca-certificates,netbase,tzdata,python3,python3-pip bookworm "$root" "${mirror:-http://deb.debian.org/debian}" >&2
  cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true # of a proxy that ends TLS
  chroot "$root" update-ca-certificates >/dev/null 2>&1
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
  ln -s /usr/bin/python3 "$root/usr/local/bin/python"
  rm -rf "$root"/var/{cache/apt/archives/*.deb,lib/apt/lists/*,log/*} "$root"/usr/share/{doc,man,locale,info}/*
  find "$root" -name __pycache__ -prune -exec rm -rf {} +
  tar -C "$root" -c . | "$container" import - "$standin" >/dev/null
fi
say "stand-in: $standin"
echo "--build-arg BUILDER_IMAGE=$standin --build-arg PYTHON_IMAGE=$standin"
