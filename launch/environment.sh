#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv from the project's own files and puts it first on PATH.
# environment EXTRA, e.g. `environment dev`. Choose the interpreter with PYTHON=..., the folder with VENV=...
environment() {
  local venv=${VENV:-.venv} python=${PYTHON:-} candidate
  if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
    done
  fi
  if [ -z "$python" ]; then echo "no Python >= 3.11 found; set PYTHON=/path/to/python3" >&2; return 2; fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return
  local wanted; wanted=$(cat requirements.txt pyproject.toml; echo "$1")
  if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}" || return
    printf '%s\n' "$wanted" > "$venv/installed"
  fi
  PATH=$(cd "$venv/bin" && pwd):$PATH
}
