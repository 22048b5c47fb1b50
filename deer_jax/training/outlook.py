"""What a run of `align` will take, in lines, before it starts: sizes, memory, disk, epochs, and the τ to beat."""

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence

import jax

from deer_jax import processes
from deer_jax.build import described as on
from deer_jax.checkpoints.drafters import drafter_shapes, trainable
from deer_jax.config import Sampling
from deer_jax.decoding.checks import prepare
from deer_jax.decoding.engine import free_bytes
from deer_jax.drafters.drafter import Drafter
from deer_jax.models.target import Target
from deer_jax.models.transformer import Params
from deer_jax.sharding import bytes_per_device
from deer_jax.stores import is_store, place
from deer_jax.training.loop import evaluations_after
from deer_jax.training.recipe import Recipe, Stage
from deer_jax.training.step import abstract_state

TIMED_ROUNDS, TIMINGS = 3, 3


def described(
    recipe: Recipe, stages: Sequence[Stage], target: Target, drafter: Drafter, rows: int, cut: int, held_out: int
) -> Iterator[str]:
    """Lines on a run that begins or goes on.

    Args:
      stages: of the recipe, with their widths.
      rows: training rows; cut: those of them longer than the recipe's `length`.
      held_out: prompts of each evaluation.
    """
    method, evaluation = trainable(drafter), recipe.evaluation
    shapes = drafter_shapes(method, target.mesh)
    own, its = parameters(shapes), parameters(target.params)
    lines = f"the drafter has {amount(own)} parameters, its target {amount(its)}: {100 * own / its:.3g} % of them"
    yield lines + (", and reads the target's embedding and head" if drafter.shared else "")
    optimizer = next((stage.optimizer for stage in stages if stage.optimizer.ema), stages[0].optimizer)
    state = abstract_state(shapes, optimizer, 1)
    # Beside the state, gradients; and what training started from stays to the end.
    held = bytes_per_device(target.params) + bytes_per_device(state) + 2 * bytes_per_device(shapes)
    where = "" if target.mesh is None or target.mesh.size == 1 else " on each device"
    free = free_bytes([device for device in target.devices if device.process_index == processes.number()])
    kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    disk = (recipe.keep + 2) * kept  # the best, and the one that is being written
    yield (
        f"memory{where}: {size(held)} for target, parameters, optimiser and gradients, and activations beside it, "
        f"{size(free)} are free; disk: {size(disk)} for {recipe.keep + 2} checkpoints{_room(recipe.output)}"
    )
    steps = sum(stage.steps for stage in stages)
    line = f"{steps:,} steps of {recipe.batch} texts are {steps * recipe.batch / rows:.3g} epochs of {rows:,} rows"
    if cut:
        line += f", {cut:,} of which are cut at length {recipe.length}"
    yield line
    if evaluation is not None:
        lengths, temperatures = len(evaluation.draft_lengths or (0,)), len(evaluation.temperatures)
        tokens = lengths * temperatures * held_out * evaluation.max_new_tokens
        times = 1 + evaluations_after(0, [stage.steps for stage in stages], evaluation.every)
        yield (
            f"{times} evaluations, each decodes {held_out:,} held-out prompts at {lengths} x {temperatures} (draft "
            f"lengths x temperatures): up to {tokens:,} tokens"
        )


def break_even(target: Target, drafter: Drafter, prompts: Sequence[list[int]], recipe: Recipe) -> str | None:
    """What a round costs on this machine in plain steps, which is the τ above which decoding gets faster; None where
    the evaluation's answers are too short to time it.

    Both are timed on as many of the longest held-out prompts as the evaluation decodes at once, with its programs.
    """
    evaluation = recipe.evaluation
    assert evaluation is not None
    k = (evaluation.draft_lengths or (drafter.draft_length,))[0]
    chosen = sorted(prompts, key=len)[-evaluation.batch_size :]
    sampling = Sampling(temperature=evaluation.temperatures[0])
    if evaluation.max_new_tokens < (1 + TIMED_ROUNDS) * 2:
        return None
    plain = _round_seconds(target, None, 0, chosen, evaluation.max_new_tokens, sampling)
    drafted = _round_seconds(target, drafter, k, chosen, evaluation.max_new_tokens, sampling)
    if plain is None or drafted is None:
        return None
    return (
        f"a round of {k} drafts takes {drafted / plain:.2f} plain steps here ({len(chosen)} prompts at once, "
        f"{on(target.devices)}): decoding gets faster where τ is above that"
    )


def _round_seconds(
    target: Target, drafter: Drafter | None, k: int, prompts: Sequence[list[int]], new: int, sampling: Sampling
) -> float | None:
    """Seconds of a round of all prompts, the least of some timings; None if they ended before one was timed."""
    engine, limits = prepare(target, list(prompts), drafter, k or None, new, sampling, 0, len(prompts), False)
    engine.admit(prompts, limits, range(len(prompts)), engine.order[: len(prompts)])
    after, found = engine.segment(max_rounds=1), math.inf
    for _ in range(TIMINGS):
        if after["done"].all():
            break
        before, begin = int(after["rounds"].max()), time.perf_counter()
        after = engine.segment(max_rounds=TIMED_ROUNDS)
        rounds = int(after["rounds"].max()) - before
        found = min(found, (time.perf_counter() - begin) / max(rounds, 1))
    return found if math.isfinite(found) else None


def parameters(params: Params) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def amount(count: int) -> str:
    """1.57 M, 8.19 B"""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def size(count: float) -> str:
    """Bytes in GB, or MB where they are few."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _room(output: str) -> str:
    """How much is free where a run's folder is, or will be."""
    folder = place(output)
    if is_store(folder):
        return ""
    folder = folder.expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return f", {size(shutil.disk_usage(os.fspath(folder)).free)} are free"
