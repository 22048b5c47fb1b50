"""Shapes and compiled programs: sizes on a coarse grid, and each program compiled once and kept."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from deer_jax.build import compiling

PREFILL_CHUNK = 512  # prompt tokens one pass reads per row; longer prompts take several
STATE = 0  # the place, among a program's arguments that are not static, of what it changes and returns
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


def compiled(function, static: tuple, *args, formats: Any = None, **options) -> tuple[Any, float]:
    """The program of a jitted function, static arguments first, and the seconds it took to compile: 0 for one that is
    kept, by what is static and by shapes. All engines of the process share them.

    formats: how the state, args[STATE], lies in memory when the program takes it and when it returns it: a `Format` for
    each of its arrays, or Layout.AUTO, as suits this program best (see `formats_of`). None: as arrays lie by default.
    """
    leaves, tree = jax.tree.flatten(args)
    places = tuple((x.shape, x.dtype, x.sharding) for x in leaves)
    key = (function, static, tree, places, tuple(jax.tree.leaves(formats)), *options.items())
    program, seconds = _compiled.pop(key, None), 0.0
    if program is None:
        begin = time.perf_counter()
        with compiling():
            if formats is None:
                lowered = function.lower(*static, *args, **options)
            else:
                lowered = _in_formats(functools.partial(function, *static, **options), args, formats)
            program = lowered.compile()
        seconds = time.perf_counter() - begin
    _compiled[key] = program
    if len(_compiled) > PROGRAMS:
        del _compiled[next(iter(_compiled))]
    return program, seconds


def _in_formats(function, args: tuple, formats: Any):
    """A function of arguments that are not static, lowered with its state in these formats."""
    state = args[STATE]
    if formats is Layout.AUTO:  # asked of shapes, as arrays already lie somehow
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        args = (*args[:STATE], state, *args[STATE + 1 :])
        formats = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), state)
    # Of the caches alone: what is small may be copied, and lies by default for whoever else reads it.
    formats = jax.tree.map(lambda x, form: form if x.ndim > 2 else None, state, formats)
    before = tuple(formats if place == STATE else None for place in range(len(args)))
    return jax.jit(function, donate_argnums=STATE, in_shardings=before, out_shardings=formats).lower(*args)


def formats_of(program: Any) -> Any:
    """How a program takes its state, and returns it: a `Format` for each of its arrays."""
    return program.input_formats[0][STATE]
