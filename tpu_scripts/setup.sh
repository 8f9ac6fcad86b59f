#!/usr/bin/env bash
# Installs this clone, at its commit, on all workers, and checks that all of them have the same of everything.
#
# Usage: setup.sh [--dry-run] [--help]
#
# Packages have the versions of containers/constraints.txt, so that a later setup of the same commit has the same ones.
# Started again it installs again, which takes seconds. A running training is left alone.
NEEDS=(PROJECT ZONE BUCKET)
# shellcheck source=functions.sh
source "$(dirname "$0")/functions.sh"
begin "" "$@"

clone=$(dirname "$SCRIPTS")
git -C "$clone" rev-parse --quiet --verify HEAD >/dev/null || refuse "$clone: is no clone, of which a commit could be installed"
there
if [[ -n $(git -C "$clone" status --porcelain --untracked-files=no) ]]; then
  say "what is not committed in $clone is not installed"
fi
# Their names there are those here.
files=$(mktemp -d)
trap 'rm -rf "$ERRORS" "$files"' EXIT
run git -C "$clone" archive --format=tar.gz "--output=$files/jaxup-source.tar.gz" HEAD
cp "$SCRIPTS/worker.sh" "$files/jaxup-worker.sh"
what=("$files/jaxup-source.tar.gz" "$files/jaxup-worker.sh")
if [[ -n $HF_TOKEN_FILE ]]; then
  [[ -r $HF_TOKEN_FILE ]] || refuse "HF_TOKEN_FILE=$HF_TOKEN_FILE: cannot be read"
  cp "$HF_TOKEN_FILE" "$files/jaxup-hf-token"
  what+=("$files/jaxup-hf-token")
fi
to_workers "${what[@]}" || fail "the workers of $NAME could not be reached; $(billed)"
on_workers all install "$UV" "$PYTHON" "$EXTRAS" "$DISK"
all_said ready || exit 1
for k in "${!SAID[@]}"; do
  [[ ${SAID[k]} == "${SAID[0]}" ]] || fail "worker $k is ${SAID[k]}, and worker 0 ${SAID[0]}; $(billed)"
done
say "all $HOSTS workers are ${SAID[0]}"
