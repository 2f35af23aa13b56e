#!/usr/bin/env bash
# An environment for a peer of benchmarks/ that cannot live beside ours; prints its python.
# bash launch/peer_env.sh recbole|tunix    (VENV=... chooses the folder; default .venv-recbole, .venv-tunix)
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  recbole) packages=(recbole==1.2.1 "numpy<2" "pandas<3" "ray<2.7" torch) ;; # whose majors it was written for
  tunix) packages=(google-tunix==0.1.7 jax==0.10.2 flax==0.12.8) ;; # wants safetensors below 0.8, transformers 0.8
  *) echo "usage: bash launch/peer_env.sh recbole|tunix" >&2; exit 2 ;;
esac
venv=${VENV:-.venv-$1}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" >&2
echo "$(cd "$venv/bin" && pwd)/python"
