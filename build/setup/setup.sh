#!/usr/bin/env bash
# Makes a Debian or Ubuntu machine ready for one make target, and does nothing where all is there already.
#   build/setup/setup.sh run    what `make run` needs: compiler, CMake, the engine's libraries, .venv with requirements/function.txt
#   build/setup/setup.sh hub    the same for `make download` and `make model`: requirements/hub.txt
#   build/setup/setup.sh test   the same for `make test` and `make check`: requirements/dev.txt and the files of fetch.py, a browser
#   build/setup/setup.sh image  the same for `make test-image`: besides, podman where Docker does not answer
#   build/setup/setup.sh chat   what `make chat` needs: .venv with requirements/chat.txt
# Where it may not install (neither root nor sudo) it prints the line to paste and exits with 1.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

packages=(g++ make cmake pkgconf libpcre2-dev zlib1g-dev nlohmann-json3-dev libcli11-dev)
case "${1:-}" in
  run) lock=requirements/function.txt ;;
  hub) lock=requirements/hub.txt ;;
  test) lock=requirements/dev.txt packages+=(curl doctest-dev qemu-user) ;;
  chat) lock=requirements/chat.txt packages=(make) ;;
  image)
    lock=requirements/dev.txt packages+=(curl doctest-dev qemu-user debootstrap)
    docker info >/dev/null 2>&1 || packages+=(podman runc containernetworking-plugins iptables)
    # Where systemd rules, the package would start a registry of its own; one test is left out instead.
    [ -d /run/systemd/system ] || packages+=(docker-registry)
    ;;
  *) fail "usage: build/setup/setup.sh run|hub|test|image|chat" ;;
esac
[ "$1" = chat ] || [ "$(uname -sm)" = "Linux x86_64" ] || fail "the engine is built for Linux on x86-64, this is $(uname -sm)"

# The browser of tests/page is Debian's Chromium. Ubuntu has it as a snap only, which cannot be run from here.
is_debian=$(. /etc/os-release 2>/dev/null && [ "$ID" = debian ] && echo yes || true)
if [ "$1" = test ] && [ "$is_debian" ]; then packages+=(chromium); fi

# The first Python that is new enough; $PYTHON wins.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      return
    fi
  done
  python=
}

# Prints those of the given packages that are not installed. A Python that can make virtual environments counts as python3-venv.
missing_packages() {
  local package
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s ' "$package"
  done
  if [ -z "$python" ]; then
    command -v python3 >/dev/null || printf 'python3 python3-venv '
  elif [ ! -x .venv/bin/python ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    printf '%s-venv ' "$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
  fi
}

install_packages() {
  local as_root=() line="apt-get update && apt-get install --yes --no-install-recommends $*"
  if [ "$(id -u)" != 0 ]; then
    # With a terminal sudo may ask for the password, without one it must not.
    if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; }; then
      as_root=(sudo)
    else
      say "packages are missing, and this user may not install them. Run this line as root, then start again:"
      printf '%s\n' "$line" >&2
      exit 1
    fi
  fi
  say "installing $*"
  "${as_root[@]}" apt-get -qq -o Acquire::Retries=3 update
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 install --yes --no-install-recommends "$@" >/dev/null
}

find_python
if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then
  read -ra missing <<<"$(missing_packages "${packages[@]}")"
  if ((${#missing[@]})); then
    install_packages "${missing[@]}"
    find_python
  fi
else
  say "not a Debian or Ubuntu machine; needed here are g++ ≥ 12, make, CMake, Python ≥ 3.11 with venv, a static glibc and PCRE2 (8 bit)," \
    "nlohmann-json, CLI11 and, for the tests, doctest and qemu-x86_64 (Debian's names: ${packages[*]} python3-venv)"
fi
[ -n "$python" ] || fail "Python 3.11 or newer is needed, found $("${PYTHON:-python3}" --version 2>/dev/null || echo none); set PYTHON=/path/to/python3"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  say "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi
# The lock last installed is kept beside the packages: an unchanged one needs no look at the index.
installed=.venv/$(basename "$lock")
if ! cmp -s "$lock" "$installed"; then
  say "installing Python packages from $lock"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r "$lock"
  cp "$lock" "$installed"
fi
if [ "$lock" = requirements/dev.txt ]; then
  .venv/bin/python build/setup/fetch.py
  if ! [ "$is_debian" ] && ! compgen -G "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}/chromium_headless_shell-*" >/dev/null; then
    say "installing Playwright's Chromium"
    .venv/bin/python -m playwright install --with-deps --only-shell chromium
  fi
fi
