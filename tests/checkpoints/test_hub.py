"""What a model is named by: folders, hub ids, and what is asked for on the hub only if it is said so."""

from pathlib import Path

import huggingface_hub
import pytest

from deer_jax.checkpoints.hub import model_name, resolve_folder
from deer_jax.checkpoints.huggingface import save_folder
from deer_jax.checkpoints.load import load_target
from deer_jax.errors import InputError
from tests.tiny import random_params, tiny


def refused(words):
    return pytest.raises(InputError, match=rf"\A(?=[^\n]{{1,999}}\Z)[^\n]*{words}")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def asked(here, tmp_path, monkeypatch):
    """The ids that the hub was asked for; it has owner/there only."""
    names: list[str] = []

    def download(name, *, allow_patterns):
        names.append(name)
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern for pattern in allow_patterns)
        if name == "owner/there":
            return str(tmp_path)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return names


def test_hub_ids(asked, here, tmp_path):
    assert resolve_folder("owner/there") == resolve_folder("hub:owner/there") == tmp_path
    assert asked == ["owner/there"] * 2
    with refused("owner/absent: .*no network.*spelling"):
        load_target("owner/absent")
    # A folder here wins over the hub, unless the hub is said.
    (here / "owner" / "there").mkdir(parents=True)
    assert resolve_folder("owner/there") == Path("owner/there")
    assert resolve_folder(Path("owner/there")) == Path("owner/there")
    assert len(asked) == 3
    assert resolve_folder("hub:owner/there") == tmp_path


@pytest.mark.parametrize(
    "name", ["runs/mine", "models/mine", "Checkpoints/last", "out/x", "weights/x", "./a/b", "../a", "a/", "a/b/",
             "a/b/c", "justaname", "~/no/such", ".hidden/x", "a b/c", "a\\b", "here/x", "file/x",
             "owner/é", "owner/x\n"],
)  # fmt: skip
def test_what_looks_like_a_path_is_not_asked_for(asked, here, name):
    (here / "here").mkdir()
    (here / "file").touch()
    with refused(r"no such folder.*a model of the Hugging Face hub is written hub:"):
        resolve_folder(name)
    assert not asked


def test_the_remedy_names_the_id_and_the_place(asked, here):
    with refused(f"runs/mine: no such folder here \\(in {here}\\); .* is written hub:runs/mine"):
        resolve_folder("runs/mine")
    with refused("/no/such/folder: no such folder; check the path"):
        resolve_folder("/no/such/folder")
    for name in ("hub:", "hub:name", "hub:/a", "hub:../a", "hub:a/b/c", "hub:é/b"):
        with refused("is written hub:OWNER/NAME"):
            resolve_folder(name)
    assert not asked


def test_names_that_no_file_can_have(asked, here):
    (here / "loop").symlink_to("loop")
    (here / "file").touch()
    for name, words in (
        ("", "a model is named by a folder or a hub id, got ''"),
        (None, "a model is named by a folder or a hub id, got None"),
        (b"model", "a model is named by"),
        (["a"], "a model is named by"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("~nobody-of-this-name/x", "no such home folder"),
        ("file", "is a file; name the folder of the model"),
    ):
        with refused(words):
            resolve_folder(name)
    assert not asked


def test_a_working_directory_that_is_gone(asked, here, tmp_path):
    save_folder(tmp_path / "model", tiny("llama"), random_params(tiny("llama")))
    here.rmdir()
    for name in ("runs/mine", "model"):
        with refused(rf"{name}: no such folder here \(in a folder that is gone\)"):
            resolve_folder(name)
    assert load_target(tmp_path / "model").digest()
    assert not asked


def test_models_are_called_by_the_last_part_of_their_name():
    assert [model_name(name) for name in ("a/b", "hub:a/b", Path("/x/y"), ".")] == ["b", "b", "y", Path.cwd().name]
    assert model_name("hub/models--Qwen--Qwen3-8B/snapshots/b968826d") == "Qwen3-8B"
    assert model_name("hub/models--gpt2/snapshots/b968826d") == "gpt2"
