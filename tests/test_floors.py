"""The floors of the house: what may import what, read off the import statements."""

import ast
import graphlib
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up; a file may import its own floor and those below.
FLOORS = (
    {"errors", "files", "config", "config_rules", "config_files", "metrics", "models"},
    {"transfer", "fetch", "images", "cli", "runtime", "resampling", "transforms", "formats"},
    {"data", "interop"},
    {"checkpoints"},
    {"training", "reports"},
    {"predict", "studies"},
    {"vit_jax", "main", "configs", "benchmarks"},
)
FORBIDDEN = {  # beyond the floors: room → what its files never import, wherever in the file
    "models": {"vit_jax.config", "vit_jax.data"},
    "data": {"jax", "flax", "optax", "orbax", "chex"},  # a decoding worker must not grab a GPU
    "transforms": {"vit_jax.data"},
    "training": {"vit_jax.reports"},
    "reports": {"vit_jax.training"},
}
# They run in their own process and by their path, and import what nothing else may.
PEERS = {"vit_jax.interop.peers", "benchmarks.peer_process"}
NOWHERE = {"tensorflow", "torch", "timm", "transformers", "torchvision"}


def read(root: Path) -> dict[str, set[str]]:
    """Every module of the product under root → the modules that its import statements name, in functions too."""
    files = [
        *root.glob("main.py"),
        *itertools.chain(*(root.glob(f"{room}/**/*.py") for room in ("vit_jax", "configs", "benchmarks"))),
    ]
    paths = {file: file.relative_to(root).with_suffix("").parts for file in files}
    modules = {".".join(path).removesuffix(".__init__"): (file, path) for file, path in paths.items()}

    def named(file: Path, path: tuple[str, ...]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = [*(path[: -node.level] if node.level else ()), *(node.module.split(".") if node.module else ())]
                yield from (".".join([*base, alias.name]) for alias in node.names)

    def resolve(name: str) -> str:
        if name.split(".")[0] != "vit_jax":
            return name
        while name not in modules and "." in name:  # `from module import name` names something inside a module
            name = name.rpartition(".")[0]
        return name

    return {module: {resolve(name) for name in named(*where)} - {module} for module, where in modules.items()}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "vit_jax" and len(parts) > 1 else parts[0]


def floor(module: str) -> int:
    if module.endswith(".__main__"):
        return len(FLOORS)
    return next((number for number, rooms in enumerate(FLOORS, 1) if room(module) in rooms), 0)


def violations(root: Path) -> list[str]:
    graph = read(root)
    found = [f"{module} stands on no floor" for module in graph if not floor(module)]
    for module, names in graph.items():
        for name in sorted(names):
            top = name.split(".")[0]
            if top in ("vit_jax", "configs", "main", "benchmarks") and floor(name) > floor(module):
                found.append(f"{module} imports {name}, which is upwards")
            forbidden = FORBIDDEN.get(room(module), set()) | ({"tensorflow", "vit_jax"} if module in PEERS else NOWHERE)
            if {top, ".".join(name.split(".")[:2])} & forbidden:
                found.append(f"{module} imports {name}, which is forbidden there")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' → '.join(error.args[1])}")
    return found


