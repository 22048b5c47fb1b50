"""What is checked before any work: models, numbers, lengths; and the engine that the work needs."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deer_jax import processes
from deer_jax.config import Sampling
from deer_jax.decoding.auto import AUTO, DraftLength, auto_length
from deer_jax.decoding.engine import Engine
from deer_jax.decoding.programs import capacity_for
from deer_jax.decoding.prompts import is_whole
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.protocol import check_tapped
from deer_jax.errors import InputError, PromptError
from deer_jax.models.target import Target

MOST_SLOTS = 2**16
MOST_ANSWERS = 10_000_000  # of one call


def prepare(
    target: Target,
    prompts: list[list[int]],
    drafter: Drafter | None,
    draft_length: DraftLength,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    seed: int,
    slots: int,
    ignore_stop: bool,
) -> tuple[Engine, list[int]]:
    """Check everything that can be wrong before any work is done; the engine and each prompt's limit."""
    auto = isinstance(draft_length, str) and draft_length == AUTO
    own = draft_length is None or auto
    k = 0 if drafter is None else drafter.draft_length if own else draft_length
    if not is_whole(k) or k < 0:
        raise InputError(f'draft_length must be 0 (plain decoding), a positive whole number or "auto", got {k!r}')
    if k > target.config.context:
        raise InputError(f"draft_length {k} exceeds the target's context of {target.config.context}")
    check_run(seed, slots)
    check_count(len(prompts), 1)
    if drafter is None and draft_length:
        raise InputError(f"draft_length is {draft_length} but there is no drafter: give one, or draft_length=0")
    vocab = target.config.vocab_size
    if drafter is not None and drafter.method.target_vocab != vocab:
        raise InputError(
            f"{drafter.name} drafts for a vocabulary of {drafter.method.target_vocab}, {target.name} has {vocab}: "
            "load it for this target, load_drafter(..., target=target)"
        )
    if drafter is not None and drafter.params and k > drafter.draft_length:  # prompt lookup is not trained
        warnings.warn(
            f"draft_length {k} is beyond the {drafter.draft_length} that {drafter.name} was trained for", stacklevel=3
        )
    several = isinstance(max_new_tokens, Sequence | np.ndarray)
    new = list(max_new_tokens) if several else [max_new_tokens] * len(prompts)
    if len(new) != len(prompts):
        raise InputError(f"max_new_tokens has {len(new)} entries for {len(prompts)} prompts")
    limits = []
    for i, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
        if not is_whole(count) or count < 1:
            raise InputError(f"max_new_tokens must be a whole number of at least 1, got {count!r}")
        room = target.config.context - len(prompt)
        if count > room:
            raise PromptError(
                i,
                f"{len(prompt)} prompt tokens and {count} new ones exceed the context of "
                f"{target.config.context}; shorten the prompt"
                + (f" or give max_new_tokens <= {room}" if room > 0 else ""),
            )
        limits.append(len(prompt) + int(count))
    if processes.count() > 1:  # they would wait for each other for ever
        texts = hashlib.sha256(repr([prompts, limits, vars(sampling), ignore_stop]).encode()).hexdigest()
        processes.same(
            {"draft_length": AUTO if auto else k, "seed": seed, "batch_size": slots, "prompts and settings": texts}
        )
    engine = Engine(
        target, drafter if k else None, k, sampling, seed, () if ignore_stop else target.stop_ids,
        min(slots, len(prompts)), capacity_for(limits, k),
    )  # fmt: skip
    if auto and drafter is not None:
        engine.auto = auto_length(drafter)
    return engine, limits


def check_run(seed: int, batch_size: int) -> None:
    """Refuse a seed or a number of slots that is none."""
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise InputError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")
    if not is_whole(batch_size) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    if batch_size > MOST_SLOTS:
        raise InputError(f"batch_size must be at most {MOST_SLOTS:,}, got {batch_size}")


def check_count(prompts: int, samples: int) -> None:
    """Refuse more answers than one call makes."""
    if prompts * samples > MOST_ANSWERS:
        raise InputError(
            f"{prompts:,} prompts x {samples:,} samples are more than {MOST_ANSWERS:,} answers: give fewer prompts or "
            "samples, and several outputs"
        )


def check_models(target: Any, drafter: Any = None) -> None:
    """Refuse what is no target or no drafter: the name of one, or one for the other; and, with several processes, a
    target that some of them have nothing of."""
    if not isinstance(target, Target):
        remedy = (
            "load it first, load_target(...)" if isinstance(target, str | Path) else "give what load_target returns"
        )
        raise InputError(f"target must be a Target, got {_what(target)}: {remedy}")
    processes.check_devices(target.devices)
    if drafter is None:
        return
    if not isinstance(drafter, Drafter):
        found = isinstance(drafter, str | Path)
        remedy = "load it first, load_drafter(..., target=target)" if found else "give what load_drafter returns"
        raise InputError(f"drafter must be a Drafter, got {_what(drafter)}: {remedy}")
    check_tapped(drafter.method, target.config.layers, target.name)
    for array in jax.tree.leaves(drafter.params):
        if isinstance(array, jax.Array) and array.committed and array.devices() != set(target.devices):
            raise InputError(
                f"the drafter {drafter.name} lies on {len(array.devices())} devices, the target {target.name} on "
                f"others or on {len(target.devices)}: load it for this target, load_drafter(..., target=target)"
            )


def _what(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | Path) else f"a {type(value).__name__}"
