"""Folders and files on an object store: what is read from it, written to it, and whose it is; on a stand-in."""

import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from deer_jax import files, load_target, spools, stores
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.data import answer_writer
from deer_jax.data.answer_writer import AnswerWriter
from deer_jax.data.answers import AnswerFiles
from deer_jax.data.sources import read_prompts
from deer_jax.errors import InputError, RunError
from deer_jax.formats import read_yaml
from deer_jax.spools import Spool, lock
from deer_jax.stores import check_file, listing, local_folder, names, place, write
from tests.tiny import random_params, tiny

MODEL = tiny("qwen3", vocab_size=32, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=24, context=64)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(spools, "SIGN", 0.1)
    monkeypatch.setattr(spools, "DEAD", 0.4)


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


# -------------------------------------------------------------------------------------------------------------- leases


@pytest.mark.parametrize("inside", [True, False])
def test_one_at_a_time_has_an_output(bucket, inside):
    output = place(f"{bucket.url}/runs/a")
    name = "runs/a/.lock" if inside else "runs/.a.lock"
    with lock(output, inside=inside) as held:
        held.check()
        refusal = (
            rf"{output}: is being written by process {os.getpid()} on \S+ since 20.*; wait for it, or name another"
        )
        with pytest.raises(InputError, match=refusal), lock(output, inside=inside):
            pass
        assert bucket.names() == [name]
        held.check()
    assert bucket.names() == []
    with lock(output, inside=inside):
        pass


def test_a_lease_without_a_sign_of_life_is_taken_over_and_its_holder_stops(bucket, monkeypatch):
    output = place(f"{bucket.url}/run")
    with lock(output, inside=True) as dead:
        with monkeypatch.context() as patch:
            patch.setattr(dead, "_sign", lambda: None)  # as one that is not on its feet
            start = time.monotonic()
            with lock(output, inside=True) as held:
                assert time.monotonic() - start >= 0.4
                held.check()
                time.sleep(0.3)
                held.check()  # what gives signs of life keeps it
        with pytest.raises(
            RunError, match=f"{output}: was removed, or taken over by another process, while it was being"
        ):
            dead.check()
        with lock(output, inside=True) as later:  # the one that lost it does not remove another's
            dead.__exit__()
            later.check()
            time.sleep(0.3)
            later.check()


def test_a_lease_whose_object_is_removed_is_lost(bucket):
    with lock(place(f"{bucket.url}/run"), inside=True) as held:
        del bucket.objects["run/.lock"]
        time.sleep(0.3)
        with pytest.raises(RunError, match="was removed, or taken over"):
            held.check()
    assert bucket.names() == []


# ------------------------------------------------------------------------------------------------------------- outputs


def test_files_are_written_whole_and_trials_leave_nothing(bucket):
    path = place(f"{bucket.url}/a/report.json")
    check_file(path)
    assert bucket.names() == []
    write(path, b"one")
    write(path, b"two")
    assert bucket.contents() == {"a/report.json": b"two"}


@pytest.mark.parametrize("content", [b"", b"\r", b"a\r\n", b"a\n", b"\r\n\r\na\n\n"])
def test_any_content_is_kept_byte_for_byte(bucket, content):
    path = place(f"{bucket.url}/out/a.bin")
    write(path, content)
    assert stores.read(path) == bucket.read("out/a.bin") == content


def test_a_large_file_goes_and_comes_in_parts(bucket, tmp_path):
    content = np.random.default_rng(0).bytes(2**20)
    bucket.put("f/large.bin", content)
    with lock(place(f"{bucket.url}/f")) as held:
        spool = Spool(place(f"{bucket.url}/f"), held)
        spool.pull("large.bin", "none")
        assert [path.name for path in spool.path.iterdir()] == ["large.bin"]
        generation = bucket.objects["f/large.bin"].generation
        (spool.path / "inner").mkdir()
        (spool.path / "inner" / "b").write_bytes(b"b")
        spool.put("large.bin", "inner")
        assert bucket.objects["f/large.bin"].generation == generation  # unchanged, so not sent
        (spool.path / "large.bin").write_bytes(content * 2)
        spool.put("large.bin", every=100)
        assert bucket.read("f/large.bin") == content
        spool.put("large.bin")
        assert bucket.read("f/large.bin") == content * 2
        assert bucket.read("f/inner/b") == b"b"
        del bucket.objects[".f.lock"]
        time.sleep(0.3)
        (spool.path / "inner" / "b").write_bytes(b"c")
        with pytest.raises(RunError, match="was removed, or taken over"):
            spool.put("inner")
        assert bucket.read("f/inner/b") == b"b"


