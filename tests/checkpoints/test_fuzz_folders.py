"""Model folders with mistakes of every kind: they load, or are refused in one line, at once and without much memory."""

import copy
import json
import os
import random
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

import deer_jax
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.errors import InputError, RunError
from deer_jax.models.layers import inverse_frequencies
from deer_jax.models.target import Target
from tests.tiny import random_params, tiny

GOLDEN = Path(__file__).parent.parent / "drafters" / "golden"
DEEP = "DEEP"  # stands for a nesting that json.dumps refuses to write
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**31 - 1, 2**53, 10**9, 10**400, -(10**30), 0.0, -0.0, 0.5, 1e-30, 1e30,
    -1e30, 1.7e308, 3e-324, float("nan"), float("inf"), float("-inf"), "", "x", "no", "1", "a\nb", "\ud800", "é" * 2000,
    [], [1], [[1]], ["LlamaForCausalLM"], [None], [True], {}, {"a": 1}, {"rope_type": "yarn"}, [2**31], [-1], [{}],
    DEEP,
]  # fmt: skip


def mutated(rng: random.Random, values: dict, absent: list[str]) -> dict:
    """The values with one to three keys changed, dropped or added, at any depth."""
    values = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        home = values
        inner = [value for value in values.values() if isinstance(value, dict) and value]
        if inner and rng.random() < 0.4:
            home = rng.choice(inner)
        key = rng.choice([*home, *absent]) if home is values else rng.choice(list(home) or [""])
        if rng.random() < 0.1:
            home.pop(key, None)
        else:
            home[key] = rng.choice(VALUES)
    return values


