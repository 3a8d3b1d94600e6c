#!/bin/sh
# What the image starts: `lambda` (the default) the function, `serve` the API on port 8080, `bitnet …` the engine's command line.
# `serve` takes MODEL_PATH or MODEL_S3_URI, else the one *.gguf file that is mounted in /models, else the demo model.
set -eu

fail() { printf 'bitnet: %s\n' "$*" >&2; exit 2; }

case "${1:-lambda}" in
  lambda)
    [ -n "${AWS_LAMBDA_RUNTIME_API:-}" ] ||
      fail "not on Lambda (AWS_LAMBDA_RUNTIME_API is not set); start the image with 'serve' for http://localhost:8080, or with 'bitnet --help'"
    exec python -m function.runtime
    ;;
  serve)
    [ $# -eq 1 ] || fail "'serve' takes no arguments but environment variables, got '$2'"
    export HOST="${HOST:-0.0.0.0}"
    if [ -z "${MODEL_PATH:-}${MODEL_S3_URI:-}" ]; then
      set -- /models/*.gguf
      [ $# -eq 1 ] || fail "MODEL_PATH must name one of the models in /models: $*"
      if [ -e "$1" ]; then
        export MODEL_PATH="$1"
      else
        echo "bitnet: no *.gguf in /models: the demo model" >&2
      fi
    fi
    exec python -m function.local
    ;;
  health) # of the container's first process: where it serves, the API must answer; otherwise it is enough that it runs
    case "$(tr '\0' ' ' </proc/1/cmdline)" in
      *function.local* | *"start.sh serve"*) ;;
      *) exit 0 ;;
    esac
    exec python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:${PORT:-8080}/health', timeout=4)"
    ;;
  bitnet)
    exec "$@"
    ;;
  *)
    fail "'$1' is no way to start: lambda, serve and bitnet are"
    ;;
esac
