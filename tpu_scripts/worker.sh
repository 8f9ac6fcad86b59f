#!/usr/bin/env bash
# What the other scripts have a worker do; setup.sh puts it there.
#
# Usage: bash jaxup-worker.sh install UV PYTHON EXTRAS GIB | start WORD... | status | stop | log LINES | fits WORD...
#
# Each prints one line, `worker NUMBER: WORD ...`, of which WORD says what is so: ready, started, runs, ended, idle,
# fits, stopped or refused.
set -euo pipefail

home=$HOME/jaxup
lock=${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}
python=$home/venv/bin/python
about=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number

number=$(curl -sf -m 5 -H 'Metadata-Flavor: Google' "$about" || echo 0)
answer() { printf 'worker %s: %s\n' "$number" "$*"; }
refuse() {
  answer "refused: $*"
  exit 0
}

as_root() { if command -v sudo >/dev/null; then sudo -n "$@"; else "$@"; fi; }

room() { # GIB: refuses a disk with less
  local free
  free=$(df --output=avail -B1G "$HOME" | tail -n 1)
  ((free >= $1)) || refuse "its disk has $((free)) GiB free of the $1 that DISK asks for"
}

install() {
  mkdir -p "$home"
  room "$4"
  if [[ -f $HOME/jaxup-hf-token ]]; then
    mkdir -p "$HOME/.cache/huggingface"
    install_private "$HOME/jaxup-hf-token" "$HOME/.cache/huggingface/token"
  fi
  if ! alive; then # what runs is not to find other code when it looks for more of it
    install_packages "$1" "$2" "$3" >"$home/install.log" 2>&1 ||
      refuse "installing failed: $(tail -n 1 "$home/install.log")"
  fi
  # Of all packages, so that a single other one is noticed.
  answer "ready $("$python" -c 'import jaxup, importlib.metadata as m, hashlib
names = sorted({f"{d.name}=={d.version}" for d in m.distributions()})
digest = hashlib.blake2b("\n".join(names).encode(), digest_size=4).hexdigest()
print("jaxup", jaxup.__version__, "jax", m.version("jax"), len(names), "packages", digest)' 2>&1 | tail -n 1)"
}

# The machine's own Python is too old; uv brings another one.
install_packages() {
  export PATH=$HOME/.local/bin:$PATH PIP_BREAK_SYSTEM_PACKAGES=1
  rm -rf "$home/source" && mkdir -p "$home/source" &&
    tar -xzf "$HOME/jaxup-source.tar.gz" -C "$home/source" &&
    python3 -m pip install --quiet --user "uv==$1" &&
    { [[ -x $python ]] || uv venv --quiet --python "$2" "$home/venv"; } &&
    uv pip install --quiet --python "$python" --constraint "$home/source/containers/constraints.txt" "$home/source[$3]"
}

install_private() {
  chmod 600 "$1"
  mv "$1" "$2"
}

# ---- who holds the TPUs

# Of the processes that have the lock or a TPU open; it is looked at as root, for they may be another user's.
holders() {
  { as_root find /proc/[0-9]*/fd '(' -lname "$lock" -o -lname '/dev/accel[0-9]*' -o -lname '/dev/vfio/[0-9]*' ')' 2>/dev/null || true; } |
    cut -d/ -f3 | sort -un
}

# A process that was killed leaves its lock, and the next start hangs on it or takes the CPU. Says in LOCK what it did.
unlock() {
  local pid
  LOCK=""
  pid=$(holders | head -n 1)
  if [[ -n $pid ]]; then
    refuse "its TPUs are held by process $pid ($(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c1-80)); end it first"
  fi
  if [[ -e $lock ]]; then
    as_root rm -f "$lock"
    LOCK="removed $lock, which a process that is dead had left"
  fi
}

# ---- the training

alive() {
  local pid
  pid=$(cat "$home/pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null &&
    [[ $(ps -o lstart= -p "$pid") == "$(cat "$home/since")" ]] # another process may have got its number
}

# Preflight and training of one command, whose ends are told apart by the file `phase`.
start() {
  local command="${*@Q}"
  [[ -x $python ]] || refuse "jaxup is not installed; setup.sh does that"
  # Two starts at the same moment: the second waits, and finds the first.
  exec 9>"$home/starting"
  flock 9
  if alive; then
    [[ $command == "$(cat "$home/command")" ]] || refuse "it runs another command since $(cat "$home/since"): $(cat "$home/command")"
    answer "runs since $(cat "$home/since")"
    return
  fi
  room 5
  unlock
  printf '%s' "${LOCK:+$LOCK$'\n'}" >"$home/log"
  printf '%s\n' "$command" >"$home/command"
  rm -f "$home/code"
  echo preflight >"$home/phase"
  # shellcheck disable=SC2016  # is expanded by that shell
  setsid nohup bash -c '
    home=$1 python=$2
    shift 2
    trap : TERM  # waits for what it started, and writes down how that ended
    "$python" -u -m jaxup.train "$@" --preflight && echo training >"$home/phase" && "$python" -u -m jaxup.train "$@"
    echo $? >"$home/code.new" && mv "$home/code.new" "$home/code"
  ' jaxup "$home" "$python" "$@" >>"$home/log" 2>&1 </dev/null 9>&- &
  echo $! >"$home/pid"
  ps -o lstart= -p $! >"$home/since" || true # it has ended already
  answer "started $!"
}

# The last line that tells how far it is; else the last one.
progress() {
  { grep -aE '[0-9]/[0-9,]+ steps' "$home/log" || cat "$home/log"; } 2>/dev/null | tail -n 1 | tr -d '\r' | cut -c1-200
}

status() {
  if alive; then
    answer "runs $(cat "$home/phase") $(progress)"
  elif [[ -f $home/code ]]; then
    answer "ended $(cat "$home/code") $(cat "$home/phase") $(tail -n 1 "$home/log" | cut -c1-300)"
  elif [[ -f $home/pid ]]; then
    answer "ended 137 killed it was killed, and said nothing"
  else
    answer idle
  fi
}

stop() {
  if alive; then
    echo stopped >"$home/phase" # so that nobody starts it again
    kill -TERM -- "-$(cat "$home/pid")"
  fi
  for ((look = 0; look < 3000; look++)); do # ten minutes, for a step and a save
    alive || break
    sleep 0.2
  done
  if alive; then refuse "it still saves; logs.sh shows how far it is"; fi
  answer stopped
}

case $1 in
  install | start | status | stop) "$@" ;;
  log) tail -n "$2" "$home/log" && answer "done" ;;
  follow) tail -n "$2" -F "$home/log" ;;
  fits)
    shift
    if said=$("$python" -m jaxup.train "$@" 2>&1); then
      answer "fits $(grep -m1 -E ' s +at least' <<<"$said" | xargs)"
    else
      refuse "$(tail -n 1 <<<"$said")"
    fi
    ;;
  *) refuse "$1: unknown" ;;
esac
