"""GGUF files: the very logits of the folder of the same values, and everything wrong with a file in one line."""

import dataclasses
import os
import struct
from typing import Any

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from deer_jax.checkpoints.drafters import load_drafter, named_target
from deer_jax.checkpoints.huggingface import read_bos_id
from deer_jax.checkpoints.load import load_target
from deer_jax.checkpoints.tapped import head_rows
from deer_jax.config import Rope
from deer_jax.errors import InputError
from deer_jax.sharding import make_mesh
from tests.gguf_files import model_pair, tiny_gguf, write_gguf
from tests.tiny import REAL

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


def refused(*words):
    """pytest.raises for an InputError of one line that contains the words, in this order."""
    rest = "[^\n]*"
    return pytest.raises(InputError, match=f"\\A{rest}{rest.join(words)}{rest}\\Z")


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.representative
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", REAL)
def test_a_file_gives_the_logits_of_the_folder_bit_for_bit(family, tied, tmp_path):
    config = tiny_gguf(family, tied=tied)
    file, folder = model_pair(tmp_path, config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12))
    for dtype in ("float32", "bfloat16"):
        one, other = load_target(file, dtype), load_target(folder, dtype)
        assert one.config == other.config == config
        assert_same(one, other)
        np.testing.assert_array_equal(one.logits(tokens), other.logits(tokens))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_quantisation_has_the_values_of_the_folder(kind, tmp_path):
    file, folder = model_pair(tmp_path, tiny_gguf("llama"), lambda key: Kind.F32 if "norm" in key else kind)
    assert_same(load_target(file), load_target(folder))


def test_stacked_layers_and_a_mesh(tmp_path):
    file, folder = model_pair(tmp_path, tiny_gguf("qwen3_moe"))
    mesh = make_mesh(fsdp=2, tensor=2)
    one, other = (load_target(each, mesh=mesh) for each in (file, folder))
    assert_same(one, other)
    assert one.params["embed"].sharding == other.params["embed"].sharding
    assert one.mesh == mesh


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        (Rope(theta=1e6, kind="linear", factor=4.0), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (
            Rope(theta=1e6, kind="yarn", factor=2.0, original_context=128),
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.original_context_length": 128,
            },
        ),
    ],
)
def test_scaled_rope(rope, metadata, tmp_path):
    metadata = {f"llama.{key}": value for key, value in metadata.items()}
    file, folder = model_pair(tmp_path, tiny_gguf("llama", rope=rope), metadata=metadata)
    assert load_target(file).config == load_target(folder).config


