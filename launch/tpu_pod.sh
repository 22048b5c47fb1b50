#!/usr/bin/env bash
# One command on every worker of a TPU slice, started again after preemptions until it is done. See --help, docs/pod.md.
# Written for the bash 3.2 of macOS too; a test knows what that forbids.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_pod.sh create|setup|run|logs|status|ssh|delete [options] [-- COMMAND...]

  create   get the slice (vm: ask for it and wait until it is there; gke: make the cluster)
  setup    vm: install Python 3.12 and deer_jax on every worker; gke: let kubectl see the cluster
  run      run COMMAND on every worker until it is done; vm: makes and sets up the slice where that has not been done
  logs     follow the output of one worker
  status   say how slice and run stand
  ssh      a shell on one worker, or COMMAND there
  delete   vm: give the slice back; gke: remove the workload (the cluster stays)

Two routes, chosen by --type: v4 and v5e go through queued resources of Cloud TPU VMs (vm), v5p, v6e and tpu7x through
GKE and xpk (gke).

options, as flags or as lines KEY=VALUE of an env file (a flag wins); see launch/pod.env.example
  --env FILE           read options from FILE
  --name NAME          name of the slice and of its run: a-z, 0-9 and -, at most 40
  --type TYPE          v4-16, v5litepod-16, v5p-16, v6e-8, tpu7x-8, ...
  --project PROJECT, --zone ZONE    where
  --work gs://BUCKET/FOLDER         the work folder: in xla/, compiled programs; runs belong there too
  --capacity KIND      on-demand (default), spot or reserved
  --files PATH         a file or folder of yours to send along, as your recipe; it lies beside configs/ there
  --worker N           which worker logs and ssh mean (default 0)
  --max-restarts N     how often run starts again (default 50)
  --pause SECONDS      before it does (default 60)
  --poll SECONDS       between two looks at a slice that is waited for (default 30)
  --route vm|gke       instead of the one of the type
  vm only:  --runtime VERSION (default by type), --source GIT_URL[#BRANCH_OR_TAG] instead of sending this tree
  gke only: --cluster NAME (required), --reservation NAME (with reserved), --image IMAGE (default python:3.12)
  --dry-run            print every command, one a line, and run none

COMMAND is the same on every worker and is not read by a shell, but $WORK in it becomes the work folder; the programs
also find it as WORK in their environment. run ends with the status of COMMAND: 0 is done, 1 and 2 (failed, wrong
input) are final, anything a preemption can leave behind (130, 143, 255 and above 128) is started again.

A 16-chip v5e slice, as a queued resource:
  launch/tpu_pod.sh run --name align8b --type v5litepod-16 --project my-project --zone us-west4-a --capacity spot \
      --work gs://my-bucket/align8b -- \
      deer-jax align --recipe configs/paper/qwen3_8b.yaml --set 'output=$WORK/run' --set mesh.fsdp=16
  launch/tpu_pod.sh delete --name align8b --type v5litepod-16 --project my-project --zone us-west4-a

An 8-chip v6e slice, in a GKE cluster:
  launch/tpu_pod.sh create --env pod.env      # pod.env: name, type=v6e-8, cluster, project, zone, work, capacity
  launch/tpu_pod.sh run --env pod.env -- deer-jax align --recipe configs/paper/qwen3_8b.yaml --set 'output=$WORK/run'
END
}

say() { printf 'tpu_pod: %s\n' "$*" >&2; }

die() { # one line, status 2: wrong input, nothing has been done
  say "$*"
  exit 2
}

quoted() { # the words as a shell reads them back
  local word line='' quote="'" escaped="'\"'\"'"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word=$quote${word//$quote/$escaped}$quote ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# What talks to the cloud goes through these two; descriptor 3 is the script's own stdout, where dry runs print.
exec 3>&1

call() { # COMMAND...: runs it, or prints it in a dry run
  if [ "$dry" = yes ]; then quoted "$@" >&3; else "$@"; fi
}

ask() { # ANSWER COMMAND...: the command's output; in a dry run prints it and answers ANSWER
  local answer=$1
  shift
  if [ "$dry" = yes ]; then quoted "$@" >&3 && printf '%s\n' "$answer"; else "$@"; fi
}

# ---------------------------------------------------------------------------------------------------------- options

KEYS=' name type project zone work capacity files worker max-restarts pause poll route runtime source cluster reservation image '
name='' type='' project='' zone='' work='' capacity='' files='' worker='' max_restarts='' pause='' poll='' route=''
runtime='' source='' cluster='' reservation='' image='' dry=no

set_option() { # KEY VALUE WHERE
  case $KEYS in *" $1 "*) ;; *) die "$3: unknown option $1; see --help" ;; esac
  [ -n "$2" ] || die "$3: $1 has no value"
  printf -v "${1//-/_}" %s "$2"
}

read_env() { # FILE
  local file=$1 named=$1 line
  [ -f "$file" ] && [ -r "$file" ] || die "--env $file: no such file"
  while IFS= read -r line || [ -n "$line" ]; do
    line=${line%$'\r'}
    case $line in
      '' | '#'*) ;;
      *=*) set_option "${line%%=*}" "${line#*=}" "$named" ;;
      *) die "$named: $line: not KEY=VALUE" ;;
    esac
  done <"$file"
}

[ $# -gt 0 ] || die 'no verb: create, setup, run, logs, status, ssh or delete; see --help'
verb=$1
shift
case $verb in
  -h | --help) usage && exit ;;
  create | setup | run | logs | status | ssh | delete) ;;
  *) die "$verb: unknown verb; create, setup, run, logs, status, ssh or delete" ;;
