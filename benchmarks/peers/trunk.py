"""A drafter that dflash's layout can hold, so that both loops run the same one.

    python benchmarks/peers/trunk.py --target MODEL --output FOLDER [--drafter D]

Of a trained conditioned drafter D its layers and projections; what the layout cannot say is left out, for both loops,
and listed in FOLDER/trunk.json. A drafter that loses more than its vocabulary drafts worse than it was trained to, or
nothing that is accepted: then only the time of a round can be compared. Without D: two random layers.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import deer_jax
from deer_jax.drafters.conditioned import ConditionedMethod, ConditionedReading, conditioned_drafter, default_taps
from deer_jax.drafters.drafter import Drafter
from deer_jax.drafters.heads import HEAD, PathSelector

MASK = "<reponame>"  # a token of SmolLM2 that texts do not contain


def untrained(target: deer_jax.Target) -> Drafter:
    mask = target.tokenizer.encode(MASK) if target.tokenizer else []
    if len(mask) != 1:
        raise SystemExit(f"{MASK} is no token of {target.name}, and the mask of an untrained drafter is")
    return conditioned_drafter(target, ConditionedReading(taps=default_taps(target.config.layers, 5), mask=mask[0]))


def trunk_of(target: deer_jax.Target, drafter: Drafter) -> tuple[Drafter, list[str]]:
    """A drafter that the layout holds, and what it lacks of the other."""
    method, left_out = drafter.method, []
    if not isinstance(method, ConditionedMethod):
        raise SystemExit(f"{drafter.name}: only a conditioned drafter has a trunk that dflash runs")
    reading, shape, head = method.reading, method.shape, None
    if isinstance(method.head, PathSelector) and shape.conv_kernel:
        head = method.head
    else:
        if HEAD in drafter.params:
            left_out.append(f"its head ({type(method.head).__name__})")
        if shape.conv_kernel:
            left_out.append("convolutions")
    if reading.draft_vocab is not None:
        reading = dataclasses.replace(reading, draft_vocab=None)
        left_out.append("its draft vocabulary")
    if reading.layout != "fill_in":
        reading = dataclasses.replace(reading, layout="fill_in")
        left_out.append("the next-token layout (read as fill-in, for which it is not trained)")
    if not shape.qk_norm:
        left_out.append("that queries and keys have no norms (they get some, of ones)")
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    fields |= {"family": "qwen3", "qk_norm": True} | ({} if head else {"conv_kernel": 0})
    count = fields.pop("layers")
    new = conditioned_drafter(target, reading, layers=count, head=head, dtype="float32", **fields)

    def kept(like, values):
        if not isinstance(like, dict):
            return values
        return {key: kept(value, values[key]) if key in values else value for key, value in like.items()}

    return dataclasses.replace(new, params=kept(new.params, drafter.params)), left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--drafter")
    args = parser.parse_args()
    target = deer_jax.load_target(args.target, dtype="float32")
    if args.drafter is None:
        drafter, left_out = untrained(target), []
    else:
        drafter, left_out = trunk_of(target, deer_jax.load_drafter(args.drafter, target=target, dtype="float32"))
    deer_jax.save_drafter(args.output, drafter, layout="dflash", target=target)
    about = {"of": args.drafter or "an untrained drafter of two layers", "left_out": left_out}
    (args.output / "trunk.json").write_text(json.dumps(about) + "\n")
    print(f"{args.output}: {about['of']}; left out: {', '.join(left_out) or 'nothing'}")


if __name__ == "__main__":
    main()
