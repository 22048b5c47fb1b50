"""Runs that lose nothing and hide nothing: one writer, the same inputs, a folder that is still there, sound metrics."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deer_jax
from deer_jax import InputError
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.cli import training
from deer_jax.data.bpe import train_bpe
from deer_jax.errors import RunError, Terminated
from deer_jax.files import Lock
from deer_jax.training.metrics import MetricsLog, read_metrics
from tests.stamps import keep_stamp
from tests.tiny import random_params, tiny
from tests.training import pretraining, runs
from tests.training.refusals import taken_or_refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("integrity"))


def short(folder, output="run", **changes):
    """A run of one step, without evaluation: what is tested here happens before and after."""
    stage = runs.recipe(folder)["stages"][0] | {"steps": 1, "warmup": 0}
    return runs.recipe(folder, output, **({"evaluation": None, "stages": [stage]} | changes))


@pytest.fixture(scope="module")
def begun(folder):
    """A run that was begun; the folder is to be copied together with what it was made from."""
    assert deer_jax.align(short(folder)).finished
    return folder


def copied(begun, tmp_path):
    """The same run, its target and answers elsewhere, with the times they had."""
    home = shutil.copytree(begun, tmp_path / "home")
    for name in ("recipe.yaml", "identity.json"):
        path = home / "run" / name
        path.write_text(path.read_text().replace(str(begun), str(home)))
    return home, short(home)


def change_one_value(path, layer=1):
    """One value of a middle layer, by the least there is; the file keeps its size and its time of modification."""
    before = path.stat()
    tensors = load_file(path)
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    tensors[name].reshape(-1)[7] = np.nextafter(tensors[name].reshape(-1)[7], np.float32(9))
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_second_start_reads_no_file_again_unless_it_is_told_to(begun, tmp_path):
    home, values = copied(begun, tmp_path)
    weights = home / "target" / "model.safetensors"
    assert deer_jax.align(values).finished  # the copies have other times
    changed = rf"\A{home}/run: cannot go on: the target's weights changed \(model\.safetensors\) since it was begun; b"
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep_stamp(monkeypatch, weights)
        change_one_value(weights)
        assert deer_jax.align(values).finished  # what the size and time of change say is trusted
        with pytest.raises(InputError, match=changed):
            deer_jax.align(values, verify=True)
    with pytest.raises(InputError, match=changed):
        deer_jax.align(values)
    shutil.copy2(begun / "target" / "model.safetensors", weights)
    os.utime(weights)
    assert deer_jax.align(values).finished  # another time, the same content


@pytest.mark.parametrize(
    ("name", "before", "after", "what"),
    [
        (
            "target/config.json",
            '"rms_norm_eps": 1e-06',
            '"rms_norm_eps": 1e-05',
            "the target's configuration changed (",
        ),
        ("answers.jsonl", '"ended": false', '"ended": true', "the answers changed"),
    ],
)
def test_what_else_decides_a_run_may_not_change_either(begun, tmp_path, name, before, after, what):
    home, values = copied(begun, tmp_path)
    text = (home / name).read_text()
    assert before in text
    (home / name).write_text(text.replace(before, after))
    with pytest.raises(InputError, match=rf"\A[^\n]*cannot go on: {re.escape(what)}[^\n]*\Z"):
        deer_jax.align(values)


def test_a_changed_start_folder_is_refused(folder, tmp_path):
    target = deer_jax.load_target(folder / "target")
    deer_jax.save_drafter(tmp_path / "start", deer_jax.load_drafter("from-target:0,1", target=target))
    values = short(folder, drafter=str(tmp_path / "start"), reading=None) | {"output": str(tmp_path / "run")}
    deer_jax.align(values)
    config = tmp_path / "start" / "config.json"
    sound = config.read_text()
    config.write_text(sound.replace('"draft_length": 8', '"draft_length": 4'))
    with pytest.raises(InputError, match=r"the start drafter's configuration changed \(config\.json\)"):
        deer_jax.align(values)
    config.write_text(sound)
    assert deer_jax.align(values).finished
    change_one_value(tmp_path / "start" / "model.safetensors", layer=0)
    with pytest.raises(InputError, match=r"the start drafter's weights changed \(model\.safetensors\)"):
        deer_jax.align(values, verify=True)


def test_a_run_that_a_run_starts_from_may_not_have_gone_on(begun, tmp_path):
    start = shutil.copytree(begun / "run", tmp_path / "start")
    values = short(begun, drafter=str(start)) | {"output": str(tmp_path / "run")}
    deer_jax.align(values)
    assert deer_jax.align(values).finished
    shutil.rmtree(start / "checkpoints")
    other = short(begun) | {"output": str(tmp_path / "other"), "seed": 1}
    deer_jax.align(other)
    shutil.copytree(tmp_path / "other" / "checkpoints", start / "checkpoints")
    with pytest.raises(InputError, match=r"the start drafter's weights changed \(checkpoint\.json\)"):
        deer_jax.align(values)


def test_a_chat_template_that_writes_the_date_writes_that_of_the_begin(tmp_path):
    (tmp_path / "target").mkdir()
    train_bpe([pretraining.text("alpha")], 288, tmp_path / "target")
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    (tmp_path / "target" / "chat_template.jinja").write_text(template)
    model = tiny("qwen3", vocab_size=288, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24, context=64)
    save_folder(tmp_path / "model", model, random_params(model, 3), tokenizer_source=tmp_path / "target")
    rows = [{"prompt": [5, i + 9], "answer": [7, 8, 9]} for i in range(8)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = {"messages": [{"role": "user", "content": "step"}]}
    (tmp_path / "held_out.jsonl").write_text(json.dumps(chat) + "\n")
    evaluation = {"prompts": str(tmp_path / "held_out.jsonl"), "max_new_tokens": 2, "temperatures": [0]}
    values = short(tmp_path, target=str(tmp_path / "model"), evaluation=evaluation)
    deer_jax.align(values)
    identity = tmp_path / "run" / "identity.json"
    text = identity.read_text()
    identity.write_text(re.sub(r'"begun": "\d{4}', '"begun": "1999', text))
    with pytest.raises(InputError, match="cannot go on: the held-out prompts changed since it was begun"):
        deer_jax.align(values)


@pytest.mark.parametrize("verb", ["align", "pretrain"])
def test_a_run_that_another_writes_is_refused_before_any_work(tmp_path, verb):
    values = short(tmp_path, target="none") if verb == "align" else pretraining.recipe(tmp_path, texts="none")
    message = rf"\A[^\n]*run: is being written by process {os.getpid()} on [^\n]*;[^\n]*\Z"
    with Lock(tmp_path / "run", inside=True), pytest.raises(InputError, match=message):
        getattr(deer_jax, verb)(values)


def test_two_processes_and_the_lock_of_a_dead_one(folder, tmp_path, environment):
    stages = [runs.recipe(folder)["stages"][0] | {"steps": 5000}]
    values = short(folder, stages=stages) | {"output": str(tmp_path / "run")}
    command = [sys.executable, "-m", "deer_jax.cli.main", "align", "--recipe", str(runs.write(values))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    checkpoints = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not (checkpoints / "2").exists():
        time.sleep(0.02)
    with pytest.raises(InputError, match=rf"\A[^\n]*run: is being written by process {process.pid} on [^\n]*\Z"):
        deer_jax.align(values)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = deer_jax.align(values, should_stop=lambda: True)
    assert report.step >= 3


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_removed_or_replaced_while_it_trains_ends_the_run(folder, tmp_path, again):
    run = tmp_path / "run"
    values = short(folder, stages=runs.recipe(folder)["stages"]) | {"output": str(run)}

    def remove(done, total, note):
        if done == 3 and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            while not (run / "checkpoints" / "2").exists():  # written meanwhile, by a thread
                time.sleep(0.01)
            shutil.rmtree(run)
            if again:
                run.mkdir()
                (run / "thesis.txt").touch()

    with pytest.raises(RunError, match=rf"\A{run}: was removed or replaced while it was being written[^\n]*\Z"):
        deer_jax.align(values, progress=remove)
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == ({"run", "once", "thesis.txt"} if again else {"once"})


@pytest.mark.parametrize("verb", ["align", "pretrain"])
@pytest.mark.parametrize("name", ["run[x]", "a\\b"])
def test_a_path_that_could_not_be_read_back_is_refused_before_the_first_step(tmp_path, verb, name):
    values = short(tmp_path, name) if verb == "align" else pretraining.recipe(tmp_path, name)
    with pytest.raises(InputError, match=r"\A[^\n]*: a path of checkpoints must not have [^\n]*; choose another\Z"):
        getattr(deer_jax, verb)(values)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run(folder, tmp_path):
    stages = [runs.recipe(folder)["stages"][0] | {"learning_rate": 1e37, "warmup": 0}]
    values = short(folder, stages=stages) | {"output": str(tmp_path / "run")}
    with pytest.raises(RunError, match=r"\A[^\n]*run: step \d has loss [^\n]* lower the learning rate, or alpha"):
        deer_jax.align(values)


def test_a_damaged_record_of_an_older_checkpoint_is_set_aside_too(begun, tmp_path):
    _, values = copied(begun, tmp_path)
    checkpoints = tmp_path / "home" / "run" / "checkpoints"
    shutil.copytree(checkpoints / "1", checkpoints / "0")  # its record says step 1
    with pytest.warns(UserWarning, match=r"\Athe checkpoint of step 0 is damaged [^\n]*damaged-0-1; that of step 1"):
        deer_jax.align(values)
    assert [path.name for path in checkpoints.iterdir()] == ["1"]
    assert (checkpoints.parent / "damaged-0-1" / "checkpoint.json").exists()


def test_torn_and_foreign_lines_of_the_metrics_are_dropped(begun, tmp_path):
    _, values = copied(begun, tmp_path)
    path = tmp_path / "home" / "run" / "metrics.jsonl"
    sound = path.read_bytes()
    path.write_bytes(
        b'{"step": 1, "loss": 2.\n[1]\n{"step": "1"}\n{"step": true}\n\xff\n' + sound + b'{"step": 9}\n{"st'
    )
    with pytest.warns(UserWarning, match=rf"\A{path}: 5 lines are no metrics and are dropped\Z"):
        deer_jax.align(values)
    assert path.read_bytes() == sound
    with warnings.catch_warnings(action="error"):
        deer_jax.align(values)


def test_strange_files_where_metrics_go_are_one_line(begun, tmp_path):
    _, values = copied(begun, tmp_path)
    run = tmp_path / "home" / "run"
    (run / "tensorboard" / "events.out.tfevents.1").write_bytes(b"\0\xff nonsense")
    (run / "tensorboard" / "folder").mkdir()
    deer_jax.align(values)
    sound = (run / "metrics.jsonl").read_bytes()
    for make in (lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere")):
        (run / "metrics.jsonl").unlink()
        make(run / "metrics.jsonl")
        with pytest.raises(InputError, match=r"\A[^\n]*metrics\.jsonl[^\n]*\Z"):
            deer_jax.align(values)
        (run / "metrics.jsonl").rename(tmp_path / f"strange_{time.monotonic_ns()}")
        (run / "metrics.jsonl").write_bytes(sound)
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("mine")
    with pytest.raises(InputError, match=r"\A[^\n]*metrics\.jsonl: cannot be written: [^\n]*\Z"):
        deer_jax.align(values)
    assert (run / "tensorboard").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_whatever_stands_in_the_metrics_a_run_goes_on(tmp_path):
    lines = [
        {"step": i, "stage": "refinement", "tokens": 40 * i, "loss": 0.5, "held_out": {"loss": 1}} for i in range(6)
    ]
    sound, rng = "".join(json.dumps(line) + "\n" for line in lines).encode(), random.Random(0)
    odd = (b"[" * 1500, b"9" * 5000, b"1e999", b"null", b'"\\ud800"', b"-1", b"\xff", b"\0", b"NaN", b"\n", b"{}")
    for number in range(100):
        damaged = bytearray(sound)
        for _ in range(rng.randrange(1, 6)):
            start = rng.randrange(len(damaged))
            damaged[start : start + rng.randrange(0, 40)] = rng.choice((*odd, b"", rng.randbytes(2)))
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        with (
            taken_or_refused((number, bytes(damaged))),
            warnings.catch_warnings(action="ignore"),
            Lock(tmp_path, inside=True) as lock,
            MetricsLog(tmp_path, resumed_at=3, lock=lock) as log,
        ):
            assert log.tokens >= 0 or b"-1" in damaged
            log.write(4, {"loss": 1.0})
        found = read_metrics(tmp_path)
        assert found[-1] == {"step": 4, "loss": 1.0}, (number, bytes(damaged))
        assert all(line["step"] <= 3 for line in found[:-1]), (number, bytes(damaged))


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_what_stopped_a_run_is_known_by_its_exit_status(capsys, number, kind):
    with training.asked_to_stop() as stopping:
        os.kill(os.getpid(), number)
        assert type(stopping.interruption("line")) is kind
        with pytest.raises(kind, match="the same command goes on") as raised:
            os.kill(os.getpid(), number)
        assert type(raised.value) is kind
    capsys.readouterr()


def test_a_start_that_is_not_finite_is_named(folder, tmp_path):
    target = deer_jax.load_target(folder / "target")
    start = deer_jax.drafter_from_target(target, layers=(0, 1))
    deer_jax.save_drafter(tmp_path / "start", start)
    weights = tmp_path / "start" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    values = runs.recipe(folder) | {"output": str(tmp_path / "run"), "drafter": str(tmp_path / "start")}
    with pytest.raises(RunError, match=r"start: of its weights these are not finite: layers\.1\.up\Z"):
        deer_jax.align(values)


def test_answers_named_twice_are_refused(folder, tmp_path):
    (tmp_path / "again.jsonl").hardlink_to(folder / "answers.jsonl")
    answers = [str(folder / "answers.jsonl"), str(tmp_path / "again.jsonl")]
    with pytest.raises(InputError, match=r"again\.jsonl: is the same file as .*answers\.jsonl; name it once"):
        deer_jax.align(runs.recipe(folder) | {"output": str(tmp_path / "run"), "answers": answers})
