#!/usr/bin/env bash
# gcloud, xpk, kubectl, Slurm, git and what workers have, as the scripts of tpu_scripts/ see them: tests link their names to
# this file. All that there is lies in the directory $FAKE: `qr` is the queued resource, worker-K/ the home of a worker,
# `next` the states that each look at it goes on to, faults/NAME something that goes wrong, `said` the calls.
set -euo pipefail

fault() { [[ -e $FAKE/faults/$1 ]]; }
error() {
  echo "ERROR: (gcloud) $*" >&2
  exit 1
}

flag() { # NAME ARGUMENTS...: the value of --NAME=
  local name=$1 word
  shift
  for word in "$@"; do
    if [[ $word == "--$name="* ]]; then printf '%s' "${word#*=}"; fi
  done
}

end_workers() { # as a preemption does
  local pid
  for pid in "$FAKE"/worker-*/jaxup/pid; do
    if [[ -e $pid ]]; then kill -KILL -- "-$(<"$pid")" 2>/dev/null || true; fi
  done
  rm -rf "$FAKE"/worker-*
}

become() { # STATE
  local owner type
  IFS=, read -r _ owner type <"$FAKE/qr"
  printf '%s\n' "$1,$owner,$type" >"$FAKE/qr"
  case $1 in
    ACTIVE) mkdir -p "$FAKE/worker-0" "$FAKE/worker-1" ;;
    SUSPENDED) end_workers ;;
  esac
}

queued_resources() {
  local left
  case $1 in
    describe)
      [[ -e $FAKE/qr ]] || error "NOT_FOUND: Resource 'projects/p/queuedResources/$2' was not found"
      if [[ $* == *failedData* ]]; then cat "$FAKE/faults/fails" && return; fi
      if [[ -s $FAKE/next ]]; then
        become "$(head -n 1 "$FAKE/next")"
        left=$(tail -n +2 "$FAKE/next")
        printf '%s' "${left:+$left$'\n'}" >"$FAKE/next"
      fi
      cat "$FAKE/qr"
      ;;
    create)
      if fault quota; then error "RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProjectPerZone' has been exceeded. Limit: 0"; fi
      printf 'NEW,%s,%s\n' "$(flag labels "$@" | cut -d= -f2)" "$(flag accelerator-type "$@")" >"$FAKE/qr"
      if fault fails; then
        echo FAILED >"$FAKE/next"
      else
        printf '%s\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >"$FAKE/next"
      fi
      ;;
    delete)
      end_workers
      rm -f "$FAKE/qr" "$FAKE/next"
      ;;
  esac
}

tpu_vm() {
  local k which file workers="0 1"
  which=$(flag worker "$@")
  if [[ $which != all ]]; then workers=$which; fi
  for k in $workers; do
    if fault "silent-$k"; then continue; fi
    if [[ $1 == scp ]]; then
      for file in "${@:2}"; do
        if [[ -f $file ]]; then cp "$file" "$FAKE/worker-$k"; fi
      done
    else
      (cd "$FAKE/worker-$k" && HOME=$PWD WORKER=$k LIBTPU_LOCKFILE=$PWD/lock bash -c "$(flag command "$@")")
    fi
  done
  if [[ $1 == ssh ]] && { fault silent-0 || fault silent-1; }; then error "[/usr/bin/ssh] exited with return code [255]."; fi
}

