"""gs:// on the command line: every verb reads and writes what is there, and refuses in one line what it cannot."""

import json
from pathlib import Path

import pytest
import yaml

from deer_jax import spools


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(spools, "SIGN", 0.1)
    monkeypatch.setattr(spools, "DEAD", 0.4)


@pytest.fixture
def target(bucket, folder) -> str:
    bucket.put_tree(Path(folder), "target")
    return f"{bucket.url}/target"


PROMPTS = b'{"tokens": [1, 2]}\n{"tokens": [3]}\n{"tokens": [4, 5, 6]}\n'


def test_answers_and_decode_and_bench(bucket, target, run, tmp_path, folder):
    bucket.put("prompts.jsonl", PROMPTS)
    (tmp_path / "prompts.jsonl").write_bytes(PROMPTS)
    common = ["--target", target, "--prompts", f"{bucket.url}/prompts.jsonl", "--max-new-tokens", "4"]
    status, _, err = run("answers", *common, "--output", f"{bucket.url}/out/answers.jsonl")
    assert (status, f"{bucket.url}/out/answers.jsonl: 3 answers" in err) == (0, True), err
    local = ["--target", folder, "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "4"]
    assert run("answers", *local, "--output", str(tmp_path / "answers.jsonl"))[0] == 0
    assert bucket.read("out/answers.jsonl") == (tmp_path / "answers.jsonl").read_bytes()
    status, _, err = run("answers", *common, "--output", f"{bucket.url}/out/answers.jsonl")
    assert (status, "is complete, 3 answers, nothing to do" in err) == (0, True), err
    outputs = ["--output", f"{bucket.url}/decoded.jsonl", "--json", f"{bucket.url}/report.json"]
    status, _, err = run("decode", *common, *outputs, "--drafter", "from-target", "--draft-length", "2")
    assert status == 0, err
    assert len(bucket.read("decoded.jsonl").splitlines()) == 3
    assert json.loads(bucket.read("report.json"))["prompts"] == 3
    assert {name for name in bucket.names() if name.startswith(("out/", "decoded", "report", "."))} == {
        "out/answers.jsonl", "out/answers.jsonl.state.json", "decoded.jsonl", "decoded.jsonl.state.json", "report.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "gs://nobody/a.jsonl"], "gs://nobody/.a.jsonl.partial-"),
        (["--output", "s3://bucket/a.jsonl"], "the one that is known is gs://BUCKET/PATH"),
        (["--output", "{prompts}"], "is read or written under another option too; name another file"),
        (["--output", "{closed}"], "permission denied ("),
        (["--target", "{none}"], "no such folder on the store, or it is empty"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(bucket, object_store, target, run, options, message):
    bucket.put("prompts.jsonl", PROMPTS)
    other = object_store.new_bucket()
    other.forbidden = 403
    places = {
        "prompts": f"{bucket.url}/prompts.jsonl", "closed": f"{other.url}/a.jsonl", "none": f"{bucket.url}/none",
    }  # fmt: skip
    given = {"--target": target, "--prompts": places["prompts"], "--output": f"{bucket.url}/a.jsonl"}
    given |= {options[0]: options[1].format(**places)}
    before = bucket.contents()
    status, out, err = run("answers", *(word for pair in given.items() for word in pair))
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert bucket.contents() == before
    assert other.contents() == {}


def test_a_pipeline_is_on_the_store_and_goes_on(bucket, target, run, tmp_path):
    bucket.put("prompts.jsonl", PROMPTS)
    steps = tmp_path / "steps.yaml"
    answers = {"target": target, "prompts": f"{bucket.url}/prompts.jsonl", "max_new_tokens": 2}
    first = {"answers": answers | {"output": "{output}/a.jsonl"}}
    again = {"answers": answers | {"prompts": "{output}/a.jsonl", "output": "{output}/b.jsonl"}}
    output = f"{bucket.url}/pipeline"
    for number, made in enumerate(([first], [first, again]), 1):
        steps.write_text(yaml.safe_dump({"steps": made}))
        status, _, err = run("pipeline", "--steps", str(steps), "--output", output)
        assert status == 0, err
        assert ("step 1 of 2: answers: done before" in err) == (number == 2)
    names = ("1-answers.yaml", "2-answers.yaml", "a.jsonl", "a.jsonl.state.json", "b.jsonl", "b.jsonl.state.json")
    assert bucket.names("pipeline/") == sorted(f"pipeline/{name}" for name in (*names, "pipeline.json"))
    generation = bucket.objects["pipeline/b.jsonl"].generation
    del bucket.objects["pipeline/b.jsonl"], bucket.objects["pipeline/b.jsonl.state.json"]
    assert run("pipeline", "--steps", str(steps), "--output", output)[0] == 0
    assert bucket.objects["pipeline/b.jsonl"].generation > generation
    bucket.put("other/x", b"")
    status, _, err = run("pipeline", "--steps", str(steps), "--output", f"{bucket.url}/other")
    assert (status, "other: is no pipeline's folder but holds x; name another output" in err) == (2, True), err


def test_pictures_are_drawn_there(bucket, target, run):
    bucket.put("prompts.jsonl", PROMPTS)
    options = ["--prompts", f"{bucket.url}/prompts.jsonl", "--limit", "1", "--max-new-tokens", "2", "--repeats", "1"]
    plot = ["--draft-lengths", "1", "--plot", f"{bucket.url}/pictures"]
    status, out, err = run("bench", "--target", target, "--drafter", "from-target", *options, *plot)
    assert status == 0, err
    assert bucket.names("pictures/") == [f"pictures/{name}.png" for name in ("depth", "histogram", "speed")]
    assert f"{bucket.url}/pictures/histogram.png" in out
