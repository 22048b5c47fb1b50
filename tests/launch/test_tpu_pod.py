"""launch/tpu_pod.sh: what it would run, what it refuses, and how it goes on after a preemption.

There is no cloud here: `gcloud`, `xpk` and `kubectl` are scripts of this file, which note their arguments.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "launch"
GOLDEN = Path(__file__).resolve().parent / "golden"
BASE = ["--name", "pod", "--project", "p", "--zone", "us-west4-a", "--pause", "0", "--poll", "0"]
VM = [*BASE, "--type", "v5litepod-16"]
GKE = [*BASE, "--type", "v6e-8", "--cluster", "c"]
WORK = ["--work", "gs://bucket/folder"]
ALIGN = ["--", "deer-jax", "align", "--recipe", "configs/paper/qwen3_8b.yaml", "--set", "output=$WORK/run"]


def pod(*words: str, path: Path | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the script; `path` is a folder of programs that come before all others."""
    environment = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}", "FAKE": str(path)} if path else {})
    return subprocess.run(
        [LAUNCH / "tpu_pod.sh", *words], capture_output=True, text=True, env=environment, cwd=cwd, timeout=30
    )


# Every verb of each route, and every option that changes a command.
DRY_RUNS = {
    "vm": [
        ["create", *VM, *WORK],
        ["create", *VM, *WORK, "--capacity", "spot"],
        ["create", *VM, *WORK, "--capacity", "reserved", "--runtime", "v2-of-mine"],
        ["create", *BASE, *WORK, "--type", "v4-16"],
        ["create", *BASE, *WORK, "--type", "v6e-8", "--route", "vm"],
        ["setup", *VM],
        ["setup", *VM, "--files", "configs/quickstart.yaml"],
        ["setup", *VM, "--source", "https://example.com/deer_jax.git#v1", "--files", "configs/"],
        ["run", *VM, *WORK, *ALIGN],
        ["logs", *VM],
        ["logs", *VM, "--worker", "3"],
        ["status", *VM],
        ["ssh", *VM, "--worker", "3"],
        ["ssh", *VM, "--", "ls", "-l"],
        ["delete", *VM],
        ["run", "--env", "launch/pod.env.example", "--name=other", *ALIGN],
    ],
    "gke": [
        ["create", *GKE, *WORK],
        ["create", *GKE, *WORK, "--capacity", "spot"],
        ["create", *BASE, *WORK, "--type", "tpu7x-8", "--cluster", "c", "--capacity", "reserved", "--reservation", "r"],
        ["create", *BASE, *WORK, "--type", "v5litepod-16", "--cluster", "c", "--route", "gke"],
        ["setup", *GKE],
        ["run", *GKE, *WORK, *ALIGN],
        ["run", *GKE, *WORK, "--image", "my/image", "--files", "configs/", "--max-restarts", "3", *ALIGN],
        ["logs", *GKE, "--worker", "3"],
        ["status", *GKE],
        ["ssh", *GKE],
        ["ssh", *GKE, "--", "ls", "-l"],
        ["delete", *GKE],
    ],
}


