"""Digests of files and of targets: each file is read once, and whatever decides an answer is in them."""

import dataclasses
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import pytest

import deer_jax
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.digests import Digests, Stamp, combined, hub_blob
from deer_jax.errors import InputError, RunError
from tests.checkpoints.test_drafters import words, write_tokenizer
from tests.stamps import keep_stamp
from tests.tiny import random_params, tiny

CONTENT = b"weights" * 1000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def known(file) -> dict:
    """The records of a first time, through JSON as a run keeps them."""
    digests = Digests()
    digests.of(Stamp.of(file))
    assert digests.read == len(CONTENT)
    return json.loads(json.dumps(digests.records()))


def test_a_second_time_reads_nothing(file):
    stamp, again = Stamp.of(file), Digests(known(file))
    assert again.of(stamp) == sha256(CONTENT)
    assert again.read == 0
    assert again.records() == known(file)
    once = Digests()
    for _ in range(3):
        once.begin(stamp)
        assert once.of(stamp) == sha256(CONTENT)
    assert once.read == len(CONTENT)


def test_a_time_of_modification_that_was_set_back_hides_nothing(file):
    records, before = known(file), file.stat()
    file.write_bytes(b"W" + CONTENT[1:])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Digests(records).of(Stamp.of(file)) == sha256(b"W" + CONTENT[1:])


def test_verifying_reads_all(file, monkeypatch):
    records = known(file)
    stamp, changed = Stamp.of(file), b"W" + CONTENT[1:]
    keep_stamp(monkeypatch, file)
    file.write_bytes(changed)
    assert Digests(records).of(stamp) == sha256(CONTENT)
    verifying = Digests(records, verify=True)
    assert verifying.of(stamp) == sha256(changed)
    assert verifying.read == len(CONTENT)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_read_again(file, change):
    records, stamp = known(file), Stamp.of(file)
    content = CONTENT + b"!" if change == "size" else CONTENT[::-1]
    file.write_bytes(content)
    os.utime(file, ns=(stamp.changed, stamp.changed + (change == "time")))
    assert Digests(records).of(Stamp.of(file)) == sha256(content)


def test_damaged_records_are_ignored(file):
    (path, (size, changed, digest)), *_ = known(file).items()
    wrong = [
        None, [], "x", 7, {path: None}, {path: [size, changed]}, {path: [size, changed, digest[1:]]},
        {path: [size, changed, 5]}, {path: [size, changed, "G" * 64]}, {path: [float(size), changed, "0" * 64]},
        {path: {"size": size}}, {path: [True, changed, "0" * 64]}, {7: [size, changed, "0" * 64]},
    ]  # fmt: skip
    for records in wrong:
        assert Digests(records).of(Stamp.of(file)) == sha256(CONTENT), records


def test_a_file_that_changes_or_goes_is_noticed(file, tmp_path):
    stamp = Stamp.of(file)
    file.write_bytes(CONTENT + b"more")
    for remove in (False, True):
        if remove:
            file.unlink()
        digests, other = Digests(), tmp_path / "other"
        other.write_bytes(b"fine")
        for _ in range(2):
            with pytest.raises(RunError, match=r"\A[^\n]*file: was changed or removed while it was in use[^\n]*\Z"):
                digests.of(stamp)
        # Neither its records nor the files behind it suffer.
        assert digests.of(Stamp.of(other)) == sha256(b"fine")
        assert list(digests.records()) == [str(other)]
    with pytest.raises(InputError, match="no such file"):
        Stamp.of(file)


def test_the_hubs_cache_brings_digests_along(tmp_path):
    digest, repository = "ab" * 32, tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "12ab", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / digest).write_bytes(CONTENT)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    small = "cd" * 20  # small files are named by another digest
    (blobs / small).write_bytes(b"{}")
    (snapshot / "config.json").symlink_to(f"../../blobs/{small}")
    (tmp_path / "linked").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "linked"):
        digests = Digests()
        assert digests.of(Stamp.of(folder / "model.safetensors")) == digest
        assert digests.read == 0
        assert digests.of(Stamp.of(folder / "config.json")) == sha256(b"{}")
    assert Digests(verify=True).of(Stamp.of(snapshot / "model.safetensors")) == sha256(CONTENT)

    # A blob of another repository, one outside snapshots, and one that is no link prove nothing.
    stranger = tmp_path / "models--owner--other" / "snapshots" / "1" / "model.safetensors"
    stranger.parent.mkdir(parents=True)
    stranger.symlink_to(blobs / digest)
    beside = tmp_path / "mine" / "model.safetensors"
    beside.parent.mkdir()
    beside.symlink_to(blobs / digest)
    for path in (stranger, beside, blobs / digest):
        assert hub_blob(path) is None
        assert Digests().of(Stamp.of(path)) == sha256(CONTENT)


