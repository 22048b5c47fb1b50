"""The shape of the source tree: which layer may import which, and a few things that no file may do."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import deer_jax

pytestmark = pytest.mark.representative

PACKAGE = Path(__file__).resolve().parent.parent / "deer_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Lowest first; a module imports from its own layer and from earlier ones.
LAYERS = (
    "errors", "files", "stores", "spools", "formats", "digests", "config", "sharding", "build", "processes", "models",
    "diffusion", "data", "drafters", "checkpoints", "decoding", "training", "planning", "bench", "demo", "cli",
)  # fmt: skip
PUBLIC = "__init__"  # the top: imports anything, and only the command line imports it
HOST_ONLY = ("diffusion", "data")  # work without jax, so of the package they see the lowest layers and each other only
WITHOUT_JAX = ("errors", "files", "stores", "spools", "formats", "digests", "config")
DEVICE_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}
MESH_AXES = {"data", "fsdp", "tensor"}
COLLECTIVES = {"psum", "pmax", "pmin", "pmean", "psum_scatter", "all_gather", "all_to_all", "ppermute", "axis_index",
               "axis_size"}  # fmt: skip

# What notebooks, the command line and users build on: a name is added here on purpose, and none is lost.
PUBLIC_NAMES = {
    "AlignReport", "AnswersReport", "DecodeResult", "DecodeStats", "Draft", "Drafter", "DrafterConfig", "InputError",
    "Method", "PretrainReport", "Regeneration", "Row", "RunError", "Seen", "Target", "align", "answers", "bench",
    "decode", "demo_pair", "drafter_from_target", "export", "learning_curve", "load_drafter", "load_target",
    "make_mesh", "pretrain", "regenerate", "save_drafter", "stream", "stream_blocks",
}  # fmt: skip


def layer_of(module: str) -> str:
    """`models` for deer_jax.models.cache; `__init__` for deer_jax itself and the names it exports."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PUBLIC


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            if base == "deer_jax":  # `from deer_jax import models` names a layer, `import decode` a public function
                yield from (f"{base}.{alias.name}" if alias.name in LAYERS else base for alias in node.names)
            else:
                yield base


