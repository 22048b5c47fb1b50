"""Logits that are not finite end a decode with one line that names the cause; those nobody meets change nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_jax import DrafterConfig, Target, answers, bench, decode, drafter_from_target, stream, stream_blocks
from deer_jax.decoding import answers as answers_module
from deer_jax.decoding.finite import broken_weights
from deer_jax.errors import NotFiniteError, RunError
from deer_jax.models import experts as moe
from deer_jax.training.acceptance import measure
from deer_jax.training.recipe import Evaluation
from tests.doubles import Pieces, anchor_drafter, table_drafter, text_table
from tests.tiny import random_params, tiny

V, K = 48, 3
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


def make(family="qwen3", *, scan=False, **changes) -> Target:
    shape = {"vocab_size": V, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
    config = tiny(family, **(shape | changes))
    return Target(config=config, params=random_params(config, 5, scan=scan))


def spoiled(model, *path, at=..., value=np.nan):
    """The model with one weight changed."""
    params = jax.tree.map(lambda x: x, model.params)
    where = params
    for name in path[:-1]:
        where = where[name]
    where[path[-1]] = where[path[-1]].at[at].set(value)
    return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def target() -> Target:
    return make()


@pytest.fixture(scope="module")
def plain(target):
    return decode(target, [[3, 4, 5], [7]], max_new_tokens=12).tokens


def unused(plain) -> int:
    """A token that is in no prompt and no answer."""
    return next(token for token in range(1, V) if token not in {*plain[0], *plain[1], 3, 4, 5, 7})


CASES = {
    "a middle layer": (("layers", 1, "up"), (2, 3), np.nan, "layers.1.up"),
    "values": (("layers", 0, "v"), (2, 3), np.nan, "layers.0.v"),
    "an infinite weight": (("layers", 1, "down"), (0, 1), np.inf, "layers.1.down"),
    "the head": (("head",), (9, 2), np.nan, "head"),
    "the head, of minus infinity": (("head",), (9, 2), -np.inf, "head"),
    "the embedding of the second prompt": (("embed",), 7, np.nan, "embed"),
    "the norm": (("norm",), 0, np.inf, "norm"),
}


@pytest.mark.parametrize(("k", "settings"), [(0, {}), (0, SAMPLED), (K, {}), (K, SAMPLED)])
@pytest.mark.parametrize("case", CASES)
def test_weights_of_the_target(target, case, k, settings):
    path, at, value, name = CASES[case]
    broken = spoiled(target, *path, at=at, value=value)
    options = settings | ({"drafter": drafter_from_target(target), "draft_length": k} if k else {})
    with pytest.raises(NotFiniteError) as caught:
        decode(broken, [[3, 4, 5], [7]], max_new_tokens=6, **options)
    error = caught.value
    assert error.index == (1 if "second" in case else 0)
    said = "the logits of the target target are not finite after 0 new tokens; of its weights these are not finite: "
    assert error.reason == said + name


@pytest.mark.parametrize("settings", [{}, SAMPLED, {"draft_temperature": 0.7}], ids=["greedy", "sampled", "mixed"])
@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
def test_weights_of_the_drafter(target, attention, settings):
    drafter = drafter_from_target(target, DrafterConfig(attention=attention))
    for name, value in (("special", np.nan), ("norm", np.inf)):
        broken = spoiled(drafter, name, value=value)
        with pytest.raises(NotFiniteError, match=rf"drafter from-target are not .* after 0 new .*not finite: {name}$"):
            decode(target, [[3, 4, 5]], drafter=broken, draft_length=K, max_new_tokens=6, **settings)


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [np.nan, np.inf, "nothing"])
def test_logits_of_the_drafter_even_where_the_draft_is_rejected(target, value, settings):
    """After the prompt's last token only, at the last place of the draft, which is as good as never accepted."""
    logits = np.zeros((V, K, V), np.float32)
    logits[:, :, 11] = 9
    logits[5, -1, 5] = value if value != "nothing" else 0
    if value == "nothing":
        logits[5, -1] = -np.inf
    drafter = anchor_drafter(logits)
    with pytest.raises(NotFiniteError, match=r"drafter anchor are not finite after 0 new tokens; .* finite: logits"):
        decode(target, [[3, 4, 5]], drafter=drafter, max_new_tokens=12, draft_length=K, **settings)


