"""Pretraining: a small autoregressive target from folders of text, with a tokenizer of its own.

For demonstrations, tests and research; a real target comes from Hugging Face. The run's folder gets, beside what every
run has (see `checkpoints.runs`), beginnings of paragraphs as prompt files: `prompts.jsonl` from the training texts, for
`answers`, and `held_out.jsonl` from the texts kept apart, for `align` and `bench`.
"""

import dataclasses
import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deer_jax.build import Build
from deer_jax.checkpoints.claims import claimed
from deer_jax.checkpoints.huggingface import write_description
from deer_jax.checkpoints.runs import TARGET
from deer_jax.data.bpe import train_bpe
from deer_jax.data.texts import (
    Corpus,
    Document,
    Windows,
    passages,
    read_corpus,
    tokens_of,
    window_batches,
    write_prompts,
)
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.errors import InputError
from deer_jax.models.transformer import Params, init_params, logical_axes
from deer_jax.sharding import make_mesh, placement
from deer_jax.training.loop import Progress, StagePlan, Trainer, TrainReport, stage_seed
from deer_jax.training.objectives import next_token_loss
from deer_jax.training.recipe import INESSENTIAL, PretrainRecipe, pretrain_recipe_from, read_pretrain_recipe, to_mapping
from deer_jax.training.step import computing

