#!/usr/bin/env bash
# Looks after the training until it is finished: shows how far it is, and after a preemption or a crash makes the TPUs
# anew, installs, and starts the same command, which goes on from the newest checkpoint.
#
# Usage: watch.sh [--dry-run] [--help]
#
# Each restart has a line that says why; after RESTARTS of them it stops. A mistake, a loss that is not finite and a
# full disk (codes 2, 3 and 6) are not restarted: the same would happen again. Ctrl-C ends the watching alone. It can
# be ended and started at any time, on any machine.
NEEDS=(PROJECT ZONE BUCKET RUN)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin "" "$@"

ASSUMED="runs training"
PATIENT=1 # a network that fails for a while is no reason to leave
count=0 shown="" partly=0 made_anew=""
interrupted() {
  if [[ -n $made_anew ]]; then
    say "not watching any more, in the middle of a restart: nothing trains, and what is there of $NAME is billed until delete.sh"
    exit 130
  fi
  say "not watching any more. The training goes on, but is not restarted; $(billed)"
  exit 130
}
trap interrupted INT

# Makes, installs and starts whatever is not there; what is there is found.
restart() {
  local step code
  count=$((count + 1)) shown=""
  ((count <= RESTARTS)) || fail "$1; that was after $RESTARTS restarts, and RESTARTS allows no more; $(billed)"
  say "restart $count of at most $RESTARTS: $1, $(date -u +%FT%RZ)"
  for step in create.sh setup.sh "launch.sh --no-fit"; do
    code=0 made_anew=1
    # shellcheck disable=SC2086  # a script and its flag
    "$SCRIPTS"/$step ${DRY:+--dry-run} || code=$?
    case $code in
      0) ;;
      2 | 3 | 6 | 130) exit "$code" ;; # it has said why, and what is billed
      *)
        say "$step did not succeed; it is tried again with the next restart"
        return
        ;;
    esac
  done
  made_anew=""
}

# How it ended, by the first worker that ended with a code of its own: the others leave after it, with 5.
how_it_ended() {
  local k code phase why found=""
  for k in "${!SAID[@]}"; do
    read -r _ code phase why <<<"${SAID[k]}"
    if [[ -z $found || ($found == 5 && $code != 5) ]]; then found=$code CODE=$code PHASE=$phase WHY="worker $k: $why"; fi
  done
}

# What the workers say: all of them run, all have ended, or something between, which they are given time to leave.
look_at_workers() {
  local k runs=0 idle=0 progress
  on_workers all status
  for k in "${!SAID[@]}"; do
    case ${SAID[k]} in
      runs*) runs=$((runs + 1)) ;;
      idle) idle=$((idle + 1)) ;;
    esac
  done
  if ((runs == HOSTS)); then
    partly=0 progress=${SAID[0]#runs }
    if [[ $progress != "$shown" ]]; then say "$progress"; fi
    shown=$progress
  elif ((runs == 0 && ${#ABSENT[@]} == 0 && idle < HOSTS)); then
    how_it_ended
    after_the_end
  elif ((idle == HOSTS)); then
    restart "nothing runs on $NAME"
  else
    partly=$((partly + 1))
    say "it runs on $runs of $HOSTS workers${ABSENT[*]:+, and no answer comes from ${ABSENT[*]}}"
    if ((partly >= 5)); then
      partly=0
      on_workers all stop
      restart "it ran on a part of the workers at five looks in turn"
    fi
  fi
}

after_the_end() {
  case $CODE in
    0)
      say "finished: $WORKDIR/SUMMARY.md; fetch.sh brings it here. $(billed)"
      exit 0
      ;;
    2 | 3 | 6)
      say "it ended with code $CODE, which a restart does not help: $WHY"
      say "$(billed)"
      exit "$CODE"
      ;;
  esac
  if [[ $PHASE == stopped ]]; then
    say "it was stopped by launch.sh --stop; launch.sh goes on with it. $(billed)"
    exit 0
  fi
  restart "it ended with code $CODE: $WHY"
}

while :; do
  look ACTIVE
  case $STATE in
    ACTIVE)
      ours
      look_at_workers
      ;;
    NONE)
      # After a preemption it is deleted before it is asked for anew, and that may fail. Else somebody wants it gone.
      [[ -n $made_anew ]] || refuse "NAME=$NAME: is not there, or not any more; create.sh makes it. Nothing is billed"
      restart "$NAME is not there"
      ;;
    SUSPENDING | SUSPENDED | FAILED)
      ours
      restart "$NAME was preempted (it is $STATE)"
      ;;
    *) if [[ $STATE != "$shown" ]]; then say "$NAME is $STATE"; fi && shown=$STATE ;;
  esac
  if [[ -n $DRY ]]; then
    restart "what follows is done after a preemption"
    exit
  fi
  sleep "$POLL" &
  wait $! # a trap does not wait for a sleep in the foreground
done
