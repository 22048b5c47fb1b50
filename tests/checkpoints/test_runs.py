"""Run folders: whose they are, and checkpoints that are read only as they were written."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from deer_jax.checkpoints.claims import claimed, input_changes
from deer_jax.checkpoints.records import DRAFTER, RECORD, TARGET, DamagedError, read_record
from deer_jax.checkpoints.runs import Checkpoint, Checkpoints, is_run, read_best
from deer_jax.errors import InputError, RunError
from deer_jax.files import Lock
from deer_jax.sharding import make_mesh
from tests.training.refusals import taken_or_refused

PARAMS = {"a": jnp.arange(24.0).reshape(4, 6), "b": {"c": jnp.ones((3,))}}
HALF = jax.tree.map(lambda x: x / 2, PARAMS)
PARTS = {"params": PARAMS, "optimizer": {"m": jnp.arange(5.0)}, "average": HALF}
RECIPE = {"seed": 0, "stages": [{"steps": 3}]}
INPUTS = {"target": {"model.safetensors": "aa", "config.json": "bb"}, "answers": {"a.jsonl": "cc"}, "dtype": "float32"}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(folder, steps, parts=PARTS, keep=9, scores=()):
    with Lock(folder, inside=True) as lock:
        checkpoints = Checkpoints(folder, keep=keep, lock=lock)
        for step, score in itertools.zip_longest(steps, scores):
            checkpoints.save(step, parts, score)


def restore(folder, step):
    with Lock(folder, inside=True) as lock:
        return Checkpoints(folder, keep=9, lock=lock).restore(step, abstract(PARTS))


def begin(folder, recipe=RECIPE, inputs=INPUTS, kind=DRAFTER, describe=None):
    """What a call of a run does with its folder."""
    with claimed(folder, recipe, kind=kind, essential=lambda values, _: dict(values)) as claim:
        claim.settle(inputs, describe or (lambda path: (path / "config.json").write_text("{}")))
        return claim


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with the checkpoint of step 5, to be copied."""
    folder = tmp_path_factory.mktemp("one")
    save(folder, [5])
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_is_read_as_it_was_written(one):
    for found in (restore(one, 5), restore(one, 5)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(PARTS), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(read_best(one, PARAMS)["a"], HALF["a"])
    record = json.loads((one / "checkpoints" / "5" / RECORD).read_text())
    assert (record["step"], record["score"]) == (5, None)
    names = {str(path.relative_to(one / "checkpoints" / "5")) for path in files(one / "checkpoints" / "5")}
    assert names == {RECORD, *record["files"]}


def test_what_is_being_written_is_what_was_there_when_it_began(tmp_path):
    """Training steps take the memory of their state, also while that is still being written."""
    size = 2**20
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    with Lock(tmp_path, inside=True) as lock, Checkpoints(tmp_path, keep=9, lock=lock) as checkpoints:
        for sharding in (jax.devices()[0], NamedSharding(make_mesh(fsdp=4), PartitionSpec("fsdp"))):
            state = {"w": jax.device_put(jnp.arange(size, dtype=jnp.float32), sharding)}
            number = len(checkpoints.steps())
            checkpoints.begin(number, {"params": state}, None)
            for _ in range(3):
                state = step(state)
            checkpoints.wait()
            before, state = state, step(state)
            assert before["w"].is_deleted()
            like = {"params": {"w": jax.ShapeDtypeStruct((size,), jnp.float32, sharding=state["w"].sharding)}}
            found = checkpoints.restore(number, like)["params"]["w"]
            np.testing.assert_array_equal(found, np.arange(size, dtype=np.float32))


def test_a_checkpoint_is_there_at_the_end_of_the_block_also_if_that_fails(tmp_path):
    with Lock(tmp_path, inside=True) as lock:
        with contextlib.suppress(ZeroDivisionError), Checkpoints(tmp_path, keep=9, lock=lock) as checkpoints:
            checkpoints.begin(1, PARTS, 0.5)
            raise ZeroDivisionError
        assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_every_flipped_bit_is_noticed(one, tmp_path):
    """In every file of a checkpoint, at seeded places; what the decoder does not read may be damaged for it."""
    step = shutil.copytree(one, tmp_path / "run") / "checkpoints" / "5"
    rng = random.Random(0)
    nonempty = [path for path in files(step) if path.stat().st_size]
    assert {path.name for path in nonempty} > {RECORD, "_METADATA", "manifest.ocdbt", "commit_success.txt"}
    for path in [*nonempty, *rng.choices(nonempty, k=max(0, 60 - len(nonempty)))]:
        sound = path.read_bytes()
        place, bit = rng.randrange(len(sound)), rng.randrange(8)
        damaged = bytearray(sound)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        case = f"{path.relative_to(step)}, byte {place}, bit {bit}"
        try:
            restore(tmp_path / "run", 5)
            pytest.fail(f"resumed with {case}")
        except DamagedError as error:
            assert str(error).startswith(f"{path}: damaged: "), case  # noqa: PT017
        part = path.relative_to(step).parts[0]
        if part in ("params", "optimizer"):
            np.testing.assert_array_equal(read_best(tmp_path / "run", PARAMS)["a"], HALF["a"])
        else:
            with pytest.raises(RunError, match=rf"{path.name}: damaged: [^\n]*; remove that checkpoint to use the"):
                read_best(tmp_path / "run", PARAMS)
        path.write_bytes(sound)
    restore(tmp_path / "run", 5)


def test_a_changed_description_is_noticed(tmp_path):
    """A flipped digit in the configuration decides as much as one in the weights."""
    begin(tmp_path / "run", describe=lambda path: (path / "config.json").write_text('{"rope_theta": 10000.0}'))
    save(tmp_path / "run", [5])
    read_best(tmp_path / "run", PARAMS)
    config = tmp_path / "run" / DRAFTER / "config.json"
    for change in (lambda: config.write_text('{"rope_theta": 10001.0}'), config.unlink):
        change()
        with pytest.raises(RunError, match=r"drafter/config\.json: is not what the run wrote"):
            read_best(tmp_path / "run", PARAMS)


def test_missing_short_empty_and_foreign_files_are_noticed(one, tmp_path):
    def refused(change, kind, message):
        run = shutil.copytree(one, tmp_path / str(len(list(tmp_path.iterdir()))))
        change(run / "checkpoints" / "5")
        for read in (lambda: restore(run, 5), lambda: read_best(run, PARAMS)):
            with pytest.raises(kind, match=rf"\A[^\n]*{message}[^\n]*\Z"):
                read()

    data = max(files(one / "checkpoints" / "5" / "average"), key=lambda path: path.stat().st_size)
    name = data.relative_to(one / "checkpoints" / "5")
    refused(lambda step: (step / name).unlink(), RunError, "average/.*: damaged: is missing")
    refused(lambda step: (step / name).write_bytes(b""), RunError, "average/.*: damaged: has 0 bytes, not")
    refused(lambda step: (step / name).write_bytes(data.read_bytes()[:-1]), RunError, "average/.*: damaged: has")
    refused(lambda step: (step / "orbax.checkpoint").unlink(), RunError, "orbax.checkpoint: damaged: is missing")
    refused(lambda step: (step / "average" / ".zarray").touch(), InputError, r"\.zarray: was not written by the run")
    refused(lambda step: (step / RECORD).unlink(), RunError, "5: damaged: has no checkpoint.json")
    refused(lambda step: (step / RECORD).write_text("{}"), RunError, r"checkpoint\.json: damaged: is not as it was")


def test_a_checkpoint_under_another_steps_name_or_of_another_format(one, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    (run / "checkpoints" / "5").rename(run / "checkpoints" / "6")
    with pytest.raises(DamagedError, match="6: damaged: is the checkpoint of step 5"):
        restore(run, 6)
    later = shutil.copytree(one, tmp_path / "later")
    path = later / "checkpoints" / "5" / RECORD
    values = json.loads(path.read_text()) | {"format": 2}
    del values["sha256"]
    digest = hashlib.sha256((json.dumps(values, indent=1) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(values | {"sha256": digest}, indent=1) + "\n")
    for read in (lambda: restore(later, 5), lambda: read_best(later, PARAMS)):
        with pytest.raises(RunError, match=r"json: has format 2, this version reads 1; update deer_jax\Z") as error:
            read()
        assert not isinstance(error.value, DamagedError)


def test_what_the_library_cannot_read_of_whole_files_is_not_called_damage(one):
    with Lock(one, inside=True) as lock:
        checkpoints = Checkpoints(one, keep=9, lock=lock)
        other = {"params": {"x": jax.ShapeDtypeStruct((7,), jnp.float32)}}
        with pytest.raises(RunError, match=r"\A[^\n]*5: its files are as they were written, but its params cannot"):
            checkpoints.restore(5, other)
        assert checkpoints.steps() == [5]


def test_damage_at_the_record_of_any_is_not_passed_over_for_another(tmp_path):
    save(tmp_path, [1, 2], scores=[5.0, 1.0])
    np.testing.assert_array_equal(read_best(tmp_path, PARAMS)["a"], HALF["a"])
    record = tmp_path / "checkpoints" / "1" / RECORD
    record.write_bytes(record.read_bytes().replace(b"5.0", b"0.0"))
    with pytest.raises(RunError, match=r"1/checkpoint\.json: damaged"):
        read_best(tmp_path, PARAMS)


def test_the_newest_and_the_best_stay_and_nothing_else_is_touched(tmp_path):
    mine = ("notes", "7b", "012", "-3", "５")
    for name in mine:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "thesis.txt").touch()
    for name in (
        ".4.partial-0123abcd",
        ".4.partial-0123abcd.orbax-checkpoint-tmp",
        ".4.partial-0123abcd.orbax-checkpoint-tmp-1",
    ):
        (tmp_path / "checkpoints" / name).mkdir()  # of a process that was killed
    (tmp_path / "checkpoints" / "4").mkdir()
    (tmp_path / "checkpoints" / "4" / "thesis.txt").touch()
    save(tmp_path, [1, 2, 3, 5, 6], parts={"params": PARAMS}, keep=2, scores=[0.5, 3.0, 1.0, None, None])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {*mine, "2", "4", "5", "6"}
    assert len(list(tmp_path.rglob("thesis.txt"))) == len(mine) + 1
    with Lock(tmp_path, inside=True) as lock:
        checkpoints = Checkpoints(tmp_path, keep=2, lock=lock)
        assert checkpoints.newest_first() == [Checkpoint(6, None), Checkpoint(5, None), Checkpoint(2, 3.0)]
        with pytest.raises(RunError, match=r"4: is already there; move it away, then the same command goes on"):
            checkpoints.save(4, PARTS, None)


def test_a_folder_removed_during_a_run_is_not_made_again(tmp_path):
    run = tmp_path / "runs" / "one"
    with Lock(run, inside=True) as lock:
        checkpoints = Checkpoints(run, keep=2, lock=lock)
        shutil.rmtree(tmp_path / "runs")
        with pytest.raises(RunError, match=r"one: was removed or replaced while it was being written"):
            checkpoints.save(1, PARTS, None)
        lock.check = lambda: setattr(lock, "check", type(lock).check.__get__(lock))  # it goes just after the first look
        with pytest.raises(RunError, match=r"one: was removed or replaced while it was being written"):
            checkpoints.save(1, PARTS, None)
    assert not run.exists()


@pytest.mark.parametrize("name", ["a[x]", "a*", "what?", "back\\slash", "x]"])
def test_paths_whose_checkpoints_could_not_be_read_back_are_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    for folder in (tmp_path / name / "run", tmp_path / "run" / name):
        with pytest.raises(InputError, match=r"\A[^\n]*: a path of checkpoints must not have '[^\n]*"):
            begin(folder)
    with pytest.raises(InputError, match="a path of checkpoints must not have"):
        begin(type(tmp_path)("run"))  # relative
    assert not list((tmp_path / name).iterdir())


def test_a_users_drafter_is_no_interrupted_start(tmp_path):
    for name in (DRAFTER, TARGET, "recipe.yaml"):
        folder = tmp_path / f"with_{name}"
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text("everything")
        with pytest.raises(InputError, match=rf"\A{folder}: is no run but holds {name}; name another output\Z"):
            begin(folder)
        assert [path.name for path in files(folder)] == ["model.safetensors"]
    (tmp_path / "both" / DRAFTER).mkdir(parents=True)
    (tmp_path / "both" / "recipe.yaml").write_text("seed: 0\n")
    with pytest.raises(InputError, match=r"both: has no identity\.json, so it is no run of this version; name another"):
        begin(tmp_path / "both")


def test_a_start_that_was_killed_anywhere_is_taken_up_again(tmp_path, monkeypatch):
    """At every rename and every other step that makes something, as kill -9 would: nothing cleans up."""

    class Killed(BaseException):
        pass

    real, moments = os.replace, []
    for number in range(20):
        folder = tmp_path / str(number)
        left = tmp_path / f"left_{number}"
        count = itertools.count()

        def step(real=real, folder=folder, left=left, count=count, number=number):
            if next(count) == number:
                shutil.copytree(folder, left)  # what a kill would leave
                raise Killed

        def replace(source, destination, step=step):
            step()
            real(source, destination)

        monkeypatch.setattr(type(tmp_path), "replace", replace)
        try:
            begin(folder)
        except Killed:
            moments.append(number)
        finally:
            monkeypatch.undo()
        if not left.exists():
            break
        (left / ".lock").unlink(missing_ok=True)
        other = RECIPE | {"seed": 7}
        begin(left, other)  # what is no run yet may become another one
        assert is_run(left, DRAFTER)
        assert yaml.safe_load((left / "recipe.yaml").read_text()) == other
        assert {path.name for path in left.iterdir()} == {"identity.json", "recipe.yaml", DRAFTER}
    assert moments == [0, 1, 2]


def test_a_description_that_fails_binds_nothing(tmp_path):
    def fails(folder):
        (folder / "config.json").write_text("half")
        raise InputError("too few texts")

    with pytest.raises(InputError, match="too few texts"):
        begin(tmp_path / "run", describe=fails)
    begin(tmp_path / "run", RECIPE | {"seed": 3}, INPUTS | {"dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"run: holds another run: seed was 3, is 0\. Name another output, or go on "):
        begin(tmp_path / "run")
    with pytest.raises(InputError, match=r"run: is the run of a drafter; name another output"):
        begin(tmp_path / "run", kind=TARGET)


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    begin(tmp_path / "run")
    message = rf"\A[^\n]*run: is being written by process {os.getpid()} on [^\n]*\Z"
    with Lock(tmp_path / "run", inside=True), pytest.raises(InputError, match=message):
        begin(tmp_path / "run")
    (tmp_path / "run" / ".lock").write_text('{"process": 1, "host": "gone", "since": "then"}\n')
    begin(tmp_path / "run")


def test_nothing_is_left_of_a_run_that_never_began(tmp_path):
    with pytest.raises(InputError, match="no such target"), claimed(
        tmp_path / "a" / "b", RECIPE, kind=DRAFTER, essential=lambda values, _: dict(values)
    ):  # fmt: skip
        raise InputError("no such target")
    assert not list(tmp_path.iterdir())


def test_what_changed_is_named():
    now = {
        "target": {"model.safetensors": "xx", "config.json": "bb", "tokenizer.json": "dd"},
        "start drafter": {RECORD: "1"}, "answers": {"a.jsonl": "yy"}, "dtype": "bfloat16",
    }  # fmt: skip
    assert input_changes(INPUTS, INPUTS) == []
    assert input_changes(INPUTS | {"start drafter": {}}, now) == [
        "the target's weights changed (model.safetensors)",
        "the target's tokenizer changed (tokenizer.json)",
        "the answers changed (a.jsonl)",
        "dtype was float32, is bfloat16",
        "the start drafter's weights changed (checkpoint.json)",
    ]


def mutated(rng, content):
    """A few bytes changed, a piece lost or doubled, or a value replaced by an odd one."""
    kind = rng.randrange(4)
    start, size = rng.randrange(len(content)), rng.randrange(1, 40)
    if kind == 0:
        return content[:start] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 4))) + content[start + 1 :]
    if kind == 1:
        return content[:start] + content[start + size :]
    if kind == 2:
        return content[:start] + content[start : start + size] * rng.choice((2, 3, 200)) + content[start + size :]
    odd = (
        b"[" * 1000,
        b"9" * 5000,
        b"1e999",
        b"null",
        b"{}",
        b'"\\ud800"',
        b"-1",
        b"\xff\xfe",
        b"\0",
        b"NaN",
        b"[[1]]",
    )
    place = content.find(b":", start)
    return content[: place + 1] + b" " + rng.choice(odd) + content[content.find(b"\n", place) :]


@pytest.mark.parametrize("name", ["identity.json", "recipe.yaml"])
def test_whatever_stands_in_a_runs_own_files_is_taken_or_refused(tmp_path, name):
    run = tmp_path / "run"
    begin(run)
    sound, rng = (run / name).read_bytes(), random.Random(name)
    for number in range(100):
        damaged = mutated(rng, sound)
        (run / name).write_bytes(damaged)
        with taken_or_refused((number, damaged)):
            begin(run)
        for each in ("identity.json", "recipe.yaml"):
            assert (run / each).exists()
    (run / name).write_bytes(sound)
    begin(run)


def test_whatever_stands_in_a_record_is_damage(one, tmp_path):
    step = shutil.copytree(one / "checkpoints" / "5", tmp_path / "5")
    sound, rng = (step / RECORD).read_bytes(), random.Random(0)
    for number in range(300):
        damaged = mutated(rng, sound)
        (step / RECORD).write_bytes(damaged)
        with taken_or_refused((number, damaged)):
            try:
                read_record(step)
                assert damaged == sound, (number, damaged)
            except DamagedError:
                pass
    (step / RECORD).write_bytes(sound)
    with warnings.catch_warnings(action="error"):
        assert read_record(step)["step"] == 5
