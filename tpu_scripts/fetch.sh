#!/usr/bin/env bash
# Brings what the run has made from its bucket: summary, metrics, pictures and the exported model.
#
# Usage: fetch.sh [DIRECTORY] [--checkpoints] [--dry-run] [--help]
#
#   DIRECTORY      where to (runs/RUN)
#   --checkpoints  all that a run resumes from as well, many times the size of the model
#
# What is here already is not brought again, and nothing is deleted, neither here nor there.
NEEDS=(BUCKET RUN)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin " --checkpoints WORD " "$@"

directory="runs/$RUN" without=('--exclude=(^|/)checkpoints/.*|.*\.tmp$')
for word in "${FLAGS[@]}"; do
  if [[ $word == --checkpoints ]]; then without=(); else directory=$word; fi
done
ask "$WORKDIR/config.json" gcloud storage ls "$WORKDIR/config.json" >/dev/null ||
  refuse "RUN=$RUN: there is no run in $WORKDIR: $(complaint)"
run mkdir -p "$directory"
run gcloud storage rsync "$WORKDIR" "$directory" --recursive "${without[@]}"
if [[ -z $DRY && ! -f $directory/SUMMARY.md ]]; then
  say "the run is not finished: there is no SUMMARY.md yet"
fi
say "$directory has what $WORKDIR has"
