#!/usr/bin/env bash
# Prints the path of a headless browser for tests/end_to_end/test_browser.py; installs one with apt where none is found.
# export ROSEPO_BROWSER=$(bash launch/browser.sh)
set -euo pipefail
found() {
  local name
  for name in "${ROSEPO_BROWSER:-}" chromium-headless-shell chromium chromium-browser google-chrome chrome; do
    if [ -n "$name" ] && command -v "$name"; then return; fi
  done
  return 1
}
found && exit
if ! command -v apt-get >/dev/null; then
  echo "no browser found and no apt-get: install Chromium, or set ROSEPO_BROWSER=/path/to/it" >&2
  exit 2
fi
root=()
[ "$(id -u)" = 0 ] || root=(sudo)
{
  "${root[@]}" apt-get update --quiet
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends \
    chromium-headless-shell fonts-dejavu-core ||
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium
} >&2
found