def test_combined_is_of_names_and_values():
    assert combined({"a": 1, "b": 2}) == combined({"b": 2, "a": 1})
    assert len({combined(each) for each in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1}, {"a1": ""})}) == 5


CONFIG = tiny("qwen3", vocab_size=40, layers=1, width=16, mlp_width=16, heads=2, kv_heads=1, tied=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets")
    source = write_tokenizer(root / "words", words())
    save_folder(root / "one", CONFIG, random_params(CONFIG), tokenizer_source=source, stop_ids=[3])
    return root


@pytest.fixture(scope="module")
def target(saved):
    return deer_jax.load_target(saved / "one")


def test_a_folders_name_is_no_part_of_the_digest(saved, target, tmp_path):
    copy = shutil.copytree(saved / "one", tmp_path / "other name")
    assert deer_jax.load_target(copy).digest() == target.digest()
    assert dataclasses.replace(target, name="another").digest() == target.digest()
    digests = Digests()
    assert deer_jax.load_target(copy, digests=digests).digest() == target.digest()
    again = Digests(digests.records())
    assert deer_jax.load_target(copy, digests=again).digest() == target.digest()
    assert again.read == 0


def test_each_file_that_decides_is_part_of_the_digest(saved, target, tmp_path):
    found = {target.digest(), deer_jax.load_target(saved / "one", dtype="bfloat16").digest()}
    names = sorted(path.name for path in (saved / "one").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"]  # fmt: skip
    for name in names:
        copy = shutil.copytree(saved / "one", tmp_path / name)
        content = (copy / name).read_bytes()
        if name == "model.safetensors":
            content = content[:-1] + bytes([content[-1] ^ 1])  # one bit of one weight
        else:
            content = content.replace(b'"rope_theta": 1000000.0', b'"rope_theta": 1000001.0').replace(b": 3", b": 4")
            content += b" " * (content == (copy / name).read_bytes())
        (copy / name).write_bytes(content)
        found.add(deer_jax.load_target(copy).digest())
    copy = shutil.copytree(saved / "one", tmp_path / "template")
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found.add(deer_jax.load_target(copy).digest())
    assert len(found) == 3 + len(names)


def test_a_file_that_changes_after_loading_is_noticed(saved, tmp_path):
    copy = shutil.copytree(saved / "one", tmp_path / "one")
    target = deer_jax.load_target(copy)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    with pytest.raises(RunError, match=r"model.safetensors: was changed or removed while it was in use"):
        target.digest()


def test_targets_made_in_memory(saved, target):
    """Among them those that were loaded and then changed: the files do not speak for them any more."""
    tokenizer = Tokenizer.load(saved / "one")
    made = deer_jax.Target(config=CONFIG, params=target.params, stop_ids=(3,), tokenizer=tokenizer)
    assert made.digest() == dataclasses.replace(made, name="x").digest()
    found = {target.digest(), made.digest(), dataclasses.replace(made, stop_ids=(4,)).digest()}
    found.add(dataclasses.replace(made, config=dataclasses.replace(CONFIG, norm_eps=1e-5)).digest())
    found.add(dataclasses.replace(made, tokenizer=None).digest())
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), made.params)
    found.add(dataclasses.replace(made, params=half).digest())
    leaves, shape = jax.tree.flatten(target.params)
    for i, leaf in enumerate(leaves):
        changed = [*leaves[:i], leaf.at[(0,) * leaf.ndim].add(1), *leaves[i + 1 :]]
        found.add(dataclasses.replace(made, params=shape.unflatten(changed)).digest())
        # As somebody merges an adapter into a target that was loaded.
        assert dataclasses.replace(target, params=shape.unflatten(changed)).digest() in found
    assert len(found) == 6 + len(leaves)


def test_a_loaded_target_changed_in_place(saved):
    target = deer_jax.load_target(saved / "one")
    before = target.digest()
    target.params["norm"] = target.params["norm"] + 1
    assert target.digest() != before


def test_the_tokenizers_files_are_part_of_a_target_in_memory(saved, target, tmp_path):
    found = set()
    for name in ("a", "b"):
        source = write_tokenizer(tmp_path / name, words(w7=name))
        tokenizer = Tokenizer.load(source)
        found.add(dataclasses.replace(target, tokenizer=tokenizer).digest())
    assert len(found) == 2
