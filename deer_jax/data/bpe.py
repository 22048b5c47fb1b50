"""A byte-level BPE tokenizer from text, as a Hugging Face folder has it."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from deer_jax.errors import InputError
from deer_jax.files import write_file
from deer_jax.formats import json_bytes

EDGE = "<|endoftext|>"  # opens every text and ends every document; id 0
LEAST = 257  # every byte and the edge


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Learn merges from the texts and write tokenizer.json and tokenizer_config.json into the folder.

    The ids are EDGE, the 256 bytes, then the merges by their rank. Any text can be encoded, and decodes to itself.
    """
    if vocab_size < LEAST:
        raise InputError(f"vocab_size must be at least {LEAST}, one entry for each byte and {EDGE}, got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyrefly: ignore
    trainer = trainers.BpeTrainer(  # pyrefly: ignore
        vocab_size=vocab_size, special_tokens=[EDGE], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyrefly: ignore
        single=f"{EDGE} $A", pair=f"{EDGE} $A {EDGE} $B", special_tokens=[(EDGE, 0)]
    )
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EDGE, "eos_token": EDGE}
    config |= {"split_special_tokens": True}  # a text that spells EDGE out does not end there
    write_file(folder / "tokenizer_config.json", json_bytes(config, indent=2))
