#!/usr/bin/env bash
# Everything a change must pass: lint, format, types, tests. Arguments go to pytest.
# bash launch/test.sh --parity: the comparisons with torch, transformers, TRL and PEFT instead, in an environment of
# their own beside the default one.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
if [ "${1:-}" = --parity ]; then
  shift
  VENV=${VENV:-.venv}-parity environment parity,dev
  export ROSEPO_PARITY=1
  exec python -m pytest -n "${WORKERS:-2}" --dist worksteal tests/parity "$@"
fi
environment dev
ruff check .
ruff format --check .
mypy rosepo_jax
exec python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
