"""Configurations refuse values of a wrong type or range in one line."""

import numpy as np
import pytest

from deer_jax.config import DrafterConfig, ModelConfig, Rope, Sampling
from deer_jax.errors import InputError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("draft_length", 2.0),
        ("draft_length", True),
        ("draft_length", "4"),
        ("draft_length", 4097),
        ("draft_length", 10**400),
        ("attention", ["block_causal"]),
        ("head", None),
        ("differing_ids", (2**31,)),
        ("differing_ids", tuple(range(2000))),
        ("separator", 1),
        ("separator", "false"),
        ("differing_ids", [4]),
        ("differing_ids", None),
        ("differing_ids", (4, -1)),
        ("differing_ids", (True,)),
    ],
)
def test_drafter_fields_are_checked(field, value):
    with pytest.raises(InputError, match=rf"\A{field} must be [^\n]*\Z"):
        DrafterConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-7),
        ("temperature", 1e300),
        ("temperature", 10**400),
        ("draft_temperature", "hot"),
        ("draft_temperature", 1e-7),
        ("top_p", "all"),
        ("top_p", None),
        ("top_k", 1.0),
        ("top_k", True),
        ("top_k", 2**31),
    ],
)
def test_sampling_fields_are_checked(field, value):
    with pytest.raises(InputError, match=rf"\A{field} [^\n]*\Z"):
        Sampling(**{field: value})


def test_sampling_takes_the_limits_and_numpy_numbers():
    assert Sampling(temperature=1e-6, draft_temperature=0, top_k=2**31 - 1).top_k == 2**31 - 1
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3


SHAPE = {
    "family": "llama", "vocab_size": 96, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8,
    "mlp_width": 48, "context": 256,
}  # fmt: skip
COUNTS = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "context")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in COUNTS for value in (0, -1, 2.0, True, "4", None, 2**31, 10**400)),
        *((name, value) for name in ("experts", "experts_per_token", "expert_width") for value in (-1, 1.0, 10**9)),
        *(("norm_eps", value) for value in (0, -1, 0.2, 1e30, float("nan"), float("inf"), "1e-6", None, True, 10**400)),
        *((name, 1) for name in ("tied", "qkv_bias", "qk_norm", "normalise_router")),
        ("family", "gpt2"),
        ("family", ["llama"]),
        ("rope", {"theta": 10000.0}),
    ],
)
def test_shapes_are_checked(field, value):
    with pytest.raises(InputError, match=rf"\A{field} [^\n]{{1,300}}\Z"):
        ModelConfig(**(SHAPE | {field: value}))


def test_shapes_fit_together():
    for changes, message in (
        ({"heads": 3}, "heads"),
        ({"head_width": 7}, "head_width must be even"),
        ({"experts": 2, "experts_per_token": 3, "expert_width": 4}, "experts_per_token must be in 1..2"),
        ({"experts": 2, "experts_per_token": 1}, "expert_width must be at least 1"),
    ):
        with pytest.raises(InputError, match=rf"\A{message}[^\n]*\Z"):
            ModelConfig(**(SHAPE | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("theta", value) for value in (0.5, 1e-30, -1, 1e16, float("nan"), float("inf"), "x", True)),
        *(("factor", value) for value in (0, 0.5, -2.0, 1e30, float("nan"), None)),
        *(("original_context", value) for value in (0, -1, 2**31, 1.5)),
        *((name, value) for name in ("low_freq_factor", "beta_slow") for value in (0, -1.0, 100.0, float("nan"))),
        *((name, value) for name in ("high_freq_factor", "beta_fast") for value in (0, 0.5, float("inf"))),
        *(("attention_factor", value) for value in (0, -1, float("nan"), "x")),
        *((name, value) for name in ("mscale", "mscale_all_dim") for value in (-0.1, float("inf"), 1e30)),
        ("truncate", "no"),
        ("kind", "longrope"),
    ],
)
def test_rotary_positions_are_checked(field, value):
    for kind in ("llama3", "yarn"):
        with pytest.raises(InputError, match=rf"\ARoPE [^\n]*{field}[^\n]*\Z"):
            Rope(**({"kind": kind, "original_context": 32} | {field: value}))


def test_rotary_positions_take_what_is_published():
    Rope(theta=1, kind="linear", factor=1)
    Rope(theta=1e15, kind="llama3", factor=32.0, original_context=8192)
    Rope(theta=5e6, kind="yarn", factor=40, original_context=4096, mscale=1.0, mscale_all_dim=0, attention_factor=0.5)