gcloud() {
  echo "gcloud $*" >>"$FAKE/said"
  if [[ $1 == alpha ]]; then shift; fi
  case "$*" in
    version) if fault old; then echo "Google Cloud SDK 432.0.0"; else echo "Google Cloud SDK 540.0.0"; fi ;;
    "auth list"*) if ! fault nobody; then echo ann@example.com; fi ;;
    "projects describe"*) if fault project; then error "(projects.describe) The project '$3' is not there, or not yours"; fi && echo "$3" ;;
    "compute tpus accelerator-types list"*) if ! fault zone; then printf '%s\n' v5p-8 v5p-16 v5p-32; fi ;;
    "storage buckets describe"*) if fault bucket; then error "(storage) gs://runs not found: 404."; fi && echo US-EAST5 ;;
    "storage cp"*) if fault read-only; then error "(storage) 403: no storage.objects.create"; fi ;;
    "storage ls"*) if fault no-run; then error "(storage.ls) One or more URLs matched no objects."; fi ;;
    "storage rsync"*) touch "$4/SUMMARY.md" ;;
    "storage rm"*) ;;
    "container clusters list"*) cat "$FAKE/cluster" 2>/dev/null || true ;;
    "container clusters update"*) echo "pod $(flag update-labels "$@" | cut -d= -f2)" >"$FAKE/cluster" ;;
    "compute tpus queued-resources"*) queued_resources "${@:4}" ;;
    "compute tpus tpu-vm"*) tpu_vm "${@:4}" ;;
    *) error "unknown: $*" ;;
  esac
}

xpk() {
  echo "xpk $*" >>"$FAKE/said"
  case "$1 $2" in
    "cluster create") echo "pod " >"$FAKE/cluster" ;;
    "cluster delete") rm "$FAKE/cluster" ;;
    "workload create") echo "$(flag workload "$@")  2026-11-26  Admitted  Admitted by ClusterQueue" >"$FAKE/workload" ;;
    "workload delete") rm "$FAKE/workload" ;;
    "workload list")
      [[ -e $FAKE/cluster ]] || { echo "ERROR: no cluster" >&2 && exit 1; }
      if [[ -s $FAKE/next && -e $FAKE/workload ]]; then
        sed -i "s/2026.*/2026-11-26  $(head -n 1 "$FAKE/next")/" "$FAKE/workload"
        sed -i 1d "$FAKE/next"
      fi
      cat "$FAKE/workload" 2>/dev/null || true
      ;;
  esac
}

# jaxup on a worker: a preflight, a look whether it fits, or steps until the file `train` says how it ends.
training() {
  local step=0 code
  case "$*" in
    "-c "*) if fault "other-$WORKER"; then echo "jaxup 0.1.0 jax 0.10.1"; else echo "jaxup 0.1.0 jax 0.10.2"; fi ;;
    *--target=*)
      if fault large; then echo "jaxup: --target=v5p:2x2x2: healed takes 99 GiB a chip, which has 95.74" >&2 && exit 2; fi
      echo "      25.3 s    at least (25.3 products), limited by products"
      ;;
    *--preflight)
      if fault preflight; then echo "jaxup: preflight: process 1 (w-1) cannot write --workdir=gs://runs/x" >&2 && exit 2; fi
      echo "preflight: 2 processes of 4 x TPU v5p"
      ;;
    *)
      trap 'echo "jaxup: stopped by SIGTERM" >&2; exit 143' TERM
      until code=$(cat "$FAKE/train-$WORKER" 2>/dev/null || cat "$FAKE/train" 2>/dev/null); do
        step=$((step + 1))
        if ((step < 5)); then echo "train healed: $step/320 steps, loss 2.5"; fi
        sleep 0.1 &
        wait $! || true
      done
      echo "jaxup: ended as it was told" >&2
      exit "$code"
      ;;
  esac
}

case ${0##*/} in
  gcloud) gcloud "$@" ;;
  xpk) xpk "$@" ;;
  squeue) if [[ -e $FAKE/job ]]; then echo "7 RUNNING"; fi ;;
  sbatch) echo "$*" >"$FAKE/job" ;;
  srun) exec "$@" ;;
  scontrol) touch "$FAKE/requeued" ;;
  curl) echo "$WORKER" ;;
  df) printf 'Avail\n%s\n' "$(if fault "full-$WORKER"; then echo 1; else echo 90; fi)" ;;
  git) if [[ $* == *archive* ]]; then tar -czf "$(flag output "$@")" -T /dev/null; fi ;;
  python3) ;;
  uv)
    if [[ $1 == venv ]]; then
      venv=${*: -1}
      mkdir -p "$venv/bin"
      ln -s "$(readlink -f "$0")" "$venv/bin/python"
    fi
    ;;
  python) training "${@#-u}" ;;
esac
