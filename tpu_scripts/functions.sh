# shellcheck shell=bash disable=SC2034  # most of what is set here is for whoever sources it
# What the scripts here share. A script sources this file, calls `begin "$@"`, and then has its settings.
#
# Exit codes: 0 done, 1 something failed that a look at its line explains, 2 a mistake in a setting or flag, 130 Ctrl-C;
# launch.sh and watch.sh also end with the code of the training: `python -m jaxup.train --help` has them.
set -euo pipefail

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SELF=$(basename "$0")
((BASH_VERSINFO[0] >= 5)) || { echo "bash 5 is needed, and this is $BASH_VERSION" >&2 && exit 2; }
OLDEST_GCLOUD=500 # of which the flags are used here
DRY=""
ERRORS=$(mktemp)
trap 'rm -f "$ERRORS"' EXIT

say() { printf '%s%s: %s\n' "${SELF%.sh}" "${DRY:+ (dry run)}" "$*" >&2; }
refuse() {
  say "$*"
  exit 2
}
fail() {
  say "$*"
  exit 1
}

# The comment at the top of the script, which is its usage.
usage() {
  sed -n '2,/^[^#]/{/^#SBATCH/d; /^#/s/^# \{0,1\}//p}' "$0"
}

# Reads --help, --dry-run and the flags that the script has beside them, into the array FLAGS; then the settings.
begin() {
  local known=" $1 " word
  shift
  FLAGS=()
  for word in "$@"; do
    case $word in
      --help | -h) usage && exit ;;
      --dry-run) DRY=1 ;;
      -*) [[ $known == *" $word "* || $known == *" OPTION "* ]] || refuse "$word: unknown flag; there are --dry-run --help$known" && FLAGS+=("$word") ;;
      *) [[ $known == *" WORD "* ]] || refuse "$word: takes no argument; see --help" && FLAGS+=("$word") ;;
    esac
  done
  SETTINGS=${SETTINGS:-$SCRIPTS/settings.sh}
  [[ -r $SETTINGS ]] || refuse "SETTINGS=$SETTINGS: there is no such file"
  # shellcheck source=settings.sh
  source "$SETTINGS"
  local need
  for need in "${NEEDS[@]}"; do
    [[ -n ${!need:-} ]] || refuse "$need: is not set; it belongs in $SETTINGS"
  done
  [[ " ${NEEDS[*]} " != *" BUCKET "* || $BUCKET =~ ^gs://[^/]+$ ]] || refuse "BUCKET=$BUCKET: is not gs://NAME"
  [[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || refuse "NAME=$NAME: lower-case letters, digits and hyphens only"
  WORKDIR="$BUCKET/runs/$RUN"
  OWNER=$(id -un | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9\n' _)
  slice
}

has() { [[ " ${FLAGS[*]:-} " == *" $1 "* ]]; }

# ---- commands

# Words as one types them: quoted where they must be.
quoted() {
  local word words=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=" $word"
  done
  printf '%s' "${words# }"
}

shown() { printf '+ %s\n' "$(quoted "$@")" >&2; }

# Runs a command, or with --dry-run prints it.
run() {
  if [[ -n $DRY ]]; then shown "$@"; else "$@"; fi
}

# ask ASSUMED COMMAND...: what the command prints; ASSUMED, with --dry-run. Complaints go to the file $ERRORS.
ask() {
  local assumed=$1
  shift
  if [[ -n $DRY ]]; then
    shown "$@"
    printf '%s\n' "$assumed"
  else
    "$@" 2>"$ERRORS"
  fi
}

# What gcloud complained of, in a line: its ERROR, or the last one.
complaint() {
  local line
  line=$(grep -m1 -E '^ERROR' "$ERRORS" || tail -n 1 "$ERRORS")
  printf '%s' "${line#ERROR: }" | cut -c1-300
}

# ---- slices: what gcloud calls them

# Sets ACCELERATOR, RUNTIME, CHIPS and HOSTS from TPU.
slice() {
  local generation=${TPU%%:*} shape=${TPU#*:} known
  case $generation in
    v4 | v5p) known="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16" ;;
    v5e | v6e) known="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" ;;
    *) refuse "TPU=$TPU: no such TPU; there are v4, v5e, v5p, v6e, as in v5p:4x4x4" ;;
  esac
  [[ " $known " == *" $shape "* ]] || refuse "TPU=$TPU: no such slice; $generation has $known"
  CHIPS=$((${shape//x/*}))
  HOSTS=$(((CHIPS + 3) / 4))
  case $generation in
    v4) ACCELERATOR="v4-$((2 * CHIPS))" RUNTIME="tpu-ubuntu2204-base" ;; # these two are named by their cores
    v5p) ACCELERATOR="v5p-$((2 * CHIPS))" RUNTIME="v2-alpha-tpuv5" ;;
    v5e) ACCELERATOR="v5litepod-$CHIPS" RUNTIME="v2-alpha-tpuv5-lite" ;;
    v6e) ACCELERATOR="v6e-$CHIPS" RUNTIME="v2-alpha-tpuv6e" ;;
  esac
  # Up to eight of these lie in one machine.
  if [[ $generation == v[56]e && $CHIPS -le 8 ]]; then HOSTS=1; fi
}

# ---- the queued resource

# Sets STATE (NONE if there is none), OWNED_BY and MADE_AS; $1 is what to assume of the state with --dry-run.
look() {
  local found
  if found=$(ask "$1,$OWNER,$ACCELERATOR" gcloud compute tpus queued-resources describe "$NAME" "--project=$PROJECT" \
    "--zone=$ZONE" '--format=csv[no-heading](state.state,tpu.nodeSpec[0].node.labels.jaxup_owner,tpu.nodeSpec[0].node.acceleratorType)'); then
    IFS=, read -r STATE OWNED_BY MADE_AS <<<"$found"
  elif grep -qiE 'not[ _]found' "$ERRORS"; then
    STATE=NONE OWNED_BY="" MADE_AS=""
  elif [[ -n ${PATIENT:-} ]]; then
    STATE=UNKNOWN
    say "gcloud cannot look at $NAME: $(complaint)"
  else
    fail "gcloud cannot look at $NAME: $(complaint)"
  fi
}

# Refuses what these scripts did not make for this user: it is never changed or deleted.
ours() {
  if [[ $OWNED_BY != "$OWNER" ]]; then
    refuse "NAME=$NAME: there is one in $ZONE that these scripts did not make for $OWNER (its label jaxup_owner is '$OWNED_BY'); choose another name"
  fi
  if [[ $MADE_AS != "$ACCELERATOR" ]]; then
    refuse "NAME=$NAME: is a $MADE_AS, and TPU=$TPU a $ACCELERATOR; choose another name, or delete.sh with the settings that made it"
  fi
}

there() {
  look ACTIVE
  [[ $STATE != NONE ]] || refuse "NAME=$NAME: there are no TPUs of that name in ZONE=$ZONE; create.sh makes them"
  ours
  [[ $STATE == ACTIVE ]] || fail "$NAME is $STATE, not ACTIVE; watch.sh waits for it, or create.sh"
}

billed() { printf '%s (%s, %s chips) is billed until delete.sh' "$NAME" "$TPU" "$CHIPS"; }

# Deletes it, and all that it holds. Only after `ours`.
remove() {
  run gcloud compute tpus queued-resources delete "$NAME" "--project=$PROJECT" "--zone=$ZONE" --force --quiet
}

# ---- the workers

# on_workers WHICH WORDS...: has worker.sh do that on worker WHICH, or on all. SAID[K] is what worker K says, and ABSENT
# has the numbers of those that say nothing, of which the others know nothing yet.
on_workers() {
  local which=$1 assumed="" line command k first=0 last=$((HOSTS - 1))
  shift
  command="bash jaxup-worker.sh $(quoted "$@")"
  if [[ $which != all ]]; then first=$which last=$which; fi
  for ((k = first; k <= last; k++)); do assumed+="worker $k: $(assumed "$1")"$'\n'; done
  SAID=() ABSENT=()
  # One that does not answer makes gcloud fail; the others have answered nevertheless.
  ask "$assumed" timeout "$ANSWER" gcloud compute tpus tpu-vm ssh "$NAME" "--project=$PROJECT" "--zone=$ZONE" --quiet \
    "--worker=$which" "--command=$command" </dev/null >"$ERRORS.said" || true
  while IFS= read -r line; do
    if [[ $line =~ ^worker\ ([0-9]+):\ (.*)$ ]]; then SAID[BASH_REMATCH[1]]=${BASH_REMATCH[2]}; fi
  done <"$ERRORS.said"
  rm -f "$ERRORS.said"
  for ((k = first; k <= last; k++)); do
    if [[ -z ${SAID[k]:-} ]]; then ABSENT+=("$k"); fi
  done
}

assumed() { # with --dry-run
  case $1 in
    install) echo ready ;;
    fits) echo "fits N s at least" ;;
    start) echo started ;;
    status) echo "${ASSUMED:-idle}" ;;
    *) echo "done" ;;
  esac
}

# Names those that did not answer, or said anything but one of these words, and is then false.
all_said() {
  local k wrong=()
  for k in "${ABSENT[@]}"; do wrong+=("worker $k did not answer"); done
  for k in "${!SAID[@]}"; do
    [[ " $* " == *" ${SAID[k]%% *} "* ]] || wrong+=("worker $k: ${SAID[k]}")
  done
  if ((${#wrong[@]})); then
    for k in "${wrong[@]}"; do say "$k"; done
    if ((${#ABSENT[@]})); then say "gcloud: $(complaint)"; fi
    say "so it is not done on all $HOSTS workers; $(billed)"
    return 1
  fi
}

# Copies files into the home directories of all workers.
to_workers() {
  run gcloud compute tpus tpu-vm scp "$@" "$NAME:" "--project=$PROJECT" "--zone=$ZONE" --quiet --worker=all
}
