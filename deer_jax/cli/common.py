"""Options that several verbs share, and what they are turned into."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from rich.console import Console
from rich.table import Table

from deer_jax import processes
from deer_jax.checkpoints.drafters import PROMPT_LOOKUP, load_drafter
from deer_jax.checkpoints.load import load_target
from deer_jax.cli.options import Source
from deer_jax.cli.progress import Reporter
from deer_jax.config import DrafterConfig, Sampling, Verification
from deer_jax.data.answer_writer import read_state
from deer_jax.data.chats import as_chat, is_chat
from deer_jax.data.sources import Prompt, read_prompts, template_arguments
from deer_jax.digests import Digests
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.start import FROM_TARGET
from deer_jax.errors import InputError
from deer_jax.formats import json_bytes
from deer_jax.models.target import Target
from deer_jax.sharding import MeshShape, make_mesh
from deer_jax.spools import lock
from deer_jax.stores import check_file, is_store, place, write

DRAFTER_HELP = (
    f"a folder, a hub id ([hub:]OWNER/NAME), or '{FROM_TARGET}': an untrained drafter with the target's own weights "
    f"('{FROM_TARGET}:0,2' takes these layers only, and then guesses no token well before it is trained), or "
    f"'{PROMPT_LOOKUP}': what followed where the text ended so before"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """target"""

    target: Annotated[
        Source, "the model to decode: a Hugging Face folder or hub id ([hub:]OWNER/NAME), or a GGUF file", "FOLDER"
    ]
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, "of the weights; by default float32 on CPU, else bfloat16"
    ] = None
    mesh: Annotated[
        MeshShape | None,
        "split the models and the slots over several devices, as in data=2,tensor=4: copies with their share of the "
        "slots, and slices of every product; fsdp=N slices of the parameters. By default one device",
        "AXES",
    ] = None

    def load_target(self, digests: Digests | None = None) -> Target:
        """digests: see `load_target`."""
        mesh = None if self.mesh is None else make_mesh(**dataclasses.asdict(self.mesh))
        processes.check_devices(jax.local_devices()[:1] if mesh is None else mesh.devices.flat)
        with Reporter("loading, bytes") as reporter:
            return load_target(self.target, dtype=self.dtype, mesh=mesh, progress=reporter.show, digests=digests)


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
        "a .jsonl, .jsonl.gz or JSON array file: HumanEval, MBPP, GSM8K, MATH, MT-Bench, Spec-Bench, LiveCodeBench, "
        "ShareGPT, Alpaca, or rows with prompt (text), messages (chat) or tokens (ids)",
    ] = None
    field: Annotated[
        str | None,
        "the field of the file that holds the prompt, if it is none of the usual ones, or a pattern of several, as in "
        "'{instruction}\\n{input}'",
    ] = None
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
            found = [
                Prompt(str(i), as_chat(text) if self.chat else text, f"--prompt {i}")
                for i, text in enumerate(self.prompt, 1)
            ]
        if self.template and not any(is_chat(prompt.content) for prompt in found):
            raise InputError("--template has no effect on plain text: add --chat")
        return found

    def template_arguments(self) -> dict[str, Any]:
        """`--template` as a mapping."""
        return template_arguments(self.template, "--template")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """decoding"""

    max_new_tokens: Annotated[int, "stop an answer after this many tokens"] = 256
    temperature: Annotated[float, "0 takes the likeliest token; higher values sample"] = 0.0
    top_k: Annotated[int, "sample among the N likeliest tokens; 0: among all"] = 0
    top_p: Annotated[float, "sample among the likeliest tokens that together have this probability; 1: all"] = 1.0
    draft_temperature: Annotated[
        float | None,
        "the drafter's own temperature; by default the target's. Any value leaves the answers' distribution unchanged",
    ] = None
    verification: Annotated[
        Verification,
        "of sampled drafts: token by token, or as a block, which keeps as much or more; neither changes the answers' "
        "distribution",
    ] = "token"
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
    """The digests that the run which makes an output knows; InputError for one that cannot go on or is being written.

    verify: read every file anyway.
    """

    def known() -> str:
        read_state(output)
        with lock(output):  # one that is being written is refused here, before a model is loaded
            state = read_state(output)
        return json.dumps(state.files if state else None)

    return Digests(json.loads(processes.led(known)), verify=verify)


def show(table: Table) -> None:
    """Print a table on stdout; a file or a pipe has no width to fit it to."""
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def check_writable(path: Path | None) -> None:
    """Refuse an output path before any work is done for it, by trying what can be tried."""
    if path is None:
        return
    if not is_store(path) and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: no folder {path.absolute().parent} to write it to")
    check_file(path)


def check_distinct(outputs: Sequence[Path | None], inputs: Sequence[Path | str | None]) -> None:
    """Refuse to write a file over another output, over what was read, or over a file in a folder that is read.

    The same file is recognised under another name too. Devices and pipes hold nothing that could be lost.
    """
    read = [place(path).expanduser() for path in inputs if path is not None]
    names, files = {path.resolve() for path in read}, {found for path in read if (found := _file(path))}
    for path in outputs:
        if path is None or not (path.is_file() or not os.path.lexists(path)):
            continue
        if path.resolve() in names or _file(path) in files:
            raise InputError(f"{path}: is read or written under another option too; name another file")
        if path.is_file():
            for folder in read:
                if folder.is_dir() and folder.resolve() in path.resolve().parents:
                    raise InputError(f"{path}: exists in the folder {folder}, which is read; name another file")
        if found := _file(path):
            files.add(found)
        names.add(path.resolve())


def _file(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to, whatever it is called; None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def write_text(path: Path, text: str) -> None:
    """Write a file, in UTF-8: all of it, or nothing."""
    _write(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, values: Any) -> None:
    """Write one JSON value, indented."""
    _write(path, json_bytes(values, indent=2))


def _write(path: Path, content: bytes) -> None:
    sys.stdout.flush()  # of `--json /dev/stdout` what was printed before comes first
    write(path, content)
