#!/usr/bin/env bash
# Shows what a worker has printed, the last 100 lines; worker 0 prints the most.
#
# Usage: logs.sh [WORKER] [--follow] [--dry-run] [--help]
#
#   --follow  goes on showing; Ctrl-C ends the showing, and not the training
NEEDS=(PROJECT ZONE BUCKET)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin " --follow WORD " "$@"

worker=0 how=log
for word in "${FLAGS[@]}"; do
  if [[ $word == --follow ]]; then how=follow; else worker=$word; fi
done
if ! [[ $worker =~ ^[0-9]+$ ]] || ((worker >= HOSTS)); then refuse "$worker: is no worker of TPU=$TPU, which has 0 to $((HOSTS - 1))"; fi
there
run gcloud compute tpus tpu-vm ssh "$NAME" "--project=$PROJECT" "--zone=$ZONE" --quiet "--worker=$worker" \
  "--command=bash jaxup-worker.sh $how 100"