def loaded(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter loads for the statement."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr.splitlines()
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


def test_imports_go_down_only():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("vit_jax/models/vit.py", "from vit_jax.training import loop", "upwards"),
        ("vit_jax/models/vit.py", "def f():\n    from ..training.loop import train", "upwards"),
        ("vit_jax/models/vit.py", "import vit_jax", "upwards"),
        ("vit_jax/models/vit.py", "from vit_jax.config import Model", "forbidden"),
        ("vit_jax/data/tasks.py", "def f():\n    import jax.numpy as jnp", "forbidden"),
        ("vit_jax/transforms/a.py", "from vit_jax import data", "forbidden"),
        ("vit_jax/reports/page.py", "from ..training import loop", "forbidden"),
        ("vit_jax/training/a.py", "import vit_jax.reports.page", "forbidden"),
        ("main.py", "import tensorflow as tf", "forbidden"),
        ("configs/a.py", "from torch import nn", "forbidden"),
        ("vit_jax/checkpoints/a.py", "def f():\n    import timm", "forbidden"),
        ("vit_jax/interop/peers.py", "import tensorflow", "forbidden"),
        ("vit_jax/training/loop.py", "from . import a", "a circle"),
        ("vit_jax/utils.py", "", "no floor"),
    ],
)
def test_forbidden_imports_are_found(tmp_path, path, source, message):
    good = {
        "main.py": "import vit_jax\nfrom vit_jax.training.loop import train\nfrom configs import a",
        "configs/a.py": "from vit_jax.config import Config",
        "vit_jax/__init__.py": "from vit_jax import training",
        "vit_jax/config.py": "import json",
        "vit_jax/data/__init__.py": "import numpy as np\nimport tensorflow_datasets",
        "vit_jax/training/__init__.py": "",
        "vit_jax/training/a.py": "from vit_jax.training.loop import train\nfrom ..data import tasks",
        "vit_jax/training/loop.py": "from vit_jax.config import Config",
        "vit_jax/reports/page.py": "",
        "vit_jax/interop/peers.py": "def f():\n    import torch, timm",
    }
    for name, text in good.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == []
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    assert any(message in line for line in violations(tmp_path))


def test_every_imported_package_is_declared():
    def key(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [*(ROOT / "requirements.txt").read_text().splitlines(), *itertools.chain(*extras.values())]
    declared = {key(found[0]) for line in wanted if (found := re.match(r"\w[\w.-]*", line))}
    tops = {name.split(".")[0] for names in read(ROOT).values() for name in names}
    tops -= {*sys.stdlib_module_names, "vit_jax", "configs", "main", "benchmarks"}
    providers = importlib.metadata.packages_distributions()
    assert {top for top in tops if not declared & {key(name) for name in providers.get(top, [top])}} == set()


def lowest(requirements: str) -> subprocess.CompletedProcess[str]:
    """Runs the Makefile's shell code that turns requirements into their lowest versions."""
    command = ["make", "--silent", "--eval=lowest-of-input: ; @$(lowest)", "lowest-of-input"]
    return subprocess.run(command, cwd=ROOT, input=requirements, capture_output=True, text=True)


def test_lowest_versions_cover_every_requirement():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "requirements.txt").read_text() + "\n".join(extras["test"]) + "\n"
    names = [re.match(r"[\w.-]+", line)[0] for line in text.splitlines() if line and not line.startswith("#")]
    pinned = lowest(text)
    assert pinned.returncode == 0, pinned.stderr
    assert [line.split("==")[0] for line in pinned.stdout.splitlines()] == names


@pytest.mark.parametrize("requirement", ["jax", "jax[cuda12]>=0.10.2", "jax<0.13"])
def test_requirement_without_lowest_version_is_an_error(requirement):
    assert lowest(f"{requirement}\n").returncode != 0


@pytest.mark.parametrize(
    ("room", "absent"),
    [
        ("", NOWHERE | {"orbax", "tensorflow_datasets", "grain", "matplotlib", "requests", "huggingface_hub", "safetensors"}),
        ("checkpoints", NOWHERE | {"requests", "huggingface_hub", "jax2onnx", "onnx"}),
        ("data", NOWHERE | FORBIDDEN["data"]),
    ],
)
def test_import_loads_only_what_it_needs(room, absent):
    files = (ROOT / "vit_jax" / room).glob("[!_]*.py") if room else ()
    names = ["vit_jax", *(f"vit_jax.{room}.{file.stem}" for file in files)]
    tops = loaded(f"import {', '.join(names)}")
    assert "vit_jax" in tops
    assert tops & absent == set()
