"""A target: configuration, parameters, tokenizer and stop ids, ready to decode."""

import dataclasses
import datetime
import functools
import hashlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deer_jax import processes
from deer_jax.build import Build
from deer_jax.config import ModelConfig
from deer_jax.digests import Digests, Stamp, combined
from deer_jax.errors import InputError, shown
from deer_jax.models.transformer import Params, bind, in_two_ways, is_stacked
from deer_jax.sharding import batch_ways, on_mesh


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params: Params, tokens, config: ModelConfig):
    """float32 [B, T, V]: causal logits of tokens int [B, T], without a cache."""
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return model.logits(model(model.lookup(tokens), positions).hidden)


def check_tokens(tokens, vocab_size: int) -> np.ndarray:
    """tokens as int32 [B, T], refused where empty or outside the vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"tokens must be integers [B, T], got {tokens.dtype} of shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InputError(f"token id {wrong} is outside the vocabulary of {vocab_size} (0..{vocab_size - 1})")
    return tokens.astype(np.int32)


def check_target(target: Any) -> None:
    """InputError for what is no target, such as the name of one."""
    if not isinstance(target, Target):
        raise InputError(f"target must be a loaded one, as in load_target({shown(target)}), got {shown(target)}")


def params_digests(params: Params) -> dict[str, str]:
    """SHA-256 of every parameter, by its path; one at a time comes to the host."""
    return {
        jax.tree_util.keystr(path): hashlib.sha256(
            np.ascontiguousarray(processes.fetch(x)).view(np.uint8).data
        ).hexdigest()
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


def references(params: Params, tokenizer: Any) -> tuple[weakref.ReferenceType, ...]:
    """The arrays and the tokenizer of a target, to be known again without being kept alive."""
    return tuple(weakref.ref(part) for part in _parts(params, tokenizer))


def _parts(params: Params, tokenizer: Any) -> list[Any]:
    return [*jax.tree.leaves(params), *([] if tokenizer is None else [tokenizer])]


class Tokenizer(Protocol):
    """What decoding needs of a tokenizer; `data.tokenizer.Tokenizer` is the one for Hugging Face folders."""

    def encode(self, text: str) -> list[int]: ...
    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, now: datetime.datetime | None = None, **template_arguments: Any
    ) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def settled(self, ids: Sequence[int]) -> int:
        """How many leading ids have a text that later ids cannot change, but for an incomplete last character."""
        ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Target:
    """An autoregressive model whose output is to be reproduced.

    Attributes:
      params: see `models.transformer`; their dtype is the compute dtype.
      tokenizer: None serves token ids only.
      stop_ids: generation ends with the first of these.
      name: where it came from.
      mesh: the devices its parameters lie on; None is the default device.
      build: how programs are made for these devices.
      files: what of its folder decides its answers, as it was when it was loaded; () for one made in memory.
      digests: of these files.
      loaded: what came from these files (`references`); a target with other weights or tokenizer is one made in memory.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None
    stop_ids: tuple[int, ...] = ()
    name: str = "target"
    mesh: Mesh | None = None
    build: Build = dataclasses.field(default_factory=Build.here)
    files: tuple[Stamp, ...] = ()
    digests: Digests = dataclasses.field(default_factory=Digests)
    loaded: tuple[weakref.ReferenceType, ...] = ()

    def __repr__(self) -> str:
        return f"Target({self.name}: {self.config.described()}, {self.dtype.name})"

    @property
    def dtype(self) -> jnp.dtype:
        """Of the parameters and the computation."""
        return self.params["embed"].dtype

    @property
    def devices(self) -> list[jax.Device]:
        """Those that its parameters lie on."""
        return sorted(self.params["embed"].devices(), key=lambda device: device.id)

    @functools.cached_property
    def two_ways(self) -> Params:
        """The parameters for passes over a few rows on a CPU, see `layers.TwoWays`: as large again, made when first
        asked for."""
        return in_two_ways(self.params, "embed" if self.config.tied else "head")

    def digest(self) -> str:
        """SHA-256, hexadecimal, of all that decides its answers: weights, configuration, stop ids, tokenizer, dtype.

        Of files by their content, without their folder's name, or any name where one file is all there is; of a target
        made in memory by its parameters and the files of its tokenizer. Raises RunError if a file was changed since it
        was loaded.
        """
        parts: dict[str, Any] = {"dtype": self.dtype.name, "stop_ids": list(self.stop_ids), "config": self.config}
        if self._is_as_loaded():
            for stamp in self.files:
                self.digests.begin(stamp)
            one = len(self.files) == 1
            parts |= {"file" if one else f"file {stamp.path.name}": self.digests.of(stamp) for stamp in self.files}
        else:
            parts |= params_digests(self.params)
            digest = getattr(self.tokenizer, "digest", None)
            parts["tokenizer"] = type(self.tokenizer).__name__ if digest is None else digest()
        return combined(parts)

    def _is_as_loaded(self) -> bool:
        now = _parts(self.params, self.tokenizer)
        return len(self.loaded) == len(now) and all(
            reference() is part for reference, part in zip(self.loaded, now, strict=True)
        )

    def logits(self, tokens) -> jax.Array:
        """float32 [B, T, V] of tokens int [B, T]: one full forward, for checks and research."""
        tokens = check_tokens(tokens, self.config.vocab_size)
        rows = len(tokens)
        with on_mesh(self.mesh):
            tokens = np.pad(tokens, ((0, -rows % batch_ways(self.mesh)), (0, 0)))
            return full_logits(self.params, tokens, self.config)[:rows]


def chosen_layers(target: Target, layers: Sequence[int]) -> Params:
    """The weights of some layers of a target, without experts, stacked in this order."""
    wrong = [i for i in layers if not 0 <= i < target.config.layers]
    if wrong or not layers:
        raise InputError(f"layers {list(layers)}: the target has layers 0..{target.config.layers - 1}")
    own = target.params["layers"]
    if is_stacked(target.params):
        return {name: w[np.array(layers)] for name, w in own.items()}
    return {name: jnp.stack([own[i][name] for i in layers]) for name in own[layers[0]]}
