"""Folders of the public packages give what the packages make of them; see tests/drafters/golden/README.md."""

import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deer_jax
from deer_jax.build import Build
from deer_jax.drafters.conditioned import HEAD
from deer_jax.drafters.heads import Independent
from deer_jax.drafters.protocol import Draft, Row, Seen
from deer_jax.models.target import Target
from deer_jax.models.transformer import bind
from tests.fast import representing
from tests.tiny import random_params, tiny

GOLDEN = Path(__file__).parent / "golden"
OTHERS = ("zlab-decode", "eagle3")  # of other tests
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz") if not path.parent.name.startswith(OTHERS))
TARGET = tiny("qwen3", vocab_size=64, layers=8, mlp_width=16)
EMBEDDING_TAPPED = "speculators-dflash-next-token"


def target_of(given) -> Target:
    """A target with the embedding and the head of a golden file; its layers are of no account."""
    params = random_params(TARGET, scan=False) | {"embed": jnp.asarray(given["embedding"])}
    return Target(config=TARGET, params=params | {"head": jnp.asarray(given["head"])})


def folder_of(case: str, tmp_path: Path) -> Path:
    """The golden folder; one taps the target's embedding, which is not supported: here it taps the first layer."""
    if case != EMBEDDING_TAPPED:
        return GOLDEN / case
    folder = shutil.copytree(GOLDEN / case, tmp_path / case)
    values = json.loads((folder / "config.json").read_text())
    values["aux_hidden_state_layer_ids"] = [1, 5]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@dataclasses.dataclass(frozen=True)
class Watched:
    """A head that keeps what it is given."""

    head: Independent
    kept: list = dataclasses.field(default_factory=list, compare=False)

    def draft(self, params, block, pick):
        self.kept.append(block)
        return self.head.draft(params, block, pick)


