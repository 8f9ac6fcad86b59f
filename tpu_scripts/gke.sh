#!/usr/bin/env bash
# The same on Google Kubernetes Engine, by xpk, which has a cluster make the TPUs and start the run again.
#
# Usage: gke.sh create | launch | watch | logs | stop | delete [--dry-run] [--help]
#
#   create  the cluster CLUSTER with one slice TPU; finds it if it is there
#   launch  the run, as the workload USER-NAME from the image IMAGE; finds it if it is there. Kubernetes starts it again
#           after a preemption or a crash, up to RESTARTS times, and with the same command it goes on
#   watch   state and last lines, until it is finished; Ctrl-C ends the watching alone
#   logs    what its first worker printed
#   stop    takes the run out of the cluster; launch goes on from its newest checkpoint. The cluster is billed
#   delete  the cluster, if create made it
#
# fetch.sh brings the results. IMAGE is one of containers/, pushed where the cluster can pull it.
NEEDS=(PROJECT ZONE BUCKET RUN CLUSTER)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin " WORD " "$@"

JOB="${OWNER//_/-}-$NAME" # so that nobody's else is ever taken for this one
here=("--project=$PROJECT" "--zone=$ZONE")
of_cluster() { printf '%s (cluster of %s, %s chips) is billed until gke.sh delete' "$CLUSTER" "$TPU" "$CHIPS"; }

# Whether there is the cluster, and it is of these scripts: xpk has no labels, and so that of the cluster says it.
find_cluster() { # ASSUMED
  local label
  label=$(ask "$1" gcloud container clusters list "--project=$PROJECT" "--filter=name=$CLUSTER" \
    '--format=value(name,resourceLabels.jaxup_owner)') || fail "gcloud cannot list clusters: $(complaint)"
  read -r FOUND CLUSTER_OWNER <<<"$label" || true
}

ours_too() {
  [[ -n $FOUND ]] || refuse "CLUSTER=$CLUSTER: is not there; gke.sh create makes it"
  [[ $CLUSTER_OWNER == "$OWNER" ]] || refuse "CLUSTER=$CLUSTER: was not made by these scripts for $OWNER; nothing of it is deleted"
}

create() {
  local how=()
  case $CAPACITY in
    spot) how=(--spot) ;;
    on-demand) how=(--on-demand) ;;
    reservation)
      [[ -n $RESERVATION ]] || refuse "RESERVATION: xpk needs its name; it belongs in $SETTINGS"
      how=("--reservation=$RESERVATION")
      ;;
    *) refuse "CAPACITY=$CAPACITY: is none of spot, on-demand and reservation" ;;
  esac
  find_cluster ""
  if [[ -n $FOUND ]]; then
    say "$CLUSTER is there already; $(of_cluster)"
    return
  fi
  run xpk cluster create "--cluster=$CLUSTER" "--tpu-type=$ACCELERATOR" --num-slices=1 "${how[@]}" "${here[@]}" ||
    fail "xpk made no cluster, or not all of it: run it again, or gke.sh delete; what is there of $CLUSTER is billed"
  run gcloud container clusters update "$CLUSTER" "--project=$PROJECT" "--region=${ZONE%-*}" "--update-labels=jaxup_owner=$OWNER" ||
    fail "the label that says whose it is could not be set, and gke.sh delete will refuse it; $(of_cluster)"
  say "$(of_cluster)"
}

# The line that xpk has of the workload; nothing if there is none.
workload() { # ASSUMED
  ask "$1" xpk workload list "--cluster=$CLUSTER" "--filter-by-job=$JOB" "${here[@]}" >"$ERRORS.list" ||
    fail "xpk cannot list the workloads of CLUSTER=$CLUSTER: $(complaint)"
  grep -E "^$JOB " "$ERRORS.list" || true
  rm -f "$ERRORS.list"
}

launch() {
  local there command
  [[ -n $IMAGE ]] || refuse "IMAGE: is not set; it belongs in $SETTINGS"
  there=$(workload "")
  if [[ -n $there ]]; then
    say "it is there already: $there"
    return
  fi
  command="python -m jaxup.train $(quoted "${TRAIN[@]}" "--workdir=$WORKDIR")"
  # Not after a mistake, a loss that is not finite or a full disk (2, 3, 6). xpk adds those of signals to these.
  run xpk workload create "--workload=$JOB" "--cluster=$CLUSTER" "--tpu-type=$ACCELERATOR" --num-slices=1 \
    "--docker-image=$IMAGE" "--max-restarts=$RESTARTS" --restart-on-exit-codes=1,5 \
    --termination-grace-period-seconds=120 "${here[@]}" \
    "--command=$command --preflight && $command" || fail "xpk did not take the workload; $(of_cluster)"
  say "$JOB trains into $WORKDIR; gke.sh watch looks at it"
}

logs() {
  run kubectl logs --tail=100 "--selector=jobset.sigs.k8s.io/jobset-name=$JOB,batch.kubernetes.io/job-completion-index=0"
}

watch() {
  local now before=""
  trap 'say "not watching any more. The training goes on; $(of_cluster)"; exit 130' INT
  while :; do
    now=$(workload "$JOB  Finished  JobSet finished successfully")
    [[ -n $now ]] || refuse "$JOB: is no workload of CLUSTER=$CLUSTER; gke.sh launch starts it"
    if [[ $now != "$before" ]]; then say "$now"; fi
    before=$now
    case $now in
      *" Finished "*[Ff]ailed*)
        logs || true
        fail "it failed, and was started again up to $RESTARTS times; $(of_cluster)"
        ;;
      *" Finished "*)
        say "finished: $WORKDIR/SUMMARY.md; fetch.sh brings it here. $(of_cluster)"
        return
        ;;
    esac
    sleep "$POLL"
  done
}

stop() {
  run xpk workload delete "--workload=$JOB" "--cluster=$CLUSTER" --force "${here[@]}"
  say "$JOB is out of the cluster; $(of_cluster)"
}

delete() {
  find_cluster "$CLUSTER $OWNER"
  if [[ -n $FOUND ]]; then
    ours_too
    run xpk cluster delete "--cluster=$CLUSTER" --force "${here[@]}" || fail "it could not be deleted; $(of_cluster)"
  fi
  say "there is no cluster $CLUSTER; what lies in $BUCKET stays, and is billed for its size"
}

case ${FLAGS[*]:-} in
  create | launch | watch | logs | stop | delete) "${FLAGS[0]}" ;;
  *) refuse "what to do is one of create, launch, watch, logs, stop and delete; see --help" ;;
esac
