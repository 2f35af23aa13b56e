#!/usr/bin/env bash
# An environment in which `rosepo compile` builds programs for accelerators that this machine does not have: the project
# with libtpu, or with jax's CUDA wheels (4 GB). Neither needs a device, and neither belongs in the default environment.
# bash launch/compile_env.sh tpu|gpu    (VENV=... chooses the folder; default .venv-compile-tpu, .venv-compile-gpu)
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
case "${1:-}" in
  tpu | gpu) ;;
  *) echo "usage: bash launch/compile_env.sh tpu|gpu" >&2; exit 2 ;;
esac
export VENV=${VENV:-.venv-compile-$1}
environment "$1,dev"
echo "$VENV/bin/rosepo compile --config=configs/llama3_8b.py --topology=$([ "$1" = tpu ] && echo v5e:4x4 || echo h200:1x1x8)"