@functools.partial(jax.jit, static_argnames="method")
def answers(method, params, shared, states, count, anchor, predecessors):
    """What a drafter says after contexts of so many states: its block, and what its head asks to pick from, where the
    picks are the predecessors given, and where they are greedy."""
    states, count, anchor = (jnp.concatenate([x, x]) for x in (states, count, anchor))  # the second time greedily
    (B, T, _), k = states.shape, method.draft_length
    state = method.state(params, shared, B, T + k + 1, Build.of("cpu"))
    seen = Seen(jnp.zeros((B, T), jnp.int32), states, jnp.zeros_like(count), count, first=True)
    state = method.observe(params, shared, state, seen, jnp.arange(B))
    tokens = jnp.zeros((B, T + k + 1), jnp.int32).at[jnp.arange(B), count].set(anchor)
    asked = []

    def pick(scores, first, ids=None):
        ids = jnp.broadcast_to(jnp.arange(scores.shape[-1])[None, None] if ids is None else ids, scores.shape)
        asked.append((scores, ids))
        greedy = jnp.take_along_axis(ids, jnp.argmax(scores, axis=-1)[..., None], axis=-1)[..., 0].astype(jnp.int32)
        given = predecessors[:, first + 1 : first + 1 + greedy.shape[1]]
        given = jnp.pad(given, ((0, B // 2), (0, greedy.shape[1] - given.shape[1])))
        return Draft(jnp.where(jnp.arange(B)[:, None] < B // 2, given, greedy), None)

    watched, row = Watched(method.head), Row(tokens, count + 1, jnp.arange(B))
    draft, _ = dataclasses.replace(method, head=watched).propose(params, shared, state, row, k, pick)
    scores, ids = (jnp.concatenate(sides, axis=1) for sides in zip(*asked, strict=True))
    hidden, half = watched.kept[0].hidden[: B // 2], B // 2
    confidence = method.head.confidence(params.get(HEAD, {}), hidden[:, None], predecessors[:, None])
    return {
        "hidden": hidden, "logits": watched.kept[0].scores[:half], "path": draft.tokens[half:],
        "scores": scores[:half], "ids": ids[:half], "greedy_scores": scores[half:], "greedy_ids": ids[half:],
        "confidence": confidence,
    }  # fmt: skip


def both(given, name: str):
    """The arrays of both contexts, one after the other."""
    return np.concatenate([given[f"{name}_0"], given[f"{name}_1"]])


def differences(drafter, given) -> dict[str, float]:
    """The largest difference between what a drafter and a package say, by name. The package may draft the mask, and
    goes another way from there on."""
    method, mask = drafter.method, int(given["mask_id"])
    states = [given["states_0"], given["states_1"]]
    longest = max(each.shape[1] for each in states)
    count = np.repeat([each.shape[1] for each in states], 2).astype(np.int32)
    # What lies behind a context of the batch must not matter.
    padded = [np.pad(x, ((0, 0), (0, longest - x.shape[1]), (0, 0)), constant_values=7) for x in states]
    answer = answers(
        method, drafter.params, drafter.shared, np.concatenate(padded).astype(np.float32), count,
        both(given, "anchor").astype(np.int32), both(given, "predecessors").astype(np.int32),
    )  # fmt: skip
    found: dict[str, Any] = {name: None if x is None else np.asarray(x) for name, x in answer.items()}
    ids, path = np.asarray(drafter.shared.get("ids", np.arange(method.target_vocab))), both(given, "greedy_path")
    assert np.isneginf(found["logits"][..., ids == mask]).all()
    drafted = np.cumsum(path == mask, axis=1)
    alike = np.pad(drafted == 0, ((0, 0), (1, 0)), constant_values=True)[:, :-1]

    def apart(mine, theirs):
        return float(np.abs(mine[..., ids != mask] - theirs[..., ids != mask]).max())

    result = {
        "hidden": float(np.abs(found["hidden"] - both(given, "hidden")).max()),
        "logits": apart(found["logits"], both(given, "logits")[:, -method.draft_length :]),
        "greedy_path": float((found["path"] != path)[drafted == 0].any()),
    }
    if "log_q_0" in given:
        result["log_q"] = among_choices(found["ids"], found["scores"], given, "log_q", np.ones_like(alike))
        result["greedy_log_q"] = among_choices(
            found["greedy_ids"], found["greedy_scores"], given, "greedy_log_q", alike
        )
    if "corrected_0" in given:
        result["corrected"] = apart(found["scores"], both(given, "corrected"))
        result["greedy_corrected"] = apart(found["greedy_scores"][alike], both(given, "greedy_corrected")[alike])
    if "confidence_0" in given:
        probability = np.asarray(jax.nn.sigmoid(found["confidence"]))[:, 0]
        result["confidence"] = float(np.abs(probability - both(given, "confidence")).max())
    return result


def among_choices(ids, scores, given, kind: str, where) -> float:
    """The largest difference of scores of candidates that both have, up to the same number for all of a place; only
    the mask is a candidate of theirs alone."""
    theirs, expected, largest = both(given, "candidates"), both(given, kind), 0.0
    for place in zip(*np.nonzero(where), strict=True):
        mine = dict(zip(ids[place].tolist(), scores[place].tolist(), strict=True))
        other = dict(zip(theirs[place].tolist(), expected[place].tolist(), strict=True))
        assert set(other) - set(mine) <= {int(given["mask_id"])}
        difference = np.array([mine[token] - other[token] for token in mine.keys() & other.keys()])
        largest = max(largest, float(np.abs(difference - difference.mean()).max()))
    return largest


@pytest.mark.parametrize("case", representing(CASES, "zlab-dflash2"))
def test_a_public_folder_answers_as_its_package_does(case, tmp_path):
    given = dict(np.load(GOLDEN / case / "golden.npz"))
    drafter = deer_jax.load_drafter(folder_of(case, tmp_path), target=target_of(given), dtype="float32")
    found = differences(drafter, given)
    assert max(found.values()) < 1e-4, found  # false for NaN


def test_a_drafter_may_have_another_dtype_than_its_target():
    given = dict(np.load(GOLDEN / "zlab-dflash-no-window" / "golden.npz"))
    whole = target_of(given)
    half = dataclasses.replace(whole, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole.params))
    for target, dtype in ((whole, "bfloat16"), (half, "float32")):
        drafter = deer_jax.load_drafter(GOLDEN / "zlab-dflash-no-window", target=target, dtype=dtype)
        assert differences(drafter, given)["logits"] < 0.15  # of values up to 6


@pytest.mark.parametrize("case", ["zlab-decode", "zlab-decode2"])
def test_decoding_goes_as_with_the_package(case):
    """The same blocks are drafted, and as many tokens of them accepted. The package's first new token comes without a
    draft; near the end of the answer it drafts shorter blocks than ours."""
    given = dict(np.load(GOLDEN / case / "golden.npz"))
    target = deer_jax.load_target(GOLDEN / "zlab-decode-target", dtype="float32")
    drafter = deer_jax.load_drafter(GOLDEN / case, target=target)
    text = np.concatenate([given["prompts"], given["tokens"]], axis=1).astype(np.int32)
    length, rounds = given["prompts"].shape[1] + 1, []
    for i, row in enumerate(text.tolist()):
        found = list(
            deer_jax.stream_blocks(target, [row[:length]], drafter=drafter, max_new_tokens=39, ignore_stop=True)
        )
        assert list(itertools.chain(*found)) == row[length:]
        whole = int((given["blocks"][i] >= 0).all(axis=1).sum())
        # The last whole block may reach beyond the answer.
        assert [len(each) for each in found][: whole - 1] == given["committed"][i, : whole - 1].tolist()
        starts = length - 1 + np.concatenate([[0], np.cumsum(given["committed"][i])])
        rounds += [(i, int(starts[j]), given["blocks"][i, j]) for j in range(whole)]
    drafts = blocks_at(drafter, target, text, [(i, start) for i, start, _ in rounds])
    np.testing.assert_array_equal(drafts, np.stack([block[1:] for *_, block in rounds]))


def blocks_at(drafter, target, text, places):
    """int [R, k]: the greedy drafts behind anchors at these (text, position)."""

    @jax.jit
    def draft(params, shared, text, which, start):
        model, method = bind(target.config, target.params), drafter.method
        positions = jnp.broadcast_to(jnp.arange(text.shape[1])[None], text.shape)
        states = model(model.lookup(text), positions, taps=method.taps).tapped[which]
        rows, k, zeros = jnp.arange(len(which)), method.draft_length, jnp.zeros_like(start)
        state = method.state(params, shared, len(which), text.shape[1] + k, target.build)
        state = method.observe(params, shared, state, Seen(text[which], states, zeros, start, first=True), rows)

        def pick(scores, first, ids=None):
            best = jnp.argmax(scores, axis=-1)
            ids = jnp.arange(scores.shape[-1])[None, None] if ids is None else ids
            return Draft(jnp.take_along_axis(jnp.broadcast_to(ids, scores.shape), best[..., None], -1)[..., 0], None)

        row = Row(jnp.pad(text[which], ((0, 0), (0, k))), start + 1, rows)
        return method.propose(params, shared, state, row, k, pick)[0].tokens

    which, start = np.array(places, np.int32).T
    return np.asarray(draft(drafter.params, drafter.shared, text, which, start))