def test_logits_of_minus_infinity_are_no_fault_of_a_drafter(target):
    logits = np.full((V, K, V), -np.inf, np.float32)
    logits[:, :, 11] = 1
    for settings in ({}, SAMPLED):
        decode(target, [[3, 4, 5]], drafter=anchor_drafter(logits), max_new_tokens=12, draft_length=K, **settings)


@pytest.mark.parametrize(("scan", "value"), [(False, np.nan), (True, np.inf)], ids=["unrolled", "scanned"])
def test_a_rejected_draft_that_is_not_finite_changes_nothing(value, scan):
    """Its keys and values lie in the block and in the cache, and neither reaches what is committed."""
    target = make(scan=scan)
    prompts = [[3, 4, 5], [7]]
    plain = decode(target, prompts, max_new_tokens=12).tokens
    bad = unused(plain)
    broken = spoiled(target, "embed", at=bad, value=value)
    table = text_table(prompts, plain)
    for places in ([5, 6, 7], range(3, 30, 2)):
        drafts = table.copy()
        drafts[:, [place for place in places if place < table.shape[1]]] = bad
        for certain in (True, False):
            drafter = table_drafter(drafts, V, certain=certain)
            found = decode(broken, prompts, drafter=drafter, draft_length=K, max_new_tokens=12)
            assert found.tokens == plain
    with pytest.raises(NotFiniteError, match=r"of the target .* embed"):  # and where it is read, it is met
        decode(broken, [[bad, 3]], max_new_tokens=2)


def test_an_expert_that_is_not_finite_reaches_only_the_rows_that_chose_it():
    """Where few rows run, each passes through every expert that any of them chose."""
    config = tiny("qwen3_moe", layers=1)
    params = random_params(config, 5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, config.width)), jnp.float32)
    router, stacks = params["layers"]["router"][0], params["experts"]
    broken = stacks | {"down": stacks["down"].at[0, 2].set(np.nan)}
    met = (np.asarray(moe.route(x[0], router, config)[0]) == 2).any(axis=1)
    before, after = (np.asarray(moe.mix(x, router, weights, 0, config)) for weights in (stacks, broken))
    assert 0 < met.sum() < 20
    np.testing.assert_array_equal(before[0, ~met], after[0, ~met])
    assert np.isnan(after[0, met]).all()


def test_padding_of_the_prompt_is_not_met(target):
    """Prompts are padded with token 0 as they are read."""
    prompts = [[3, 4, 5], [7]]
    plain = decode(target, prompts, max_new_tokens=8).tokens
    if 0 in {*plain[0], *plain[1]}:
        pytest.fail("choose another seed: token 0 is an answer's")
    assert decode(spoiled(target, "embed", at=0), prompts, max_new_tokens=8).tokens == plain


def test_what_a_stop_token_or_the_limit_cuts_off_is_not_met(target, plain):
    """A right draft whose later tokens stand behind the end of the answer."""
    prompt, answer = [3, 4, 5], plain[0]
    bad = unused(plain)
    table = text_table([prompt], [answer])
    broken = spoiled(target, "embed", at=bad)
    table[0, 5] = bad
    drafter = table_drafter(table, V)
    cut = decode(broken, [prompt], drafter=drafter, draft_length=K, max_new_tokens=2)
    assert cut.tokens == [answer[:2]]


def test_activations_that_overflow(target):
    broken = spoiled(target, "layers", 1, "down", value=3e38)
    with pytest.raises(
        NotFiniteError, match="0 new tokens; no weight is not finite: its activations overflow in float32"
    ):
        decode(broken, [[3]], max_new_tokens=2)


