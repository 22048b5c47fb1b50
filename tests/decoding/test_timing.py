"""Seconds by a clock that the tests turn: compiling takes a thousand, running a program one, everything else none."""

import time

import jax
import pytest

from deer_jax import Target, answers, bench, decode
from deer_jax.decoding import programs
from tests.doubles import table_drafter
from tests.tiny import random_params, tiny

COMPILING, RUNNING = 1000.0, 1.0
NEW, PROMPTS = 8, [[1, 2, 3], [4, 5]]


class Clock:
    """Counts what was compiled and run, too."""

    def __init__(self):
        self.now, self.compiled, self.ran = 0.0, 0, 0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    compiling, running = jax.stages.Lowered.compile, jax.stages.Compiled.__call__

    def compiled(self, *args, **kwargs):
        program = compiling(self, *args, **kwargs)
        clock.now, clock.compiled = clock.now + COMPILING, clock.compiled + 1
        return program

    def ran(self, *args, **kwargs):
        clock.now, clock.ran = clock.now + RUNNING, clock.ran + 1
        return running(self, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    monkeypatch.setattr(jax.stages.Compiled, "__call__", ran)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(programs, "_compiled", {})  # nothing has been compiled before
    return clock


@pytest.fixture(scope="module")
def target() -> Target:
    config = tiny("qwen3", vocab_size=16, width=8, heads=1, kv_heads=1, head_width=8, mlp_width=8, layers=1)
    return Target(config=config, params=random_params(config, 5, scan=False))


@pytest.mark.representative
def test_compilation_is_in_no_speed_of_decode(target, clock):
    for first in (True, False):
        ran, compiled = clock.ran, clock.compiled
        stats = decode(target, PROMPTS, max_new_tokens=NEW, time_prefill=True).stats
        assert clock.compiled - compiled == (3 if first else 0)  # prefill, admit, the loop
        assert stats.compile_seconds == COMPILING * (clock.compiled - compiled)
        assert stats.seconds == clock.ran - ran == 3 * RUNNING
        assert stats.prefill_seconds == 2 * RUNNING
        assert stats.tokens_per_second == 2 * NEW / 3
        assert stats.decode_tokens_per_second == 2 * NEW


def test_compilation_is_in_no_speed_of_answers(target, clock, tmp_path):
    speeds = []
    report = answers(
        target, PROMPTS, tmp_path / "a", max_new_tokens=NEW, progress=lambda done, total, speed: speeds.append(speed)
    )
    assert clock.compiled == clock.ran == 3
    assert report.seconds == 3 * RUNNING
    assert report.tokens_per_second == speeds[-1] == 2 * NEW / 3


def test_compilation_is_in_no_speed_of_bench(target, clock):
    """Right drafts of three commit four tokens a round: two programs' runs for plain and for drafted decoding alike."""
    drafter = table_drafter([[0] * 12] * 2, 16)
    report = bench(target, PROMPTS, drafters={"x": drafter}, draft_lengths=[3], max_new_tokens=NEW, batch_size=2)
    assert clock.compiled == 6
    for method in report.methods.values():
        assert method.compile_seconds == 3 * COMPILING
        assert method.seconds == report.repeats * 3 * RUNNING
        assert method.prefill_seconds == report.repeats * 2 * RUNNING
        assert method.tokens_per_second == 2 * NEW / 3
        assert method.decode_tokens_per_second == 2 * NEW
        assert method.speedup == 1
    plain, drafted = report.methods.values()
    assert drafted.round_cost == pytest.approx(plain.rounds / drafted.rounds)
