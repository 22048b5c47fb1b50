"""What the command line does with input that is wrong: cases tried by kind, counted by how they ended.

    python benchmarks/foreign_input.py --cases 40 --seed 0 --json report.json

Files of every kind that the library reads are damaged by a seeded generator, one at a time, and the verb that reads
them is run. A case ends as

    line       exit status 1 or 2 and one line of at most 1,000 characters
    accepted   exit status 0 (a damage may leave a file right: a changed word of a text is another text)
    nonsense   accepted, although what it gave cannot be right: weights that are not those that were written, answers of
               a model that is broken
    several    more than one line, or a longer one
    traceback  anything else that was raised
    hang       not ended after 30 s

Needs nothing but the package: the target, its tokenizer, answers and a run are made first, in about a minute.
"""

import argparse
import collections
import contextlib
import copy
import gzip
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 30
LENGTH = 1000
VALUES = (None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**400, 0.5, -1e30, 1e30, 1e999, float("nan"), "", "x",
          "\ud83d", "a\0b", "9" * 5000, [], [1], ["x"], [[1]], {}, {"a": 1}, [None], "../../etc/passwd")  # fmt: skip
ENDINGS = ("line", "accepted", "nonsense", "several", "traceback", "hang")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=None, help="only these, separated by commas")
    parser.add_argument(
        "--json", type=Path, default=None, help="write the counts, and every case that did not end well"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work()
    kinds = options.kinds.split(",") if options.kinds else list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        worker = Worker()
        prepare(base, worker)
        counts: dict[str, collections.Counter[str]] = {}
        bad = []
        for kind in kinds:
            counts[kind] = collections.Counter()
            for number in range(options.cases):
                seed = f"{options.seed}:{kind}:{number}"
                case = Path(folder) / "case"
                shutil.rmtree(case, ignore_errors=True)
                shutil.copytree(base, case, symlinks=True)
                argv, judge, what = KINDS[kind](case, random.Random(seed))
                ending, said = worker.run(argv)
                if ending == "accepted" and judge is not None and not judge():
                    ending = "nonsense"
                counts[kind][ending] += 1
                if ending not in ("line", "accepted"):
                    bad.append({"seed": seed, "what": what, "ending": ending, "argv": argv, "said": said[-600:]})
            print(f"{kind:<22}" + "".join(f"{name} {counts[kind][name]:<4} " for name in ENDINGS), flush=True)
        worker.stop()
    total = sum(counts.values(), collections.Counter())
    print(f"{'together':<22}" + "".join(f"{name} {total[name]:<4} " for name in ENDINGS))
    if options.json:
        options.json.write_text(json.dumps({"counts": counts, "bad": bad}, indent=1, default=str))


# Running a verb, in a process that is replaced where it hangs or dies.


class Worker:
    """A process that runs verbs one after the other."""

    def __init__(self):
        self.process = None

    def run(self, argv: list[str], seconds: float = SECONDS) -> tuple[str, str]:
        """How it ended, and what was said."""
        if self.process is None:
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([argv, seconds]) + "\n")
        self.process.stdin.flush()
        killer = _after(seconds + 30, self.process.kill)
        answer = self.process.stdout.readline()
        killer.cancel()
        if not answer:
            self.stop()
            return "hang", "the process hung in a library, or died"
        return tuple(json.loads(answer))

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _after(seconds: float, what: Callable[[], Any]):
    import threading

    timer = threading.Timer(seconds, what)
    timer.daemon = True
    timer.start()
    return timer


class _TooLong(BaseException):
    pass


