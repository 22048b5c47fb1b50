"""Pretraining: a small autoregressive target from folders of text, with a tokenizer of its own.

For demonstrations, tests and research; a real target comes from Hugging Face. The run's folder gets, beside what every
run has (see `checkpoints.runs`), beginnings of paragraphs as prompt files: `prompts.jsonl` from the training texts, for
`answers`, and `held_out.jsonl` from the texts kept apart, for `align` and `bench`.
"""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deer_jax import processes
from deer_jax.build import Build
from deer_jax.checkpoints.claims import claimed
from deer_jax.checkpoints.families import write_config
from deer_jax.checkpoints.huggingface import write_description
from deer_jax.checkpoints.records import TARGET
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
from deer_jax.models.transformer import Params, abstract_params, init_params, logical_axes
from deer_jax.sharding import on_mesh, placements
from deer_jax.spools import Spool
from deer_jax.stores import names, place
from deer_jax.training.loop import Batches, Progress, StagePlan, Trainer, TrainReport, Work, run_mesh, stage_seed
from deer_jax.training.objectives import next_token_loss
from deer_jax.training.recipe import INESSENTIAL, PretrainRecipe, as_pretrain_recipe, pretrain_recipe_from, to_mapping
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

    def described(self) -> str:
        return f"held-out loss {self.loss:.3f} nats per token, {self.bits_per_byte:.3f} bits per byte"


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
    tell: Callable[[str], Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    verify: bool = False,
) -> PretrainReport:
    """Train a target from text as a recipe says, or go on with the run in its output folder.

    Args:
      recipe: a PretrainRecipe, its plain values, or a YAML file of them.
      progress: called after every step, and during evaluations.
      tell: given lines worth keeping: what each evaluation found, and how long the rest takes.
      should_stop: asked after every step; True writes a checkpoint and returns.
      verify: as for `align`; the texts are read in full in any case.

    Raises:
      InputError: anything wrong with the recipe or the texts it names, an output that another process writes, or one
        that was begun with another recipe or other texts; before any work is done.
      RunError: a full disk, a loss that is not finite, no checkpoint that can be read, the output removed meanwhile.
    """
    recipe = as_pretrain_recipe(recipe)
    output, show = place(recipe.output), progress or (lambda *_: None)
    with claimed(output, to_mapping(recipe), kind=TARGET, essential=essential, verify=verify) as claim:
        mesh = run_mesh(recipe)
        build = Build.here(mesh, recipe.dtype)
        show(0, recipe.steps, "reading the texts")
        corpus = read_corpus(recipe.texts, files=recipe.files, exclude=recipe.exclude, held_out=recipe.held_out)
        if corpus.duplicates:
            names = ", ".join(corpus.duplicates[:3]) + (", ..." if len(corpus.duplicates) > 3 else "")
            left_out = f"{len(corpus.duplicates)} texts mostly repeat others and are left out: {names}"
            warnings.warn(left_out, stacklevel=2)
        claim.settle(identity(corpus, build), lambda folder: describe(folder, recipe, corpus, show))
        tokenizer = Tokenizer.load(claim.spool.path / TARGET)
        if tokenizer is None:
            raise InputError(f"{output / TARGET}: has no tokenizer any more; name another output")
        processes.led(lambda: write_openings(claim.spool, recipe, corpus, tokenizer))
        show(0, recipe.steps, "reading the texts as tokens")
        run = Trainer(
            work_of(recipe, corpus, tokenizer, mesh, build), recipe, lock=claim.lock, show=show,
            tell=tell or (lambda _: None), should_stop=should_stop or (lambda: False),
        )  # fmt: skip
        report = run.train()
    return PretrainReport(**vars(report), evaluations=run.evaluations)


