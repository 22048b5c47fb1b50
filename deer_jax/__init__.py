"""Diffusion-drafted speculative decoding in JAX: lossless, on device, trainable."""

from deer_jax.bench.curves import learning_curve
from deer_jax.bench.runner import bench
from deer_jax.checkpoints.drafters import load_drafter, save_drafter
from deer_jax.checkpoints.export import export
from deer_jax.checkpoints.load import load_target
from deer_jax.config import DrafterConfig
from deer_jax.decoding.answers import AnswersReport, answers
from deer_jax.decoding.decode import decode
from deer_jax.decoding.regenerate import Regeneration, regenerate
from deer_jax.decoding.state import DecodeResult, DecodeStats
from deer_jax.decoding.stream import stream, stream_blocks
from deer_jax.demo import demo_pair
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.protocol import Draft, Method, Row, Seen
from deer_jax.drafters.standalone import drafter_from_target
from deer_jax.errors import InputError, RunError
from deer_jax.models.target import Target
from deer_jax.sharding import make_mesh
from deer_jax.training.align import AlignReport, align
from deer_jax.training.pretrain import PretrainReport, pretrain

__all__ = [
    "AlignReport",
    "AnswersReport",
    "DecodeResult",
    "DecodeStats",
    "Draft",
    "Drafter",
    "DrafterConfig",
    "InputError",
    "Method",
    "PretrainReport",
    "Regeneration",
    "Row",
    "RunError",
    "Seen",
    "Target",
    "align",
    "answers",
    "bench",
    "decode",
    "demo_pair",
    "drafter_from_target",
    "export",
    "learning_curve",
    "load_drafter",
    "load_target",
    "make_mesh",
    "pretrain",
    "regenerate",
    "save_drafter",
    "stream",
    "stream_blocks",
]
