"""Options that several verbs share, and what they are turned into."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table

from deer_jax.checkpoints.drafters import FROM_TARGET, load_drafter
from deer_jax.checkpoints.load import load_target
from deer_jax.cli.progress import Reporter
from deer_jax.config import DrafterConfig, Sampling
from deer_jax.data.answers import read_state
from deer_jax.data.sources import Prompt, as_chat, read_prompts, template_arguments
from deer_jax.digests import Digests
from deer_jax.drafters.protocol import Drafter
from deer_jax.errors import InputError, NotFiniteError, PromptError, RunError
from deer_jax.models.target import Target

DRAFTER_HELP = (
    f"a folder, a hub id, or '{FROM_TARGET}': an untrained drafter with the target's own weights "
    f"('{FROM_TARGET}:0,2' takes these layers only)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """target"""

    target: Annotated[str, "the model to decode: a Hugging Face folder or hub id", "FOLDER"]
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, "of the weights; by default float32 on CPU, else bfloat16"
    ] = None

    def load_target(self, digests: Digests | None = None) -> Target:
        """digests: see `load_target`."""
        with Reporter("loading, bytes") as reporter:
            return load_target(self.target, dtype=self.dtype, progress=reporter.show, digests=digests)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(TargetOptions):
    """drafters"""

    draft_attention: Annotated[
        Literal["block_causal", "bidirectional"] | None,
        f"what a '{FROM_TARGET}' drafter sees: the text causally (default), or everything in both directions",
    ] = None

    def load(self, sources: Sequence[str], digests: Digests | None = None) -> tuple[Target, list[Drafter]]:
        """The target and the drafters from their sources; digests: see `load_target`."""
        config = None
        if self.draft_attention is not None:
            if not any(source.partition(":")[0] == FROM_TARGET for source in sources):
                raise InputError(f"--draft-attention is for '{FROM_TARGET}' drafters; a folder brings its own")
            config = DrafterConfig(attention=self.draft_attention)
        target = self.load_target(digests)
        with Reporter("loading, bytes") as reporter:
            drafters: list[Drafter] = [
                load_drafter(
                    source,
                    target=target,
                    dtype=self.dtype,
                    progress=reporter.show,
                    config=config if source.partition(":")[0] == FROM_TARGET else None,
                )
                for source in sources
            ]
        return target, drafters


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """prompts"""

    prompt: Annotated[tuple[str, ...], "a prompt; repeatable"] = ()
    prompts: Annotated[
        Path | None,
        "a .jsonl or .jsonl.gz file: HumanEval, MBPP, GSM8K, MATH, MT-Bench, Spec-Bench, LiveCodeBench, or lines with "
        "prompt (text), messages (chat) or tokens (ids)",
    ] = None
    field: Annotated[str | None, "the field of the file that holds the prompt, if it is none of the usual ones"] = None
    limit: Annotated[int | None, "read only the first N prompts of the file"] = None
    chat: Annotated[
        bool, "send each text as a user message through the tokenizer's chat template, not as it stands"
    ] = False
    template: Annotated[
        tuple[str, ...], "an argument of the chat template, as in enable_thinking=false; repeatable", "NAME=VALUE"
    ] = ()

    def read(self, *, whole: bool = False, allow_empty: bool = False) -> list[Prompt]:
        """The prompts, of the file or the command line; for the arguments see `read_prompts`."""
        if bool(self.prompt) == (self.prompts is not None):
            raise InputError("give prompts either with --prompt TEXT or with --prompts FILE")
        if self.prompts is not None:
            found = read_prompts(
                self.prompts, field=self.field, limit=self.limit, chat=self.chat, whole=whole, allow_empty=allow_empty
            )
        elif self.field is not None or self.limit is not None:
            raise InputError("--field and --limit are for a file given with --prompts")
        else:
            if not all(self.prompt):
                raise InputError("--prompt is empty: give some text")
            found = [Prompt(str(i), as_chat(text) if self.chat else text) for i, text in enumerate(self.prompt, 1)]
        if self.template and not any(isinstance(part, dict) for prompt in found for part in prompt.content[:1]):
            raise InputError("--template has no effect on plain text: add --chat")
        return found

    def template_arguments(self) -> dict[str, Any]:
        """`--template` as a mapping."""
        return template_arguments(self.template, "--template")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """decoding"""

    max_new_tokens: Annotated[int, "stop an answer after this many tokens"] = 128
    temperature: Annotated[float, "0 takes the likeliest token; higher values sample"] = 0.0
    top_k: Annotated[int, "sample among the N likeliest tokens; 0: among all"] = 0
    top_p: Annotated[float, "sample among the likeliest tokens that together have this probability; 1: all"] = 1.0
    draft_temperature: Annotated[
        float | None,
        "the drafter's own temperature; by default the target's. Any value leaves the answers' distribution unchanged",
    ] = None
    seed: Annotated[int, "fixes every random choice"] = 0
    ignore_stop: Annotated[bool, "run to --max-new-tokens whatever the target says"] = False

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `decode` and `bench`, checked."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(DecodeOptions)}
        Sampling(**{field.name: values[field.name] for field in dataclasses.fields(Sampling)})
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """settings"""

    config: Annotated[
        Path | None, "a YAML file whose keys are these options (draft_length: 8); what stands on the command line wins"
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions(ConfigOptions):
    """output"""

    json: Annotated[Path | None, "write the numbers to this file"] = None


def known_digests(output: Path, *, verify: bool = False) -> Digests:
    """The digests that the run which makes an output knows; InputError for an output that cannot go on.

    verify: read every file anyway.
    """
    state = read_state(output)
    return Digests(state.files if state else None, verify=verify)


@contextlib.contextmanager
def named(prompts: Sequence[Prompt], source: Path | None) -> Iterator[None]:
    """Errors about one of the prompts say which it is in their file, not its place in a list."""
    try:
        yield
    except (PromptError, NotFiniteError) as error:
        where = f"{source}: prompt {prompts[error.index].id}" if source else f"prompt {prompts[error.index].id}"
        kind = InputError if isinstance(error, PromptError) else RunError
        raise kind(f"{where}: {error.reason}") from None


def show(table: Table) -> None:
    """Print a table on stdout; a file or a pipe has no width to fit it to."""
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def check_writable(path: Path | None) -> None:
    """Refuse an output path before any work is done for it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: no folder {path.absolute().parent} to write it to")
    if path is not None and path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")


def check_distinct(outputs: Sequence[Path | None], inputs: Sequence[Path | None]) -> None:
    """Refuse to write a file over another output or over what was read."""
    seen = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in seen:
            raise InputError(f"{path}: is read or written under another option too; name another file")
        seen.add(path.resolve())


def write_text(path: Path, text: str) -> None:
    """Write a file: all of it, or nothing."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write one JSON value, indented."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
