"""What must not matter does not, what is counted is counted right, and streamed text is the text of decode."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl  # there is no public way to see a copy to the host on CPU
from jax.experimental.layout import Format, Layout

from deer_jax import DrafterConfig, Target, decode, drafter_from_target, stream
from deer_jax.config import Sampling
from deer_jax.decoding import decode as decoding
from deer_jax.decoding import loop, programs
from deer_jax.decoding.engine import Engine
from deer_jax.decoding.programs import bucket
from deer_jax.drafters.prompt_lookup import lookup_first
from deer_jax.models.cache import KVCache
from tests.doubles import Pieces, table_drafter, table_drafters, text_table
from tests.kinds import CONDITIONED, EAGLE, conditioned, eagle3
from tests.tiny import random_params, tiny

V, K, SLOTS, CAPACITY = 48, 3, 4, 64
SMALL = {"vocab_size": V, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 24}
SAMPLED = {"temperature": 0.9}
GARBAGE = 1e4


def make_target(scan: bool) -> Target:
    config = tiny("qwen3", **SMALL)
    return Target(config=config, params=random_params(config, 5, scan=scan))


def choosing(target: Target) -> Target:
    """The same, with a loop that chooses the layouts of its state, as on a TPU."""
    return dataclasses.replace(target, build=dataclasses.replace(target.build, auto_layouts=True))


@pytest.fixture(scope="module")
def target() -> Target:
    return make_target(scan=False)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, n).tolist() for n in (9, 1, 14, 3, 5, 1, 12, 2)]


@pytest.fixture(scope="module")
def limits(prompts) -> list[int]:
    return [len(prompt) + 12 + i % 5 for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def plain(target, prompts):
    return decode(target, prompts, max_new_tokens=20, batch_size=SLOTS).tokens


def drafter_for(target: Target, name: str):
    if name.startswith("lookup or "):
        return lookup_first(drafter_for(target, name.removeprefix("lookup or ")), longest=2)
    if name in CONDITIONED:
        return conditioned(target, CONDITIONED[name], k=K, scan=target.build.scan)
    if name in EAGLE:
        return eagle3(target, name, k=K, scan=target.build.scan)
    return None if name == "none" else drafter_from_target(target, DrafterConfig(attention=name))


def kept_by(drafter: Any, length) -> tuple[KVCache | None, Any]:
    """What a drafter keeps of the rows, and int32 [B] how many of their tokens it has."""
    if isinstance(drafter, KVCache):  # a conditioned drafter's: what the target has read
        return drafter, length - 1
    if not drafter:
        return None, length
    return drafter["cache"], drafter.get("read", length - 1)  # of a standalone one how far it has read


def make_engine(target: Target, name: str, settings: dict, slots: int = SLOTS) -> Engine:
    drafter = drafter_for(target, name)
    return Engine(target, drafter, K if drafter else 0, Sampling(**settings), 7, (), slots, CAPACITY)


def poison(state):
    """Large garbage in every slot of caches and tokens that holds nothing yet, idle rows' among them."""
    length = state.length

    def spoil(cache, exists):
        free = jnp.arange(CAPACITY, dtype=jnp.int32)[None] >= exists[:, None]
        signs = jnp.where(jnp.arange(CAPACITY) % 2 == 0, GARBAGE, -GARBAGE).astype(jnp.float32)
        where = free[None, :, None, :, None]
        return jax.tree.map(lambda x: jnp.where(where, signs[None, None, None, :, None], x), cache)

    drafter, (cache, exists) = state.drafter, kept_by(state.drafter, length)
    if cache is not None:
        spoiled = spoil(cache, exists)
        drafter = spoiled if cache is drafter else drafter | {"cache": spoiled}
    scratch = jnp.arange(CAPACITY, dtype=jnp.int32)[None] >= length[:, None]
    tokens = jnp.where(scratch, jnp.int32(GARBAGE), state.tokens)
    return dataclasses.replace(state, cache=spoil(state.cache, length - 1), drafter=drafter, tokens=tokens)