def work() -> None:
    """The worker's side: verbs from stdin, endings to stdout."""
    from deer_jax.cli import main as cli

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    expired = False

    def late(*_):
        nonlocal expired
        expired = True
        raise _TooLong

    signal.signal(signal.SIGALRM, late)
    for line in sys.stdin:
        argv, seconds = json.loads(line)
        expired, out, err = False, io.StringIO(), io.StringIO()
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status: Any = cli.main(argv)
        except BaseException as error:  # what the command line would show as a traceback
            status = f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        said = [x for x in err.getvalue().splitlines() if " warning: " not in x and not PROGRESS(x)]
        if expired:
            ending = "hang"
        elif isinstance(status, str) or any("unexpected " in x and "details are in" in x for x in said):
            ending = "traceback"
        elif status == 0:
            ending = "accepted"
        else:
            ending = "line" if len(said) == 1 and len(said[0]) <= LENGTH else "several"
        answers.write(json.dumps([ending, f"{status}: {err.getvalue()}"]) + "\n")
        answers.flush()


def PROGRESS(line: str) -> bool:
    return any(word in line for word in (" of ", ": step ")) and "error" not in line


# What is damaged.


def prepare(base: Path, worker: Worker) -> None:
    """A target with a tokenizer and a chat template, its answers, an align run, and files of every other kind."""
    (base / "texts").mkdir(parents=True)
    rng = random.Random(1)
    words = ["the", "dog", "said", "hello", "once", "upon", "a", "time", "and", "went", "home", "again"]
    for number in range(40):
        lines = [" ".join(rng.choices(words, k=12)) for _ in range(12)]
        (base / "texts" / f"{number}.txt").write_text("\n\n".join(lines))
    model = {"family": "llama", "vocab_size": 300, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8,
             "mlp_width": 24, "context": 128}  # fmt: skip
    pretrain = {"texts": [str(base / "texts")], "output": str(base / "target_run"), "model": model, "steps": 2,
                "length": 32, "batch": 2, "prompts": 16, "held_out": ["3.txt"]}  # fmt: skip
    (base / "pretrain.yaml").write_text(json.dumps(pretrain))
    target, answers = str(base / "target"), str(base / "answers.jsonl")
    steps = [
        ["pretrain", "--recipe", str(base / "pretrain.yaml")],
        ["export", "--source", str(base / "target_run"), "--output", target, "--dtype", "float32"],
        ["answers", "--target", target, "--prompts", str(base / "target_run" / "prompts.jsonl"), "--output", answers,
         "--max-new-tokens", "8"],
    ]  # fmt: skip
    (base / "held_out.jsonl").write_text('{"prompt": "zebras"}\n')
    stage = {"steps": 1, "stage": "continuation", "blocks": 2}
    align = {"target": target, "answers": [answers], "output": str(base / "run"), "drafter": "from-target:0",
             "reading": {"draft_length": 2}, "length": 24, "batch": 2, "stages": [stage]}  # fmt: skip
    (base / "align.yaml").write_text(json.dumps(align))
    steps.append(["align", "--recipe", str(base / "align.yaml")])
    steps.append(["export", "--source", str(base / "run"), "--output", str(base / "drafter"), "--dtype", "float32"])
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    for argv in steps:
        ending, said = worker.run(argv, 300)
        if ending != "accepted":
            raise SystemExit(f"{argv}: {said}")
        config = base / "target" / "tokenizer_config.json"
        if config.exists() and "chat_template" not in config.read_text():
            config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    rows = [{"prompt": "the dog"}, {"messages": [{"role": "user", "content": "hello"}]}, {"question": "dog", "id": "q"},
            {"tokens": [1, 2, 3]}, {"turns": ["hello", "again"]}, {"text": "dog", "test_list": ["assert"]},
            {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "said"}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
            {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}]  # fmt: skip
    (base / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "two.jsonl").write_text('{"prompt": "the dog"}\n{"prompt": "once upon"}\n')
    (base / "bench.yaml").write_text("prompts: x.jsonl\nmax_new_tokens: 4\nrepeats: 1\ndraft_lengths: [1]\n")
    (base / "steps.yaml").write_text('steps:\n  - export: {source: "{output}/run", output: "{output}/made"}\n')
    _tree(base, "base", "case")


def _tree(base: Path, old: str, new: str) -> None:
    """The files name their places: those of the copy that a case damages."""
    folder = base.parent
    for path in base.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".yaml", ".jsonl"):
            path.write_text(path.read_text().replace(str(folder / old), str(folder / new)))


