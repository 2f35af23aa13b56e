#!/usr/bin/env bash
# From nothing to a report: an environment, the demo on the embedded world, the table and the path of report.html.
# bash launch/quickstart.sh [WORKDIR] [--config.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment ""
workdir=runs/demo
case "${1:-}" in "" | --*) ;; *) workdir=$1; shift ;; esac
exec rosepo run --config=configs/demo.py --workdir="$workdir" "$@"