def test_a_listing_has_many_pages_and_no_neighbours(bucket):
    for i in range(120):
        bucket.put(f"many/{i:03d}/x", b"1")
    bucket.put("many-more/x", b"1")
    bucket.put("many/", b"")  # how a console makes a folder
    assert names(place(f"{bucket.url}/many")) == [f"{i:03d}" for i in range(120)]
    assert len(listing(place(f"{bucket.url}/many"))) == 120
    assert names(place(bucket.url)) == ["many", "many-more"]


@pytest.mark.parametrize(("how", "status"), [("closed", 401), ("closed", 403), ("forbidden", 403)])
def test_a_bucket_that_one_may_not_use_is_one_line_and_untouched(bucket, how, status):
    setattr(bucket, how, status)
    for use in (lambda: write(place(f"{bucket.url}/a"), b""), lambda: check_file(place(f"{bucket.url}/a")),
                lambda: lock(place(f"{bucket.url}/run"), inside=True).__enter__()):  # fmt: skip
        with pytest.raises(
            InputError, match=rf"{bucket.url}\S*: permission denied \(.*\); log in \(gcloud auth"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert bucket.names() == []


def test_a_store_that_does_not_work_is_one_line_of_a_run(bucket):
    bucket.closed = 400
    with pytest.raises(RunError, match=rf"{bucket.url}/a: the store cannot be used: .*; the same command goes on when"):
        write(place(f"{bucket.url}/a"), b"")


def test_without_gcsfs_a_store_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    stores._system.cache_clear()
    with pytest.raises(InputError, match=r"gs:// needs gcsfs: pip install 'deer_jax\[gcs\]'"):
        load_target("gs://bucket/model")
    stores._system.cache_clear()


def test_what_is_written_to_folders_only_says_so(bucket):
    for use in (lambda: files.write_file(Path(f"{bucket.url}/a"), b""), lambda: files.Lock(place(f"{bucket.url}/a")),
                lambda: files.new_folder(place(f"{bucket.url}/a")).__enter__()):  # fmt: skip
        with pytest.raises(InputError, match="this output is written to a folder only, not to an object store"):
            use()


# ------------------------------------------------------------------------------------------------------------- answers


SETTINGS = {"seed": 0}


def save(path, *items: int, running=None, settings=SETTINGS) -> set[int]:
    with AnswerWriter(path) as writer:
        writer.begin(settings, range(10))
        found = set(writer.items)
        writer.save([{"id": str(i), "item": i, "prompt": [1], "answer": [i]} for i in items], running or {})
    return found


def test_answers_grow_on_a_store_and_go_on(bucket, tmp_path):
    path = f"{bucket.url}/a/answers.jsonl"
    assert save(path, 0, 2) == set()
    assert bucket.names() == ["a/answers.jsonl", "a/answers.jsonl.state.json"]
    assert save(path, 1) == {0, 2}
    save(tmp_path / "answers.jsonl", 0, 2)
    save(tmp_path / "answers.jsonl", 1)
    assert bucket.read("a/answers.jsonl") == (tmp_path / "answers.jsonl").read_bytes()
    before = bucket.contents()
    with pytest.raises(InputError, match=f"{path}: was begun with other settings: seed 0 .now 1.; write to another"):
        save(path, settings={"seed": 1})
    bucket.put("a/answers.jsonl", b"{}\n" * 200)
    with pytest.raises(InputError, match=f"{path}:1: is no answer of this run; write to another output"):
        save(path)
    bucket.put("b.jsonl", b"of somebody")
    with pytest.raises(InputError, match=f"{bucket.url}/b.jsonl: exists without b.jsonl.state.json, so it is no run"):
        save(f"{bucket.url}/b.jsonl")
    assert before | {"a/answers.jsonl": b"{}\n" * 200, "b.jsonl": b"of somebody"} == bucket.contents()


def test_answers_that_were_killed_between_two_copies_go_on_from_what_is_there(bucket, monkeypatch):
    path = f"{bucket.url}/answers.jsonl"
    save(path, 0)
    state = bucket.read("answers.jsonl.state.json")
    save(path, 1, running={2: [5]})
    bucket.put("answers.jsonl.state.json", state)  # the file was put up, its state was not
    assert save(path, 3) == {0, 1}
    monkeypatch.setattr(answer_writer, "PUT_EVERY", 0.0)
    with AnswerWriter(path) as writer:
        writer.begin(SETTINGS, range(10))
        writer.save([{"id": "4", "item": 4, "prompt": [1], "answer": [4]}], {5: [6, 7]})
        assert b'"item": 4' in bucket.read("answers.jsonl")  # while it runs
    with AnswerWriter(path) as writer:
        writer.begin(SETTINGS, range(10))
        assert (writer.items, writer.running) == ({0, 1, 3, 4}, {5: [6, 7]})
