#!/usr/bin/env bash
# What tpu_pod.sh calls on every worker of a Cloud TPU VM slice, in the folder that holds deer_jax-source.
#
#   worker.sh setup           installs Python 3.12 (the images have 3.10) and deer_jax
#   worker.sh run COMMAND...  starts COMMAND, or attaches to it where it still runs; ends with its status
#
# The command does not hang on the ssh connection: when that is lost, gcloud connects again and finds it running.
set -euo pipefail
home=$PWD
run=$home/deer_jax-run # log, command, processes and status of what runs
mkdir -p "$run"

if [ "$1" = setup ]; then
  curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$home/uv" UV_NO_MODIFY_PATH=1 sh
  "$home/uv/uv" venv --quiet --allow-existing --python 3.12 deer_jax-env
  exec "$home/uv/uv" pip install --quiet --python deer_jax-env "deer_jax[tpu] @ file://$home/deer_jax-source"
fi

shift
words=$(printf '%q ' "$@")
touch "$run/log"
from=$(($(wc -l <"$run/log") + 1))
exec 9>>"$run/lock"
if flock --nonblock 9; then # nothing runs
  rm -f "$run/status"
  printf '%s\n' "$words" >"$run/command"
  # The keeper has descriptor 9 and with it the lock for as long as it lives; `process` is for whoever wants to stop it.
  # shellcheck disable=SC2016  # for the inner shell
  PATH=$home/deer_jax-env/bin:$PATH setsid bash -c '
    cd deer_jax-source || exit
    "${@:2}" & echo $! >"$1/process"
    wait $!
    echo $? >"$1/status"' bash "$run" "$@" </dev/null >>"$run/log" 2>&1 &
  echo $! >"$run/keeper"
elif [ "$(cat "$run/command")" != "$words" ]; then
  echo "worker.sh: another command runs here: $(cat "$run/command"); end it first" >&2
  exit 2
fi
exec 9>&-

tail -s 0.2 -n "+$from" -f --pid "$(cat "$run/keeper")" "$run/log"
exit "$(cat "$run/status" 2>/dev/null || echo 255)"
