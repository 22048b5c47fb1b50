"""Text to token ids and back, over the tokenizers of Hugging Face folders."""

import datetime
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from deer_jax.errors import InputError

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

BYTE = re.compile(r"<0x[0-9A-F]{2}>")

Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """A tokenizer of a folder.

    Attributes:
      folder: where its files are.
    """

    def __init__(self, inner, folder: Path):
        """Use `load`; inner is a transformers tokenizer."""
        self._inner = inner
        self.folder = folder

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer | None":
        """The tokenizer of a local folder; None if it has none. Code that a folder brings along is never run."""
        folder = Path(folder)
        if not any((folder / name).is_file() for name in VOCABULARIES):
            return None
        for name in (*VOCABULARIES, *COMPANIONS):
            if name.endswith(".json") and (folder / name).is_file():
                _check_json(folder / name)
        from huggingface_hub.errors import StrictDataclassError  # what transformers raises over config.json
        from transformers import AutoTokenizer  # slow to import

        try:
            inner = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except StrictDataclassError as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(
                f"{folder / 'config.json'}: transformers refuses it ({line}); correct it or download it again"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(f"{folder}: the tokenizer files cannot be used ({line}); download them again") from None
        return cls(inner, folder)

    @functools.cached_property
    def _opening(self) -> list[int]:
        """Ids put before every text (BOS, mostly)."""
        plain, full = self.plain("a"), list(self._inner("a")["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        raise InputError(f"{self.folder}: the tokenizer changes a text when it adds special tokens; not supported")

    def plain(self, text: str) -> list[int]:
        """Ids of a text alone, with nothing added."""
        return list(self._inner(text, add_special_tokens=False)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Ids of a text to be continued: with BOS if the tokenizer adds one, never with a closing EOS."""
        return self._opening + self.plain(text)

    def encode_chat(
        self, messages: Messages, *, now: datetime.datetime | None = None, **template_arguments
    ) -> list[int]:
        """Ids of a chat through the tokenizer's template, up to where the assistant's answer starts.

        Args:
          messages: role and content each. template_arguments: passed to the template, such as enable_thinking.
          now: for templates that write a date; None is the time of the call.
        """
        if not self._inner.chat_template:
            raise InputError(f"{self.folder}: the tokenizer has no chat template; give plain text")
        from jinja2 import TemplateError

        if now is not None:
            template_arguments["strftime_now"] = now.strftime
        try:
            text = self._inner.apply_chat_template(
                list(messages), **{**template_arguments, "add_generation_prompt": True, "tokenize": False}
            )
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            line = " ".join(str(error).split())
            raise InputError(f"{self.folder}: the chat template refuses these messages: {line}") from None
        return self.plain(text)  # the template writes BOS itself

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, the added ones included."""
        return dict(self._inner.get_vocab())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hexadecimal digest of the vocabulary: equal for tokenizers whose ids mean the same."""
        entries = json.dumps(sorted(self.vocabulary().items()), ensure_ascii=False)
        return hashlib.sha256(entries.encode()).hexdigest()[:12]

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


def _check_json(path: Path) -> None:
    # The Rust tokenizer answers damaged JSON with a bare Exception.
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged tokenizer file ({error}); download it again") from None


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copy the tokenizer files of one folder into another; a folder without any is an InputError."""
    names = [name for name in (*VOCABULARIES, *COMPANIONS) if (Path(source) / name).is_file()]
    if not set(names) & set(VOCABULARIES):
        raise InputError(f"{source}: no tokenizer files")
    for name in names:
        shutil.copyfile(Path(source) / name, Path(folder) / name)


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
                f"the tokenizers differ at id {token}: {ours[token]!r} for the target, {theirs[token]!r} for the "
                "drafter; a drafter must share its target's tokenizer"
            )
    return tuple(differing)