def late(target, prompts, *, at: int) -> tuple[Target, list[list[int]], int]:
    """A target that is not finite once it reads a token that the first prompt's answer has at a place for the first
    time, and others do not have at all; the answers; and the token."""
    plain = decode(target, prompts, max_new_tokens=12).tokens
    bad = plain[0][at]
    assert bad not in plain[0][:at]
    return spoiled(target, "embed", at=bad), plain, bad


def fresh_place(answer) -> int:
    """A place of at least 3 whose token did not occur before."""
    return next(i for i in range(3, len(answer) - 1) if answer[i] not in answer[:i])


def test_answers_keeps_what_was_done_before(target, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "ROUNDS_PER_SEGMENT", 2)
    prompts = [[3, 4, 5], [7], [9, 9], [12]]
    at = fresh_place(decode(target, prompts, max_new_tokens=12).tokens[0])
    broken, plain, bad = late(target, prompts, at=at)
    others = [i for i in range(1, 4) if bad not in plain[i]]
    order = [others[0], 0]  # the one that is all right is finished first
    for _ in range(2):  # and again where it goes on
        with pytest.raises(NotFiniteError) as caught:
            answers(broken, [prompts[i] for i in order], tmp_path / "a", max_new_tokens=12, batch_size=1)
        assert caught.value.index == 1
        assert f"after {at + 1} new tokens; of its weights these are not finite: embed" in caught.value.reason
        (line,) = (tmp_path / "a").read_text().splitlines()
        assert json.loads(line)["answer"] == plain[others[0]]
    running = json.loads((tmp_path / "a.state.json").read_text())["running"]
    assert running == {"1": plain[0][: at + 1]}


def test_streams_say_what_they_have_and_end(target):
    prompt = [3, 4, 5]
    at = fresh_place(decode(target, [prompt], max_new_tokens=12).tokens[0])
    broken, plain, _ = late(target, [prompt], at=at)
    seen = []
    with pytest.raises(NotFiniteError, match=rf"prompts\[0\]: .* after {at + 1} new tokens"):
        seen.extend(token for block in stream_blocks(broken, [prompt], max_new_tokens=12) for token in block)
    assert seen == plain[0][: at + 1]
    spoken = dataclasses.replace(broken, tokenizer=Pieces({}))
    pieces = []
    with pytest.raises(NotFiniteError):
        pieces.extend(stream(spoken, [prompt], max_new_tokens=12))
    assert "".join(pieces) == "?" * (at + 1)


def test_bench_and_evaluation_name_the_method_and_the_prompt(target, tmp_path):
    drafter = spoiled(drafter_from_target(target), "special")
    with pytest.raises(NotFiniteError, match=r"prompts\[0\]: mine k=2: the logits of the drafter from-target"):
        bench(target, [[3], [4]], drafters={"mine": drafter}, draft_lengths=[2], max_new_tokens=3, repeats=1)
    evaluation = Evaluation(prompts="p", every=1, draft_lengths=(2,), max_new_tokens=4)
    broken = spoiled(target, "embed", at=7)
    message = "evaluating k = 2, T = 0: held-out prompt 2: the logits of the target target are not finite"
    with pytest.raises(RunError, match=message):
        measure(broken, drafter_from_target(target), [[3, 4], [7]], evaluation, 0, lambda note: None)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_names_of_weights(scan):
    params = random_params(tiny("qwen3_moe"), 0, scan=scan)
    assert broken_weights(params) == []
    assert broken_weights({"counts": jnp.arange(3), "deep": [jnp.ones(2), jnp.array([np.nan])]}) == ["deep.1"]
    if scan:
        params["layers"]["q"] = params["layers"]["q"].at[1, 0, 0].set(np.nan)
    else:
        params["layers"][1]["q"] = params["layers"][1]["q"].at[0, 0].set(np.nan)
    params["experts"]["up"] = params["experts"]["up"].at[0, 3, 1, 1].set(-np.inf)
    params["norm"] = params["norm"].at[2].set(np.inf)
    assert sorted(broken_weights(params)) == ["experts.0.up", "layers.1.q", "norm"]
