# shellcheck shell=bash disable=SC2154
# The route gke of tpu_pod.sh: xpk makes a workload of a GKE cluster, Kubernetes runs it and starts it again.

on_cluster() { call xpk "$@" --cluster "$cluster" --project "$project" --zone "$zone"; }

kind=--$capacity
[ "$capacity" != reserved ] || kind=--reservation=$reservation
context=gke_${project}_${zone%-*}_$cluster # whatever cluster kubectl talks to otherwise
selector=xpk.google.com/workload=$name,batch.kubernetes.io/job-completion-index=$worker

gke_create() { on_cluster cluster create --tpu-type "$type" --num-slices 1 "$kind"; }

gke_setup() {
  call gcloud container clusters get-credentials "$cluster" --location "${zone%-*}" --project "$project"
}

gke_run() { # xpk has a workload repeated after statuses above 126 only, which is what --help promises
  local command status=0
  # exec: a SIGTERM of Kubernetes has to reach the program, not a shell around it. An installation that failed is repeated.
  command="pip install --quiet '.[tpu]' || exit 255; $(environment); exec $(quoted "${argv[@]}")"
  stage=$(ask /tmp/deer_jax mktemp -d)
  [ "$dry" = yes ] || trap 'rm -rf "$stage"' EXIT
  call cp -R "${tree[@]}" "$stage/"
  on_cluster workload create --workload "$name" --tpu-type "$type" --num-slices 1 "$kind" \
    --max-restarts "$max_restarts" --termination-grace-period-seconds 300 \
    --base-docker-image "${image:-python:3.12}" --script-dir "$stage" --command "$command" || status=$?
  [ "$status" = 0 ] || exit "$status"
  trap 'say "left; the run goes on: see logs and status, delete ends it"; exit 130' INT
  status=124 # xpk's own limit of a week
  while [ "$status" = 124 ]; do
    status=0
    on_cluster workload list --wait-for-job-completion "$name" || status=$?
  done
  [ "$status" != 125 ] || { say "$name has failed: see logs; delete it before it is run again" && exit 1; }
  exit "$status"
}

gke_logs() { call kubectl --context "$context" logs --selector "$selector" --tail 200 --follow; }

gke_status() { on_cluster workload list --filter-by-job "$name"; }

gke_ssh() {
  local pod
  pod=$(ask POD kubectl --context "$context" get pods --selector "$selector" --output name)
  [ -n "$pod" ] || { say "$name has no worker $worker that runs" && exit 1; }
  if [ ${#argv[@]} = 0 ]; then
    call kubectl --context "$context" exec --stdin --tty "$pod" -- bash
  else
    call kubectl --context "$context" exec "$pod" -- "${argv[@]}"
  fi
}

gke_delete() {
  on_cluster workload delete --workload "$name" --force
  say "the cluster and its nodes stay and cost; to delete them: $(
    quoted xpk cluster delete --cluster "$cluster" --project "$project" --zone "$zone"
  )"
}
