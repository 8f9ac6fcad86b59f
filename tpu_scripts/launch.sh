#!/usr/bin/env bash
# Starts the training on all workers, detached: it goes on whatever becomes of this terminal.
#
# Usage: launch.sh [--stop] [--no-fit] [--dry-run] [--help]
#
#   --stop    has it save its state and leave; launch.sh goes on with it
#   --no-fit  does not look whether it fits (`--target`), as after a preemption
#
# First worker 0 says whether the configuration fits the TPUs, then a preflight of all workers says whether they are
# ready, and what is not is said in a line. A second launch finds the first, and starts nothing.
NEEDS=(PROJECT ZONE BUCKET RUN)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin " --stop --no-fit " "$@"

stop() {
  on_workers all stop
  all_said stopped "done" || exit 1
  say "its state is saved, and all workers have left; $(billed)"
}

# Whether it runs on all workers; what to do where it runs on some.
running() {
  local k count=0
  on_workers all status
  all_said idle ended runs || exit 1
  for k in "${!SAID[@]}"; do
    if [[ ${SAID[k]} == runs* ]]; then count=$((count + 1)); fi
  done
  if ((count > 0 && count < HOSTS)); then
    fail "it runs on $count of $HOSTS workers; launch.sh --stop ends it there, or wait: they notice it by themselves"
  fi
  ((count > 0))
}

# Until the preflight is over on all of them; what it found is the last line of the log.
see_it_begin() {
  local k until=$((SECONDS + GATHER + ANSWER)) waiting
  trap 'say "not looking any more; the training goes on, and $(billed)"; exit 130' INT
  while :; do
    on_workers all status
    waiting=${#ABSENT[@]}
    for k in "${!SAID[@]}"; do
      case ${SAID[k]} in
        "runs preflight"*) waiting=$((waiting + 1)) ;;
        "ended 0 "*) ;;
        ended*) ended "$k" ;;
      esac
    done
    if ((waiting == 0)) || [[ -n $DRY ]]; then break; fi
    ((SECONDS < until)) || fail "no end of the preflight in $((SECONDS / 60)) minutes; logs.sh shows what it waits for; $(billed)"
    sleep "$POLL"
  done
  trap - INT
}

ended() {
  local code why
  read -r _ code _ why <<<"${SAID[$1]}"
  say "worker $1 ended with code $code: $why"
  say "$(billed)"
  exit "$code"
}

there
if has --stop; then
  stop
  exit
fi
if running; then
  # The workers compare the command with theirs.
  on_workers all start "${TRAIN[@]}" "--workdir=$WORKDIR"
  all_said runs || exit 1
  say "it runs already on all $HOSTS workers: ${SAID[0]}"
  exit
fi
if ! has --no-fit; then
  on_workers 0 fits "${TRAIN[@]}" "--target=$TPU"
  [[ -z ${ABSENT[*]} ]] || fail "worker 0 did not answer: $(complaint); $(billed)"
  case ${SAID[0]} in
    refused:*) refuse "${SAID[0]#refused: }; $(billed)" ;;
    *) say "it fits; a step takes ${SAID[0]#fits }" ;;
  esac
fi
on_workers all start "${TRAIN[@]}" "--workdir=$WORKDIR"
if ! all_said started runs; then
  on_workers all stop # the others would wait for those
  exit 1
fi
see_it_begin
say "all $HOSTS workers train into $WORKDIR; watch.sh looks after it, logs.sh shows it"
