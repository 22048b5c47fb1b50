"""Where the command line ends: whatever goes wrong is one line and an exit status; what is written where."""

import errno
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from deer_jax.cli import main as cli
from deer_jax.cli.answers import Options as AnswersOptions
from deer_jax.cli.bench import Options as BenchOptions
from deer_jax.cli.common import check_distinct, check_writable, write_json
from deer_jax.cli.export import Options as ExportOptions
from deer_jax.cli.main import keep_compiled_programs  # before the fixture of all tests here takes its place
from deer_jax.cli.options import parse
from deer_jax.cli.progress import LONGEST, say
from deer_jax.errors import InputError, RunError, Terminated


class Panic(BaseException):
    """What a Rust library raises is no Exception."""


@pytest.fixture
def ends(run, monkeypatch):
    """Runs a verb that ends with an error: the exit status and the one line."""

    def call(error: BaseException, *argv: str) -> tuple[int, str]:
        def verb(words):
            raise error

        monkeypatch.setattr(cli, "_run", verb)
        status, out, err = run(*argv)
        assert out == ""
        assert err.count("\n") == 1
        assert len(err) <= LONGEST + 40
        return status, err

    return call


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"id": "a", "tokens": [1, 2, 3]}\n', encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a: wrong"), 2, "error: a: wrong"),
        (RunError("a: full"), 1, "error: a: full"),
        (KeyboardInterrupt(), 130, "interrupted: files are written at the end, whole or not at all"),
        (KeyboardInterrupt("half\nof it"), 130, "interrupted: half of it"),
        (Terminated(), 143, "terminated: files are written at the end, whole or not at all"),
        (Terminated("half of it"), 143, "terminated: half of it"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "error: a/b: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 1, "error: a: Permission denied"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "error: Too many open files"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 1,
            "error: the device has too little memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; a smaller "
            "batch (batch_size, in a recipe batch with accumulate), a smaller length or max_new_tokens, or dtype "
            "bfloat16 needs less",
        ),
    ],
)  # fmt: skip
def test_an_expected_end(ends, error, status, line):
    assert ends(error) == (status, f"deer-jax: {line}\n")


@pytest.mark.parametrize(
    "error",
    [KeyError("x\ny" * 5000), MemoryError(), RecursionError("too deep"), Panic("\x1b[31m \ud800"), UnicodeError("τ")],
    ids=lambda error: type(error).__name__,
)
def test_an_unexpected_end_is_kept_in_a_file(ends, error, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    status, line = ends(error, "decode", "--prompt", "two words")
    assert status == 1
    assert line.startswith(f"deer-jax: error: unexpected {type(error).__name__}: ")
    (path,) = tmp_path.iterdir()
    assert line.endswith(f"; the details are in {path}, please report them\n")
    kept = path.read_text(encoding="utf-8")
    assert kept.startswith("deer-jax decode --prompt 'two words'\n")
    assert f"jax {jax.__version__}" in kept
    assert "Traceback (most recent call last)" in kept
    assert "in verb" in kept


def test_an_unexpected_end_that_cannot_be_kept(ends, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path / "none"))
    status, line = ends(KeyError("x"))
    assert status == 1
    assert line == (
        "deer-jax: error: unexpected KeyError: 'x'; the details could not be kept (No such file or directory), "
        "please report them\n"
    )


