#!/usr/bin/env bash
# Deletes the TPUs, so that nothing of them is billed any more. The bucket, and the run in it, stays.
#
# Usage: delete.sh [--running] [--dry-run] [--help]
#
#   --running  even while it trains; what it did since its newest checkpoint is lost
#
# What these scripts did not make for you is never deleted. Started again it says that there is nothing.
NEEDS=(PROJECT ZONE BUCKET)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin " --running " "$@"

look ACTIVE
if [[ $STATE != NONE ]]; then
  ours
  if [[ $STATE == ACTIVE ]] && ! has --running; then
    on_workers all status
    for k in "${!SAID[@]}"; do
      [[ ${SAID[k]} != runs* ]] || refuse "$NAME trains (${SAID[k]}); launch.sh --stop saves its state first, or --running"
    done
  fi
  remove || fail "$NAME could not be deleted, and is billed; try again, or look at https://console.cloud.google.com/compute/tpus?project=$PROJECT"
  look NONE
  [[ $STATE == NONE || $STATE == DELETING ]] || fail "$NAME is still there ($STATE), and is billed as long as it is ACTIVE; try again"
fi
say "there is no $NAME in $ZONE; what lies in $BUCKET stays, and is billed for its size"