def run(engine: Engine, *, spoil: bool) -> list[tuple]:
    """Answers, rounds and histogram of every row, one round at a time, spoiled before each of them or not."""
    while True:
        if spoil:
            engine.state = jax.jit(poison)(engine.state)
        after = engine.segment(1)
        if after["done"].all():
            return rows_of(after)


def rows_of(after) -> list[tuple]:
    rows = zip(after["tokens"], after["length"], after["rounds"], after["histogram"], strict=True)
    return [(tokens[:length].tolist(), int(rounds), counts.tolist()) for tokens, length, rounds, counts in rows]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("none", {}),
        ("none", SAMPLED),
        ("block_causal", {}),
        ("block_causal", SAMPLED),
        ("bidirectional", {}),
        ("selector", {}),
        ("rnn reduced", SAMPLED),
        ("eagle3", SAMPLED),
    ],
    ids=[
        "plain-greedy",
        "plain-sampled",
        "causal-greedy",
        "causal-sampled",
        "bidirectional-greedy",
        "selector-greedy",
        "rnn-sampled",
        "eagle3-sampled",
    ],
)
def test_garbage_beyond_what_exists_changes_nothing(target, prompts, limits, name, settings):
    results = []
    for spoil in (False, True):
        engine = make_engine(target, name, settings)
        engine.admit(prompts[:3], limits[:3], [0, 1, 2], [2, 0, 3])
        results.append(run(engine, spoil=spoil))
    assert results[0] == results[1]
    assert [len(results[0][slot][0]) for slot in (2, 0, 3)] == limits[:3]


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_is_the_same_alone_in_a_batch_in_another_slot_and_after_refill(target, prompts, limits, settings):
    name = "block_causal"
    new = [limit - len(prompt) for prompt, limit in zip(prompts, limits, strict=True)]
    refilled = decode(
        target, prompts, drafter=drafter_for(target, name), draft_length=K, max_new_tokens=new, batch_size=SLOTS,
        seed=7, **settings,
    )  # fmt: skip
    expected = [
        (prompt + answer, rounds, histogram)
        for prompt, answer, rounds, histogram in zip(
            prompts, refilled.tokens, refilled.stats.rounds, refilled.stats.accepted_histogram, strict=True
        )
    ]
    together = make_engine(target, name, settings)
    slots = [3, 1, 0, 2]
    together.admit(prompts[:4], limits[:4], [0, 1, 2, 3], slots)
    rows = rows_of(together.segment())
    assert [rows[slot] for slot in slots] == expected[:4]

    for index, slot, count in ((2, 3, SLOTS), (6, 0, 1)):
        alone = make_engine(target, name, settings, count)
        alone.admit([prompts[index]], [limits[index]], [index], [slot])
        assert rows_of(alone.segment())[slot] == expected[index]


def test_the_prompt_number_and_the_seed_are_what_sampling_depends_on(target, prompts):
    same = [prompts[3]] * 3
    options = {"max_new_tokens": 20, "batch_size": SLOTS, "temperature": 0.9}
    first, again, other = (decode(target, same, seed=seed, **options).tokens for seed in (0, 0, 1))
    assert first == again
    assert len({tuple(answer) for answer in (*first, *other)}) == 6


@contextlib.contextmanager
def copies_to_host(monkeypatch) -> Iterator[list[str]]:
    """Names of the copies to the host made outside `Engine.fetch`."""
    seen, inside = [], []
    value, fetch = ArrayImpl._value, Engine.fetch

    def counted(self):
        if not inside:
            seen.append(str(self.shape))
        return value.fget(self)

    def allowed(self, tree):
        inside.append(True)
        try:
            return fetch(self, tree)
        finally:
            inside.pop()

    with monkeypatch.context() as patch, jax.transfer_guard_device_to_host("disallow"):
        patch.setattr(ArrayImpl, "_value", property(counted))
        patch.setattr(ArrayImpl, "__array__", lambda self, *args, **kw: np.array(counted(self), *args, **kw))
        patch.setattr(Engine, "fetch", allowed)
        yield seen


