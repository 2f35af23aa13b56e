#!/usr/bin/env bash
# `rosepo VERB ...` on the NVIDIA GPUs of this host, 1 to 8 of them: one process drives all, and goes on after it was killed.
#
#   [CUDA_VISIBLE_DEVICES=0,1] bash launch/gpu_host.sh [--restarts=3] [--dry-run] VERB ...
#
# `rosepo doctor` looks first whether JAX sees them. SIGTERM and Ctrl-C let the run save what it has and end, with status
# 75. One that ends so without this launcher being told is started again, and one that was killed (128 or more), --restarts
# times.
set -uo pipefail

restarts=3 dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --dry-run) dry=yes ;;
    -*) echo "gpu_host: $1: no such option (they come before the verb)" >&2; exit 2 ;;
    *) break ;;
  esac
  shift
done
if [ $# = 0 ] || [[ ! $restarts =~ ^[0-9]+$ ]]; then
  echo "usage: bash launch/gpu_host.sh [--restarts=3] [--dry-run] VERB ..." >&2
  exit 2
fi
venv=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin
[ ! -d "$venv" ] || PATH=$venv:$PATH
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # an error, not the CPU, where the GPUs cannot be used
look=(nvidia-smi "--query-gpu=index,name,memory.total" "--format=csv,noheader")

if [ -n "$dry" ]; then
  printf 'export %s=%q\n' JAX_PLATFORMS "$JAX_PLATFORMS" \
    ${CUDA_VISIBLE_DEVICES+CUDA_VISIBLE_DEVICES "$CUDA_VISIBLE_DEVICES"}
  line=$(printf '%q ' "${look[@]}"); echo "${line% }"
  echo rosepo doctor
  line=$(printf '%q ' rosepo "$@"); echo "${line% }"
  exit
fi
"${look[@]}" || exit 2
rosepo doctor || exit 2

told='' child=''
trap 'told=yes; kill -TERM "$child"' TERM INT
while [ -z "$told" ]; do
  rosepo "$@" &
  child=$!
  while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait`, not the run
  case $status in
    75) ;;
    130) break ;; # interrupted by hand
    *) if [ "$status" -lt 128 ] || [ "$restarts" = 0 ]; then break; fi; restarts=$((restarts - 1)) ;;
  esac
  [ -n "$told" ] || echo "gpu_host: status $status; starting again" >&2
done
exit "$status"