def llama3_factors(theta: float, width: int, factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them."""
    found = []
    for frequency in 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width):
        length = 2 * np.pi / frequency
        if length < 8192 / 4:
            found.append(1.0)
        elif length > 8192:
            found.append(factor)
        else:
            smooth = (8192 / length - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_llama_3_is_known_by_its_rope_factors(tmp_path):
    rope = Rope(theta=5e5, kind="llama3", factor=8.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    config = tiny_gguf("llama", rope=rope, head_width=32)
    factors = llama3_factors(5e5, 32, 8.0)
    assert len(set(factors.tolist())) > 2
    file, _ = model_pair(tmp_path, config, tensors={"rope_freqs.weight": (factors, Kind.F32)})
    assert load_target(file).config == config
    factors[0] = 2
    file, _ = model_pair(tmp_path / "other", config, tensors={"rope_freqs.weight": (factors, Kind.F32)})
    with refused("rope_freqs.weight", "not supported"):
        load_target(file)


def test_what_decides_the_answers_is_the_one_file(tmp_path):
    metadata = {
        "tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.bos_token_id": 1
    }  # fmt: skip
    file, _ = model_pair(tmp_path, tiny_gguf("llama"), metadata=metadata)
    target = load_target(file)
    assert [stamp.path for stamp in target.files] == [file]
    assert (target.stop_ids, read_bos_id(file), target.name, target.tokenizer) == ((5, 7), 1, "model.gguf", None)
    digest = target.digest()
    assert digest == load_target(file).digest()
    assert digest != dataclasses.replace(target, params=jax.tree.map(lambda x: x + 1, target.params)).digest()
    other, _ = model_pair(tmp_path / "other", tiny_gguf("llama"), metadata=metadata, seed=1)
    assert load_target(other).digest() != digest
    assert load_target(file.rename(tmp_path / "another name.gguf")).digest() == digest


def test_public_layouts_name_it_and_take_rows_of_its_head(tmp_path):
    file, folder = model_pair(tmp_path, tiny_gguf("qwen3", tied=False))
    target = load_target(file)
    assert named_target(target) == (str(file), target.config)
    np.testing.assert_array_equal(*(head_rows(each, target.config, (3, 5)) for each in (file, folder)))


def test_names_of_files(tmp_path, monkeypatch):
    file, _ = model_pair(tmp_path, tiny_gguf("llama"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_target("~/model.gguf").name == "model.gguf"
    monkeypatch.chdir(tmp_path)
    for name in ("none.gguf", "mine/none.gguf"):  # the hub is not asked
        with refused(f"{name}: no such file"):
            load_target(name)
    os.mkfifo("pipe.gguf")
    with refused("pipe.gguf: is no regular file"):
        load_target("pipe.gguf")
    with refused("is a file; name the folder"):
        load_drafter(file, target=load_target(file))


def test_a_file_on_a_store(bucket, tmp_path):
    file, folder = model_pair(tmp_path, tiny_gguf("llama"))
    bucket.put("models/model.gguf", file.read_bytes())
    assert_same(load_target(f"gs://{bucket.name}/models/model.gguf"), load_target(folder))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """A file without scaled rotary positions, untied; to be spoilt."""
    file, _ = model_pair(tmp_path_factory.mktemp("good"), tiny_gguf("llama", tied=False))
    return file.read_bytes()


def test_a_file_cut_anywhere_is_refused_in_one_line(good, tmp_path):
    file = tmp_path / "cut.gguf"
    for length in (*range(0, 2048, 37), *range(2048, len(good) - 1, 4099), len(good) - 1):
        file.write_bytes(good[:length])
        with refused("cut.gguf: "):
            load_target(file)


@pytest.mark.parametrize(
    ("place", "content", "words"),
    [
        (0, b"GGML", ["is no GGUF file"]),
        (4, struct.pack("<I", 1), ["version 1", "supported: 2 and 3"]),
        (4, struct.pack(">I", 3), ["big-endian"]),
        (8, struct.pack("<Q", 2**60), ["damaged or truncated", "tensors"]),
        (16, struct.pack("<Q", 2**60), ["damaged or truncated", "keys"]),
        (24, struct.pack("<Q", 2**40), ["damaged or truncated", "a text of"]),
    ],
)
def test_a_damaged_start(good, tmp_path, place, content, words):
    file = tmp_path / "model.gguf"
    file.write_bytes(good[:place] + content + good[place + len(content) :])
    with refused("model.gguf", *words):
        load_target(file)


def test_every_flipped_byte_of_the_header_is_one_line_or_harmless(good, tmp_path):
    file = tmp_path / "model.gguf"
    end = good.index(b"blk.1.")
    for place in np.random.default_rng(0).integers(0, end, 200):
        content = bytearray(good)
        content[place] ^= 0xFF
        file.write_bytes(content)
        found = []
        try:
            load_target(file)
        except InputError as error:  # anything else fails the test
            found.append(str(error))
        assert all("\n" not in line and "model.gguf" in line for line in found)


def test_huge_lists_are_not_believed(tmp_path):
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    for inner, count in ((0, 2**62), (8, 2**62), (6, 2**40), (9, 3), (99, 1)):
        file = tmp_path / "model.gguf"
        file.write_bytes(head + struct.pack("<IQ", inner, count) + bytes(64))
        with refused("damaged or truncated"):
            load_target(file)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.block_count": None}, ["llama.block_count is missing"]),
        ({"llama.attention.head_count": "four"}, ["llama.attention.head_count must be an integer"]),
        ({"llama.attention.head_count": 0}, ["heads"]),
        ({"llama.block_count": 4000}, ["its metadata says 4,000 layers"]),
        ({"llama.rope.scaling.type": "longrope"}, ["RoPE scaling 'longrope' is not supported"]),
        ({"llama.rope.dimension_count": 4}, ["rope.dimension_count 4 is not supported"]),
        ({"llama.expert_count": 8}, ["llama.expert_count = 8 is not supported"]),
        ({"llama.attention.sliding_window": 64}, ["llama.attention.sliding_window = 64 is not supported"]),
        ({"general.type": "adapter"}, ["'adapter', no model"]),
        ({"split.count": 3}, ["one of 3 parts", "--merge"]),
        ({"llama.vocab_size": 97}, ["do not fit its metadata", "token_embd.weight is \\[96, 32\\]"]),
        ({"llama.embedding_length": 64}, ["do not fit its metadata"]),
        ({"tokenizer.ggml.eos_token_id": "end"}, ["eos_token_id must be an id"]),
        ({"general.alignment": 24}, ["alignment"]),
    ],
)
def test_wrong_metadata(tmp_path, metadata, words):
    file, _ = model_pair(tmp_path, tiny_gguf("llama", tied=False), metadata=metadata)
    with refused("model.gguf", *words):
        load_target(file)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blk.1.ffn_up.weight": None}, ["1 missing", "missing: blk.1.ffn_up.weight"]),
        ({"blk.1.attn_q.bias": (np.zeros(32, np.float32), Kind.F32)}, ["1 unknown", "unknown: blk.1.attn_q.bias"]),
        ({"blk.0.ffn_up.weight": (np.zeros((32, 32), np.float32), Kind.F16)}, ["ffn_up.weight is \\[32, 32\\]"]),
        ({"blk.0.attn_k.weight": (np.zeros((9, 32), np.float32), Kind.F16)}, ["attn_k.weight", "2 heads"]),
    ],
)
def test_wrong_tensors(tmp_path, tensors, words):
    file, _ = model_pair(tmp_path, tiny_gguf("llama", tied=False), tensors=tensors)
    with refused("model.gguf", *words):
        load_target(file)


def test_other_architectures_are_refused_by_name(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", "mamba", {}, {"a": (np.zeros((2, 32), np.float32), Kind.F32)})
    with refused("architecture 'mamba' is not supported; supported: llama, qwen2, qwen3, qwen3moe"):
        load_target(file)


@pytest.mark.parametrize(("number", "name"), [(999, "999"), (Kind.Q8_K.value, "Q8_K"), (Kind.F64.value, "F64")])
def test_kinds_that_the_package_does_not_read_are_refused_by_name(good, tmp_path, number, name):
    tensor = b"blk.1.ffn_up.weight"
    place = good.index(tensor) + len(tensor) + 4 + 2 * 8
    file = tmp_path / "model.gguf"
    file.write_bytes(good[:place] + struct.pack("<I", number) + good[place + 4 :])
    with refused("blk.1.ffn_up.weight has the quantisation type", name, "which the package gguf does not read"):
        load_target(file)


def test_a_file_that_shrinks_while_it_is_read(good, tmp_path, monkeypatch):
    from deer_jax.checkpoints import huggingface
    from deer_jax.errors import RunError

    file = tmp_path / "model.gguf"
    file.write_bytes(good)
    check: Any = huggingface.check_headers

    def shrinking(*arguments, **options):
        check(*arguments, **options)
        os.truncate(file, len(good) // 2)

    monkeypatch.setattr(huggingface, "check_headers", shrinking)
    with pytest.raises((RunError, InputError), match=r"\A[^\n]*model.gguf[^\n]*\Z"):
        load_target(file)


def test_the_published_file_is_the_folder_made_from_it(smollm2):
    one, other = (load_target(each, "bfloat16") for each in smollm2)
    assert_same(one, other)
    assert one.config == other.config
    assert one.stop_ids == other.stop_ids
