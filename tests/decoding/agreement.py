"""Greedy decodes that must say the same, for tests and the grid."""

from deer_jax.decoding.agreement import Agreement, Tokens, compare_greedy
from deer_jax.models.target import Target


def assert_same_greedy(
    target: Target, prompts: Tokens, plain: Tokens, other: Tokens, *, k: int = 8, batch: int = 1
) -> Agreement:
    """The answers are equal, row by row, up to a first departure that a near-tie of the target explains."""
    agreement = compare_greedy(target, prompts, plain, other, k=k, batch=batch)
    for row, at, gap, difference in (departure for departure in agreement.departures if not departure.near_tie):
        raise AssertionError(
            f"row {row} departs at token {at}: {other[row][at : at + 1]} instead of {plain[row][at : at + 1]}, "
            f"logits {gap:.3g} apart where the programs differ by {difference:.3g}"
        )
    return agreement
