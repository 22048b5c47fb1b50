"""Text to token ids and back, over the tokenizers of Hugging Face folders."""

import contextlib
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deer_jax.data.chats import check_text, excerpt
from deer_jax.data.templates import Renderer
from deer_jax.digests import combined
from deer_jax.errors import InputError, one_line
from deer_jax.files import write_file
from deer_jax.formats import open_file, read_bytes, read_json

# What holds a vocabulary, and what may lie beside it.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
READ = (".json", ".jinja", ".model", ".txt")  # whatever transformers opens in a folder ends so
SENTENCEPIECE = ("sentencepiece", "google.protobuf")  # modules that read a tokenizer.model

PANIC = "PanicException"  # of Rust, which derives from BaseException and has no module to import it from

BYTE = re.compile(r"<0x[0-9A-F]{2}>")

Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """A tokenizer of a folder. Whatever the libraries beneath raise over its files or a text is an InputError.

    Attributes:
      folder: where its files are.
    """

    def __init__(self, inner, folder: Path, where: str):
        """Use `load`; inner is a transformers tokenizer."""
        self._inner, self._where = inner, where
        self.folder = folder

    @classmethod
    def load(cls, folder: str | Path, where: str | None = None) -> "Tokenizer | None":
        """The tokenizer of a local folder; None if it has none. Code that a folder brings along is never run.

        where: what errors name in place of the folder.
        """
        folder, where = Path(folder), str(folder) if where is None else where
        if not any(os.path.lexists(folder / name) for name in VOCABULARIES):
            return None
        _check_files(folder)
        with _foreign(f"{where}: the tokenizer files cannot be used", "download them again"), _without_panics():
            from huggingface_hub.errors import StrictDataclassError  # what transformers raises over config.json
            from transformers import AutoTokenizer  # slow to import

            try:
                inner: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            except StrictDataclassError as error:
                raise InputError(
                    f"{folder / 'config.json'}: transformers refuses it ({one_line(error)}); correct it or download it "
                    "again"
                ) from None
            inner("a"), inner.get_vocab()  # some damage shows only in use
        return cls(inner, folder, where)

    @functools.cached_property
    def _opening(self) -> list[int]:
        """Ids put before every text (BOS, mostly)."""
        with self._using("a text"):
            plain, full = self.plain("a"), list(self._inner("a")["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        raise InputError(f"{self._where}: the tokenizer changes a text when it adds special tokens; not supported")

    def plain(self, text: str) -> list[int]:
        """Ids of a text alone, with nothing added."""
        with self._using("this text"):
            return list(self._inner(check_text(text, "the text"), add_special_tokens=False)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Ids of a text to be continued: with BOS if the tokenizer adds one, never with a closing EOS."""
        return self._opening + self.plain(text)

    def encode_chat(
        self, messages: Messages, *, now: datetime.datetime | None = None, tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None, **template_arguments: Any,
    ) -> list[int]:  # fmt: skip
        """Ids of a chat through the tokenizer's template, up to where the assistant's answer starts.

        Args:
          messages: role and content each, see `data.chats`.
          now: the moment that the template's strftime_now() writes; None is the present.
          tools, documents: for the template, None where there are none.
          template_arguments: passed to the template, such as enable_thinking; one it does not know is an InputError.
        """
        if not self._inner.chat_template:
            raise InputError(f"{self._where}: the tokenizer has no chat template; give plain text")
        with self._using("these messages"):
            template = self._inner.get_chat_template(None, tools)
            special = {name: str(token) for name, token in self._inner.special_tokens_map.items()}
        if not isinstance(template, str):
            raise InputError(f"{self._where}: the chat template must be a text, found {type(template).__name__}")
        text = self._renderer.render(
            template, messages, now=now, tools=tools, documents=documents, special=special, arguments=template_arguments
        )
        check_text(text, f"{self._where}: the chat template writes no text")
        return self.plain(text)  # the template writes BOS itself

    @functools.cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self._where)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens. Ids without a text have none; this never raises over an id."""
        try:
            with self._using("these ids"):
                return self._decode(ids)
        except InputError:
            known = set(self.vocabulary().values())
        try:
            with self._using("these ids"):
                return self._decode([token for token in ids if token in known])
        except InputError:
            return "\N{REPLACEMENT CHARACTER}"

    def _decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, the added ones included."""
        with self._using("its own vocabulary"):
            return dict(self._inner.get_vocab())

    def token(self, number: int) -> str | None:
        """How the vocabulary writes an id; None if it has no such id."""
        return next((text for text, token in self.vocabulary().items() if token == number), None)

    def ordinary(self, number: int) -> str | None:
        """How the vocabulary writes an id that texts may contain; None for a special token, or an id that it lacks."""
        added = self._inner.added_tokens_decoder.get(number)
        return None if added is not None and added.special else self.token(number)

    def _using(self, what: str) -> contextlib.AbstractContextManager[None]:
        return _foreign(f"{self._where}: the tokenizer cannot read {what}", "give token ids or correct its files")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hexadecimal digest of the vocabulary: equal for tokenizers whose ids mean the same."""
        entries = json.dumps(sorted(self.vocabulary().items()), ensure_ascii=False)
        return hashlib.sha256(entries.encode()).hexdigest()[:12]

    def digest(self) -> str:
        """SHA-256, hexadecimal, of its files as they are now."""
        files = [self.folder / name for name in (*VOCABULARIES, *COMPANIONS) if (self.folder / name).is_file()]
        return combined({file.name: hashlib.sha256(read_bytes(file)).hexdigest() for file in files})

    @functools.cached_property
    def _unsettled_ids(self) -> frozenset[int]:
        found = {token for text, token in self.vocabulary().items() if BYTE.fullmatch(text)}
        # Special tokens are left out of the text, so the bytes on both sides of one are a single run.
        special = {token for token, added in self._inner.added_tokens_decoder.items() if added.special}
        return frozenset(found | special if found else ())

    def settled(self, ids: Sequence[int]) -> int:
        """How many leading ids have a text that later ids cannot change, but for an incomplete last character.

        Tokens that stand for one byte (<0xC3> and the like, as in Llama 2) are decoded as a run: a wrong byte behind
        turns the whole run into replacement characters. So a run at the end is not settled.

          [..., "said", <0xC3>, <0xB1>] -> all but the last two
        """
        count = len(ids)
        while count and ids[count - 1] in self._unsettled_ids:
            count -= 1
        return count


@contextlib.contextmanager
def _foreign(line: str, remedy: str) -> Iterator[None]:
    """Whatever the libraries beneath raise is one line: bare exceptions, and the panics of Rust, which are none."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise InputError(f"{line} ({type(error).__name__}: {one_line(error)}); {remedy}") from None


_STDERR = threading.Lock()  # one at a time puts something in its place


@contextlib.contextmanager
def _without_panics() -> Iterator[None]:
    """Keep back what is written to stderr meanwhile, and drop it if Rust panics: it writes its stack there itself."""
    try:
        held = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError:  # no room
        yield
        return
    panicked = False
    with held, _STDERR:
        try:
            stderr = os.dup(2)
        except OSError:  # there is none
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = type(error).__name__ == PANIC
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if not panicked and held.seek(0, os.SEEK_END):
                held.seek(0)
                os.write(2, held.read())


def _check_files(folder: Path) -> None:
    """InputError for what transformers should not be let near, such as a pipe, which it would wait for."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in READ)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    for path in paths:
        ours = path.name in VOCABULARIES or path.name in COMPANIONS
        if ours or path.exists():
            os.close(open_file(path))
        if ours and path.suffix == ".json":
            try:
                read_json(path)
            except InputError as error:
                raise InputError(f"{error}; download it again") from None
    names = {path.name for path in paths}
    missing = [name for name in SENTENCEPIECE if not _installed(name)]
    if missing and not names & {"tokenizer.json", "vocab.json"}:
        found = " and ".join(sorted(names & set(VOCABULARIES)))
        raise InputError(
            f"{folder}: has its tokenizer as {found} alone, which sentencepiece reads: "
            "pip install 'deer_jax[sentencepiece]', or add a tokenizer.json"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it would lie in
        return False


def tokenizer_files(folder: Path) -> list[tuple[str, Path]]:
    """The tokenizer files of a folder, each by its name and where it really lies.

    Raises InputError for a folder without any, and for a link that leaves the folder: it may lead to anything, which a
    copy would publish. The links of a download from the hub, snapshots/REVISION/NAME to blobs/DIGEST, stay inside.
    """
    names = [name for name in (*VOCABULARIES, *COMPANIONS) if os.path.lexists(folder / name)]
    if not set(names) & set(VOCABULARIES):
        raise InputError(f"{folder}: no tokenizer files")
    found = []
    try:
        real = folder.resolve()
        allowed = [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
        for name in names:
            path = (folder / name).resolve()
            if not any(path.is_relative_to(root) for root in allowed):
                raise InputError(
                    f"{folder / name}: is a link to {path}, outside its folder; put the file itself in its place"
                )
            found.append((name, path))
    except (OSError, RuntimeError) as error:  # a loop of links
        raise InputError(f"{folder}: cannot be read: {one_line(error)}") from None
    return found


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copy the tokenizer files of one folder into another; for the InputErrors see `tokenizer_files`."""
    for name, path in tokenizer_files(Path(source)):
        write_file(Path(folder) / name, read_bytes(path))


def differing_ids(target: Tokenizer, drafter: Tokenizer, allowed: Collection[int]) -> tuple[int, ...]:
    """Ids in `allowed` that mean another string to the drafter than to the target, ascending.

    Ids that only one of them has do not count. Raises InputError at the first differing id outside `allowed`.
    """
    ours = {token: text for text, token in target.vocabulary().items()}
    theirs = {token: text for text, token in drafter.vocabulary().items()}
    differing = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    for token in differing:
        if token not in allowed:
            raise InputError(
                f"the tokenizers differ at id {token}: {excerpt(ours[token])} for the target, {excerpt(theirs[token])} "
                "for the drafter; a drafter must share its target's tokenizer"
            )
    return tuple(differing)
