"""One process and the shards that several had made: all of them count, and nobody else may write them."""

import json

import pytest

from deer_jax.data.answer_writer import AnswerWriter
from deer_jax.data.answers import shard_path
from deer_jax.decoding.output import Output
from deer_jax.errors import InputError

SETTINGS, ITEMS = {"seed": 0}, range(10)


def record(item: int) -> dict:
    return {"item": item, "prompt": [1], "answer": [item]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.jsonl"


def shard(path, number, items, running, settings=SETTINGS):
    with AnswerWriter(shard_path(path, number)) as writer:
        writer.begin(settings, ITEMS)
        writer.save([record(item) for item in items], running)


def items(path, number) -> list[int]:
    return [json.loads(line)["item"] for line in shard_path(path, number).read_text().splitlines()]


def test_another_number_of_processes_goes_on_from_all_shards(path):
    """Three had made it. Item 4 was finished since by another, and item 5 got further there."""
    shard(path, 0, [3, 0], {6: [6]})
    shard(path, 1, [1], {4: [4, 4], 7: [7]})
    shard(path, 2, [2, 4], {5: [5, 5], 7: [7, 7]})
    with shard_path(path, 2).open("a") as stream:
        stream.write('{"item": 8, "pro')
    kept = [shard_path(path, number).read_bytes() for number in (0, 1)]
    with Output(path, sharded=True) as output:
        output.begin(SETTINGS, ITEMS)
        assert output.items == {0, 1, 2, 3, 4}
        assert output.running == {5: [5, 5], 6: [6], 7: [7, 7]}
        output.save([record(7), record(8)], {5: [5, 5, 5], 9: [9]})
        assert output.items == {0, 1, 2, 3, 4, 7, 8}
        assert output.running == {5: [5, 5, 5], 6: [6], 9: [9]}
    assert [items(path, number) for number in range(3)] == [[3, 0, 7, 8], [1], [2, 4]]  # the torn line is gone
    assert path.read_bytes().startswith(kept[0])
    assert shard_path(path, 1).read_bytes() == kept[1]
    with Output(path, sharded=True) as output:
        output.begin(SETTINGS, ITEMS)
        assert output.items == {0, 1, 2, 3, 4, 7, 8}
        assert output.running == {5: [5, 5, 5], 6: [6], 9: [9]}


def test_shards_that_cannot_go_on_are_refused(path):
    shard(path, 0, [0], {})
    shard(path, 3, [1], {}, settings={"seed": 1})
    before = {each: each.read_bytes() for each in path.parent.iterdir()}

    def refused(message):
        with pytest.raises(InputError, match=message) as caught, Output(path, sharded=True) as output:
            output.begin(SETTINGS, ITEMS)
        assert "\n" not in str(caught.value)

    refused(r"a\.shard-3\.jsonl: was begun with other settings: seed 1 \(now 0\); write to another output, or remove")
    with AnswerWriter(shard_path(path, 3)):
        refused(r"a\.shard-3\.jsonl: is being written by process \d+ on ")
    assert {each: each.read_bytes() for each in path.parent.iterdir()} == before
    shard_path(path, 3).unlink()
    path.with_name("a.shard-3.jsonl.state.json").unlink()
    shard(path, 1, [5, 0], {})
    refused(r"a\.shard-1\.jsonl: item 0 stands in .*a\.jsonl already; write to another output")
    shard_path(path, 1).unlink()
    refused(r"a\.shard-1\.jsonl: is gone, of which a\.shard-1\.jsonl\.state\.json says that it can go on")
