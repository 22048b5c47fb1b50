"""Every stage and every seed sees examples of its own, and the first step of a stage, which compiles, is not timed."""

import time

import pytest

import deer_jax
from deer_jax.training import loop
from deer_jax.training.loop import evaluations_after, stage_seed
from deer_jax.training.metrics import read_metrics
from tests.training import runs

COMPILING, STEP = 1000.0, 1.0


@pytest.mark.representative
def test_every_stage_and_every_seed_has_a_number_of_its_own():
    numbers = {stage_seed(seed, stage) for seed in (0, 1, 2, 2**32 - 1) for stage in range(5)}
    assert len(numbers) == 4 * 5
    assert stage_seed(7, 1) == stage_seed(7, 1)
    assert all(0 <= number < 2**32 for number in numbers)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two equal stages that learn nothing, and one stage of another seed: losses show the examples alone.

    Under a clock that stands still but for the steps: the first of a stage takes a thousand seconds, others one.
    """
    folder = runs.prepare(tmp_path_factory.mktemp("stages"))
    stages = [stage | {"stage": "continuation", "learning_rate": 1e-30, "steps": 4} for stage in runs.averaged(folder)]
    now, steps = 0.0, 0
    make = loop.make_step

    def make_step(*args, **kwargs):
        step, called = make(*args, **kwargs), 0

        def timed(*args):
            nonlocal now, steps, called
            now += STEP if called else COMPILING
            called, steps = called + 1, steps + 1
            return step(*args)

        return timed

    reports = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", make_step)
        patch.setattr(time, "perf_counter", lambda: now)
        for seed in (0, 1):
            values = runs.recipe(
                folder, str(seed), stages=stages[seed:], evaluation=None, checkpoint_every=100, seed=seed
            )
            reports.append(deer_jax.align(values))
    assert steps == 12
    losses = [[line["loss"] for line in read_metrics(folder / str(seed)) if "loss" in line] for seed in (0, 1)]
    return reports, losses, [line for line in read_metrics(folder / "0") if "tokens_per_second" in line]


@pytest.mark.parametrize("stages", [(6,), (6, 6), (5, 1, 9)])
@pytest.mark.parametrize("every", [1, 4, 6, 50])
def test_evaluations_that_are_left(stages, every):
    ends = [sum(stages[: i + 1]) for i in range(len(stages))]
    for done in range(ends[-1] + 1):
        left = [step for step in range(done + 1, ends[-1] + 1) if step % every == 0 or step in ends]
        assert evaluations_after(done, stages, every) == len(left)


def test_stages_and_seeds_see_other_examples(run):
    _, losses, _ = run
    first, second, other = losses[0][:4], losses[0][4:], losses[1]
    assert len({*first, *second, *other}) == 12, "two steps saw the same examples"


def test_the_step_that_compiles_is_in_no_speed(run):
    reports, _, lines = run
    for report, timed in zip(reports, (6, 3), strict=True):  # of four steps a stage, one compiles
        assert report.seconds == timed * STEP
        assert report.tokens == timed * 4 * 23  # rows, and tokens of a prompt and its answer
    assert len(lines) == 6
    assert {line["tokens_per_second"] for line in lines} == {4 * 23 / STEP}
