"""The program of benchmarks/gpu, with tiny shapes: it runs, and what fails in it costs nothing but itself."""

import gzip
import importlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import jax
import pytest

from deer_jax.models.transformer import abstract_params
from tests.conftest import CACHE, CACHE_BYTES, ROOT

FOLDER = ROOT / "benchmarks" / "gpu"
PHASES = ["correct", "rounds", "generate", "answers", "align", "pair", "training"]
MOST_FILES, MOST_BYTES = 8, 16 << 20


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """A module of the program by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def program(module, monkeypatch: pytest.MonkeyPatch):
    """The program, whose processes find what was compiled before and optimise as tests do."""
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_COMPILATION_CACHE_MAX_SIZE": CACHE_BYTES,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.1, "JAX_DISABLE_MOST_OPTIMIZATIONS": 1,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return module("run")


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_phase_runs_and_a_failing_one_costs_nothing_but_itself(program, tmp_path: Path):
    out = tmp_path / "out"
    argv = [str(out), "--tiny", "--seconds", "600", "--work", str(tmp_path / "work")]
    crash = program.Phase("crash", 60, [sys.executable, "-c", "print('begun'); raise SystemExit('planted')"])
    asleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    hang = program.Phase("hang", 0.5, [sys.executable, "-c", asleep])
    real = program.phases_of(program.parsed(argv), argv)
    assert [phase.name for phase in real] == PHASES
    assert program.run_phases(out, [crash, hang, *real]) == ["crash", "hang"], (out / "log.txt").read_text()

    found = lines(out)
    ends = {line["phase"]: line for line in found if line["what"] == "phase"}
    assert list(ends) == ["crash", "hang", *PHASES]
    assert "planted" in ends["crash"]["outcome"]
    assert "0.5 s" in ends["hang"]["outcome"]
    assert ends["hang"]["seconds"] < 60
    figures = [line for line in found if "measured" in line]
    assert {line["phase"] for line in figures} == set(PHASES) - {"generate"}  # which has no tiny form
    assert all(line["expected"].keys() <= line["measured"].keys() and line["measured"] for line in figures)
    assert all(line["because"] for line in figures if line["expected"])

    def of(phase: str, part: str) -> list[dict]:
        return [line for line in figures if line["phase"] == phase and part in line["what"]]

    assert not [line for line in found if "left_out" in line and line["phase"] != "generate"]
    assert {line["what"].split(",")[0] for line in of("rounds", "batch")} == {"8b", "30b"}
    assert all(line["measured"]["ms"] > 0 < line["expected"]["ms"] for line in of("rounds", "batch"))
    assert all(line["expected"]["round/step"] > 1 for line in of("rounds", " k = "))
    assert [line["measured"]["passed"] for line in of("correct", "exactness tests")] == [1]
    assert len(of("pair", "as chat")) == 3
    assert len(of("training", "texts of")) == 2
    report = (out / "report.txt").read_text(encoding="utf-8")
    assert all(line["what"] in report for line in figures)
    assert "planted" in report

    files = list(out.iterdir())
    assert len(files) <= MOST_FILES
    assert all(file.stat().st_size <= MOST_BYTES for file in files)
    with tarfile.open(fileobj=io.BytesIO((out / "answers.tar.0").read_bytes())) as tar:
        names = [
            "smollm2.jsonl.gz",
            "smollm2.jsonl.state.json",
            "smollm2_again.jsonl.gz",
            "smollm2_again.jsonl.state.json",
        ]
        assert tar.getnames() == names
        rows = gzip.decompress(tar.extractfile(names[0]).read()).splitlines()
    assert len(rows) == of("answers", "smollm2.jsonl")[0]["measured"]["answers"]
    data = b"".join(file.read_bytes() for file in sorted(out.glob("smollm2_drafter.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        weights = tar.extractfile("smollm2_drafter/model.safetensors").read()
        assert "smollm2_drafter/config.json" in tar.getnames()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    assert {value["dtype"] for name, value in header.items() if name != "__metadata__"} <= {"BF16", "I32", "I64"}


def test_a_program_that_cannot_begin_is_not_begun(program, tmp_path: Path):
    with pytest.raises(SystemExit, match="--target and --inputs"):
        program.main([str(tmp_path / "out")])
    assert not os.path.exists(tmp_path / "out")


def test_what_is_expected_must_be_measured(module, tmp_path: Path):
    results = module("results").Results(tmp_path, "some")
    with pytest.raises(ValueError, match="ms"):
        results.add("a step", {"seconds": 1.0}, {"ms": 1000.0})


@pytest.mark.parametrize("name", ["0.5b", "8b", "30b"])
def test_a_pass_reads_what_the_model_holds(module, name):
    """With every expert chosen: all the weights, but for norms and an embedding that is no head."""
    card, config = module("card"), module("shapes").shape_of(name, tiny=False)
    held = sum(x.size for x in jax.tree.leaves(abstract_params(config)))
    held -= 0 if config.tied else config.vocab_size * config.width
    everything = card.pass_bytes(config, 10**6, 1, 0)  # rows that choose every expert
    assert everything == pytest.approx(2 * held, rel=1e-3)
    one = card.pass_bytes(config, 1, 1, 1000) - card.pass_bytes(config, 1, 1, 0)
    assert one == 2 * 1000 * 2 * config.layers * config.kv_heads * config.head_width
    if config.experts:
        assert card.reached_experts(config, 1) == pytest.approx(config.experts_per_token)
        assert card.pass_bytes(config, 1, 1, 0) < everything / 5
