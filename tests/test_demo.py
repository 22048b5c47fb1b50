"""The bundled pair: small, the same on every call, trained, exact; and the verb that shows it."""

import jax
import numpy as np
import pytest

import deer_jax
from deer_jax import demo_pair
from deer_jax.cli import demo
from deer_jax.cli import main as cli
from deer_jax.data.sources import read_prompts
from deer_jax.demo import FOLDER, PROMPTS

LARGEST = 12e6  # bytes


@pytest.fixture(scope="module")
def pair():
    return demo_pair()


@pytest.fixture(scope="module")
def prompts() -> list:
    return [prompt.content for prompt in read_prompts(PROMPTS, limit=8)]


def test_it_is_small_and_always_the_same(pair):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < LARGEST
    again = demo_pair()
    for one, other in zip(pair, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_its_drafts_are_better_than_an_untrained_drafters_and_its_answers_exact(pair, prompts):
    target, drafter = pair
    untrained = deer_jax.drafter_from_target(target, drafter.method.reading, layers=(0, 2, 5))
    plain = deer_jax.decode(target, prompts, max_new_tokens=32)
    found = {}
    for name, each in (("trained", drafter), ("untrained", untrained)):
        result = deer_jax.decode(target, prompts, drafter=each, draft_length=8, max_new_tokens=32)
        assert result.tokens == plain.tokens
        found[name] = result.stats.acceptance_length
    assert found["trained"] > found["untrained"] + 0.3


@pytest.fixture
def short(monkeypatch, tmp_path):
    """The verb's work, cut to what a test needs; it runs in a folder of its own."""
    monkeypatch.setattr(demo, "NEW_TOKENS", 12)
    monkeypatch.setattr(demo, "MEASURED", 2)
    monkeypatch.setattr(demo, "DRAFT_LENGTHS", (4,))
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_verb_shows_answers_a_table_and_a_picture(short, capsys):
    assert cli.main(["demo", "--pair", "bundled"]) == 0
    out = capsys.readouterr().out
    assert out.count("the same tokens as plain decoding's") == demo.SHOWN - 1
    assert out.count("sampled at temperature") == 1
    assert "drafter k=4" in out
    assert (short / "deer_jax_demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_verb_takes_prompts(short, capsys):
    assert (
        cli.main(["demo", "--pair", "bundled", "--prompt", "class Stack:\n    def push", "--picture", "own.png"]) == 0
    )
    out = capsys.readouterr().out
    assert "class Stack:" in out
    assert out.count("the same tokens as plain decoding's") == 1
    assert (short / "own.png").exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--prompt", ""], "--prompt is empty: give some text"),
        (["--picture", "picture.txt"], "picture.txt must end in .png"),
        (["--picture", "nowhere/a.png"], "no folder"),
        (["--prompts", "x"], "unknown option '--prompts', did you mean '--prompt'?"),
    ],
)
def test_wrong_arguments(short, capsys, argv, line):
    assert cli.main(["demo", *argv]) == 2
    assert line in capsys.readouterr().err


def test_without_smollm2_the_small_pair_is_shown(short, capsys, monkeypatch):
    """And the line that says so says why; asked for by name, its absence is an error."""

    def missing(name, **options):
        if name == "smollm2":
            raise deer_jax.RunError("cannot be downloaded (no network)")
        return demo_pair(name, **options)

    monkeypatch.setattr(demo, "demo_pair", missing)
    assert cli.main(["demo", "--prompt", "class Stack:"]) == 0
    found = capsys.readouterr()
    assert "cannot be downloaded (no network); here is the small pair that comes with this package" in found.err
    assert "class Stack:" in found.out
    assert cli.main(["demo", "--pair", "smollm2"]) == 1
    assert "cannot be downloaded (no network)" in capsys.readouterr().err
