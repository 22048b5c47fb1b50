# shellcheck shell=bash disable=SC2154
# The route vm of tpu_pod.sh: a queued resource with one TPU slice, and ssh to all of its workers at once.

where=(--project "$project" --zone "$zone" --quiet)

tpu() { call gcloud compute tpus "$@" "${where[@]}"; }

on_all() { tpu tpu-vm ssh "$name" --worker all --command "$1"; }

slice_state() { # ANSWER: NONE, READY, UNKNOWN or whatever Cloud says; of a dry run ANSWER
  local state plain=("${where[@]}" --verbosity error)
  state=$(ask "$1" gcloud compute tpus queued-resources describe "$name" "${plain[@]}" \
    --format 'value(state.state)' 2>&1) || state=$(failed_state "$state" NONE)
  if [ "$state" = ACTIVE ]; then # so it stays for a while after a preemption: the node knows more
    state=$(ask READY gcloud compute tpus tpu-vm describe "$name" "${plain[@]}" --format 'value(state)' 2>&1) ||
      state=$(failed_state "$state" 'ACTIVE, without a node of that name')
  fi
  printf '%s\n' "$state"
}

failed_state() { # OUTPUT STATE: STATE where gcloud says that there is none; it may as well be the network
  case $1 in
    *NOT_FOUND* | *'not found'*) printf '%s\n' "$2" ;;
    *) say "$(printf %s "$1" | tail -n 1)" && echo UNKNOWN ;;
  esac
}

fresh=no # yes: there is a slice of ours that has not been set up

vm_create() { # returns when it is there, however long that takes; what was preempted is deleted and asked for again
  local state last='' kind=()
  case $capacity in spot) kind=(--spot) ;; reserved) kind=(--reserved) ;; esac
  state=$(slice_state NONE)
  while [ "$state" != READY ]; do
    [ "$state" = "$last" ] || say "slice $name: $state"
    last=$state
    case $state in
      NONE)
        if tpu queued-resources create "$name" --node-id "$name" --accelerator-type "$type" \
          --runtime-version "${runtime:-$default_runtime}" ${kind[@]+"${kind[@]}"}; then
          fresh=yes
        else # gcloud has said why
          [ "$restarts" -gt 0 ] || exit 1
          sleep "$pause"
          again "the slice $name cannot be created"
        fi
        ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED)
        if [ "$fresh" = yes ]; then sleep "$pause" && again "the new slice is $state"; fi
        tpu queued-resources delete "$name" --force || sleep "$poll"
        ;;
      STOPPED) die "the slice $name is stopped: start it, or delete it and what is on its disks" ;;
      *) sleep "$poll" ;;
    esac
    state=$(slice_state ACTIVE)
  done
}

vm_setup() { # can be repeated
  local get='mkdir deer_jax-source' branch=() send=("${tree[@]}")
  if [ -n "$source" ]; then
    case $source in *'#'*) branch=(--branch "${source#*#}") ;; esac
    get=$(quoted git clone --quiet --depth 1 ${branch[@]+"${branch[@]}"} "${source%%#*}" deer_jax-source)
    send=(${files:+"${files%/}"})
  fi
  on_all "rm -rf deer_jax-source && $get" || return
  [ ${#send[@]} = 0 ] || tpu tpu-vm scp "${send[@]}" "$name:deer_jax-source/" --recurse --worker all || return
  on_all 'bash deer_jax-source/launch/worker.sh setup' || return
  fresh=no
}

vm_run() {
  local status state
  trap 'say "left; the run goes on: the same command attaches to it again, delete ends it"; exit 130' INT
  while :; do
    vm_create
    status=0
    if [ "$fresh" = yes ]; then vm_setup || status=255; fi
    if [ "$status" = 0 ]; then
      on_all "$(environment); bash deer_jax-source/launch/worker.sh run $(quoted "${argv[@]}")" || status=$?
    fi
    if [ "$dry" = yes ]; then
      say "dry run: after a preemption, queued-resources delete $name --force, and all of this again" && return
    fi
    case $status in
      0) say "done; $name still runs and costs: delete gives it back" && return ;;
      2) exit 2 ;;
    esac
    say "ended with status $status"
    sleep "$pause" # it takes a moment until Cloud knows of a preemption
    state=$(slice_state READY)
    if [ "$status" -lt 128 ] && [ "$state" = READY ]; then # not the slice's fault
      if [ "$status" = 127 ]; then say 'a program is missing there: has setup been run?'; fi
      exit "$status"
    fi
    again "status $status, slice $name: $state"
  done
}

vm_logs() { tpu tpu-vm ssh "$name" --worker "$worker" --command 'tail -n 200 -F deer_jax-run/log'; }

vm_status() {
  tpu queued-resources describe "$name" --format 'value(state.state)'
  tpu tpu-vm describe "$name" --format 'value(state,health)'
}

vm_ssh() {
  if [ ${#argv[@]} = 0 ]; then
    tpu tpu-vm ssh "$name" --worker "$worker"
  else
    tpu tpu-vm ssh "$name" --worker "$worker" --command "$(quoted "${argv[@]}")"
  fi
}

vm_delete() { tpu queued-resources delete "$name" --force; }
