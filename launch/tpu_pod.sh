#!/usr/bin/env bash
# `rosepo VERB ... --distributed` on all hosts of a TPU slice (v4, v5e, v5p, v6e), from no slice at all to the end of the
# run: asks for the slice as a queued resource, waits, installs the project, runs, and starts again what was preempted.
#
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-16 --nfs=HOST:/SHARE [OPTION ...] VERB --workdir=/mnt/rosepo/DIR ...
#
#   --nfs=HOST:/SHARE  mounted on all hosts at /mnt/rosepo; without it the hosts must share the workdir in another way
#   --create=FLAG      a further flag for `gcloud compute tpus queued-resources create`, e.g. --create=--spot; any number
#   --secrets=FILE     NAME=VALUE lines, copied to ~/.rosepo.env of the hosts and put into the run's environment
#   --restarts=3       how many failures, other than preemptions, are started again
#   --delete           give the slice back at the end, however it ends; without it, it stays, and costs
#   --runtime=VERSION  TPU software version, where that of the type is not the right one
#   --job=ID           names the attempts (default: the time)
#   --dry-run          print the commands, for a slice that is granted at once and a run that ends well, and do nothing
set -euo pipefail
cd "$(dirname "$0")/.."

mistake() { echo "tpu_pod: $1" >&2; exit 2; }

name='' zone='' type='' nfs='' secrets='' restarts=3 delete='' runtime='' job=$(date +%Y%m%d-%H%M%S) dry='' create=()
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --create=*) create+=("${1#*=}") ;;
    --secrets=*) secrets=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --delete) delete=yes ;;
    --runtime=*) runtime=${1#*=} ;;
    --job=*) job=${1#*=} ;;
    --dry-run) dry=yes ;;
    -*) mistake "$1: no such option (they come before the verb; the head of launch/tpu_pod.sh lists them)" ;;
    *) break ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || mistake "--name=$name: small letters, digits and hyphens, a letter first"
[[ $job =~ ^[A-Za-z0-9_-]+$ ]] || mistake "--job=$job: letters, digits, - and _"
[[ $restarts =~ ^[0-9]+$ ]] || mistake "--restarts=$restarts: a number"
[ -n "$zone" ] || mistake "give --zone=ZONE, one that has the type"
[ -z "$secrets" ] || [ -f "$secrets" ] || mistake "--secrets=$secrets: no such file"
[[ " $* " == *" --workdir=/"* ]] || mistake "give a verb and --workdir=/mnt/rosepo/DIR, a folder that all hosts see"
case $type in
  v4-*) runtime=${runtime:-tpu-ubuntu2204-base} ;;
  v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
  v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
  v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
  *) mistake "--type=$type: v4-N, v5litepod-N, v5p-N or v6e-N (the Cloud TPU API has no later ones; see launch/gke.py)" ;;
esac

exec 3>&1 # where a dry run prints, also from within $(...)
quoted() { local line; line=$(printf '%q ' "$@"); echo "${line% }"; }
run() { if [ -n "$dry" ]; then quoted "$@" >&3; else "$@"; fi; } # a command, or what it would be
tpus() { run gcloud compute tpus "$@" --zone="$zone"; }
on_all() { tpus tpu-vm ssh "$name" --worker=all --command="$1"; }
worker() { on_all "$(quoted bash rosepo_jax/launch/tpu_worker.sh "$@")"; }

slice() { # waits until the slice is there, and asks for it where it is not
  local state node
  while :; do
    state=$(tpus queued-resources list --filter="name~/$name\$" --format="value(state.state)") || state=UNKNOWN
    [ -z "$dry" ] || state=$granted
    if [ "$state" = ACTIVE ]; then
      node=$(tpus tpu-vm describe "$name" --format="value(state)") || node=UNKNOWN
      case ${dry:+READY}$node in READY*) return ;; PREEMPTED | TERMINATED) state=SUSPENDED ;; esac
    fi
    case $state in
      '')
        tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
          ${create[@]+"${create[@]}"}
        granted=ACTIVE
        ;;
      SUSPENDED) # taken away: a queued resource is granted once, so it must be asked for anew
        tpus queued-resources delete "$name" --force --quiet
        failures=0
        ;;
      FAILED) echo "tpu_pod: the request for $name failed: gcloud compute tpus queued-resources describe $name" >&2; exit 1 ;;
      *) sleep 30 ;;
    esac
  done
}

install() {
  run mkdir -p build &&
    run tar -czf "build/$name.tgz" --exclude=__pycache__ rosepo_jax configs launch pyproject.toml requirements.txt README.md &&
    tpus tpu-vm scp "build/$name.tgz" "$name:" --worker=all &&
    { [ -z "$secrets" ] || tpus tpu-vm scp "$secrets" "$name:.rosepo.env" --worker=all; } &&
    on_all "mkdir -p rosepo_jax && tar -xzf $name.tgz -C rosepo_jax" &&
    worker prepare "$nfs"
}

attempt=0 failures=0 granted=''
while :; do
  attempt=$((attempt + 1)) status=0
  slice
  { install && worker run "$job-$attempt" "$@"; } || status=$?
  case $status in
    0 | 2) break ;;
    75) ;;
    *) failures=$((failures + 1)); [ "$failures" -le "$restarts" ] || break ;;
  esac
  echo "tpu_pod: attempt $attempt ended with status $status; starting again" >&2
  sleep 30
done
if [ -n "$delete" ]; then
  tpus queued-resources delete "$name" --force --quiet
else
  echo "tpu_pod: $name is still there, and costs: gcloud compute tpus queued-resources delete $name --zone=$zone --force" >&2
fi
exit "$status"
