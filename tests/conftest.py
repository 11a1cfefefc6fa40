"""Settings every test runs under, such that the processes a test starts have them too."""

import importlib.metadata
import os
import signal
import tempfile
from pathlib import Path

import pytest

# Before JAX is first imported: eight simulated devices on the CPU, and no silent promotion of ranks.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Most of the tests' time is compilation, which takes half as long without optimisations. With
# VIT_JAX_TEST_OPTIMIZED=1 they are compiled as users' programs are; CI does so for the files of NUMBERS in the Makefile.
NOT_OPTIMIZED = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
NOT_OPTIMIZED += " --xla_cpu_parallel_codegen_split_count=1"  # the processes share the cores
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions end at this flag, which halves what is left
    NOT_OPTIMIZED += " --xla_cpu_use_fusion_emitters=false"
if os.environ.get("VIT_JAX_TEST_OPTIMIZED") != "1":
    os.environ["XLA_FLAGS"] += NOT_OPTIMIZED
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# What one test compiled, no other compiles again: the workers of pytest-xdist and what tests start inherit the
# folder of the first process, with which it goes. JAX finds a program only under the same path of the folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="vit_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.0"
# No test leaves this machine or looks into what its user has fetched: other hosts are behind a proxy that is not there.
for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
    os.environ[name] = "http://127.0.0.1:9"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
_USER = Path(os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ.get("PYTEST_XDIST_WORKER", "user"))
os.environ["VIT_JAX_CACHE"], os.environ["HF_HOME"] = str(_USER / "checkpoints"), str(_USER / "hub")

# `nohup` and shells that start background jobs let a process ignore Ctrl-C, and what it starts inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="run only the first case of each parametrized test")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--first-cases"):
        first = set({item.nodeid.partition("[")[0]: item for item in reversed(items)}.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in first])
        items[:] = [item for item in items if item in first]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of oracles and real data, which is not part of the package; tests that need it are skipped without it."""
    folder = Path(os.environ.get("VIT_JAX_SHARED", ROOT / ".." / "shared"))
    if not (folder / "oracles").is_dir():
        pytest.skip(f"needs the shared folder of oracles; none at {folder} (set VIT_JAX_SHARED)")
    return folder.resolve()


@pytest.fixture(scope="session")
def prepared_cifar100(shared, tmp_path_factory):
    """The TFDS directory that holds the real CIFAR-100, which all test processes of a session share."""
    from vit_jax.data.prepare import prepare
    from vit_jax.data.tasks import TASKS

    folder = tmp_path_factory.getbasetemp()
    data_dir = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tfds"
    data_dir.mkdir(exist_ok=True)
    # The first process prepares the data; the others wait for it.
    prepare(TASKS["cifar100"], shared / "data" / "cifar-100-binary.tar.xz", data_dir)
    return data_dir


@pytest.fixture
def demo():
    """The command line of the demo's training."""
    return ["main.py", "--config", str(ROOT / "configs" / "demo.py")]


@pytest.fixture
def noise():
    """noise(height, width): an image of noise, uint8 [height, width, 3], a new one at each call."""
    import numpy as np

    draw = np.random.default_rng(0)
    return lambda height=32, width=32: draw.integers(0, 256, (height, width, 3), np.uint8)