def write_openings(spool: Spool, recipe: PretrainRecipe, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """The prompt files, where they are not there yet."""
    room, there = PROMPT_SHARE * recipe.model.context, names(spool.folder)
    for name, texts, count in (
        (PROMPTS, corpus.training, recipe.prompts),
        (HELD_OUT, corpus.held_out, HELD_OUT_PROMPTS),
    ):
        if texts and name not in there:
            found = passages(
                texts, count=count, most=PROMPT_LINES, seed=recipe.seed,
                fits=lambda text: len(tokenizer.encode(text)) <= room,
            )  # fmt: skip
            write_prompts(spool.path / name, found)
            spool.put(name)


def identity(corpus: Corpus, build: Build) -> dict[str, Any]:
    """What must not change between the calls of one run, beside the recipe."""

    def digests(documents: Sequence[Document]) -> dict[str, str]:
        found: dict[str, str] = {}  # of several with one name, of different sources, all count
        for each in documents:
            found[each.name] = hashlib.sha256((found.get(each.name, "") + each.text).encode()).hexdigest()
        return found

    return {
        "training texts": digests(corpus.training),
        "held-out texts": digests(corpus.held_out),
        "dtype": build.dtype.name,
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
    write_description(folder, write_config(recipe.model, "float32", stop_ids=(0,), bos_id=0))
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


def work_of(recipe: PretrainRecipe, corpus: Corpus, tokenizer: Tokenizer, mesh: Mesh, build: Build) -> Work:
    """What the loop trains: a model, on windows of text."""
    model, edge = recipe.model, tokenizer.encode("")[0]
    loss = next_token_loss(model, remat=recipe.remat or build.remat)
    windows = Windows(tokens_of(corpus.training, tokenizer, edge), recipe.length, edge)
    kept_apart = HeldOut.of(corpus, tokenizer, recipe.length, edge) if corpus.held_out else None
    shapes = abstract_params(model)
    where = placements(mesh, shapes, logical_axes(model))

    def examples(first: int, rows: np.ndarray) -> Batches:
        return window_batches(windows, batch=recipe.batch, seed=stage_seed(recipe.seed, 0), first=first, rows=rows)

    def start() -> Params:
        return jax.tree.map(jax.device_put, init_params(model, stage_seed(recipe.seed, 1)), where)

    @jax.jit
    def loss_of(params: Params, batch):
        return loss(computing(params, build), batch, {})

    def evaluate(params: Params, show: Callable[[str], Any]) -> HeldOutLoss:
        show("evaluating")
        assert kept_apart is not None
        with on_mesh(mesh):
            return kept_apart.measure(lambda batch: loss_of(params, batch), recipe.batch)

    stage = StagePlan(name="pretraining", steps=recipe.steps, optimizer=recipe.optimizer, loss=loss, examples=examples)
    return Work(
        mesh=mesh, build=build, stages=[stage],
        params=jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, where),
        start=start, evaluate=evaluate, evaluate_every=recipe.evaluate_every if corpus.held_out else None,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Windows of the texts kept apart, stacked, and the bytes of text in them."""

    rows: dict[str, np.ndarray]
    bytes: int

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer, length: int, edge: int) -> "HeldOut":
        """Evenly over all of them, so that no single text decides."""
        windows = Windows(tokens_of(corpus.held_out, tokenizer, edge), length, edge)
        count = min(len(windows), EVALUATED_WINDOWS)
        rows = [windows[i * len(windows) // count] for i in range(count)]
        size = sum(len(tokenizer.decode(row["tokens"][: row["length"]].tolist()).encode()) for row in rows)
        return cls({name: np.stack([row[name] for row in rows]) for name in rows[0]}, size)

    def measure(self, loss_of: Callable[[dict[str, np.ndarray]], Any], batch: int) -> HeldOutLoss:
        """loss_of: the summed loss of a batch, and how many tokens it predicts."""
        total, tokens = 0.0, 0
        for first in range(0, len(self.rows["length"]), batch):
            part = {name: value[first : first + batch] for name, value in self.rows.items()}
            part = {name: np.pad(x, [(0, batch - len(x))] + [(0, 0)] * (x.ndim - 1)) for name, x in part.items()}
            loss, count = jax.device_get(loss_of(part))
            total, tokens = total + float(loss), tokens + int(count)
        return HeldOutLoss(loss=total / tokens, bits_per_byte=total / math.log(2) / self.bytes, tokens=tokens)
