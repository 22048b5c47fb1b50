"""Is it right on this device? Exactness tests, near-ties in bfloat16, and what the decode loop may not do.

The tests are those of tests/decoding that are marked `accelerator`, in float32 with products at highest precision.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from results import Results
from shapes import shape_of

from deer_jax import Target, decode
from deer_jax.build import Build
from deer_jax.config import Sampling
from deer_jax.decoding import loop
from deer_jax.decoding.agreement import compare_greedy
from deer_jax.decoding.programs import compiled
from deer_jax.decoding.sampling import Kind, Knobs
from deer_jax.decoding.state import StateShape, abstract_state
from deer_jax.drafters.conditioned import ConditionedReading, conditioned_drafter
from deer_jax.models.transformer import abstract_params, init_params
from deer_jax.planning.hlo import Memory

ROOT = Path(__file__).resolve().parents[2]
K, NEW = 8, 64
COPY = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* (?:copy|copy-start)\(")
NUMBER_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4}  # what caches are made of, and what might be


def run(results: Results, args: Any, deadline: float) -> None:
    """The whole phase."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the tests need memory beside this process; read by jax now
    target = random_target(args.tiny)
    near_ties(results, target, args.tiny)
    copies(results, args.tiny)
    exactness_tests(results, args.tiny, deadline)


def random_target(tiny: bool) -> Target:
    """In bfloat16, its weights those that training would begin with."""
    config = shape_of("8b", tiny=True)
    if not tiny:
        config = type(config)(**{**vars(config), "width": 512, "mlp_width": 1536, "head_width": 64, "layers": 8,
                                 "heads": 8, "vocab_size": 4096, "context": 2048})  # fmt: skip
    return Target(config=config, params=init_params(config, 0, jnp.bfloat16), build=Build.of("gpu"), name="random")


def near_ties(results: Results, target: Target, tiny: bool) -> None:
    """Greedy answers with a drafter against plain ones, in bfloat16; and the fetches of a decode."""
    count, new, V = (2, 8, target.config.vocab_size) if tiny else (16, NEW, target.config.vocab_size)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V - 1, 20).tolist() for _ in range(count)]
    taps = (1, target.config.layers - 2)
    drafter = conditioned_drafter(target, ConditionedReading(taps=taps, mask=V - 1, draft_length=K), layers=1)
    plain = decode(target, prompts, max_new_tokens=new, batch_size=count)
    drafted = decode(target, prompts, drafter=drafter, max_new_tokens=new, batch_size=count)
    found = compare_greedy(target, prompts, plain.tokens, drafted.tokens, k=K, batch=count)
    mistakes = len(found.departures) - found.near_ties
    results.add(
        f"bfloat16, {count} greedy answers of {new} tokens against plain decoding",
        {"mistakes": mistakes, "near-ties": found.near_ties, "same tokens": found.same_tokens},
        {"mistakes": 0}, "a departure has to be a near-tie of the target's two best logits",
    )  # fmt: skip
    results.add(
        "fetches of a decode whose prompts all have a slot", {"plain": plain.stats.fetches, "k": drafted.stats.fetches},
        {"plain": 1, "k": 1}, "one per segment, and there is one segment",
    )  # fmt: skip
    if mistakes:
        raise SystemExit(f"{mistakes} departures from plain decoding are no near-ties")


def copies(results: Results, tiny: bool) -> None:
    """Of the compiled loop: copies as large as a cache, what it holds besides, and what it does not update in place."""
    config, build = shape_of("8b", tiny), Build.of("gpu")
    shape = StateShape(config, None, 2 if tiny else 4, 512 if tiny else 4096, K, build)
    state = abstract_state(shape, {}, {})
    number = jax.ShapeDtypeStruct((), jnp.int32)
    weights = loop.Weights(abstract_params(config, build.dtype), {}, {})
    knobs = jax.eval_shape(lambda: Knobs.of(Sampling(), 0))
    plan = loop.Plan(config, None, 0, Kind.of(Sampling()))
    args = (state, weights, knobs, jax.ShapeDtypeStruct((2,), jnp.int32), number, number)
    program, _ = compiled(loop.run_segment, (plan,), *args)
    cache = state.cache.keys.size * state.cache.keys.dtype.itemsize
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n], initial=NUMBER_BYTES.get(kind, 1)))
        for kind, dims in COPY.findall(program.as_text())
    ]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    results.add(
        f"plain loop of the 8b target, keys of {cache / 1e6:,.4g} MB",
        {"copies of that size": sum(size >= cache for size in sizes),
         "not updated in place, MB": max(0, held - Memory.of(program).aliased) / 1e6},
        {"copies of that size": 0, "not updated in place, MB": 0.0},
        "the state is donated, and every array of it is written where it lies",
    )  # fmt: skip


def exactness_tests(results: Results, tiny: bool, deadline: float) -> None:
    """The marked tests, on the platform of this process, as far as the time goes."""
    which = ["tests/decoding", "-m", "accelerator and representative"]
    if tiny:
        which = ["tests/decoding/test_greedy.py::test_the_grid_covers_every_pair"]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-v", *which]
    platform = os.environ.get("JAX_PLATFORMS") or {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    environment = os.environ | {"DEER_JAX_TEST_PLATFORM": platform, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # fmt: skip
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic() - 3))
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    print(said, flush=True)
    outcomes = re.findall(r"^(tests/\S+).* (PASSED|FAILED|ERROR|SKIPPED)", said, re.MULTILINE)
    total = re.search(r"/ (\d+) selected", said) or re.search(r"collected (\d+)", said)
    passed = sum(outcome == "PASSED" for _, outcome in outcomes)
    failed = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    count = int(total[1]) if total else 0
    results.add(
        f"exactness tests on {platform}",
        {"passed": passed, "failed": len(failed), "seconds": time.perf_counter() - begin},
        {"passed": count, "failed": 0}, "greedy answers equal plain decoding's, samples have the target's distribution",
    )  # fmt: skip
    if failed or not passed:
        raise SystemExit(f"of {count} exactness tests {passed} passed: {', '.join(failed) or said.strip()[-200:]}")
