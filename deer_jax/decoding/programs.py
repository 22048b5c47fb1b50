"""Shapes and compiled programs: sizes on a coarse grid, and each program compiled once and kept."""

import time
from collections.abc import Sequence
from typing import Any

import jax

PREFILL_CHUNK = 512  # prompt tokens one pass reads per row; longer prompts take several
PROGRAMS = 128  # compiled programs that are kept: each holds memory maps, of which a process has a limited number


def bucket(n: int, least: int) -> int:
    """The smallest size >= n on a grid of four steps per doubling, from `least` on: few shapes, little waste."""
    size = least
    while 2 * size < n:
        size *= 2
    step = max(size // 4, 1)
    return size if n <= size else size + -(-(n - size) // step) * step


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two >= n and >= least."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def prefill_chunks(count: int) -> list[tuple[int, int]]:
    """Start and padded width of the passes that read `count` prompt tokens.

    600 -> [(0, 512), (512, 128)]
    """
    chunks = []
    for start in range(0, count, PREFILL_CHUNK):
        rest = count - start
        chunks.append((start, PREFILL_CHUNK if rest >= PREFILL_CHUNK else power_of_two(rest, 16)))
    return chunks


def capacity_for(limits: Sequence[int], k: int) -> int:
    """Slots of cache per row that hold every answer's last block; limits are those of `Engine.admit`."""
    return bucket(max(limits) + k + 1, 64)


_compiled: dict[Any, Any] = {}  # the programs used last come last


def compiled(function, static: tuple, *args, **options) -> tuple[Any, float]:
    """The program of a jitted function, static arguments first, and the seconds it took to compile: 0 for one that is
    kept, by what is static and by shapes. All engines of the process share them."""
    leaves, tree = jax.tree.flatten(args)
    key = (function, static, tree, tuple((x.shape, x.dtype, x.sharding) for x in leaves), *options.items())
    program, seconds = _compiled.pop(key, None), 0.0
    if program is None:
        begin = time.perf_counter()
        program = function.lower(*static, *args, **options).compile()
        seconds = time.perf_counter() - begin
    _compiled[key] = program
    if len(_compiled) > PROGRAMS:
        del _compiled[next(iter(_compiled))]
    return program, seconds
