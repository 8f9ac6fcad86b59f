#!/usr/bin/env bash
# Makes the TPUs that the settings name, by a queued resource, and waits until they are there.
#
# Usage: create.sh [--dry-run] [--help]
#
# Whatever can be wrong is looked at before anything is made. Started again it goes on waiting, or finds them there;
# what a preemption left of them is replaced. Ctrl-C ends the waiting alone: the request stays, and delete.sh takes it
# back.
NEEDS=(PROJECT ZONE BUCKET)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin "" "$@"

check_gcloud() {
  local said version
  command -v gcloud >/dev/null || [[ -n $DRY ]] || refuse "gcloud: is not installed; see https://cloud.google.com/sdk/docs/install"
  said=$(ask "Google Cloud SDK $OLDEST_GCLOUD.0.0" gcloud version) || refuse "gcloud version: $(complaint)"
  version=$(grep -oE 'SDK [0-9]+' <<<"$said" | cut -d' ' -f2)
  ((${version:-0} >= OLDEST_GCLOUD)) || refuse "gcloud: is of version ${version:-?}, and $OLDEST_GCLOUD is needed; 'gcloud components update' brings it"
  [[ -n $(ask "$OWNER" gcloud auth list --filter=status:ACTIVE '--format=value(account)') ]] ||
    refuse "gcloud: nobody is logged in; 'gcloud auth login' does that"
}

check_project() {
  ask "$PROJECT" gcloud projects describe "$PROJECT" '--format=value(projectId)' >/dev/null ||
    refuse "PROJECT=$PROJECT: $(complaint)"
}

check_slice() {
  local types
  types=$(ask "$ACCELERATOR" gcloud compute tpus accelerator-types list "--project=$PROJECT" "--zone=$ZONE" '--format=value(name.basename())') ||
    refuse "ZONE=$ZONE: $(complaint)"
  [[ -n $types ]] || refuse "ZONE=$ZONE: has no TPUs; see https://cloud.google.com/tpu/docs/regions-zones"
  if ! grep -qx "$ACCELERATOR" <<<"$types"; then
    refuse "TPU=$TPU: ZONE=$ZONE has no $ACCELERATOR, but $(sort -V <<<"$types" | paste -sd' ' | cut -c1-200)"
  fi
}

check_bucket() {
  local place mark="$BUCKET/.jaxup-can-write-$NAME"
  place=$(ask "${ZONE%-*}" gcloud storage buckets describe "$BUCKET" '--format=value(location)') ||
    refuse "BUCKET=$BUCKET: $(complaint)"
  ask "" gcloud storage cp "$0" "$mark" >/dev/null || refuse "BUCKET=$BUCKET: cannot be written: $(complaint)"
  ask "" gcloud storage rm "$mark" >/dev/null || refuse "BUCKET=$BUCKET: what is written cannot be deleted: $(complaint)"
  if [[ ${place,,} != "${ZONE%-*}" ]]; then
    say "BUCKET=$BUCKET lies in $place, and ZONE=$ZONE elsewhere: checkpoints take longer, and reading from afar is billed"
  fi
}

request() {
  local how=() release=()
  case $CAPACITY in
    spot) how=(--spot) ;;
    on-demand) ;;
    reservation) if [[ -n $RESERVATION ]]; then release=(alpha) how=("--reservation=$RESERVATION"); else how=(--reserved); fi ;;
    *) refuse "CAPACITY=$CAPACITY: is none of spot, on-demand and reservation" ;;
  esac
  # The label says whose it is: delete.sh deletes no other.
  if ! run gcloud "${release[@]}" compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--project=$PROJECT" \
    "--zone=$ZONE" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" "--labels=jaxup_owner=$OWNER" \
    "${how[@]}" --async --quiet 2>"$ERRORS"; then
    local why
    why=$(complaint)
    look NONE
    [[ $STATE == NONE ]] || fail "creating failed: $why; and there is a $NAME nevertheless, $STATE: delete.sh takes it away"
    refused "$why"
  fi
  # With --dry-run the command is in there.
  cat "$ERRORS" >&2
}

# What a refusal says in a line, with the setting that it is about.
refused() {
  case ${1,,} in
    *quota*) refuse "TPU=$TPU: PROJECT=$PROJECT has no quota for it as CAPACITY=$CAPACITY in ZONE=$ZONE: $1; nothing is left that is billed" ;;
    *reserv*) refuse "RESERVATION=$RESERVATION: $1; nothing is left that is billed" ;;
    *) refuse "NAME=$NAME: was not made: $1; nothing is left that is billed" ;;
  esac
}

failed() {
  ask "" gcloud compute tpus queued-resources describe "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    '--format=value(state.failedData.error.message)' || true
}

wait_for() {
  local before="" why
  trap 'say "not waiting any more. The request stays: once $NAME is there, it is billed; delete.sh takes it back"; exit 130' INT
  while look ACTIVE && [[ $STATE != ACTIVE ]]; do
    if [[ $STATE != "$before" ]]; then say "$NAME is $STATE"; fi
    before=$STATE
    case $STATE in
      FAILED)
        why=$(failed)
        remove
        refused "$why"
        ;;
      SUSPENDING | SUSPENDED) fail "$NAME was taken away again before it was used; create.sh once more asks for another" ;;
      NONE) fail "$NAME is not there any more: somebody deleted it" ;;
    esac
    sleep "$POLL"
  done
  trap - INT
  say "it is there: $(billed)"
}

check_gcloud
check_project
check_slice
check_bucket
look NONE
case $STATE in
  NONE) request ;;
  SUSPENDED | FAILED)
    ours
    say "$NAME is $STATE: what is left of it is deleted, and it is asked for anew"
    remove
    request
    ;;
  *)
    ours
    say "$NAME is $STATE already"
    ;;
esac
wait_for
