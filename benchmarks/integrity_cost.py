"""What checksums cost: a checkpoint saved and restored with and without them, and the digests of a model's files.

    python benchmarks/integrity_cost.py [--gigabytes X] [--folder DIR]

Random float32 arrays in several leaves. "without" is Orbax alone, which does not wait for the disk; "with" is a run's
checkpoint: Orbax, SHA-256 of every file, and everything on the disk before it counts. Files that have just been
written are read from memory, not from the disk. The folder is removed afterwards; it holds four times the size at most.

Then the files that decide an 8 B target (the shapes of Qwen3-8B in bfloat16, five files): bytes read at a first start,
at a second one, and with --verify. The files have no content, so this is hashing without a disk; a disk of less than
the rate of SHA-256 is what one waits for.
"""

import argparse
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from deer_jax.checkpoints.families import tensor_slots, write_config
from deer_jax.checkpoints.huggingface import deciding_files
from deer_jax.checkpoints.records import read_record, verify
from deer_jax.checkpoints.runs import Checkpoints
from deer_jax.config import ModelConfig
from deer_jax.digests import Digests, Stamp
from deer_jax.files import Lock, sync_tree

LEAVES = 8
FILES = 5  # of the 8 B target


def timed(what: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    what()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one unless given")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="integrity_cost_", dir=args.folder))
    try:
        measure(folder, int(args.gigabytes * 1e9 / 4 / LEAVES / 1024) * 1024)
        measure_target(folder / "8b")
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    params = {f"leaf_{i}": jax.device_put(rng.standard_normal((size // 1024, 1024), np.float32)) for i in range(LEAVES)}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    rows = []
    few = jax.tree.map(lambda x: x[:1], params)
    ocp.save_checkpointables(str(folder / "few"), {"params": few})  # imports and first uses
    load(str(folder / "few"), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), few))

    def row(what: str, seconds: float, hashed: int) -> None:
        rows.append((what, seconds, hashed))

    plain = str(folder / "plain")
    row("save, without", timed(lambda: ocp.save_checkpointables(plain, {"params": params})), 0)
    row("  its files to the disk", timed(lambda: sync_tree(Path(plain))), 0)
    row("restore, without", timed(lambda: jax.block_until_ready(load(plain, like))), 0)
    with Lock(folder / "run", inside=True) as lock:
        checkpoints = Checkpoints(folder / "run", keep=1, lock=lock)
        seconds = timed(lambda: checkpoints.save(1, {"params": params}, None))
        where = folder / "run" / "checkpoints" / "1"
        record = read_record(where)
        count = sum(length for length, _ in record["files"].values())
        row("save, with", seconds, count)
        row("restore, with", timed(lambda: jax.block_until_ready(checkpoints.restore(1, {"params": like}))), count)
        row("  of that, the digests", timed(lambda: verify(where, record)), count)

    model = folder / "model.safetensors"
    with model.open("wb") as stream:
        for x in params.values():
            stream.write(np.asarray(x).data)
    first = Digests()
    row("digest of a model's file", timed(lambda: first.of(Stamp.of(model))), first.read)
    again = Digests(first.records())
    row("the same at a second start", timed(lambda: again.of(Stamp.of(model))), again.read)
    content = bytes(2**28)
    speed = len(content) / timed(lambda: hashlib.sha256(content)) / 1e9

    print(f"{size * 4 * LEAVES / 1e9:.2f} GB in {LEAVES} arrays; SHA-256 in one thread: {speed:.2f} GB/s\n")
    print(f"| {'what':<26} | seconds | GB hashed |\n| {'-' * 26} | ------: | --------: |")
    for what, seconds, hashed in rows:
        print(f"| {what:<26} | {seconds:7.3f} | {hashed / 1e9:9.2f} |")


def measure_target(folder: Path) -> None:
    config = ModelConfig(
        family="qwen3", vocab_size=151936, width=4096, layers=36, heads=32, kv_heads=8, head_width=128,
        mlp_width=12288, context=40960, qk_norm=True,
    )  # fmt: skip
    folder.mkdir()
    keys = list(tensor_slots(config).items())
    where, per_file = {}, -(-len(keys) // FILES)
    for number in range(FILES):
        name, header, end = f"model-{number}.safetensors", {}, 0
        for key, slot in keys[number * per_file : (number + 1) * per_file]:
            begin, end = end, end + 2 * math.prod(slot.shape)
            header[key] = {"dtype": "BF16", "shape": slot.shape, "data_offsets": [begin, end]}
            where[key] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(write_config(config, "bfloat16")))
    stamps = deciding_files(folder)
    known = Digests()
    print("\n| an 8 B target | seconds | GB read |\n| --- | ---: | ---: |")
    for what, digests in (("first start", known), ("second start", None), ("second start with --verify", True)):
        found = digests if isinstance(digests, Digests) else Digests(known.records(), verify=digests is True)
        seconds = timed(lambda found=found: [found.of(stamp) for stamp in stamps])
        print(f"| {what} | {seconds:.3f} | {found.read / 1e9:.2f} |")


def load(path: str, like: Any) -> Any:
    return ocp.load_checkpointables(path, {"params": like})["params"]


if __name__ == "__main__":
    main()
