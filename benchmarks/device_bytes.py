"""What a device holds and makes, by mesh: compiled ahead of time for a TPU v5e slice of 2 x 4 on this host, never run.

    python benchmarks/device_bytes.py [--case 'train-*' decode-1x8x1] [--largest 3] [--json FILE]

`train`: a step of the 0.5 B drafter, block-causal, on 32 texts of 2048 tokens with 24 blocks of 32, from float32
parameters. `decode`: the rounds of Qwen3-8B with that drafter, k 16, 16 slots of 4096 tokens, bfloat16. The mesh is
data x fsdp x tensor.

Parameters, optimiser and caches are the program's arguments as placed; temporaries are what the compiler planned for
beside them. Of these the largest arrays are named, with the lines that made them, innermost first; what is updated in
place or becomes a result counts for none. A program that does not fit is shown with the compiler's words.

Needs libtpu as benchmarks/tpu_programs.py does, whose programs these are.
"""

import argparse
import fnmatch
import json
import math
from pathlib import Path

import tpu_programs as tpu  # before jax, for its environment

import jax  # isort: skip

from deer_jax.planning.hlo import Memory, Program, Step
from deer_jax.planning.text import ARRAY, arrays

MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
TEXTS = 32


def cases() -> dict[str, tpu.Training | tpu.Decoding]:
    found: dict[str, tpu.Training | tpu.Decoding] = {}
    for mesh in MESHES:
        found[f"train-{name_of(mesh)}"] = tpu.Training(mesh, "v5e", texts=TEXTS // math.prod(mesh))
    for mesh in MESHES:
        found[f"decode-{name_of(mesh)}"] = tpu.Decoding("8b", "drafter", 16, 4096, "v5e", mesh=mesh)
    return found


def name_of(mesh: tuple[int, int, int]) -> str:
    return "x".join(map(str, mesh))


def measure(case: tpu.Training | tpu.Decoding, count: int) -> dict:
    """Bytes per device of what a program takes and makes, and the `count` largest arrays that it makes."""
    train = isinstance(case, tpu.Training)
    try:
        compiled, args = tpu.compile_training(case) if train else tpu.compile_decoding(case)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).replace("\n", " ")[:300]}
    held = {"parameters": (args[0].params, args[2]), "optimizer": args[0].optimizer} if train else {
        "parameters": args[1], "caches": (args[0].cache, args[0].drafter)}  # fmt: skip
    result: dict = {name: tpu.bytes_per_device(tree) for name, tree in held.items()}
    memory = Memory.of(compiled)
    largest = [{"bytes": one.largest, "type": shape_of(one), "origin": one.origin}
               for one in largest_made(Program(compiled.as_text()), count)]  # fmt: skip
    return result | {"arguments": memory.arguments, "temporaries": memory.temporaries, "largest": largest}


def largest_made(program: Program, count: int) -> list[Step]:
    """The steps that make the largest arrays, one of each shape; without results and what is updated in place."""
    lines = program.text.computations[program.text.entry]
    results = {name for result in program.text.root(program.text.entry).args for name in (result, *lines[result].args)}
    found: dict[str, Step] = {}
    for step in sorted(program.whole().steps, key=lambda step: step.largest, reverse=True):
        if step.instruction.name not in results and step.origin and (shape := shape_of(step)):
            found.setdefault(shape, step)
    return list(found.values())[:count]


def shape_of(step: Step) -> str:
    """Type and dimensions of the largest array that a step makes, as in f32[8,4]; empty for an update in place."""
    for found in ARRAY.finditer(step.instruction.type):
        (array,) = arrays(found[0])
        if array.in_hbm and array.bytes == step.largest:
            return found[0].split("{")[0]
    return ""


HEAD = ("case", "parameters GB", "optimizer GB", "caches GB", "temporaries GB", "largest temporaries")


def shown(name: str, result: dict) -> str:
    """A row of the table."""
    held = [f"{result[key] / 1e9:.2f}" if key in result else "-" for key in ("parameters", "optimizer", "caches")]
    if "error" in result:
        return tpu.table_row([name, *held, "does not fit", result["error"]])
    largest = [f"{one['bytes'] / 1e6:.0f} MB `{one['type']}` {place(one['origin'])}" for one in result["largest"]]
    return tpu.table_row([name, *held, f"{result['temporaries'] / 1e9:.2f}", "; ".join(largest)])


def place(origin: str) -> str:
    """The innermost line of an origin."""
    return origin.split(" | ")[-1].split(" < ")[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(cases())
    parser.add_argument("--case", nargs="+", default=["*"], metavar="NAME", help=f"of {', '.join(names)}; or patterns")
    parser.add_argument("--largest", type=int, default=3, metavar="N", help="name the N largest temporaries of each")
    parser.add_argument("--json", metavar="FILE", help="write the figures, in bytes, to this file")
    args = parser.parse_args()
    chosen = {name: case for name, case in cases().items() if any(fnmatch.fnmatch(name, x) for x in args.case)}
    if not chosen:
        parser.error(f"no such case; there are {', '.join(names)}")
    if not tpu.LIBTPU.is_file():
        parser.error(f"no {tpu.LIBTPU}: install libtpu there (see tpu_programs.py --help), or set DEER_JAX_LIBTPU")
    versions = tpu.versions_used()
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(tpu.table_row(HEAD), tpu.table_row(["---"] * len(HEAD)), sep="\n")
    results = {}
    for name, case in chosen.items():
        results[name] = measure(case, args.largest)
        print(shown(name, results[name]), flush=True)
        if args.json:
            text = json.dumps({"versions": versions, "results": results}, indent=1)
            Path(args.json).write_text(text, encoding="utf-8")
        jax.clear_caches()


if __name__ == "__main__":
    main()