@pytest.mark.parametrize("name", ["none", "block_causal"])
def test_one_fetch_per_segment_and_no_other_copy_to_the_host(target, prompts, name, monkeypatch):
    drafter = drafter_for(target, name)
    options = {"drafter": drafter, "draft_length": K if drafter else None, "max_new_tokens": 16, "batch_size": SLOTS}
    with copies_to_host(monkeypatch) as seen:
        once = decode(target, prompts[:4], **options)
        monkeypatch.setattr(decoding, "ROUNDS_PER_SEGMENT", 3)
        calls = []
        shown = decode(target, prompts[:4], **options, progress=lambda *state: calls.append(state))
        refilled = decode(target, prompts, **options)
    assert seen == []
    assert once.stats.fetches == 1
    assert shown.stats.fetches == len(calls) == -(-max(shown.stats.rounds) // 3)
    assert shown.tokens == once.tokens
    assert [finished for finished, *_ in calls] == sorted(finished for finished, *_ in calls)
    assert calls[-1] == (4, 4, 64)
    assert 1 < refilled.stats.fetches <= len(prompts) - SLOTS + 1
    assert refilled.tokens[:4] == once.tokens


def test_a_copy_to_the_host_would_be_seen(monkeypatch):
    x = jnp.arange(3) + 1
    # Not np.asarray: on CPU it reads the array's memory in place, which neither this nor a transfer guard notices.
    for copy in (jax.device_get, lambda x: x.tolist(), lambda x: bool(x[0]), lambda x: int(x[1])):
        with copies_to_host(monkeypatch) as seen:
            copy(x)
        assert seen


def cache_copies(text: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """Lines of optimised HLO that copy an array of one of the shapes."""
    lines = re.finditer(r"^.*= \(?\w+\[([\d,]+)\].* copy(-start)?\(.*$", text, re.MULTILINE)
    return [line[0].strip() for line in lines if tuple(map(int, line[1].split(","))) in shapes]


@pytest.mark.parametrize(
    ("scan", "auto"), [(False, False), (True, False), (True, True)], ids=["unrolled", "scanned", "auto_layouts"]
)
@pytest.mark.parametrize(
    "name", ["none", "block_causal", "selector", "eagle3", "lookup or block_causal", "lookup or selector"]
)
def test_the_loop_works_in_the_memory_it_was_given(prompts, limits, scan, auto, name):
    """Every cache is aliased with the donated one, and nothing as large as one is copied anywhere, also where a draft
    may go unverified."""
    target = choosing(make_target(scan)) if auto else make_target(scan)
    test_engine = make_engine(target, name, {})
    test_engine.admit(prompts[:1], limits[:1], [0], [0])
    test_engine.segment()
    plan, gated = test_engine.plan, dataclasses.replace(test_engine.plan, gated=True)
    if plan.k:
        test_engine.segment(draft_length=plan.k)
    arrays = jax.tree.leaves([test_engine.state.cache, kept_by(test_engine.state.drafter, 0)[0]])
    wanted = {(plan,), (gated,), (plan.target, plan.drafter)}  # the loop's static arguments, and those of prefill
    found = [
        (key[0].__name__, program)
        for key, program in programs._compiled.items()
        if key[1] in wanted and _is_for(key, test_engine.weights.target, arrays[0].shape) and bool(key[4]) == auto
    ]
    assert {"prefill", "admit", "run_segment"} <= {function for function, _ in found}
    assert [function for function, _ in found].count("run_segment") == 1 + (plan.k > 0)
    for function, program in found:
        aliased = program.memory_analysis().alias_size_in_bytes
        assert aliased >= sum(x.nbytes for x in arrays), function
        copies = cache_copies(program.as_text(), {x.shape for x in arrays})
        assert not copies, (function, copies)


def _is_for(key, params, cache: tuple[int, ...]) -> bool:
    """Whether a compiled program's key has a cache of this shape, and these parameters' if it has any."""
    shapes = [shape for shape, *_ in key[3]]
    wanted = [x.shape for x in jax.tree.leaves(params)]
    ours = any(shapes[i : i + len(wanted)] == wanted for i in range(len(shapes)))
    return cache in shapes and (ours or key[0] is loop.admit)


def test_a_loop_that_chooses_layouts_says_the_same(target, prompts, plain, monkeypatch):
    """Drafted, with refilled slots; asking the loop costs no compilation, and the next call has none at all."""
    monkeypatch.setattr(programs, "_compiled", {})
    options = {"drafter": drafter_for(target, "block_causal"), "draft_length": K, "batch_size": SLOTS}
    for again in (False, True):
        result = decode(choosing(target), prompts, max_new_tokens=20, **options)
        assert result.tokens == plain
        assert (result.stats.compile_seconds == 0) == again
    assert [key[0].__name__ for key in programs._compiled].count("run_segment") == 1


def test_prompts_are_admitted_into_caches_as_they_lie(target, prompts, limits):
    """Layouts that are not the default are taken and returned by the programs that follow the loop."""

    def slots_innermost(x):
        return Format(Layout((*range(x.ndim - 2), x.ndim - 1, x.ndim - 2)), x.sharding) if x.ndim > 2 else x.format

    engines = [make_engine(each, "block_causal", {}) for each in (target, choosing(target))]
    formats = jax.tree.map(slots_innermost, engines[1].state)
    engines[1].state = jax.device_put(engines[1].state, formats)
    for each in engines:
        each.admit(prompts[:3], limits[:3], range(3), range(3))
    layouts = jax.tree.map(lambda x: x.format.layout.major_to_minor, engines[1].state)
    assert layouts == jax.tree.map(lambda x: x.layout.major_to_minor, formats)
    jax.tree.map(np.testing.assert_array_equal, engines[0].state, engines[1].state)


def test_a_copied_cache_would_be_found():
    @jax.jit
    def keep_both(cache):
        return cache.at[0].set(1.0), cache

    cache = jnp.zeros((2, 3, 5, 7))
    text = keep_both.lower(cache).compile().as_text()
    assert cache_copies(text, {(2, 3, 5, 7)})
    assert not cache_copies(text, {(2, 3, 5, 8)})


def test_acceptance_length_counts_the_stop_token_and_what_the_limit_cuts(target, prompts, plain):
    """Right drafts of k = 3 commit 4 tokens a round; each answer ends where its limit or its stop token is."""
    right = table_drafters(target, prompts, plain)["right"]
    cut = decode(target, prompts[:1], drafter=right, draft_length=K, max_new_tokens=6)
    assert cut.tokens[0] == plain[0][:6]
    assert cut.stats.new_tokens == [6]
    assert cut.stats.rounds == [2]
    assert cut.stats.accepted_histogram == [[0, 0, 0, 2]]  # the second would have committed 4, the limit left 2
    assert cut.stats.acceptance_length == 4

    at = next(i for i in range(4, 20) if plain[0][i] not in plain[0][:i] and i % 4 != 3)
    stopping = dataclasses.replace(target, stop_ids=(plain[0][at],))
    stopped = decode(stopping, prompts[:1], drafter=right, draft_length=K, max_new_tokens=20)
    assert stopped.tokens[0] == plain[0][: at + 1]
    rounds, rest = divmod(at + 1, 4)
    assert stopped.stats.rounds == [rounds + 1]
    expected = [0, 0, 0, rounds]
    expected[rest - 1] += 1
    assert stopped.stats.accepted_histogram == [expected]
    assert stopped.stats.acceptance_length == pytest.approx((at + 1) / (rounds + 1))
    assert stopped.stats.draft_length == K
    assert stopped.texts is None

    ignoring = decode(stopping, prompts[:1], drafter=right, draft_length=K, max_new_tokens=20, ignore_stop=True)
    assert ignoring.tokens[0] == plain[0]
    without = decode(stopping, prompts[:1], max_new_tokens=20)
    assert without.tokens[0] == plain[0][: at + 1]
    assert without.stats.accepted_histogram == [[at + 1]]
    assert without.stats.acceptance_length == 1
    assert without.stats.draft_length == 0


def test_acceptance_length_is_summed_before_dividing(target, prompts, plain):
    table = text_table(prompts[:2], plain[:2])
    table[1] = (table[1] + 1) % V
    mixed = decode(target, prompts[:2], drafter=table_drafter(table, V), draft_length=K, max_new_tokens=8)
    assert mixed.stats.accepted_histogram == [[0, 0, 0, 2], [8, 0, 0, 0]]
    assert mixed.stats.acceptance_length == 16 / 10
    assert mixed.stats.tokens_per_second == pytest.approx(16 / mixed.stats.seconds)


def test_timing_separates_prefill_and_compilation(target, prompts):
    untimed, timed = (decode(target, prompts[:4], max_new_tokens=20, batch_size=SLOTS, time_prefill=t) for t in (0, 1))
    assert untimed.stats.prefill_seconds is untimed.stats.decode_tokens_per_second is None
    assert 0 < timed.stats.prefill_seconds < timed.stats.seconds
    assert timed.stats.compile_seconds == 0
    assert timed.stats.decode_tokens_per_second > timed.stats.tokens_per_second


@pytest.mark.parametrize("name", ["none", "block_causal"])
@pytest.mark.parametrize("stops", [False, True])
def test_streamed_pieces_make_the_text_of_decode(target, name, stops):
    """Pieces end inside characters, whose first bytes wait for the rest."""
    options = {"max_new_tokens": 24, "temperature": 1.5, "seed": 3}
    if drafter := drafter_for(target, name):
        options |= {"drafter": drafter, "draft_length": K}
    (answer,) = decode(target, [[8, 9]], **options).tokens
    spelled = "€😀".encode()
    assert len(set(answer[:7])) == 7
    pieces = {token: spelled[i : i + 1] for i, token in enumerate(answer[:7])}
    stop_ids = next((token,) for token in answer[8:] if token not in pieces) if stops else ()
    spoken = dataclasses.replace(target, tokenizer=Pieces(pieces, stop_ids), stop_ids=stop_ids)
    whole = decode(spoken, [[8, 9]], **options)
    assert whole.texts[0].startswith("€😀")
    assert len(whole.tokens[0]) == (answer.index(stop_ids[0]) + 1 if stops else 24)
    streamed = list(stream(spoken, [[8, 9]], **options))
    assert "".join(streamed) == whole.texts[0]
    assert all(streamed)
    assert len(streamed) > (1 if stops else 2)
    assert not streamed[0].startswith("\ufffd")


def test_text_and_chats_go_through_the_tokenizer(target):
    spoken = dataclasses.replace(target, tokenizer=Pieces({}))
    ids = [ord(letter) % V for letter in "hi"]
    expected = decode(target, [ids], max_new_tokens=4).tokens[0]
    chat = [{"role": "user", "content": "hi"}]
    for prompt in ("hi", ["hi"], chat, [chat], [ids], [np.array(ids)]):
        result = decode(spoken, prompt, max_new_tokens=4)
        assert result.tokens == [expected]
        assert result.texts == [spoken.tokenizer.decode(expected)]


def test_the_context_may_be_filled_to_the_last_token(target):
    """The last block reads beyond the context; its scratch must not reach what is committed."""
    prompt = [1] * 100
    new = target.config.context - len(prompt)
    plain = decode(target, [prompt], max_new_tokens=new)
    assert plain.stats.new_tokens == [new]
    right = table_drafters(target, [prompt], plain.tokens)["right"]
    full = decode(target, [prompt], drafter=right, draft_length=K, max_new_tokens=new)
    assert full.tokens == plain.tokens
    assert full.stats.rounds == [-(-new // (K + 1))]


@pytest.mark.parametrize(("n", "expected"), [(1, 64), (64, 64), (65, 80), (80, 80), (100, 112), (128, 128), (129, 160)])
def test_bucket(n, expected):
    assert bucket(n, 64) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [(0, 16)]), (512, [(0, 512)]), (600, [(0, 512), (512, 128)])]
)
def test_prefill_chunks(count, expected):
    assert programs.prefill_chunks(count) == expected
