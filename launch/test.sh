#!/usr/bin/env bash
# Everything a change must pass: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment dev
ruff check .
ruff format --check .
mypy rosepo_jax
exec python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
