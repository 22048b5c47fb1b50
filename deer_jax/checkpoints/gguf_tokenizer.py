"""The tokenizer in a GGUF file's metadata, written as a Hugging Face folder has it and read as one of those.

Byte-level BPE (`gpt2`) of the pre-tokenizers whose published tokenizer.json is known to the letter; what else there is
would be a guess, and is refused by name.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deer_jax.checkpoints.gguf import GgufFile
from deer_jax.data.tokenizer import Tokenizer
from deer_jax.errors import InputError, named, shown
from deer_jax.files import disk_error, write_file
from deer_jax.formats import json_bytes

MODEL, PRE, ADD_BOS = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"
TOKENS, KINDS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
TEMPLATE = "tokenizer.chat_template"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens; an unused one only fills a row
# transformers' name of a special token -> that in tokenizer.ggml.NAME_token_id
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(digits: str) -> list[dict[str, Any]]:
    """Words, numbers of so many digits, signs and spaces apart, as Llama 3 and Qwen2 have it."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _byte_level(False)
    ]  # fmt: skip


QWEN2 = {"normalizer": {"type": "NFC"}, "pre_tokenizers": _split(r"\p{N}")}
LLAMA3 = {"pre_tokenizers": _split(r"\p{N}{1,3}"), "ignore_merges": True, "add_bos": True}
PRE_TOKENIZERS: dict[str, Mapping[str, Any]] = {
    "gpt-2": {"pre_tokenizers": [_byte_level(True)]},
    "smollm": {"pre_tokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]},
    "qwen2": QWEN2,
    "llama-bpe": LLAMA3,
}


def load_tokenizer(file: GgufFile) -> Tokenizer | None:
    """The tokenizer of a file; None if it has none. InputError for one that is damaged or not supported.

    Its files lie in a temporary folder for as long as it lives.
    """
    if MODEL not in file.metadata and TOKENS not in file.metadata:
        return None
    content = {"tokenizer.json": _tokenizer(file), "tokenizer_config.json": _config(file)}
    try:
        folder = Path(tempfile.mkdtemp(prefix="deer_jax_tokenizer_"))
    except OSError as error:
        raise disk_error(error.filename or tempfile.gettempdir(), error) from None
    try:
        for name, values in content.items():
            write_file(folder / name, json_bytes(values))
        tokenizer = Tokenizer.load(folder, str(file.path))
        assert tokenizer is not None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(tokenizer, shutil.rmtree, folder, ignore_errors=True)
    return tokenizer


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    """The tokenizer.json."""
    where, metadata = file.path, file.metadata
    if metadata.get(MODEL) != "gpt2":
        raise InputError(f"{where}: tokenizer {shown(metadata.get(MODEL))} is not supported; supported: gpt2")
    pre = metadata.get(PRE)
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{where}: pre-tokenizer {shown(pre)} is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    said = PRE_TOKENIZERS[pre]
    tokens, merges = _texts(file, TOKENS), [merge.split(" ") for merge in _texts(file, MERGES)]
    kinds = metadata.get(KINDS, [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise InputError(f"{where}: {KINDS} must have an entry for each of the {len(tokens):,} tokens")
    if unknown := set(kinds) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        raise InputError(f"{where}: {KINDS}: kind {shown(min(unknown, key=str))} is not supported for gpt2")
    vocabulary: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != UNUSED and vocabulary.setdefault(token, number) != number:
            raise InputError(f"{where}: token {named(token)} stands twice, at {vocabulary[token]} and {number}")
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise InputError(f"{where}: {MERGES}: {shown(' '.join(merge))} is no merge of two tokens into one")
    bos = _special(file, "bos")
    add_bos = metadata.get(ADD_BOS, said.get("add_bos", False)) is True
    if add_bos and bos is None:
        raise InputError(f"{where}: {ADD_BOS} is true, but there is no tokenizer.ggml.bos_token_id")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": kind == CONTROL,
            }
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": said.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": said["pre_tokenizers"]},
        "post_processor": _opening(bos, vocabulary[bos]) if add_bos and bos is not None else None,
        "decoder": _byte_level(True) | {"add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": said.get("ignore_merges", False), "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip


def _opening(bos: str, number: int) -> dict[str, Any]:
    """The post-processor that puts this token before every text."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [number], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing", "single": [first, text], "pair": [first, text, *second], "special_tokens": special
    }  # fmt: skip


def _config(file: GgufFile) -> dict[str, Any]:
    """The tokenizer_config.json."""
    template = file.metadata.get(TEMPLATE)
    if not isinstance(template, str | None):
        raise InputError(f"{file.path}: {TEMPLATE} must be a text, got {shown(template)}")
    special = {ours: _special(file, theirs) for ours, theirs in SPECIAL.items()}
    values = {name: token for name, token in special.items() if token is not None}
    values |= {"chat_template": template} if template else {}
    # Of this class tokenizer.json is taken as it stands.
    return values | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def _texts(file: GgufFile, key: str) -> Sequence[str]:
    found = file.metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f"{file.path}: {key} is missing, or no list of texts; download the file again")
    return found


def _special(file: GgufFile, name: str) -> str | None:
    """The token that tokenizer.ggml.NAME_token_id names."""
    key = f"tokenizer.ggml.{name}_token_id"
    number, tokens = file.metadata.get(key), _texts(file, TOKENS)
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise InputError(f"{file.path}: {key} must be one of the {len(tokens):,} tokens, got {shown(number)}")
    return tokens[number]