def damage_json(text: str, rng: random.Random) -> str:
    """A JSON text with one thing changed."""
    value = json.loads(text)
    way = rng.randrange(8)
    if way == 0:
        return damage_bytes(text.encode(), rng).decode("latin-1")
    if way == 1 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return text.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(VALUES))}}}"
    if way == 2:
        return "[" * 50_000 + text
    places = list(_places(value))
    path = rng.choice(places)
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if not path:
        value = rng.choice(VALUES)
    elif way == 3:
        del inner[path[-1]]
    else:
        inner[path[-1]] = rng.choice(VALUES)
    return json.dumps(value)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, inner) in enumerate(items):
        if number < 40:
            yield from _places(inner, (*path, key))


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one thing changed."""
    way, at = rng.randrange(5), rng.randrange(max(len(content), 1))
    if way == 0:
        return content[:at]
    if way == 1 and content:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if way == 2:
        return content[:at] + bytes(rng.randrange(256) for _ in range(8)) + content[at:]
    if way == 3:
        return b""
    return content[:at] + content[at + rng.randrange(1, 64) :]


def _special(path: Path, rng: random.Random) -> str | None:
    """Now and then something that is no file: a pipe, a folder, a link to itself, nothing."""
    way = rng.randrange(30)
    if way > 3:
        return None
    path.unlink()
    if way == 0:
        os.mkfifo(path)
    elif way == 1:
        path.mkdir()
    elif way == 2:
        path.symlink_to(path.name)
    return ("a pipe", "a folder", "a link to itself", "missing")[way]


def _file(name: str, argv: Callable[[Path], list[str]], text: bool = True) -> Callable:
    """A kind: one file of the tree is damaged."""

    def make(case: Path, rng: random.Random):
        path = case / name
        what = _special(path, rng)
        if what is None:
            if text:
                what = damage_json(path.read_text(), rng)
                path.write_bytes(what.encode(errors="surrogatepass"))
            else:
                content = damage_bytes(path.read_bytes(), rng)
                path.write_bytes(content)
                what = f"{len(content)} bytes"
        return argv(case), None, f"{name}: {what[:300]}"

    return make


def decode(case: Path, *more: str) -> list[str]:
    return ["decode", "--target", str(case / "target"), "--max-new-tokens", "2", "--prompt", "the dog", *more]


def _lines(name: str, argv: Callable[[Path], list[str]]) -> Callable:
    """A kind: one line of a file of JSON lines is damaged."""

    def make(case: Path, rng: random.Random):
        path = case / name
        what = _special(path, rng)
        if what is None:
            lines = path.read_text().splitlines()
            at = rng.randrange(len(lines))
            lines[at] = what = damage_json(lines[at], rng)
            content = ("\n".join(lines) + "\n").encode(errors="surrogatepass")
            path.write_bytes(content)
        return argv(case), None, f"{name}: {what[:300]}"

    return make


def prompts(case: Path, rng: random.Random):
    path = case / "prompts.jsonl"
    lines = path.read_text().splitlines()
    line = rng.choice(lines)
    what = damage_json(line, rng)
    way, extra = rng.randrange(6), []
    content = (what + "\n").encode(errors="surrogatepass")
    if way == 0:
        path = case / "prompts.jsonl.gz"
        content = gzip.compress(content)
        if rng.random() < 0.5:
            content = damage_bytes(content, rng)
    elif way == 1:
        path = case / "prompts.json"
        content = b"[" + content.strip() + b"]"
    elif way == 2:
        extra = [
            "--field",
            rng.choice(["prompt", "nope", "{prompt}", "{prompt", "{prompt.x}", "{0}", "{}", "messages"]),
        ]
    path.write_bytes(content)
    argv = ["decode", "--target", str(case / "target"), "--max-new-tokens", "2", "--prompts", str(path), *extra]
    return argv, None, what[:300]


TEMPLATES = (
    "{{ 1 // 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[5].content }}", "{{ undefined.x }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 30000000000 }}",
    "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% for", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}",
    "{{ messages | tojson | length ** 9999999 }}",
    "{{ 10 ** 10 ** 8 }}", "{% include 'x' %}", "{{ messages[0]['content'].encode('utf-16') }}", "", "{{ '\\ud83d' }}",
    "{{ [1] * 10000000000 }}", "{{ 'a'.format(1, 2) }}", "{{ '%s' % () }}", "{{ strftime_now('%Y' * 9999999) }}",
)  # fmt: skip


def templates(case: Path, rng: random.Random):
    path = case / "target" / "tokenizer_config.json"
    template: Any = rng.choice(TEMPLATES)
    if rng.random() < 0.2:
        template = rng.choice(VALUES)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    more = rng.choice([[], [], ["--template", "nope=1"], ["--template", "tokenize=true"], ["--template", "x"]])
    return decode(case, "--chat", *more), None, repr(template)[:300]


def checkpoints(case: Path, rng: random.Random):
    """One bit of one file of a checkpoint. What is exported in spite of it must be what was written."""
    folder = max((case / "run" / "checkpoints").iterdir(), key=lambda path: path.name)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    output = case / "exported"

    def same() -> bool:
        name = "model.safetensors"
        return (output / name).read_bytes() == (case / "drafter" / name).read_bytes()

    argv = ["export", "--source", str(case / "run"), "--output", str(output), "--dtype", "float32"]
    return argv, same, f"{path.relative_to(folder)} at {at}"


def broken_weights(case: Path, rng: random.Random):
    """Numbers that are not finite in one tensor. Any answer is nonsense, if the numbers take part in it."""
    path = case / "target" / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__" and "embed" not in key])
    first, last = header[name]["data_offsets"]
    bad = rng.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"])
    path.write_bytes(content[: 8 + size + first] + bad * ((last - first) // 4) + content[8 + size + last :])
    argv = decode(case)
    if rng.random() < 0.5:
        argv += ["--drafter", "from-target", "--temperature", rng.choice(["0", "1"])]
    return argv, lambda: False, name


def paths(case: Path, rng: random.Random):
    """Names that no file can have, or that lead nowhere."""
    (case / "loop").symlink_to("loop")
    (case / "file").write_text("x")
    os.mkfifo(case / "pipe")
    null = case / "null"  # a device of its own: a verb that is wrong may replace it
    with contextlib.suppress(OSError):
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    name = rng.choice(["x" * 5000, "a\0b", str(case / "loop"), str(case / "loop" / "x"), str(case / "file" / "x"), "",
                       str(case / "nope" / "x"), "~nobody/x", "runs/mine", "\udcff", "/proc/self/mem", "/dev/zero",
                       str(null), "/", ".", "..", str(case / "pipe")])  # fmt: skip
    way = rng.choice(["--target", "--drafter", "--prompts", "--output", "--json", "--config", "--recipe", "--source",
                      "--curve", "--plot", "--picture"])  # fmt: skip
    verb = {"--recipe": "align", "--source": "export", "--curve": "bench", "--plot": "bench", "--picture": "demo"}
    argv = decode(case)
    if way in verb:
        argv = {"align": ["align"], "export": ["export", "--output", str(case / "out")], "demo": ["demo"],
                "bench": ["bench", "--target", str(case / "target"), "--drafter", "from-target", "--prompt", "the dog",
                          "--max-new-tokens", "2", "--repeats", "1", "--draft-lengths", "1"]}[verb[way]]  # fmt: skip
    if way == "--prompts":
        argv = argv[:-2]
    if name in ("/dev/zero", str(case / "pipe")) and way in ("--prompts", "--output", "--json"):
        name = str(null)  # what the user names may be a pipe, and is waited for
    if verb.get(way) == "demo" and name in (str(null), str(case / "pipe")):
        name = ""  # right, and takes its time
    before = argv.index(way) if way in argv else None
    argv = [*argv, way, name] if before is None else [*argv[: before + 1], name, *argv[before + 2 :]]
    return argv, None, f"{way} {name[:60]!r}"


def numbers(case: Path, rng: random.Random):
    """Values that an option cannot have."""
    options = ["--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--batch-size", "--draft-length",
               "--draft-temperature", "--limit"]  # fmt: skip
    value = rng.choice(["", "x", "-1", "0", "nan", "inf", "1e999", "9" * 5000, "1_0", "0x10", "4294967296", "2.5",
                        "\u0663", "1e-400", "99999999999999999999", "true", "[1]"])  # fmt: skip
    option = rng.choice(options)
    argv = ["decode", "--target", str(case / "target"), "--prompts", str(case / "two.jsonl"), "--max-new-tokens", "2",
            f"{option}={value}"]  # fmt: skip
    if rng.random() < 0.3:
        option = rng.choice(["--samples", "--seed", "--prefix"])
        argv = ["answers", "--target", str(case / "target"), "--prompts", str(case / "two.jsonl"), "--output",
                str(case / "new.jsonl"), "--max-new-tokens", "2", f"{option}={value}"]  # fmt: skip
    return argv, None, argv[-1][:80]


def align(case: Path) -> list[str]:
    return ["align", "--recipe", str(case / "align.yaml")]


def answers(case: Path) -> list[str]:
    return ["answers", "--target", str(case / "target"), "--prompts", str(case / "target_run" / "prompts.jsonl"),
            "--output", str(case / "answers.jsonl"), "--max-new-tokens", "8"]  # fmt: skip


def run_file(case: Path, rng: random.Random):
    """What a run's folder says of itself."""
    import yaml

    name = rng.choice(["recipe.yaml", "identity.json", "drafter/config.json", "drafter/tokenizer.json"])
    path = case / "run" / name
    if not path.exists():
        path = case / "run" / "facts.json"
    what = _special(path, rng)
    if what is None:
        text = path.read_text()
        what = damage_json(json.dumps(yaml.safe_load(text)) if path.suffix == ".yaml" else text, rng)
        path.write_bytes(what.encode(errors="surrogatepass"))
    return align(case), None, f"{path.name}: {what[:300]}"