def written(values: dict) -> bytes:
    text = json.dumps(values).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
    return text.encode(errors="surrogatepass")


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The bytes cut, with bits flipped, or with a piece replaced."""
    changed = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(changed[: rng.randrange(len(changed))])
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed)) if kind == 1 else rng.randrange(min(400, len(changed)))
        changed[at] ^= 1 << rng.randrange(8)
    if kind == 3:
        at = rng.randrange(min(200, len(changed)))
        changed[at:at] = rng.choice([b"\xff" * 9, b"[" * 300, b"9" * 40, b"\x00", b'"', b"null", b",,"])
    return bytes(changed)


def outcome(what: str, load) -> bool:
    """Whether it loads; anything but a clean refusal fails with the case."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except (InputError, RunError) as error:
        line = str(error)
        assert "\n" not in line, what
        assert len(line) < 1000, f"{what}: {line}"
        line.encode()
        return False
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}"[:5000]) from error
    return True


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target in several files, one of experts, and a drafter of the first."""
    root = tmp_path_factory.mktemp("fuzz")
    for family, most in (("llama", 6e3), ("qwen3_moe", 5e9)):
        config = tiny(family, width=16, mlp_width=24, vocab_size=32, heads=2, kv_heads=1, head_width=8)
        save_folder(root / family, config, random_params(config), stop_ids=[5], bos_id=1, max_shard_bytes=most)
    drafter = deer_jax.load_drafter("from-target:0", target=deer_jax.load_target(root / "llama"))
    deer_jax.save_drafter(root / "drafter", drafter)
    return root


@pytest.fixture(scope="module")
def target(folders):
    return deer_jax.load_target(folders / "llama")


def turning(folder):
    """The target, whose positions turn by finite angles whatever its configuration says."""
    config = deer_jax.load_target(folder).config
    frequencies, factor = inverse_frequencies(config.rope, config.head_width)
    assert np.isfinite(frequencies).all()
    assert 0 < factor < 1000


def test_configurations(folders, tmp_path):
    absent = [
        "quantization_config", "layer_types", "partial_rotary_factor", "original_max_position_embeddings", "deer_jax",
        "num_local_experts", "no_such_key", "sliding_window", "max_window_layers", "mlp_only_layers",
    ]  # fmt: skip
    loaded = 0
    for family in ("llama", "qwen3_moe"):
        folder = shutil.copytree(folders / family, tmp_path / family)
        good = json.loads((folder / "config.json").read_text())
        kinds = {
            "linear": {"rope_type": "linear", "factor": 2.0},
            "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32,
                       "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
                     "beta_slow": 1.0, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5,
                     "truncate": True},
        }  # fmt: skip
        for seed in range(300):
            rng = random.Random(seed)
            values = mutated(rng, good | {"rope_scaling": kinds[rng.choice(list(kinds))]}, absent)
            (folder / "config.json").write_bytes(written(values))
            loaded += outcome(f"{family}, seed {seed}: {values}", lambda folder=folder: turning(folder))
    assert loaded  # some changes are none


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_damaged_texts(folders, tmp_path, name):
    folder = shutil.copytree(folders / "llama", tmp_path / "llama")
    good = (folder / name).read_bytes()
    for seed in range(100):
        content = damaged(random.Random(seed), good)
        (folder / name).write_bytes(content)
        outcome(f"{name}, seed {seed}: {content!r}", lambda: deer_jax.load_target(folder))


def test_generation_configurations_and_indices(folders, tmp_path):
    folder = shutil.copytree(folders / "llama", tmp_path / "llama")
    for name in ("generation_config.json", "model.safetensors.index.json"):
        good = (folder / name).read_bytes()
        for seed in range(150):
            values = mutated(random.Random(seed), json.loads(good), ["eos_token_id"])
            (folder / name).write_bytes(written(values))
            outcome(f"{name}, seed {seed}: {values}", lambda: deer_jax.load_target(folder))
        (folder / name).write_bytes(good)


def test_weights(folders, tmp_path):
    folder = shutil.copytree(folders / "llama", tmp_path / "llama")
    files = sorted(folder.glob("*.safetensors"))
    contents = {file: file.read_bytes() for file in files}
    for seed in range(250):
        rng = random.Random(seed)
        file = rng.choice(files)
        content = damaged(rng, contents[file])
        if rng.random() < 0.3:  # a length of the header that cannot be
            length = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(content), len(content) - 8])
            content = struct.pack("<Q", length) + contents[file][8:]
        file.write_bytes(content)
        outcome(f"{file.name}, seed {seed}: {content[:600]!r}", lambda: deer_jax.load_target(folder))
        file.write_bytes(contents[file])


def test_headers_of_weights(folders, tmp_path):
    folder = shutil.copytree(folders / "llama", tmp_path / "llama")
    file = sorted(folder.glob("*.safetensors"))[0]
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    good, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for seed in range(250):
        values = mutated(random.Random(seed), good, ["model.norm.weight", "new", "x" * 3000, "a\nb"])
        for each in values.values():
            if isinstance(each, dict) and random.Random(seed).random() < 0.2:
                each["shape"] = [2**31, 2**33]
        header = written(values)
        file.write_bytes(struct.pack("<Q", len(header)) + header + data)
        outcome(f"seed {seed}: {values}", lambda: deer_jax.load_target(folder))


def test_sections_of_drafters(folders, target, tmp_path):
    folder = shutil.copytree(folders / "drafter", tmp_path / "drafter")
    good = json.loads((folder / "config.json").read_text())
    for seed in range(150):
        rng = random.Random(seed)
        section = mutated(rng, good["deer_jax"], ["new", "draft_head", "a\nb", "y" * 3000])
        values = good | {"deer_jax": section if rng.random() < 0.9 else rng.choice(VALUES)}
        (folder / "config.json").write_bytes(written(values))
        outcome(f"seed {seed}: {values['deer_jax']}", lambda: deer_jax.load_drafter(folder, target=target))


@pytest.mark.parametrize("case", ["zlab-dflash2", "zlab-dflash-sliding", "speculators-dspark-gated", "ours"])
def test_configurations_of_conditioned_drafters(tmp_path, case):
    config = tiny("qwen3", vocab_size=64, layers=8, mlp_width=16)
    target = Target(config=config, params=random_params(config, scan=False))
    source = GOLDEN / ("speculators-dspark-gated" if case == "ours" else case)
    folder = shutil.copytree(source, tmp_path / "drafter")
    if case == "ours":
        deer_jax.save_drafter(tmp_path / "ours", deer_jax.load_drafter(source, target=target))
        folder = tmp_path / "ours"
    good = json.loads((folder / "config.json").read_text())
    absent = [
        "architectures", "is_causal", "max_window_layers", "block_size", "num_target_layers", "rope_theta",
        "rope_scaling", "quantization_config", "model_type", "conv_kernel_size", "a\nb", "speculators_model_type",
    ]  # fmt: skip
    loaded = 0
    for seed in range(150):
        rng = random.Random(seed)
        values = mutated(rng, good, absent)
        if case == "ours" and rng.random() < 0.6:
            values = good | {"deer_jax": mutated(rng, good["deer_jax"], ["new", "ids", "head"])}
        (folder / "config.json").write_bytes(written(values))
        what = f"{case}, seed {seed}: {values}"
        loaded += outcome(what, lambda: deer_jax.load_drafter(folder, target=target))
    assert loaded  # some changes are none


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "merges.txt", "chat_template.jinja"]
)  # fmt: skip
def test_what_is_no_file_is_never_waited_for(folders, target, tmp_path, name):
    folder = shutil.copytree(folders / "drafter", tmp_path / "drafter")
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        for load in (deer_jax.load_target, lambda folder: deer_jax.load_drafter(folder, target=target)):
            with pytest.raises(InputError, match=rf"\A[^\n]*{name}: (is|cannot be read)[^\n]*\Z"):
                load(folder)
        if (folder / name).is_dir():
            (folder / name).rmdir()