PROMPTS, HELD_OUT = "prompts.jsonl", "held_out.jsonl"
HELD_OUT_PROMPTS = 128
PROMPT_LINES = 12
PROMPT_SHARE = 0.75  # of the context at most, so that an answer has room
EVALUATED_WINDOWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """How well the texts kept apart are predicted.

    Attributes:
      loss: nats per token. bits_per_byte: the same in a unit that does not depend on the tokenizer.
    """

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def score(self) -> float:
        return -self.loss

    def metrics(self) -> dict[str, Any]:
        return {"held_out": dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainReport(TrainReport):
    """What a call of `pretrain` did; `export` makes a target of its output.

    Attributes:
      evaluations: by step, in order, those of this call.
    """

    evaluations: dict[int, HeldOutLoss]


def pretrain(
    recipe: PretrainRecipe | Mapping[str, Any] | str | Path,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    verify: bool = False,
) -> PretrainReport:
    """Train a target from text as a recipe says, or go on with the run in its output folder.

    Args:
      recipe: a PretrainRecipe, its plain values, or a YAML file of them.
      progress: called after every step, and during evaluations.
      should_stop: asked after every step; True writes a checkpoint and returns.
      verify: as for `align`; the texts are read in full in any case.

    Raises:
      InputError: anything wrong with the recipe or the texts it names, an output that another process writes, or one
        that was begun with another recipe or other texts; before any work is done.
      RunError: a full disk, a loss that is not finite, no checkpoint that can be read, the output removed meanwhile.
    """
    if isinstance(recipe, str | Path):
        recipe = read_pretrain_recipe(recipe)
    elif not isinstance(recipe, PretrainRecipe):
        recipe = pretrain_recipe_from(recipe, "recipe")
    show = progress or (lambda *_: None)
    values = to_mapping(recipe)
    with claimed(Path(recipe.output), values, kind=TARGET, essential=essential, verify=verify) as claim:
        mesh = make_mesh(**dataclasses.asdict(recipe.mesh))
        show(0, recipe.steps, "reading the texts")
        corpus = read_corpus(recipe.texts, files=recipe.files, exclude=recipe.exclude, held_out=recipe.held_out)
        if corpus.duplicates:
            names = ", ".join(corpus.duplicates[:3]) + (", ..." if len(corpus.duplicates) > 3 else "")
            left_out = f"{len(corpus.duplicates)} texts mostly repeat others and are left out: {names}"
            warnings.warn(left_out, stacklevel=2)
        claim.settle(inputs(recipe, corpus), lambda folder: describe(folder, recipe, corpus, show))
        output = Path(recipe.output)
        tokenizer = Tokenizer.load(output / TARGET)
        if tokenizer is None:
            raise InputError(f"{output / TARGET}: has no tokenizer any more; name another output")
        write_openings(output, recipe, corpus, tokenizer)
        work = _Pretraining(recipe, corpus, tokenizer, mesh, show)
        stop = should_stop or (lambda: False)
        run = Trainer(work, recipe, lock=claim.lock, mesh=mesh, build=work.build, show=show, should_stop=stop)
        report = run.train()
    return PretrainReport(**vars(report), evaluations=run.evaluations)


def write_openings(output: Path, recipe: PretrainRecipe, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """The prompt files, where they are not there yet."""
    room = PROMPT_SHARE * recipe.model.context
    for name, texts, count in (
        (PROMPTS, corpus.training, recipe.prompts),
        (HELD_OUT, corpus.held_out, HELD_OUT_PROMPTS),
    ):
        if texts and not os.path.lexists(output / name):
            found = passages(
                texts, count=count, most=PROMPT_LINES, seed=recipe.seed,
                fits=lambda text: len(tokenizer.encode(text)) <= room,
            )  # fmt: skip
            write_prompts(output / name, found)


def inputs(recipe: PretrainRecipe, corpus: Corpus) -> dict[str, Any]:
    """What must not change between the calls of one run, beside the recipe."""

    def digests(documents: Sequence[Document]) -> dict[str, str]:
        found: dict[str, str] = {}  # of several with one name, of different sources, all count
        for each in documents:
            found[each.name] = hashlib.sha256((found.get(each.name, "") + each.text).encode()).hexdigest()
        return found

    return {
        "training texts": digests(corpus.training),
        "held-out texts": digests(corpus.held_out),
        "dtype": Build.here(dtype=recipe.dtype).dtype.name,
    }


def essential(recipe: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What of a recipe must not change while its run goes on; later versions' new keys count with their defaults."""
    values = to_mapping(pretrain_recipe_from(recipe, where))
    return {name: value for name, value in values.items() if name not in INESSENTIAL}


def describe(folder: Path, recipe: PretrainRecipe, corpus: Corpus, show: Progress) -> None:
    """Learn the tokenizer, and write everything of the target's folder but the weights.

    Raises InputError if the texts do not fill a batch: here the recipe may still change.
    """
    show(0, recipe.steps, "learning the tokenizer")
    train_bpe((each.text for each in corpus.training), recipe.model.vocab_size, folder)
    write_description(folder, recipe.model, jnp.dtype("float32"), stop_ids=(0,), bos_id=0)
    tokenizer, tokens = Tokenizer.load(folder), 0
    assert tokenizer is not None
    for each in corpus.training:
        tokens += len(tokenizer.plain(each.text)) + 1
        if tokens > (recipe.batch - 1) * (recipe.length - 1):
            return
    raise InputError(
        f"the texts have {tokens:,} tokens, too few for a batch of {recipe.batch} windows of {recipe.length}; lower "
        "batch or length"
    )


class _Pretraining:
    """What `pretrain` trains: a model, on windows of text."""

    def __init__(self, recipe: PretrainRecipe, corpus: Corpus, tokenizer: Tokenizer, mesh: Mesh, show: Progress):
        self.recipe = recipe
        self.mesh = mesh
        self.build = Build.here(mesh, recipe.dtype)
        show(0, recipe.steps, "reading the texts as tokens")
        edge = tokenizer.encode("")[0]
        self.windows = Windows(tokens_of(corpus.training, tokenizer, edge), recipe.length, edge)
        self.stages: Sequence[StagePlan] = [
            StagePlan(
                name="pretraining", steps=recipe.steps, optimizer=recipe.optimizer, loss=next_token_loss(recipe.model)
            )
        ]
        self.evaluate_every = recipe.evaluate_every if corpus.held_out else None
        if corpus.held_out:
            kept_apart = Windows(tokens_of(corpus.held_out, tokenizer, edge), recipe.length, edge)
            count = min(len(kept_apart), EVALUATED_WINDOWS)
            # Evenly over all of it, so that no single text decides.
            rows = [kept_apart[i * len(kept_apart) // count] for i in range(count)]
            self.held_out = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            self.held_out_bytes = sum(
                len(tokenizer.decode(row["tokens"][: row["length"]].tolist()).encode()) for row in rows
            )

    def first_params(self) -> Params:
        model, axes = self.recipe.model, logical_axes(self.recipe.model)
        params = init_params(model, stage_seed(self.recipe.seed, len(self.stages)))
        return jax.tree.map(lambda x, names: jax.device_put(x, placement(self.mesh, x.shape, names)), params, axes)

    def examples(self, number: int) -> Iterator[dict[str, np.ndarray]]:
        return window_batches(self.windows, batch=self.recipe.batch, seed=stage_seed(self.recipe.seed, number))

    @functools.cached_property
    def _loss(self):
        loss = next_token_loss(self.recipe.model)

        def of(params: Params, batch):
            return loss(computing(params, self.build), batch, {})

        return jax.jit(of)

    def evaluate(self, params: Params, show: Callable[[str], Any]) -> HeldOutLoss:
        """The loss on the texts kept apart."""
        show("evaluating")
        total, tokens = 0.0, 0
        rows, batch = len(self.held_out["length"]), self.recipe.batch
        for first in range(0, rows, batch):
            part = {name: value[first : first + batch] for name, value in self.held_out.items()}
            part = {name: np.pad(x, [(0, batch - len(x))] + [(0, 0)] * (x.ndim - 1)) for name, x in part.items()}
            loss, count = jax.device_get(self._loss(params, part))
            total, tokens = total + float(loss), tokens + int(count)
        return HeldOutLoss(loss=total / tokens, bits_per_byte=total / math.log(2) / self.held_out_bytes, tokens=tokens)