def test_sigterm(run, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def verb(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(cli, "_run", verb)
    status, _, err = run()
    assert status == 143
    assert err.startswith("deer-jax: terminated: ")
    assert err.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_not_lost_where_python_raises_nothing(run, monkeypatch, number, status):
    class Collected:
        def __del__(self):
            os.kill(os.getpid(), number)
            for _ in range(1000):  # the handler runs here
                pass

    def verb(argv):
        Collected()
        time.sleep(10)

    monkeypatch.setattr(cli, "_run", verb)
    assert run()[0] == status


def test_a_program_that_is_terminated_says_one_line(environment, folder, ids):
    options = ["--target", folder, "--drafter", "from-target", "--prompts", ids, "--repeats", "100000"]
    command = [sys.executable, "-m", "deer_jax.cli.main", "bench", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        first = process.stderr.readline()  # of progress: it is at work
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert first.startswith("deer-jax: ")
    assert process.returncode == 143
    assert said.splitlines()[-1] == "deer-jax: terminated: files are written at the end, whole or not at all"
    assert all(line.startswith("deer-jax: ") for line in said.splitlines())


def test_a_program_without_stdout(tmp_path, environment, folder, ids):
    command = f"exec '{sys.executable}' -m deer_jax.cli.main decode --target '{folder}' --prompts '{ids}' >&-"
    options = f" --max-new-tokens 3 --json '{tmp_path / 'numbers.json'}'"
    done = subprocess.run(["sh", "-c", command + options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "numbers.json").read_text())["new_tokens"] == 3  # nothing was printed into it


@pytest.fixture
def stdout(monkeypatch):
    """Puts a stream in the place of stdout."""
    opened = []

    def call(name, **options):
        opened.append(open(name, "w", **options))  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", opened[-1])

    yield call
    for stream in opened:
        stream.close()


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["decode", "--help"]], ids=" ".join)
def test_a_full_stdout(run, stdout, argv):
    stdout("/dev/full")
    status, _, err = run(*argv)
    assert (status, err) == (1, "deer-jax: error: stdout: No space left on device\n")


def test_a_pipe_that_nobody_reads(run, stdout):
    reading, writing = os.pipe()
    os.close(reading)
    stdout(writing)
    assert run("--help") == (0, "", "")


def test_stderr_that_nobody_reads_ends_nothing(monkeypatch):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        say("one")
        say("two")


def test_a_stdout_that_cannot_say_tau(run, monkeypatch, folder, ids):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    options = ["--drafter", "τ=from-target", "--draft-lengths", "2", "--max-new-tokens", "4", "--repeats", "1"]
    assert run("bench", "--target", folder, "--prompts", ids, *options)[0] == 0
    assert b"? k=2" in stream.buffer.getvalue()  # pyrefly: ignore


def test_lines_are_short_and_cannot_steer_a_terminal(capsys):
    say("error: \x1b[31mred\x07 caf\udce9\n" + "x" * 5000 + "; the remedy")
    said = capsys.readouterr().err
    assert said.startswith(r"deer-jax: error: \x1b[31mred\x07 caf\udce9 xxx")
    assert said.endswith("xxx; the remedy\n")
    assert len(said) < LONGEST + 100


@pytest.fixture
def cache(monkeypatch):
    """Restores what `keep_compiled_programs` sets."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_without_a_home_nothing_is_kept(monkeypatch, cache, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # as unwritable as it gets, also for root
    with pytest.warns(UserWarning, match="compiled programs are not kept, the next start compiles again: Not a dir"):
        keep_compiled_programs()
    assert cache() is None
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    with pytest.warns(UserWarning, match="compiled programs are not kept"):
        keep_compiled_programs()
    assert cache() is None


def test_where_compiled_programs_are_kept(monkeypatch, cache, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "relative/cache")
    keep_compiled_programs()
    assert cache() == str(tmp_path / "relative" / "cache")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/proc/none")
    with pytest.warns(UserWarning, match="compiled programs are not kept"):
        keep_compiled_programs()
    assert cache() is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    keep_compiled_programs()
    assert cache() is None


def test_a_current_folder_that_is_gone(run, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    line = "deer-jax: error: the current folder does not exist any more; change into another one\n"
    assert run("decode", "--target", "/t", "--prompt", "a") == (2, "", line)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "unknown verb 'train', did you mean 'pretrain' or 'align'?"),
        (["Decode"], "unknown verb 'Decode', did you mean 'decode'?"),
        (["serve"], "unknown verb 'serve', valid: demo, decode, pretrain, answers, align, bench, pipeline, export"),
        (["x" * 9000], "unknown verb 'xxx"),
        (["align", "my.yaml"], "unexpected argument 'my.yaml'; did you mean --recipe my.yaml?"),
        (["pipeline", "my.yml"], "unexpected argument 'my.yml'; did you mean --steps my.yml?"),
        (["bench", "my.yaml"], "unexpected argument 'my.yaml'; did you mean --config my.yaml?"),
        (["export", "--output="], "--output: is empty: name a path"),
        (["answers", "--output", ""], "--output: is empty: name a path"),
        (["align", "--recipe", ""], "--recipe: is empty: name a path"),
        (["decode", "--target", ""], "--target: is empty: name a path"),
        (["decode", "--json", ""], "--json: is empty: name a path"),
        (["export", "--output", "a" * 5000], "--output: 'aaaa"),
        (["decode", "--target", "a" * 300], "a...': File name too long"),
        (["bench", "--drafter", "a\0b"], "--drafter: 'a\\x00b': embedded null byte"),
        (["decode", "--prompts", "loop"], "--prompts: 'loop': Too many levels of symbolic links"),
        (["decode", "--prompts", "loop/a"], "--prompts: 'loop/a': Too many levels of symbolic links"),
        (["decode", "--prompt", "caf\udce9"], "--prompt: is not UTF-8: 'caf\\udce9'"),
        (["decode", "--field", "caf\udce9"], "--field: is not UTF-8"),
        (["decode", "--target", "caf\udce9", "--prompt", "a"], "'caf\\udce9': "),
        (["decode", "--temperature", "nan"], "--temperature: invalid float value: 'nan'"),
        (["decode", "--temperature", "inf"], "--temperature: invalid float value: 'inf'"),
        (["decode", "--top-p", "1e999"], "--top-p: invalid float value: '1e999'"),
        (["decode", "--top-p", "0.9_9"], "--top-p: invalid float value: '0.9_9'"),
        (["decode", "--top-k", "1_0"], "--top-k: invalid int value: '1_0'"),
        (["decode", "--seed", "9" * 5000], "--seed: invalid int value: '999"),
        (["decode", "--seed", "٣"], "--seed: invalid int value: '٣'"),
        (["decode", "--limit", "-1", "--prompts", "ids.jsonl", "--target", "t"], "limit must be at least 1, got -1"),
        (["decode", "--seed", "1", "--seed", "2"], "--seed is given twice, as '1' and '2', but takes one value"),
        (["decode", "--target", "a", "--target=b"], "--target is given twice, as 'a' and 'b', but takes one value"),
        (["decode", "--chat", "--no-chat"], "--chat is given twice, as 'True' and 'False', but takes one value"),
        (["bench", "--draft-lengths", "2,,4"], "--draft-lengths: invalid comma-separated numbers value: '2,,4'"),
    ],
    ids=lambda each: " ".join(each)[:40].encode("ascii", "replace").decode() if isinstance(each, list) else "",
)
def test_wrong_words_are_one_line(run, monkeypatch, tmp_path, ids, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("deer-jax: error: ")
    assert err.count("\n") == 1
    assert len(err) < 1000
    assert message in err


def test_the_same_value_twice_is_one():
    twice = ["--target=t", "--drafter=d", "--seed", "3", "--seed=3", "--chat", "--chat"]
    options = parse(BenchOptions, "bench", twice, "")
    assert (options.seed, options.chat) == (3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature: [0, 1]", "key 'temperature' takes one value, got '[0, 1]'"),
        ("target: [a, b]", "key 'target' takes one value"),
        ("target: [a]", "key 'target' takes one value"),
        ("chat: [true]", "key 'chat': expected true or false"),
        ("chat: 1", "key 'chat': expected true or false, got '1'"),
        ("temperature: {a: 1}", "key 'temperature' takes one value"),
        ("draft_lengths: {a: 1}", "key 'draft_lengths' takes numbers"),
        ("draft_lengths: [[1, 2]]", "key 'draft_lengths': expected text or a number, got '[1, 2]', a YAML list"),
        ("draft_lengths: [1, null]", "key 'draft_lengths': expected text or a number, got 'None'"),
        ("temperature: true", "key 'temperature': expected text or a number, got 'True', a YAML bool"),
        ("target: true", "key 'target': expected text or a number, got 'True', a YAML bool; quotes make it text"),
        ("prompt: 2024-01-01", "key 'prompt': expected text or a number, got '2024-01-01', a YAML date; quotes make"),
        ("prompt: !!binary aGk=", "a YAML bytes"),
        ("prompt: !!set {a, b}", "a YAML set"),
        ("template: {a: 2024-01-01}", "key 'template.a': Object of type date is not JSON"),
        ("temperature: .nan", "--temperature: invalid float value: 'NaN'"),
        ("temperature: 1e999", "--temperature: invalid float value: '1e999'"),
        (f"seed: {'9' * 5000}", "not readable as YAML"),
        (f"seed: 0x{'f' * 5000}", "may be read in several ways"),
        ("top_p: 1\ntop-p: 1", "the key 'top-p' stands twice, also as 'top_p'"),
        ("seed: 1\nseed: 2", "the key 'seed' stands here and in line 1"),
        ("1: 2", "unknown key '1'"),
        (f"{'k' * 900}: 2", "unknown key 'kkk"),
        ("target: ''", "--target: is empty: name a path"),
        ('json: "a\\0b"', "--json: 'a\\x00b': embedded null byte"),
    ],
)
def test_wrong_values_of_a_config_file_are_one_line(run, monkeypatch, tmp_path, text, message):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text, encoding="utf-8")
    status, out, err = run("bench", "--config", "run.yaml")
    assert (status, out) == (2, "")
    assert err.startswith("deer-jax: error: run.yaml: ")
    assert err.count("\n") == 1
    assert len(err) < 1000
    assert message in err


def test_options_fuzz(tmp_path, monkeypatch):
    """Random values on the command line and in a file: an object of the right types, or an InputError of one line."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(11)
    words = ["", " ", "a", "-1", "0", "1", "1e9", "nan", "--", "-", "=", "a=b", "9" * 400, "\0", "\ud800", "τ", "[1",
             "{}", "1,2", ",", "null", "true", "/", "..", "~", "%s", "{output}", "\n", "x" * 5000]  # fmt: skip
    values = ["~", "[]", "{}", "[1, [2]]", "{a: {b: c}}", "!!set {a}", "2001-01-01", ".inf", "0x" + "f" * 4000, "a",
              "true", "-0", "1_0", "010", "1:30", "!!float 3", "!!int '4'", "<<", "|\n  a", "'é'", "1", "'\0'",
              "[0x" + "f" * 4000 + "]"]  # fmt: skip
    for case in range(800):
        cls = rng.choice([BenchOptions, AnswersOptions, ExportOptions])
        names = [*cls.__dataclass_fields__, "nmae", "--", ""]
        argv = []
        for _ in range(rng.randrange(4)):
            flag, word = "--" + rng.choice(names).replace("_", "-"), rng.choice(words)
            argv += rng.choice([[f"{flag}={word}"], [flag, word], [flag], [word]])
        text = "".join(f"{rng.choice(names)}: {rng.choice(values)}\n" for _ in range(rng.randrange(4)))
        Path("c.yaml").write_text(text)
        try:
            found = parse(cls, "verb", [*argv, "--config", "c.yaml"], "")
            right = all(type(getattr(found, name, 0)) in (int, type(None)) for name in ("limit", "seed", "top_k"))
        except InputError as error:
            right = len(str(error)) < 1000
        except BaseException:
            right = False
        assert right, f"seed 11, case {case}: {argv!r:.2000} with {text!r:.2000}"


# What is written.


@pytest.fixture
def full(tmp_path) -> Path:
    """A device like /dev/full, in a folder of ours: a mistake shall not cost the machine its own."""
    path = tmp_path / "full"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.stat("/dev/full").st_rdev)
        os.close(os.open(path, os.O_WRONLY))
    except PermissionError:
        pytest.skip("devices are made by root only, and not on every file system")
    return path


