"""The same steps and the same decoding on any mesh: what the suite and `benchmarks/mesh_grid.py` compare."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import deer_jax
from deer_jax import DrafterConfig, Target, drafter_from_target
from deer_jax.build import Build
from deer_jax.checkpoints.drafters import place_drafter
from deer_jax.diffusion.corruption import Corruption, corrupt_blocks, corrupt_cut
from deer_jax.models.transformer import logical_axes, unstack_layers
from deer_jax.sharding import batch_placement, make_mesh, on_mesh, placements
from deer_jax.training.objectives import CROSS_ENTROPY, Objective, drafter_loss
from deer_jax.training.step import OptimizerConfig, init_state, make_step
from tests.tiny import random_params, tiny

T, W, BATCH = 24, 4, 8
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup=3, weight_decay=0.1, ema=0.9)
SCANNED = dataclasses.replace(Build.of("cpu"), scan=True, remat="layers")  # the layout of accelerators, in float32


def model_of(family: str):
    """Sizes that eight devices divide: 4 key heads of 2 query heads each; a dense model or a mixture of experts."""
    changes: dict[str, Any] = {"heads": 8, "kv_heads": 4, "mlp_width": 64}
    return tiny(family, **changes, **({"experts": 8} if family == "qwen3_moe" else {}))


def made(family: str, mesh: Mesh | None, *, scan: bool) -> Target:
    """A random target on a mesh, with the same values on each."""
    config, build = model_of(family), dataclasses.replace(SCANNED, scan=scan)
    params, axes = random_params(config, 5), logical_axes(config)
    if mesh is not None:
        params = jax.device_put(params, placements(mesh, params, axes))
    return Target(
        config=config, params=params if scan else unstack_layers(params, config.layers), mesh=mesh, build=build
    )


def batches(stage: str, attention: str, count: int):
    """Micro-batches [1, BATCH, ...] of corrupted random texts."""
    rng = np.random.default_rng(0)
    settings = Corruption(stage=stage, width=W, blocks=3, alpha=1.1)
    for _ in range(count):
        rows = []
        for _ in range(BATCH):
            tokens, prompt, length = rng.integers(0, 96, T).astype(np.int32), *sorted(rng.integers(2, T - 1, 2))
            length += 2
            if attention == "bidirectional":
                cut = corrupt_cut(int(prompt), int(length), settings, 0.5, rng)._asdict()
                rows.append({"tokens": tokens} | cut | {
                    name: np.pad(cut[name], (0, T - length)) for name in ("masked", "weight")})  # fmt: skip
            else:
                blocks = corrupt_blocks(int(prompt), int(length), settings, rng)
                text_weight = np.pad(blocks.text_weight, (0, T - length))
                rows.append({"tokens": tokens} | blocks._replace(text_weight=text_weight)._asdict())
        yield {name: np.stack([row[name] for row in rows])[None] for name in rows[0]}


def begun(family: str, mesh: Mesh, attention: str, labels: str, steps: int):
    """A drafter, its first state on the mesh, the step, and what the step's loss is given of the target."""
    target = made(family, mesh, scan=True)
    drafter = drafter_from_target(target, DrafterConfig(attention=attention, draft_length=W))
    taught = labels == "target"
    objective = Objective(ce=0, kl=1) if taught else CROSS_ENTROPY
    loss = drafter_loss(drafter.method, target.config, objective, remat=SCANNED.remat)
    state = init_state(place_drafter(drafter, mesh), OPTIMIZER, steps)
    where = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(loss, OPTIMIZER, steps, build=SCANNED, shardings=where)
    return drafter, state, step, {"target": target.params} if taught else {}


def placed(batch, mesh: Mesh):
    return {name: jax.device_put(x, batch_placement(mesh)) for name, x in batch.items()}


def trained(family: str, mesh: Mesh, attention: str, stage: str, labels: str, steps: int):
    """Losses of the steps, and the parameters after them on the host: {"losses", "params"}; and the state itself."""
    _, state, step, fixed = begun(family, mesh, attention, labels, steps)
    losses = []
    with on_mesh(mesh):
        for batch in batches(stage, attention, steps):
            state, metrics = step(state, placed(batch, mesh), fixed)
            losses.append(float(metrics["loss"]))
    return {"losses": np.array(losses), "params": jax.device_get(state.params)}, state


def compiled_step(family: str, mesh: Mesh, attention: str):
    """The program of a step, and the drafter that it trains."""
    drafter, state, step, fixed = begun(family, mesh, attention, "tokens", 20)
    with on_mesh(mesh):
        batch = placed(next(batches("refinement", attention, 1)), mesh)
        return step.lower(state, batch, fixed).compile(), drafter


def decoded(family: str, mesh: Mesh | None, temperature: float, *, scan: bool = True):
    """Tokens of six prompts, drafted, in four slots or what the mesh makes of them."""
    target = made(family, mesh, scan=scan)
    drafter = drafter_from_target(target, DrafterConfig(draft_length=3), layers=(0,))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 96, n).tolist() for n in (1, 5, 17, 40, 3, 9)]
    return deer_jax.decode(
        target, prompts, drafter=drafter, max_new_tokens=[9, 14, 8, 12, 10, 11], batch_size=4, seed=3,
        temperature=temperature,
    ).tokens  # fmt: skip


def mesh_of(shape: str) -> Mesh:
    """2x2x2 -> data 2, fsdp 2, tensor 2."""
    data, fsdp, tensor = map(int, shape.split("x"))
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor)
