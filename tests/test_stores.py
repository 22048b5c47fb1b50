"""Folders and files on an object store: what is read from it, written to it, and whose it is; on a stand-in."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from deer_jax import load_target, stores
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.sources import read_prompts
from deer_jax.errors import InputError, RunError
from deer_jax.formats import read_yaml
from deer_jax.stores import local_folder, place
from tests.tiny import random_params, tiny

MODEL = tiny("qwen3", vocab_size=32, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24, context=64)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stores, "SIGN", 0.1)
    monkeypatch.setattr(stores, "DEAD", 0.4)


def copies(home: Path) -> list[Path]:
    return sorted((home / "home" / ".cache" / "deer_jax" / "gs").iterdir())


# ------------------------------------------------------------------------------------------------------------- inputs


def test_a_path_keeps_its_spelling():
    path = place("gs://bucket/a/b.txt")
    assert [str(each) for each in (path, path.parent / "c", path.absolute(), place(Path("gs://bucket/a/")))] == [
        "gs://bucket/a/b.txt", "gs://bucket/a/c", "gs://bucket/a/b.txt", "gs://bucket/a",
    ]  # fmt: skip
    assert (path.name, open_name(path)) == ("b.txt", "gs://bucket/a/b.txt")
    assert place("runs/a") == Path("runs/a")
    for wrong in ("s3://bucket/a", "gs://", "gs:///a", "gs://bucket/../a", "gs://B/a"):
        with pytest.raises(InputError, match="the one that is known is gs://BUCKET/PATH"):
            place(wrong)


def open_name(path) -> str:
    return path.__fspath__()


@pytest.mark.representative
def test_a_target_is_copied_once_and_again_when_it_changes(tmp_path, bucket, object_store):
    save_folder(tmp_path / "target", MODEL, random_params(MODEL, 3))
    bucket.put_tree(tmp_path / "target", "models/mine")
    bucket.put("models/mine/checkpoint-3/optimizer.bin", b"not of the model")
    bucket.put("models/mine-too/config.json", b"{}")
    url = f"{bucket.url}/models/mine"
    target, local = load_target(url), load_target(tmp_path / "target")
    assert target.name == "mine"
    assert target.digest() == local.digest()
    for a, b in zip(jax.tree.leaves(target.params), jax.tree.leaves(local.params), strict=True):
        np.testing.assert_array_equal(a, b)
    (copy,) = copies(tmp_path)
    assert {path.name for path in copy.iterdir()} == {path.name for path in (tmp_path / "target").iterdir()}
    object_store.requests.clear()
    load_target(url + "/")
    assert not [each for each in object_store.requests if "/download/" in each]
    save_folder(tmp_path / "other", MODEL, random_params(MODEL, 4))
    bucket.put_tree(tmp_path / "other", "models/mine")
    assert load_target(url).digest() != local.digest()
    assert len(copies(tmp_path)) == 2


def test_files_are_read_where_they_are_named(tmp_path, bucket):
    rows = [{"id": str(i), "item": i, "prompt": [1, i], "answer": [2], "ended": True} for i in range(4)]
    bucket.put("a/answers.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows[::2]))
    bucket.put("a/answers.shard-1.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows[1::2]))
    bucket.put("prompts.json", b'[{"prompt": "one"}, {"prompt": "two"}]')
    bucket.put("recipe.yaml", b"seed: 3\n")
    found = AnswerFiles([f"{bucket.url}/a/answers.jsonl"], vocab_size=8)
    assert [found[i]["prompt"][1] for i in range(len(found))] == [0, 1, 2, 3]
    assert [str(path) for path in found.paths] == [f"{bucket.url}/a/answers{s}.jsonl" for s in ("", ".shard-1")]
    assert found[1]["where"] == f"{bucket.url}/a/answers.shard-1.jsonl:1"
    assert [each.content for each in read_prompts(f"{bucket.url}/prompts.json")] == ["one", "two"]
    assert read_yaml(f"{bucket.url}/recipe.yaml") == {"seed": 3}
    with pytest.raises(InputError, match=f"{bucket.url}/none.yaml: no such file or folder, or no such bucket"):
        read_yaml(f"{bucket.url}/none.yaml")
    with pytest.raises(InputError, match=f"{bucket.url}/none: no such folder on the store, or it is empty"):
        load_target(f"{bucket.url}/none")
    with pytest.raises(InputError, match="gs://nobody/x: no such file or folder, or no such bucket"):
        load_target("gs://nobody/x")


def test_what_changes_while_it_is_copied_is_refused(tmp_path, bucket, object_store, monkeypatch):
    bucket.put("m/a.json", b"1")

    def change(asked: str) -> None:
        if "/download/" in asked:
            bucket.put("m/a.json", b"2")

    monkeypatch.setattr(object_store, "before", change)
    with pytest.raises(RunError, match=f"{bucket.url}/m/a.json: was changed while it was read; start again"):
        local_folder(f"{bucket.url}/m")
    assert copies(tmp_path) == []
    monkeypatch.undo()


def test_no_name_leads_out_of_a_copy(tmp_path, bucket):
    bucket.put("m/../../../evil.json", b"1")
    with pytest.raises(InputError, match="cannot be a place on an object store"):
        local_folder(f"{bucket.url}/m")
    assert not list(tmp_path.rglob("evil.json"))