def test_devices_stay_devices(run, full, folder, ids):
    argv = ["decode", "--target", folder, "--prompts", ids, "--max-new-tokens", "2", "--json", str(full)]
    status, _, err = run(*argv)
    assert (status, err.splitlines()[-1]) == (1, f"deer-jax: error: {full}: cannot be written: No space left on device")
    assert stat.S_ISCHR(os.lstat(full).st_mode)


def test_a_pipe_gets_what_a_file_would(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    check_writable(pipe)  # must not look like an end to the reader
    values = {"text": "x" * 200_000, "half": "\ud800"}
    write_json(pipe, values)
    reader.join(10)
    assert json.loads(found[0]) == values
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_stdout_as_a_file_keeps_the_order(tmp_path, monkeypatch):
    """`bench --json /dev/stdout > FILE`: what is printed does not come to lie over the numbers."""
    kept = os.dup(1)
    with open(tmp_path / "out", "w+b") as file, open(1, "w", closefd=False) as stdout:
        os.dup2(file.fileno(), 1)
        try:
            monkeypatch.setattr(sys, "stdout", stdout)
            print("before")
            write_json(Path("/dev/stdout"), [1])
            print("after", flush=True)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    assert (tmp_path / "out").read_text() == "before\n[\n  1\n]\nafter\n"


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        check_writable(path)
    return str(error.value)


def test_outputs_are_tried_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "nowhere").symlink_to("none")
    assert f"no folder {tmp_path / 'none'} to write it to" in refused(tmp_path / "none" / "a")
    assert "is a folder; name a file" in refused(tmp_path)
    assert "link: is a link to mine; name the file itself" in refused(tmp_path / "link")
    assert "nowhere: is a link to none" in refused(tmp_path / "nowhere")
    assert "File name too long" in refused(tmp_path / ("a" * 300))
    assert "no folder" in refused(tmp_path / "mine" / "a")
    assert "/proc/self/a: cannot be written" in refused(Path("/proc/self/a"))
    check_writable(tmp_path / "mine")
    check_writable(tmp_path / "new")
    check_writable(tmp_path / ("é" * 120))
    check_writable(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine", "nowhere"]
    assert (tmp_path / "mine").read_text() == "mine"
    real = os.open

    def full(path, flags, *mode, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(RunError, match="new: cannot be written: No space left on device"):
        check_writable(tmp_path / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_outputs_without_permission(tmp_path):
    (tmp_path / "mine").touch(0o444)
    assert "mine: cannot be written: Permission denied" in refused(tmp_path / "mine")
    tmp_path.chmod(0o555)
    assert "new: cannot be written: Permission denied" in refused(tmp_path / "new")


def test_outputs_are_no_inputs(tmp_path):
    one, same, other = tmp_path / "one", tmp_path / "same", tmp_path / "other"
    one.write_text("mine")
    os.link(one, same)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for outputs, inputs in (([one], [one]), ([same], [str(one)]), ([one, same], []), ([other, other], [])):
        with pytest.raises(InputError, match="is read or written under another option too; name another file"):
            check_distinct(outputs, inputs)
    with pytest.raises(InputError, match=r"config.json: exists in the folder .*model, which is read"):
        check_distinct([tmp_path / "model" / "config.json"], [str(tmp_path / "model")])
    check_distinct([tmp_path / "model" / "new.json", one, None], [tmp_path / "model", other, None, "owner/name"])
    check_distinct([Path("/dev/full"), Path("/dev/full")], [Path("/dev/full")])
