#!/usr/bin/env bash
# The same on GPUs of a cluster that Slurm runs: NODES nodes with GPUS GPUs each, one process a node.
#
# Usage: slurm.sh [--dry-run] [--help] [OPTION OF sbatch ...]
#
# Options such as --partition=P, --account=A and --time=24:00:00 are those of your cluster. It needs no BUCKET: the run
# directory is runs/RUN where you are, on a disk that all nodes see, with the tokens in runs/data. A second submission
# finds the first. Two minutes before its time is over, or when it is preempted, the run saves its state, and Slurm
# queues the job again, up to RESTARTS times; `scancel --name=NAME` ends it.
#
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

if [[ -n ${SLURM_JOB_ID:-} && -n ${JAXUP_SCRIPTS:-} ]]; then # in the job; sbatch has copied this file elsewhere
  # shellcheck disable=SC2034  # of functions.sh
  NEEDS=(RUN)
  # shellcheck source=functions.sh
  source "$JAXUP_SCRIPTS/functions.sh"
  begin ""
  command=("${JAXUP_PYTHON:-python}" -m jaxup.train "${TRAIN[@]}" "--workdir=runs/$RUN")

  again() { # WHY
    if ((${SLURM_RESTART_COUNT:-0} >= RESTARTS)); then fail "$1; that was after $RESTARTS restarts, and RESTARTS allows no more"; fi
    say "restart $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $RESTARTS: $1"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  }

  # The steps get SIGTERM, upon which all processes save and leave.
  leave="" step=""
  trap 'leave=1; kill -TERM "$step" 2>/dev/null || true' USR1
  code=0
  srun "${command[@]}" --preflight || code=$?
  if ((code)); then
    say "the preflight ended with code $code"
    exit "$code"
  fi
  srun "${command[@]}" &
  step=$!
  wait "$step" || code=$?
  if [[ -n $leave ]]; then # the signal ended the waiting, and not the step
    code=0
    wait "$step" || code=$?
  fi
  case $code in
    0) say "finished: runs/$RUN/SUMMARY.md" ;;
    2 | 3 | 6) say "it ended with code $code, which a restart does not help" ;;
    130 | 143)
      [[ -z $leave ]] || again "its time was over"
      say "it was stopped, with its state saved; slurm.sh goes on with it" # by scancel; of a preemption Slurm queues it again
      ;;
    *) again "it ended with code $code" ;;
  esac
  exit "$code"
fi

NEEDS=(RUN NAME)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin " OPTION " "$@"
found=$(ask "" squeue --me "--name=$NAME" --noheader '--format=%i %T') || fail "squeue: $(complaint)"
if [[ -n $found ]]; then
  say "it is there already: job $found"
  exit
fi
run sbatch "--job-name=$NAME" "--nodes=$NODES" "--gpus-per-node=$GPUS" "--output=$NAME-%j.log" \
  "--export=ALL,JAXUP_SCRIPTS=$SCRIPTS,SETTINGS=$SETTINGS" "${FLAGS[@]}" "$0" || fail "sbatch did not take it"
say "its log is $NAME-JOB.log here; squeue --me shows how it stands"
