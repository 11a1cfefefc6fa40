"""A StableHLO file, served as the docs describe by a Python that has only jax, gives the model's outputs."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.load import load
from vit_jax.data.tasks import TASKS
from vit_jax.formats.google import read_npz
from vit_jax.interop.stablehlo import save_stablehlo
from vit_jax.transforms.preprocess import for_evaluation

ROOT = Path(__file__).parents[2]
NAMES = ("pre_logits", "mean of tokens", "hybrid", "features", "demo")
BATCHES = {"demo": (1, 7)}  # (7,) for the others, because each is a compilation


def expected(model, params, meta, dtype, images):
    """Returns the evaluation's outputs, with the parameters as they are stored."""
    statistics = (meta or {}).get("normalization")
    prepare = for_evaluation(images.shape[1:3], statistics and (statistics["mean"], statistics["std"]))
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), params)
    outputs = jax.jit(lambda params, images: model.apply({"params": params}, prepare(images)))(params, images)
    return jax.nn.softmax(outputs) if model.num_classes else outputs


def packages_beyond_jax() -> set[str]:
    """Top-level names of the installed packages that `pip install jax` does not install."""
    installed, left = set(), {"jax"}
    while left:
        name = left.pop()
        installed.add(name)
        wanted = [line for line in importlib.metadata.requires(name) or () if "extra ==" not in line]
        left |= {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in wanted} - installed
    providers = importlib.metadata.packages_distributions()
    return {top for top, names in providers.items() if not {name.lower().replace("-", "_") for name in names} & installed}


SERVER = """
import os, pathlib, sys

class OnlyJax:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"{name} does not come with jax", name=name)

sys.meta_path.insert(0, OnlyJax())
import numpy as np
for folder in sorted(pathlib.Path("models").resolve().iterdir()):
    os.chdir(folder)
    images = np.load("images.npy")
    for batch in BATCHES.get(folder.name, (7,)):
        scope = {"images": images[:batch]}
        exec(SNIPPET, scope)
        np.save(f"{batch}.npy", scope["probabilities"])
"""


def snippet() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "from jax import export" in block)


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
    """A folder for each model with its file, and in {1,7}.npy the outputs that a process with only jax computes from it."""
    folder = tmp_path_factory.mktemp("served")
    for name in NAMES:
        model, params, meta, dtype, images = made(name)
        save_stablehlo(folder / "models" / name / "model.stablehlo", model, params, meta, dtype)
        np.save(folder / "models" / name / "images.npy", images)
    missing = packages_beyond_jax()
    assert {"flax", "orbax"} <= missing and not {"jax", "jaxlib", "numpy"} & missing
    code = f"MISSING, SNIPPET, BATCHES = {missing!r}, {snippet()!r}, {BATCHES!r}\n{SERVER}"
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}  # whose warnings would be errors there
    command = [sys.executable, "-I", "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "models"


@pytest.mark.parametrize("name", NAMES)
def test_python_with_only_jax_computes_the_model(name, made, served):
    outputs = np.asarray(expected(*made(name)))
    for batch in BATCHES.get(name, (7,)):
        found = np.load(served / name / f"{batch}.npy")
        assert found.dtype == np.float32 and found.shape == (batch, outputs.shape[1])
        np.testing.assert_allclose(found, outputs[:batch], atol=2e-6)
    assert np.ptp(outputs, axis=0).max() > 1e-3  # the images have an effect


def test_file_contains_the_description(served):
    with np.load(served / "demo" / "model.stablehlo") as file:
        about = json.loads(file["about"].tobytes())
    assert about["class_names"] == list(TASKS["cifar100_excerpt"].excerpt.classes)
    assert about["normalization"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert (about["image_size"], about["source"], about["outputs"]) == (64, "mini_8.npz", 10)
    assert "no antialiasing" in about["resize"]


@pytest.mark.parametrize("name", ["hybrid", "pre_logits"])
def test_weights_can_be_read_back(name, made, served):
    _, params, _, dtype, _ = made(name)
    path = served / name / "model.stablehlo"
    found, stored = flatten_dict(read_npz(path), sep="/"), flatten_dict(params, sep="/")
    assert found.keys() == stored.keys()
    for key, leaf in found.items():
        assert np.array_equal(leaf, stored[key].astype(dtype).astype(np.float32)), key
    load(path)


def test_file_depends_only_on_the_model(made, served, tmp_path):
    model, params, meta, dtype, _ = made("pre_logits")
    path = tmp_path / "again.stablehlo"
    save_stablehlo(path, model.clone(dtype=jax.numpy.bfloat16, dropout=0.1), params, meta, dtype)
    assert path.read_bytes() == (served / "pre_logits" / "model.stablehlo").read_bytes()
    assert str(ROOT).encode() not in path.read_bytes()


def test_bfloat16_weights_take_half_the_bytes(made, tmp_path):
    model, params, meta, _, _ = made("demo")
    for dtype in (np.float32, ml_dtypes.bfloat16):
        save_stablehlo(tmp_path / f"{np.dtype(dtype)}.stablehlo", model, params, meta, dtype)
    whole, half = (tmp_path / f"{dtype}.stablehlo" for dtype in ("float32", "bfloat16"))
    assert half.stat().st_size < 0.52 * whole.stat().st_size


def test_failed_write_keeps_the_earlier_file(made, tmp_path, monkeypatch):
    def fails(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    model, params, _, _, _ = made("pre_logits")
    path = tmp_path / "x.stablehlo"
    path.write_bytes(b"before")
    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="No space left"):
        save_stablehlo(path, model, params)
    assert path.read_bytes() == b"before" and [*tmp_path.iterdir()] == [path]
