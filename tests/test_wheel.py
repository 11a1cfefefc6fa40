"""The wheel: what it carries, and that a configuration is found by name without a clone."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of a wheel that is built from a copy of the project, without a network."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs setuptools to build a wheel; none is installed")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 or newer, which pyproject.toml names, to build a wheel; here is {version}")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("vit_jax", "configs", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "main.py"):
        shutil.copy(ROOT / name, folder / "source")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=folder / "source", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_the_configurations_only(wheel):
    expected = {f"vit_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*.py")}
    for path in (ROOT / "vit_jax").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            expected.add(str(path.relative_to(ROOT)))
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "vit_jax = vit_jax.__main__:console" in archive.read(entry_points).decode()
    assert names == expected


@pytest.mark.parametrize("name", ["cifar100_b16", "augreg:B/16,cifar100"])
def test_wheel_finds_its_configurations_by_name(wheel, tmp_path, name):
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    command = [sys.executable, "-m", "vit_jax", "train", "--config", name, "--help"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--config.data.task=cifar100\n" in done.stdout and not list(folder.iterdir())