@pytest.mark.parametrize("route", DRY_RUNS)
def test_what_a_dry_run_prints(route: str, tmp_path: Path):
    """Golden files; after a wanted change: DEER_JAX_WRITE_GOLDEN=1 pytest tests/launch, and read the difference."""
    for program in ("gcloud", "xpk", "kubectl", "cp", "rm", "mktemp"):
        (tmp_path / program).write_text("#!/bin/sh\necho called >>$FAKE/calls\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    text = ""
    for words in DRY_RUNS[route]:
        result = pod(words[0], "--dry-run", *words[1:], path=tmp_path)
        assert result.returncode == 0, result.stderr
        text += f"$ launch/tpu_pod.sh {shlex.join(words)}\n{result.stdout.replace(str(ROOT), 'ROOT')}\n"
    assert not (tmp_path / "calls").exists()
    golden = GOLDEN / f"{route}.txt"
    if os.environ.get("DEER_JAX_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_words_come_through_two_shells():
    words = ["a  b", "it's", '"', "$HOME", "*", "", "é", "x=$WORK/y", "back\\slash", "&"]
    result = pod("run", "--dry-run", *VM, *WORK, "--", *words)
    command = shlex.split(result.stdout.splitlines()[-1])
    remote = shlex.split(command[command.index("--command") + 1])
    assert remote[remote.index("run") + 1 :] == [word.replace("$WORK", "gs://bucket/folder") for word in words]


def test_an_env_file_is_read_and_not_run(tmp_path: Path):
    env = tmp_path / "pod.env"
    env.write_text(f"# mine\nname=$(touch {tmp_path}/ran)\r\nproject=p\n\nzone=z\ntype=v4-8")
    result = pod("status", "--dry-run", "--env", str(env), "--name", "flag")
    assert "describe flag " in result.stdout
    assert "describe flag " in pod("status", "--dry-run", "--name", "flag", "--env", str(env)).stdout
    assert pod("status", "--dry-run", "--env", str(env)).returncode == 2
    assert not (tmp_path / "ran").exists()


NO_CLOUD = [
    ([], "no verb: create, setup, run, logs, status, ssh or delete; see --help"),
    (["make"], "make: unknown verb; create, setup, run, logs, status, ssh or delete"),
    (["run", *VM, "--speed", "1"], "--speed: unknown option speed; see --help"),
    (["run", *VM, "--zone"], "--zone: no value"),
    (["run", *VM, "--zone="], "--zone: zone has no value"),
    (["run", *VM, "deer-jax"], "deer-jax: unknown word; the command stands after --"),
    (["run", "--env", "nowhere.env"], "--env nowhere.env: no such file"),
    (["status", *BASE], "no type: give --type, as in --type v5litepod-16"),
    (["status", *BASE, "--type", "v9-8"], "--type v9-8: unknown; v4-N, v5litepod-N, v5p-N, v6e-N or tpu7x-N"),
    (["status", *BASE, "--type", "v5e-16"], "--type v5e-16: Cloud calls it v5litepod-16"),
    (["status", *VM[2:]], "no name: give --name"),
    (["status", *VM, "--name", "Pod"], "--name Pod: a-z, 0-9 and -, from a letter, at most 40"),
    (["status", "--name", "pod", "--type", "v4-8", "--zone", "z"], "no project: give --project"),
    (["status", "--name", "pod", "--type", "v4-8", "--project", "p"], "no zone: give --zone"),
    (["create", *VM], "no work folder: create needs --work gs://BUCKET/FOLDER"),
    (["run", *VM, *ALIGN], "no work folder: run needs --work gs://BUCKET/FOLDER"),
    (["run", *VM, "--work", "/tmp/x", *ALIGN], "--work /tmp/x: not a folder gs://BUCKET/FOLDER"),
    (["run", *VM, "--work", "gs://bucket", *ALIGN], "--work gs://bucket: not a folder gs://BUCKET/FOLDER"),
    (["run", *VM, *WORK], "run: no command; it stands after --"),
    (["delete", *VM, "--", "ls"], "delete takes no command"),
    (["setup", *VM, "--files", "nowhere"], "--files nowhere: no such file"),
    (["logs", *VM, "--worker", "all"], "--worker all: not a whole number"),
    (["logs", *VM, "--max-restarts", "-1"], "--max-restarts -1: not a whole number"),
    (["create", *VM, *WORK, "--capacity", "cheap"], "--capacity cheap: on-demand, spot or reserved"),
    (["create", *GKE, *WORK, "--capacity", "reserved"], "--capacity reserved: gke needs --reservation NAME"),
    (["create", *GKE, *WORK, "--reservation", "r"], "--reservation r: only with --capacity reserved"),
    (["create", *VM, *WORK, "--route", "ssh"], "--route ssh: vm or gke"),
    (["create", *VM, *WORK, "--cluster", "c"], "--cluster, --reservation and --image are of the route gke, and"
     " v5litepod-16 goes through vm here; leave them out or give --route gke"),
    (["create", *GKE, *WORK, "--runtime", "x"], "--runtime and --source are of the route vm, and v6e-8 goes through gke"
     " here; leave them out or give --route vm"),
    (["create", *BASE, *WORK, "--type", "v6e-8"], "no cluster: the route gke needs --cluster"),
    (["create", *BASE, "--type", "tpu7x-8", "--route", "vm"], "--route vm: tpu7x-8 has no Cloud TPU VMs; only gke"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), NO_CLOUD, ids=[line[:40] for _, line in NO_CLOUD])
def test_wrong_words_are_one_line(words: list[str], line: str, tmp_path: Path):
    result = pod(*words, path=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"tpu_pod: {line}\n")


@pytest.mark.parametrize("line", ["speed=1", "name", "zone="])
def test_wrong_lines_of_an_env_file(line: str, tmp_path: Path):
    (tmp_path / "pod.env").write_text(f"{line}\n")
    result = pod("status", "--env", "pod.env", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("tpu_pod: pod.env: ")
    assert result.stderr.count("\n") == 1


def test_programs_that_are_missing(tmp_path: Path):
    for program in ("bash", "dirname", "env"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    for words, program in ((VM, "gcloud"), (GKE, "gcloud"), (GKE, "xpk"), (GKE, "kubectl")):
        result = subprocess.run(
            [LAUNCH / "tpu_pod.sh", "logs", *words], capture_output=True, text=True, env={"PATH": str(tmp_path)}
        )
        line = f"tpu_pod: {program} is not in PATH; docs/pod.md says how to install it\n"
        assert (result.returncode, result.stderr) == (2, line)
        if words is GKE:
            (tmp_path / program).symlink_to("/bin/true")
    help_ = pod("run", "--help")
    assert help_.returncode == 0
    assert "An 8-chip v6e slice" in help_.stdout


# A cloud with one slice. `slice` holds the state of the queued resource, `node` that of the machines; `script` has a
# line for each start of the command: the status it ends with, and the state of the slice then.
CLOUD = r"""#!/usr/bin/env bash
printf '%s %s\n' "${0##*/}" "$*" >>"$FAKE/calls"
case "$*" in
  "storage ls"*) [ ! -e "$FAKE/storage" ] || { cat "$FAKE/storage" >&2; exit 1; } ;;
  *"queued-resources describe"*)
    if [ -e "$FAKE/network" ]; then rm "$FAKE/network"; echo "ERROR: gcloud crashed: no route to host" >&2; exit 1; fi
    [ -e "$FAKE/slice" ] || { echo "ERROR: (gcloud) NOT_FOUND: Resource 'pod' was not found" >&2; exit 1; }
    cat "$FAKE/slice" ;;
  *"queued-resources create"*)
    if [ "$(head -n 1 "$FAKE/script")" = refused ]; then sed -i 1d "$FAKE/script"; exit 1; fi
    echo ACTIVE >"$FAKE/slice"; echo READY >"$FAKE/node" ;;
  *"queued-resources delete"*) rm -f "$FAKE/slice" "$FAKE/node" ;;
  *"tpu-vm describe"*) cat "$FAKE/node" ;;
  *"worker.sh setup"*) exit "$(cat "$FAKE/setup" 2>/dev/null || echo 0)" ;;
  *"worker.sh run"* | *wait-for-job*)
    read -r status slice node <"$FAKE/script"
    sed -i 1d "$FAKE/script"
    [ -z "$slice" ] || echo "$slice" >"$FAKE/slice"
    [ -z "$node" ] || echo "$node" >"$FAKE/node"
    exit "$status" ;;
esac
"""
STEPS = {
    "queued-resources describe": "ask", "tpu-vm describe": "ask", "storage ls": "bucket", "resources create": "create",
    "resources delete": "delete", "rm -rf deer_jax-source": "clear", "tpu-vm scp": "send", "worker.sh setup": "setup",
    "worker.sh run": "run", "workload create": "submit", "wait-for-job": "wait",
}  # fmt: skip


@pytest.fixture
def cloud(tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """Plays a verb: (words, script, whether there is a slice) -> status, what was done beside asking, stderr."""
    for program in ("gcloud", "xpk"):
        (tmp_path / program).write_text(CLOUD)
        (tmp_path / program).chmod(0o755)

    def play(words: list[str], script: str = "", there: bool = False) -> tuple[int, list[str], str]:
        (tmp_path / "script").write_text(script)
        if there:
            (tmp_path / "slice").write_text("ACTIVE\n")
            (tmp_path / "node").write_text("READY\n")
        result = pod(*words, path=tmp_path)
        calls = (tmp_path / "calls").read_text().splitlines()
        steps = [step for call in calls for part, step in STEPS.items() if part in call and step != "ask"]
        runs = {call for call in calls if "worker.sh run" in call}
        assert len(runs) <= 1  # the very same command every time
        return result.returncode, steps, result.stderr

    return play


RUN = ["run", *VM, *WORK, "--max-restarts", "3", *ALIGN]
MAKE = ["create", "clear", "send", "setup"]


@pytest.mark.parametrize(
    ("script", "status", "steps"),
    [
        ("0", 0, [*MAKE, "run"]),
        ("255 SUSPENDED\n0", 0, [*MAKE, "run", "delete", *MAKE, "run"]),
        ("255 ACTIVE PREEMPTED\n0", 0, [*MAKE, "run", "delete", *MAKE, "run"]),
        ("refused", 1, ["create"]),
        ("255 SUSPENDED\nrefused\n0", 0, [*MAKE, "run", "delete", "create", *MAKE, "run"]),
        ("1 FAILED\n0", 0, [*MAKE, "run", "delete", *MAKE, "run"]),  # gcloud's own status when it finds no machine
        ("143\n130\n255\n134\n0", 1, [*MAKE, "run", "run", "run", "run"]),  # the slice is still there; three restarts
        ("143\n130\n0", 0, [*MAKE, "run", "run", "run"]),
        ("1", 1, [*MAKE, "run"]),
        ("2", 2, [*MAKE, "run"]),
        ("2 SUSPENDED", 2, [*MAKE, "run"]),
        ("127", 127, [*MAKE, "run"]),
    ],
)
def test_restarts(cloud, script: str, status: int, steps: list[str]):
    assert cloud(RUN, script + "\n")[:2] == (status, ["bucket", *steps])


def test_a_slice_that_is_there_is_used_as_it_is(cloud):
    assert cloud(RUN, "0\n", there=True)[:2] == (0, ["bucket", "run"])


def test_a_lost_slice_is_replaced_by_create(cloud, tmp_path: Path):
    (tmp_path / "slice").write_text("SUSPENDED\n")
    assert cloud(["create", *VM, *WORK])[:2] == (0, ["bucket", "delete", "create"])


def test_a_lost_network_is_no_lost_slice(cloud, tmp_path: Path):
    (tmp_path / "network").touch()
    status, steps, lines = cloud(RUN, "0\n", there=True)
    assert (status, steps) == (0, ["bucket", "run"])
    assert "tpu_pod: ERROR: gcloud crashed: no route to host\ntpu_pod: slice pod: UNKNOWN\n" in lines


def test_a_stopped_slice_is_left_alone(cloud, tmp_path: Path):
    (tmp_path / "slice").write_text("ACTIVE\n")
    (tmp_path / "node").write_text("STOPPED\n")
    status, steps, line = cloud(["create", *VM, *WORK])
    assert (status, steps) == (2, ["bucket"])
    assert "the slice pod is stopped" in line


def test_setup_that_fails_is_repeated(cloud, tmp_path: Path):
    (tmp_path / "setup").write_text("1")
    status, steps, _ = cloud(RUN)
    assert (status, steps) == (1, ["bucket", *MAKE, *["clear", "send", "setup"] * 3])


@pytest.mark.parametrize("words", [["create", *VM, *WORK], RUN, ["create", *GKE, *WORK]])
def test_a_bucket_without_permission(cloud, tmp_path: Path, words: list[str]):
    (tmp_path / "storage").write_text("ERROR: (gcloud.storage.ls) HTTPError 403: me does not have storage.objects.list")
    status, steps, line = cloud(words)
    assert (status, steps) == (2, ["bucket"])
    assert line.startswith("tpu_pod: --work gs://bucket/folder: gs://bucket cannot be read: ERROR: ")
    assert "403" in line
    assert line.count("\n") == 1


def test_an_empty_bucket_is_one(cloud, tmp_path: Path):
    (tmp_path / "storage").write_text("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    assert cloud(["create", *VM, *WORK])[:2] == (0, ["bucket", "create"])


@pytest.mark.parametrize(("script", "status"), [("0", 0), ("124\n0", 0), ("125", 1), ("1", 1)])
def test_gke_waits_for_the_workload(cloud, script: str, status: int):
    waits = ["wait"] * len(script.split())
    assert cloud(["run", *GKE, *WORK, *ALIGN], script + "\n")[:2] == (status, ["bucket", "submit", *waits])


# ------------------------------------------------------------------------------------------- the script on the workers


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts worker.sh run in an empty home."""
    (tmp_path / "deer_jax-source").mkdir()

    def start(*words: str) -> subprocess.Popen[str]:
        command = ["bash", LAUNCH / "worker.sh", "run", *words]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    yield start
    processes = tmp_path / "deer_jax-run" / "process"
    if processes.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(processes.read_text()), signal.SIGKILL)


def follows(pid: int) -> bool:
    """Whether that worker.sh has come to following the log."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    with contextlib.suppress(FileNotFoundError):  # one that has just ended
        return any(Path(f"/proc/{child}/comm").read_text() == "tail\n" for child in children)
    return False


def test_the_status_of_a_worker_is_that_of_its_command(worker, tmp_path: Path):
    process = worker("sh", "-c", 'echo "in ${PWD##*/}"; exit 7')
    assert process.communicate(timeout=10) == ("in deer_jax-source\n", "")
    assert process.returncode == 7
    assert (tmp_path / "deer_jax-run" / "log").read_text() == "in deer_jax-source\n"


def test_a_lost_connection_loses_nothing(worker, tmp_path: Path):
    """The same command attaches to the one that runs, another one is refused; a signal reaches the command."""
    job = ("sh", "-c", "trap 'echo saved; exit 143' TERM; echo started; while :; do sleep 0.05; done")
    first = worker(*job)
    assert first.stdout.readline() == "started\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=10)
    other = worker("sh", "-c", "echo another")
    assert "another command runs here" in other.communicate(timeout=10)[1]
    assert other.returncode == 2
    second = worker(*job)
    while not follows(second.pid):
        time.sleep(0.01)
    os.kill(int((tmp_path / "deer_jax-run" / "process").read_text()), signal.SIGTERM)
    assert second.communicate(timeout=10) == ("saved\n", "")
    assert second.returncode == 143
    assert (tmp_path / "deer_jax-run" / "log").read_text() == "started\nsaved\n"


def test_from_run_to_the_workers_and_back(tmp_path: Path):
    """Both scripts together, with an ssh that is a shell in the folder of a worker: saved, started again, done."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("""#!/usr/bin/env bash
case "$*" in
  *"queued-resources describe"*) echo ACTIVE ;;
  *"tpu-vm describe"*) echo READY ;;
  *"--worker all"*)
    while [ "$1" != --command ]; do shift; done
    for worker in 0 1; do (cd "$FAKE/$worker" && exec bash -c "$2") & processes+=($!); done
    for process in "${processes[@]}"; do wait "$process" || status=$?; done
    exit "${status:-0}" ;;
esac
""")
    gcloud.chmod(0o755)
    for worker in ("0", "1"):
        (tmp_path / worker / "deer_jax-source").mkdir(parents=True)
        (tmp_path / worker / "deer_jax-source" / "launch").symlink_to(LAUNCH)
    job = 'echo "$1 $WORK $JAX_COMPILATION_CACHE_DIR"; [ -e saved ] || { touch saved; exit 143; }'
    result = pod("run", *VM, *WORK, "--", "sh", "-c", job, "sh", "it's $WORK", path=tmp_path)
    assert result.returncode == 0, result.stderr
    line = "it's gs://bucket/folder gs://bucket/folder gs://bucket/folder/xla\n"
    assert result.stdout == 4 * line  # two workers, twice
    assert "status 143, slice pod: READY; restart 1 of 50" in result.stderr


def test_setup_of_a_worker(tmp_path: Path):
    """The installer of uv, played by curl, writes a uv that notes its arguments."""
    (tmp_path / "bin").mkdir()
    curl = tmp_path / "bin" / "curl"
    curl.write_text("""#!/bin/sh
cat <<'END'
mkdir -p "$UV_INSTALL_DIR"
printf '#!/bin/sh\\necho "$@" >>uv.calls\\n' >"$UV_INSTALL_DIR/uv"
chmod +x "$UV_INSTALL_DIR/uv"
END
""")
    curl.chmod(0o755)
    environment = os.environ | {"PATH": f"{curl.parent}:{os.environ['PATH']}"}
    for _ in range(2):  # it can be repeated
        subprocess.run(["bash", LAUNCH / "worker.sh", "setup"], cwd=tmp_path, env=environment, check=True, timeout=10)
    assert (tmp_path / "uv.calls").read_text().splitlines() == 2 * [
        "venv --quiet --allow-existing --python 3.12 deer_jax-env",
        f"pip install --quiet --python deer_jax-env deer_jax[tpu] @ file://{tmp_path}/deer_jax-source",
    ]


@pytest.mark.parametrize("name", ["tpu_pod.sh", "vm.sh", "gke.sh"])
def test_nothing_newer_than_the_bash_of_macos(name: str):
    newer = r"mapfile|declare -[An]|local -n|,,\}|\^\^\}|&>>|\|&|wait -n|\{\w+\}[<>]|%\(|@Q\}|EPOCH|coproc|;;?&"
    assert re.findall(newer, (LAUNCH / name).read_text()) == []


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda script: script.name)
def test_shellcheck(script: Path):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found
    result = subprocess.run([found, "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
