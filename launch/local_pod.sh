#!/usr/bin/env bash
# Several processes of one command on this machine, each with virtual CPU devices: what a pod runs, to try it here.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local_pod.sh [--devices D] [--grace S] N COMMAND...

Runs N processes of COMMAND, each with --coordinator 127.0.0.1:PORT --processes N --process I behind it and D virtual
CPU devices (default 1). Lines of process 1 and up begin with [1] and so on.

When a process fails, the others are ended: SIGTERM, and SIGKILL for what is left after S seconds (default 30). Ctrl-C
and SIGTERM are handed to every process and waited for; a second one too. The status is that of the process that failed
first.

  launch/local_pod.sh --devices 2 2 deer-jax align --recipe configs/align_stories260k.yaml --set mesh.fsdp=4
END
}

die() {
  printf 'local_pod: %s\n' "$*" >&2
  exit 2
}

whole() { # NAME VALUE
  [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die "$1 $2: not a whole number from 1"
}

devices=1 grace=30
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) usage && exit ;;
    --devices | --grace)
      [ $# -gt 1 ] || die "$1: no value"
      whole "$1" "$2"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) die "$1: unknown option; see --help" ;;
  esac
done
[ $# -gt 1 ] || die 'the number of processes and the command are missing; see --help'
count=$1
whole N "$count"
shift
command -v "$1" >/dev/null || die "$1: no such command"
((BASH_VERSINFO[0] >= 5)) || die "bash $BASH_VERSION is too old: 5 or newer"

port=0
while ((port == 0)) || (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do # taken: somebody answers there
  port=$((20000 + RANDOM % 12000))                                         # below those that systems deal out
done

lines() { # BEFORE: stdin line by line; a signal to everybody does not end it, only the end of its input does
  trap '' INT TERM
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '%s%s\n' "$1" "$line"; done
}

pids=()   # of the processes that run, by number
groups=() # of all that were started
hand_on() { # SIGNAL
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done
}
end_groups() { # whatever the processes have left behind
  local pid
  for pid in ${groups[@]+"${groups[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}
trap end_groups EXIT
handed=0
trap 'handed=1; hand_on INT' INT
trap 'handed=1; hand_on TERM' TERM HUP

set -m # a group for each process: Ctrl-C at a terminal reaches them once, through this script
readers=() before=''
for ((i = 0; i < count && handed == 0; i++)); do
  exec {out}> >(lines "$before") && readers+=("$!")
  exec {err}> >(lines "$before" >&2) && readers+=("$!")
  JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices "$@" --coordinator "127.0.0.1:$port" --processes "$count" \
    --process "$i" </dev/null 1>&"$out" 2>&"$err" &
  pids[i]=$! && groups[i]=$!
  exec {out}>&- {err}>&-
  before="[$((i + 1))] "
done
set +m # for what follows: the terminal stays ours
exec {said}>&2 2>/dev/null # bash would tell of every process that is killed, in its own words

status=0 next='' deadline=0 # the signal that comes next, and when
if ((handed)); then status=143 && hand_on TERM; fi # before all were there: some may not have been told
while ((${#pids[@]} > 0)); do
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}"; then continue; fi
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    if ((code == 0 || status > 0)); then continue; fi
    status=$code
    if ((${#pids[@]} == 0)); then break; fi
    stopped=$((code == 130 || code == 143)) # in order: all have agreed to
    if ((handed && stopped)); then
      continue # for as long as their checkpoint takes
    elif ((handed || stopped)); then
      next=TERM deadline=$((SECONDS + grace)) # they are about to end, and a second signal would end them at once
    else
      printf 'local_pod: process %d ended with status %d; ending the others\n' "$i" "$code" >&"$said"
      next=TERM deadline=0
    fi
  done
  if [ -n "$next" ] && ((SECONDS >= deadline)); then
    hand_on "$next"
    if [ "$next" = TERM ]; then next=KILL deadline=$((SECONDS + grace)); else next=''; fi
  fi
  sleep 0.05 || true # Ctrl-C ends it too
done
end_groups
wait "${readers[@]}" || true
exit "$status"
