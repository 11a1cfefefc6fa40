"""A StableHLO file, served as the docs say by a Python that has only jax, computes what the model does; ONNX: tests/peers."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.load import load
from vit_jax.data.sources import open_split
from vit_jax.data.tasks import TASKS
from vit_jax.errors import CheckpointError
from vit_jax.formats.google import read_npz
from vit_jax.formats.stablehlo import read_about
from vit_jax.interop.onnx import save_onnx
from vit_jax.interop.stablehlo import save_stablehlo
from vit_jax.models.variants import build, shapes
from vit_jax.transforms.geometry import resize
from vit_jax.transforms.preprocess import for_evaluation

ROOT = Path(__file__).parents[2]
TINY = dict(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, num_classes=5)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# name → variant, fields, image size, what is known of it, dtype of the stored weights
MODELS = {
    "pre_logits": ("B/8", {**TINY, "representation_size": 8}, (16, 16), {"normalization": IMAGENET}, ml_dtypes.bfloat16),
    "mean of tokens": ("B/8", {**TINY, "classifier": "gap"}, (16, 24), {"image_size": [16, 24]}, np.float32),
    "hybrid": ("R26+S/32", {**TINY, "resnet": (1,), "resnet_width": 32}, (16, 16), None, np.float32),
    "features": ("B/8", {**TINY, "num_classes": 0}, (16, 16), None, np.float32),
}
BATCHES = {"demo": (1, 7)}  # (7,) of the others: each is a compilation


def made(name):
    """A model of the table with random parameters, or "demo"; what else `save_…` is given, and seven images of its size."""
    draw, flat = np.random.default_rng(0), {}
    if name == "demo":  # the embedded checkpoint, a head for the ten classes of the embedded images; these have 32 px
        model, params = load("mini_8", num_classes=10, image_size=64)
        params["head"]["kernel"] = draw.normal(size=(192, 10)).astype(np.float32)
        images, _ = open_split(TASKS["cifar100_excerpt"], "test[:7]").take(np.arange(7))
        meta = {"image_size": 64, "class_names": list(TASKS["cifar100_excerpt"].excerpt.classes), "source": "mini_8.npz"}
        return model, params, meta, np.float32, np.asarray(resize(images, 64)).round().astype(np.uint8)
    variant, fields, size, meta, dtype = MODELS[name]
    model = build(variant, **fields)
    for key, leaf in flatten_dict(shapes(model, size), sep="/").items():
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if key.endswith("kernel") else 0.1
        flat[key] = (draw.normal(size=leaf.shape) * scale + key.endswith("scale")).astype(np.float32)
    return model, unflatten_dict(flat, sep="/"), meta, dtype, draw.integers(0, 256, (7, *size, 3), np.uint8)


def expected(model, params, meta, dtype, images):
    """What evaluation computes, with the parameters as they are stored."""
    statistics = (meta or {}).get("normalization")
    prepare = for_evaluation(images.shape[1:3], statistics and (statistics["mean"], statistics["std"]))
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), params)
    outputs = jax.jit(lambda params, images: model.apply({"params": params}, prepare(images)))(params, images)
    return jax.nn.softmax(outputs) if model.num_classes else outputs


def lacking_with_jax_alone() -> set[str]:
    """Top-level names of the installed packages that `pip install jax` would not bring."""
    brought, left = set(), {"jax"}
    while left:
        name = left.pop()
        brought.add(name)
        wanted = [line for line in importlib.metadata.requires(name) or () if "extra ==" not in line]
        left |= {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in wanted} - brought
    providers = importlib.metadata.packages_distributions()
    return {top for top, names in providers.items() if not {name.lower().replace("-", "_") for name in names} & brought}


SERVER = """
import os, pathlib, sys