def dotted(node: ast.expr) -> str:
    """`jax.sharding.PartitionSpec` for that expression; empty for anything but names and attributes."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def strings(call: ast.Call) -> set[str]:
    """The string literals among a call's arguments."""
    found = set()
    for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
        for node in ast.walk(argument):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def import_problems(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    layer = layer_of(module)
    for name in imports(tree, module, is_package):
        package = name.split(".")[0]
        if package in ("pickle", "torch"):
            yield f"imports {package}"
        elif package in DEVICE_PACKAGES and layer in HOST_ONLY:
            yield f"{layer} imports {package}"
        elif package == "deer_jax" and layer != PUBLIC:
            below = layer_of(name)
            if below == PUBLIC:
                if layer != "cli":
                    yield "imports the public names; only cli may"
            elif below not in LAYERS:
                yield f"imports {name}, which has no place in LAYERS"
            elif LAYERS.index(below) > LAYERS.index(layer):
                yield f"{layer} imports {below}, which lies above it"
            elif layer in HOST_ONLY and below not in (*WITHOUT_JAX, *HOST_ONLY):
                yield f"{layer} imports {below}, which may import jax"


def usage_problems(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    layer = layer_of(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os" and layer != "cli":
            yield from (f"imports os.{a.name}" for a in node.names if a.name in ("environ", "getenv"))
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name in ("os.environ", "os.getenv") and layer != "cli":
                yield f"reads {name}; only cli may"
            if name in ("jax.default_backend", "jax.devices") and layer not in ("build", "sharding"):
                yield f"asks {name}; what the machine is like is decided once, see build"
            if name in ("nnx.jit", "nnx.Optimizer", "flax.nnx.jit", "flax.nnx.Optimizer"):
                yield f"uses {name}: its dispatch costs too much, see jax.jit and optax"
        if isinstance(node, ast.Call):
            name = dotted(node.func).split(".")[-1]
            if name == "print" and layer != "cli":
                yield "prints; only cli may"
            if layer != "sharding" and name in ("P", "PartitionSpec") and strings(node):
                yield f"names mesh axes {sorted(strings(node))}; only sharding may"
            if layer != "sharding" and name in COLLECTIVES and strings(node) & MESH_AXES:
                yield f"{name} names a mesh axis; only sharding may"


def problems(source: str, path: Path) -> list[str]:
    """What is wrong with a source file of the package; path is relative to the package."""
    is_package = path.name == "__init__.py"
    parts = path.parent.parts if is_package else path.with_suffix("").parts
    module = ".".join(["deer_jax", *parts])
    tree = ast.parse(source)
    checks: tuple[Callable[[ast.AST, str, bool], Iterator[str]], ...] = (import_problems, usage_problems)
    found = [problem for check in checks for problem in check(tree, module, is_package)]
    if layer_of(module) not in (*LAYERS, PUBLIC):
        found.append("has no place in LAYERS")
    if (lines := len(source.splitlines())) > MAX_LINES:
        found.append(f"has {lines} lines, more than {MAX_LINES}: probably two nouns")
    return found


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_source_file(file: Path):
    assert problems(file.read_text(encoding="utf-8"), file.relative_to(PACKAGE)) == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("models/a.py", "from deer_jax.decoding.loop import run", "models imports decoding, which lies above it"),
        ("models/a.py", "from deer_jax import cli", "models imports cli, which lies above it"),
        ("models/a.py", "from ..decoding import loop", "models imports decoding, which lies above it"),
        ("models/__init__.py", "from ..decoding import loop", "models imports decoding, which lies above it"),
        ("models/a.py", "def f():\n import deer_jax.cli", "models imports cli, which lies above it"),
        ("models/a.py", "import deer_jax", "imports the public names; only cli may"),
        ("decoding/a.py", "from deer_jax.training import loop", "decoding imports training, which lies above it"),
        ("decoding/a.py", "from deer_jax.strange import x", "imports deer_jax.strange, which has no place in LAYERS"),
        ("strange.py", "", "has no place in LAYERS"),
        ("diffusion/a.py", "import jax.numpy as jnp", "diffusion imports jax"),
        ("data/a.py", "from deer_jax.models import cache", "data imports models, which may import jax"),
        ("training/a.py", "import pickle", "imports pickle"),
        ("checkpoints/a.py", "from torch import nn", "imports torch"),
        ("training/a.py", "print(1)", "prints; only cli may"),
        ("bench/a.py", "import os\nos.environ['A']", "reads os.environ; only cli may"),
        ("bench/a.py", "from os import getenv", "imports os.getenv"),
        ("models/a.py", "P(('data', 'fsdp'), None)", "names mesh axes ['data', 'fsdp']; only sharding may"),
        ("models/a.py", "lax.psum(x, 'tensor')", "psum names a mesh axis; only sharding may"),
        (
            "models/a.py",
            "scan = jax.default_backend() != 'cpu'",
            "asks jax.default_backend; what the machine is like is decided once, see build",
        ),
        ("training/a.py", "nnx.jit(f)", "uses nnx.jit: its dispatch costs too much, see jax.jit and optax"),
        ("models/a.py", "x = 1\n" * 401, "has 401 lines, more than 400: probably two nouns"),
    ],
)
def test_wrong_source_is_found(path: str, source: str, problem: str):
    assert problems(source, Path(path)) == [problem]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli/a.py", "import os\nimport deer_jax\nfrom deer_jax import decode\nprint(os.environ)"),
        ("__init__.py", "from deer_jax.decoding.loop import decode"),
        ("decoding/a.py", "from deer_jax.models.cache import KVCache\nfrom . import state\nP(None, axis)"),
        ("sharding.py", "P('data')"),
        ("data/a.py", "import numpy\nfrom deer_jax.config import InputError\nfrom deer_jax.data import sources"),
    ],
)
def test_right_source_passes(path: str, source: str):
    assert problems(source, Path(path)) == []


def test_the_public_names_are_these():
    assert set(deer_jax.__all__) == PUBLIC_NAMES
    assert list(deer_jax.__all__) == sorted(deer_jax.__all__)
    for name in PUBLIC_NAMES:
        assert getattr(deer_jax, name).__doc__, name