esac
flags=()
while [ $# -gt 0 ]; do
  case $1 in
    --) shift && break ;;
    -h | --help) usage && exit ;;
    --dry-run) dry=yes ;;
    --*)
      key=${1%%=*}
      case $1 in
        *=*) value=${1#*=} ;;
        *) [ $# -gt 1 ] || die "$1: no value"; value=$2 && shift ;;
      esac
      if [ "$key" = --env ]; then read_env "$value"; else flags+=("$key" "$value"); fi
      ;;
    *) die "$1: unknown word; the command stands after --" ;;
  esac
  shift
done
for ((i = 0; i < ${#flags[@]}; i += 2)); do # after the env file, for a flag wins
  set_option "${flags[i]#--}" "${flags[i + 1]}" "${flags[i]}"
done
work=${work%/}
argv=() # the command
for word; do argv+=("${word//\$WORK/$work}"); done

# ----------------------------------------------------------------------------------------------------------- checks

default_runtime='' default_route=''
case $type in
  v4-[0-9]*) default_route=vm default_runtime=tpu-ubuntu2204-base ;;
  v5litepod-[0-9]*) default_route=vm default_runtime=v2-alpha-tpuv5-lite ;;
  v5p-[0-9]*) default_route=gke default_runtime=v2-alpha-tpuv5 ;;
  v6e-[0-9]*) default_route=gke default_runtime=v2-alpha-tpuv6e ;;
  tpu7x-[0-9]*) default_route=gke ;;
  '') die 'no type: give --type, as in --type v5litepod-16' ;;
  v5e-*) die "--type $type: Cloud calls it v5litepod-${type#v5e-}" ;;
  *) die "--type $type: unknown; v4-N, v5litepod-N, v5p-N, v6e-N or tpu7x-N" ;;
esac
route=${route:-$default_route} capacity=${capacity:-on-demand} worker=${worker:-0}
max_restarts=${max_restarts:-50} pause=${pause:-60} poll=${poll:-30}
case $route in
  vm)
    [ -z "$cluster$reservation$image" ] || die "--cluster, --reservation and --image are of the route gke, and $type" \
      'goes through vm here; leave them out or give --route gke'
    [ -n "$default_runtime" ] || die "--route vm: $type has no Cloud TPU VMs; only gke"
    ;;
  gke)
    [ -z "$runtime$source" ] || die "--runtime and --source are of the route vm, and $type goes through gke here;" \
      'leave them out or give --route vm'
    [ -n "$cluster" ] || die 'no cluster: the route gke needs --cluster'
    ;;
  *) die "--route $route: vm or gke" ;;
esac
case $capacity in
  on-demand | spot) [ -z "$reservation" ] || die "--reservation $reservation: only with --capacity reserved" ;;
  reserved) [ "$route" = vm ] || [ -n "$reservation" ] || die '--capacity reserved: gke needs --reservation NAME' ;;
  *) die "--capacity $capacity: on-demand, spot or reserved" ;;
esac
for key in worker max_restarts pause poll; do
  case ${!key} in *[!0-9]*) die "--${key//_/-} ${!key}: not a whole number" ;; esac
done
[ -n "$name" ] || die 'no name: give --name'
pattern='^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$'
[[ $name =~ $pattern ]] || die "--name $name: a-z, 0-9 and -, from a letter, at most 40"
[ -n "$project" ] || die 'no project: give --project'
[ -n "$zone" ] || die 'no zone: give --zone'
case $verb in
  create | run) [ -n "$work" ] || die "no work folder: $verb needs --work gs://BUCKET/FOLDER" ;;
esac
pattern='^gs://[a-z0-9][-_.a-z0-9]+/[^[:space:]]+$'
[ -z "$work" ] || [[ $work =~ $pattern ]] || die "--work $work: not a folder gs://BUCKET/FOLDER"
case $verb:${#argv[@]} in
  run:0) die 'run: no command; it stands after --' ;;
  run:* | ssh:* | *:0) ;;
  *) die "$verb takes no command" ;;
esac
[ -z "$files" ] || [ -e "$files" ] || die "--files $files: no such file"
[ "$dry" = yes ] || for program in gcloud xpk kubectl; do
  case $route:$program:$verb in
    vm:gcloud:* | gke:gcloud:* | gke:xpk:* | gke:kubectl:logs | gke:kubectl:ssh)
      command -v "$program" >/dev/null || die "$program is not in PATH; docs/pod.md says how to install it" ;;
  esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tree=() # what the workers get
for part in pyproject.toml README.md LICENSE deer_jax configs launch; do tree+=("$root/$part"); done
[ -z "$files" ] || tree+=("${files%/}")

check_bucket() { # before anything is made that costs
  local bucket=${work#gs://} answer
  bucket=gs://${bucket%%/*}
  answer=$(ask '' gcloud storage ls "$bucket" --project "$project" 2>&1) && return
  case $answer in *'matched no objects'*) return 0 ;; esac # it is empty
  die "--work $work: $bucket cannot be read: $(printf %s "$answer" | tr '\n' ' ')"
}

restarts=0
again() { # REASON: counts a restart; the pause is behind us
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "$max_restarts" ]; then
    say "$1; that was restart $max_restarts of $max_restarts, no more"
    exit 1
  fi
  say "$1; restart $restarts of $max_restarts"
}

environment() { # what stands before the command on a worker; the last: who the others are, the machine knows
  quoted export "WORK=$work" "JAX_COMPILATION_CACHE_DIR=$work/xla" DEER_JAX_PROCESSES=environment
}

# shellcheck source=launch/vm.sh source=launch/gke.sh
. "$root/launch/$route.sh" # vm_create and so on, or gke_create and so on
case $verb in create | run) check_bucket ;; esac
"${route}_$verb"
