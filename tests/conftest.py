"""Settings for every test: no accelerator, no network, strict JAX; and where the data is."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported, and inherited by the programs that tests start.
os.environ["JAX_PLATFORMS"] = PLATFORM = os.environ.get("DEER_JAX_TEST_PLATFORM", "cpu")  # else: benchmarks/gpu
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_GCE_CHECK"] = "true"  # nobody looks for the account of a machine
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # nor asks Google what kind of bucket it is
if "PYTEST_XDIST_WORKER" in os.environ:
    # One compute thread per worker, for XLA and for torch: more of them only wait for each other.
    os.environ["NPROC"] = os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"  # nor does compiling in parts pay with one

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.fake_store import Bucket, FakeStore

ROOT = Path(__file__).resolve().parent.parent
CACHE, CACHE_BYTES = ROOT / ".cache" / "xla", 2**30
DEVICES = 8
DATA = Path(os.environ.get("DEER_JAX_DATA") or ROOT.parent / "shared" / "data")

# For the tests alone: the programs that tests start run as users run them.
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Most of the time of the tests is compilation. XLA's own passes are left as they are, the program it arrives at is the
# same; the machine code made of that is less optimised. What was compiled before is read from disk; the bound on the
# size also makes JAX lock the folder, which workers that write the same entry need.
jax.config.update("jax_disable_most_optimizations", PLATFORM == "cpu")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# A tenth of what is left went into looking for garbage: tracing makes many objects.
gc.set_threshold(20_000, 20)


def pytest_report_header() -> str:
    found = "found" if DATA.is_dir() else "not found, tests that read it are skipped (set DEER_JAX_DATA)"
    where = f"{DEVICES} virtual CPU devices" if PLATFORM == "cpu" else PLATFORM
    return f"jax {jax.__version__} on {where}; data: {DATA}, {found}"


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps() -> Iterator[None]:
    """Every compiled program holds memory maps, of which a process has a limited number (65,530), and dies beyond."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        from deer_jax.decoding import programs

        programs._compiled.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public data sets and small models; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}; set DEER_JAX_DATA")
    return DATA


@pytest.fixture(scope="session")
def stories_dir(data_dir: Path) -> Path:
    """The Hugging Face folder of stories260k, a real pretrained target of 260 thousand parameters."""
    folder = data_dir / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For programs that tests start: they find what the tests compiled, and write nothing there, as they may be killed
    or find no room."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(CACHE_BYTES),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
        # A compiled program is for these settings.
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


@pytest.fixture(scope="session")
def object_store() -> Iterator[FakeStore]:
    """What stands for gs:// in this process and in the programs that its tests start."""
    store = FakeStore()
    with store.serving() as address:
        os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = address
        yield store
        del os.environ["STORAGE_EMULATOR_HOST"], os.environ["TENSORSTORE_GCS_HTTP_URL"]


@pytest.fixture
def bucket(object_store: FakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """An empty bucket; copies of what is read from it are made in a home of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return object_store.new_bucket()


@pytest.fixture
def optimised() -> Iterator[None]:
    """Programs are optimised as for users: for tests that run longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def compile_anew() -> Iterator[None]:
    """Nothing is read from the cache: for tests that look for scope names in compiled text, which may be old there."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether it uses the cache
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