class OnlyJax:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKING:
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
def served(tmp_path_factory):
    """A folder for each model with its file, and in {1,7}.npy what a process with jax alone has computed from it."""
    folder = tmp_path_factory.mktemp("served")
    for name in (*MODELS, "demo"):
        model, params, meta, dtype, images = made(name)
        save_stablehlo(folder / "models" / name / "model.stablehlo", model, params, meta, dtype)
        np.save(folder / "models" / name / "images.npy", images)
    lacking = lacking_with_jax_alone()
    assert {"flax", "orbax"} <= lacking and not {"jax", "jaxlib", "numpy"} & lacking
    code = f"LACKING, SNIPPET, BATCHES = {lacking!r}, {snippet()!r}, {BATCHES!r}\n{SERVER}"
    done = subprocess.run([sys.executable, "-I", "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "models"


@pytest.mark.parametrize("name", [*MODELS, "demo"])
def test_a_python_that_has_only_jax_computes_what_the_model_does(name, served):
    outputs = np.asarray(expected(*made(name)))
    for batch in BATCHES.get(name, (7,)):
        found = np.load(served / name / f"{batch}.npy")
        assert found.dtype == np.float32 and found.shape == (batch, outputs.shape[1])
        np.testing.assert_allclose(found, outputs[:batch], atol=2e-6)
    assert np.ptp(outputs, axis=0).max() > 1e-3  # the images matter


def test_what_a_server_has_to_know_travels_with_the_model(served):
    with np.load(served / "demo" / "model.stablehlo") as file:
        about = json.loads(file["about"].tobytes())
    assert about["class_names"] == list(TASKS["cifar100_excerpt"].excerpt.classes)
    assert about["normalization"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert (about["image_size"], about["source"], about["outputs"]) == (64, "mini_8.npz", 10)
    assert "no antialiasing" in about["resize"]


@pytest.mark.parametrize("name", ["hybrid", "pre_logits"])
def test_the_weights_can_be_got_back(name, served):
    _, params, _, dtype, _ = made(name)
    path = served / name / "model.stablehlo"
    found, stored = flatten_dict(read_npz(path), sep="/"), flatten_dict(params, sep="/")
    assert found.keys() == stored.keys()
    for key, leaf in found.items():
        assert np.array_equal(leaf, stored[key].astype(dtype).astype(np.float32)), key
    load(path)


def test_the_file_depends_on_nothing_but_the_model(served, tmp_path):
    model, params, meta, dtype, _ = made("pre_logits")
    path = tmp_path / "again.stablehlo"
    save_stablehlo(path, model.clone(dtype=jax.numpy.bfloat16, dropout=0.1), params, meta, dtype)
    assert path.read_bytes() == (served / "pre_logits" / "model.stablehlo").read_bytes()
    assert str(ROOT).encode() not in path.read_bytes()


def test_bfloat16_is_stored_in_half_the_bytes(tmp_path):
    model, params, meta, _, _ = made("demo")
    for dtype in (np.float32, ml_dtypes.bfloat16):
        save_stablehlo(tmp_path / f"{np.dtype(dtype)}.stablehlo", model, params, meta, dtype)
    whole, half = (tmp_path / f"{dtype}.stablehlo" for dtype in ("float32", "bfloat16"))
    assert half.stat().st_size < 0.52 * whole.stat().st_size


@pytest.mark.parametrize("save", [save_stablehlo, save_onnx])
@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"class_names": ["a", "b"]}, "the head has 5 classes, the JSON beside the weights names 2"),
        ({"image_size": 24}, "says image_size 24, their 4 positions are for 16×16 pixels"),
        ({"image_size": [8, 31]}, r"says image_size \[8, 31\], their 4 positions are for 16×16 pixels"),
        ({"image_size": "16"}, "says image_size 16, their 4 positions"),
        ({"normalization": {"mean": [0.5] * 3}}, "should hold a mean and a std of three numbers each"),
        ({"normalization": {"mean": 0.5, "std": 0.5}}, "should hold a mean and a std of three numbers each"),
        ({"normalization": {"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}}, "should hold a mean and a std of three numbers"),
    ],
)
def test_what_contradicts_the_model_is_refused(save, meta, said, tmp_path):
    model, params, _, _, _ = made("pre_logits")
    path = tmp_path / f"x.{save.__name__.removeprefix('save_')}"
    with pytest.raises(CheckpointError, match=f"{path.name}: .*{said}") as error:
        save(path, model, params, meta)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=f"a file whose name ends in {path.suffix}, got .*x.npz"):
        save(tmp_path / "x.npz", model, params)
    assert not any(tmp_path.iterdir())


def test_positions_that_make_no_square_want_an_image_size(tmp_path):
    model, params, meta, _, _ = made("mean of tokens")
    with pytest.raises(CheckpointError, match="6 positions make no square"):  # 2×3
        save_stablehlo(tmp_path / "x.stablehlo", model, params)
    save_stablehlo(tmp_path / "x.stablehlo", model, params, meta)


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path, monkeypatch):
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


def test_onnx_without_its_converter_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    model, params, _, _, _ = made("pre_logits")
    with pytest.raises(
        CheckpointError, match=r"x.onnx is not written, .*jax2onnx is not installed: pip install jax2onnx==.* onnxruntime, "
    ):
        save_onnx(tmp_path / "x.onnx", model, params)
    assert not any(tmp_path.iterdir())


def test_more_than_onnx_can_hold_is_refused_at_once(tmp_path):
    model = build("H/14", num_classes=1000)
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes(model))  # takes no memory
    with pytest.raises(CheckpointError, match="x.onnx would take 2.4 GiB, and an ONNX file holds 2: bfloat16 takes half"):
        save_onnx(tmp_path / "x.onnx", model, params)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (None, "it has no 'about'"),
        (np.array([{"image_size": 32}], object), "'about' is a pickled object, which is never loaded"),
        (np.frombuffer(100_000 * b"[", np.uint8), "'about' is (not JSON|nested)"),
        (np.frombuffer(b"[1]", np.uint8), "'about' should hold an object"),
        (np.frombuffer(b'{"lacks": 1}', np.uint8), "'about': lacks should be a list of names"),
    ],
)
def test_damaged_description_in_a_stablehlo_file_is_one_error_line(about, expected, tmp_path):
    path = tmp_path / "x.stablehlo"
    with open(path, "wb") as file:
        np.savez(file, module=np.zeros(3, np.uint8), **({} if about is None else {"about": about}))
    with pytest.raises(CheckpointError, match=f"x.stablehlo.*{expected}") as error:
        read_about(path)
    assert "\n" not in str(error.value) and "allow_pickle" not in str(error.value) and len(str(error.value)) < 400
