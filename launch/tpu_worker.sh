#!/usr/bin/env bash
# One host of a TPU slice; launch/tpu_pod.sh calls this on all of them.
#   prepare [HOST:/SHARE]   Python, the project's environment, and the share at /mnt/rosepo
#   run ATTEMPT WORDS ...   `rosepo WORDS ... --distributed`, apart from the connection: shows its log, ends with its status
#   stop                    tells what runs to save and end, and waits for that
# A connection that breaks stops nothing. gcloud then repeats the command, and the same ATTEMPT goes on showing the log;
# another one first stops what runs, for a TPU serves one process.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$HOME/rosepo_jobs
mkdir -p "$jobs"
exec 9>"$jobs/lock" # locked by whatever runs

prepare() {
  [ ! -f "$HOME/.rosepo.env" ] || chmod 600 "$HOME/.rosepo.env"
  if [ -n "$1" ] && ! mountpoint --quiet /mnt/rosepo; then
    sudo apt-get install --quiet --yes -o DPkg::Lock::Timeout=600 nfs-common
    sudo mkdir -p /mnt/rosepo
    sudo mount -t nfs -o hard "$1" /mnt/rosepo
    sudo chmod a+rwx /mnt/rosepo
  fi
  python3 -m pip install --quiet --user uv # the system's Python may be older than 3.11
  python3 -m uv python install --quiet 3.12
  PYTHON=$(python3 -m uv python find 3.12)
  source launch/environment.sh
  environment tpu
}

stop() {
  if flock --nonblock 9; then return; fi
  kill -TERM -- "-$(cat "$jobs/group")" || true
  flock --wait 600 9 || kill -KILL -- "-$(cat "$jobs/group")"
  flock 9
}

run() {
  local job=$jobs/$1
  shift
  if mkdir "$job" 2>/dev/null; then
    stop
    if [ -f "$HOME/.rosepo.env" ]; then
      set -a
      # shellcheck source=/dev/null
      . "$HOME/.rosepo.env"
      set +a
    fi
    export JAX_PLATFORMS=tpu,cpu PATH="$PWD/.venv/bin:$PATH" # an error, not the CPU, where the TPU cannot be had
    # shellcheck disable=SC2016
    setsid bash -c 'trap : TERM; job=$1; shift; "$@" >"$job/log" 2>&1; echo $? >"$job/status"' - \
      "$job" rosepo "$@" --distributed </dev/null >/dev/null 2>&1 &
    echo $! | tee "$jobs/group" >"$job/pid"
    exec 9>&-
  fi
  until [ -s "$job/pid" ] && [ -e "$job/log" ]; do sleep 1; done
  tail --lines=+1 --follow --pid="$(cat "$job/pid")" "$job/log"
  exit "$(cat "$job/status" 2>/dev/null || echo 137)" # no status: the host was started anew meanwhile
}

case "${1:-}" in
  prepare) prepare "${2:-}" ;;
  run) run "${@:2}" ;;
  stop) stop ;;
  *) echo "usage: tpu_worker.sh prepare [HOST:/SHARE] | run ATTEMPT VERB ... | stop" >&2; exit 2 ;;
esac