def answers_anew(case: Path, rng: random.Random):
    """The state of an answers file, as far as the tree has it: the settings must be those of the tree."""
    path = case / "answers.jsonl.state.json"
    what = damage_json(path.read_text(), rng)
    path.write_bytes(what.encode(errors="surrogatepass"))
    return answers(case), None, what[:300]


def pipeline(case: Path, rng: random.Random):
    state = [{"verb": "export", "options": {"source": f"{case}/run", "output": f"{case}/made"}, "seconds": 1.0}]
    what = damage_json(json.dumps(state), rng)
    (case / "pipeline.json").write_bytes(what.encode(errors="surrogatepass"))
    return ["pipeline", "--steps", str(case / "steps.yaml"), "--output", str(case)], None, what[:300]


def export(case: Path) -> list[str]:
    return ["export", "--source", str(case / "run"), "--output", str(case / "exported")]


def drafter(case: Path) -> list[str]:
    return decode(case, "--drafter", str(case / "drafter"))


KINDS: dict[str, Callable] = {
    "config.json": _file("target/config.json", decode),
    "generation_config.json": _file("target/generation_config.json", decode),
    "weights": _file("target/model.safetensors", decode, text=False),
    "drafter config.json": _file("drafter/config.json", drafter),
    "tokenizer.json": _file("target/tokenizer.json", decode),
    "tokenizer_config.json": _file("target/tokenizer_config.json", decode),
    "chat templates": templates,
    "prompt rows": prompts,
    "recipes": _file("align.yaml", align),
    "config files": _file("align.yaml", lambda case: decode(case, "--config", str(case / "align.yaml"))),
    "answers": _lines("answers.jsonl", lambda case: [*align(case), "--set", f"output={case}/new"]),
    "answers state": answers_anew,
    "a run's own files": run_file,
    "run metrics.jsonl": _lines("run/metrics.jsonl", lambda case: [*align(case)]),
    "checkpoints, one bit": checkpoints,
    "broken weights": broken_weights,
    "pipeline.json": pipeline,
    "paths": paths,
    "numbers": numbers,
}

if __name__ == "__main__":
    main()
