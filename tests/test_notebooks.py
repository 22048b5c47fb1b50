"""The notebooks run from top to bottom as they stand, what they say of their results holds, and none are stored."""

import ast
import os
import re
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

import deer_jax
from tests.test_docs import link_problems

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.])(/(home|root|work|tmp|mnt|Users|opt|usr|var)/|[A-Z]:\\)")
CELL_SECONDS = 900


class Executed:
    """A notebook after its run: what it printed, and its outputs by MIME type."""

    def __init__(self, book: nbformat.NotebookNode):
        outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
        streams = {
            name: "".join(each.text for each in outputs if each.output_type == "stream" and each.name == name)
            for name in ("stdout", "stderr")
        }
        self.printed, self.complaints = streams["stdout"], streams["stderr"]
        self.shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]

    @property
    def pictures(self) -> int:
        return sum("image/png" in data for data in self.shown)

    @property
    def pages(self) -> str:
        return "".join(data.get("text/html", "") for data in self.shown)

    def number(self, pattern: str) -> float:
        found = re.search(pattern, self.printed)
        assert found, f"nothing like {pattern!r} was printed:\n{self.printed}"
        return float(found[1])


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a notebook by the beginning of its name, in a process of this Python and an empty folder."""
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    # As a user would run it, but for compiled programs: they are made, and kept, as those of the other tests.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(temporary),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm, where ipywidgets is not installed
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(jax.config.jax_compilation_cache_max_size),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def run(beginning: str, *, optimised: bool = False) -> Executed:
        """optimised: its programs are, which pays where it trains."""
        (path,) = (path for path in NOTEBOOKS if path.name.startswith(beginning))
        book = nbformat.read(path, as_version=4)
        client = NotebookClient(
            book, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(here)}}
        )
        client.execute(env=environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimised))})
        assert list(here.iterdir()) == [], "writes beside the notebook"
        assert list(temporary.glob("deer_jax*")) == [], "leaves its temporary folder behind"
        executed = Executed(book)
        assert executed.complaints == ""
        return executed

    return run


def test_decode_and_look_at_blocks(execute):
    found = execute("1_")
    assert "the same tokens: True" in found.printed
    assert "by hand the same rounds: True" in found.printed
    assert "the same seed, the same tokens: True" in found.printed
    assert "the text of decode: True" in found.printed
    assert found.printed.count("anchor  ") == 4
    assert found.number(r"drafted .*τ = ([\d.]+)") > 1
    assert found.pages.count("<span style='background:") > 4
    assert found.pictures == 1


def test_align_a_drafter(execute):
    found = execute("2_", optimised=True)
    assert found.number(r"-> ([\d.]+)") > found.number(r"τ ([\d.]+) ->")
    assert "exact: True" in found.printed
    assert "model.safetensors" in found.printed
    assert found.pictures == 2


def test_bring_your_own_model(execute):
    found = execute("3_")
    assert found.printed.count("the same tokens: True") == 3
    assert "False" not in re.findall(r"the same tokens: (\w+)", found.printed)
    assert found.printed.count("InputError: ") == 9
    assert "did you mean 'length'?" in found.printed
    assert "# user: What is a list?" in found.printed
    assert "# deer:" in found.printed
    assert found.number(r"τ = ([\d.]+)") >= 1.9


@pytest.mark.skipif("DEER_JAX_SMOLLM2" not in os.environ, reason="DEER_JAX_SMOLLM2 names no SmolLM2")
def test_a_real_model(execute):
    found = execute("4_")
    assert len(re.findall(r"tokens in \d+ rounds", found.printed)) == 3
    assert found.pages.count("<span style='background:") > 30
    assert found.pictures == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_stored_without_outputs(path: Path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.source
    text = path.read_text(encoding="utf-8")
    assert not MACHINE_PATH.search(text)
    assert list(link_problems("\n".join(c.source for c in book.cells if c.cell_type == "markdown"), path, str)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_only_public_names(path: Path):
    book = nbformat.read(path, as_version=4)
    code = "\n".join(re.sub("^%.*$", "", c.source, flags=re.MULTILINE) for c in book.cells if c.cell_type == "code")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("deer_jax"), node.module
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("deer_jax.") for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "deer_jax":
            assert node.attr in (*deer_jax.__all__, "__file__"), node.attr


def test_machine_paths_are_found():
    for text in ("/home/me/x", '"/tmp/x"', "see /usr/lib/python", "C:\\me"):
        assert MACHINE_PATH.search(text), text
    for text in ("docs/home/x", "../docs/numbers.md", "a/tmp/b", "Qwen/Qwen2.5-0.5B-Instruct"):
        assert not MACHINE_PATH.search(text), text
