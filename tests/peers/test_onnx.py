"""An ONNX file gives the model's outputs in onnxruntime, or is not written."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from vit_jax.checkpoints.load import load
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import TASKS
from vit_jax.errors import CheckpointError
from vit_jax.interop.onnx import save_onnx
from vit_jax.models.variants import build
from vit_jax.transforms.geometry import resize
from vit_jax.transforms.preprocess import for_evaluation

for needed in ("jax2onnx", "onnx", "onnxruntime"):
    pytest.importorskip(needed, reason=f"needs {needed}: make test-interop installs it")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

TINY = dict(hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32, num_classes=5)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# name → variant, fields, image size, description, dtype of the stored weights
MODELS = {
    "plain": ("B/8", TINY, (16, 16), None, np.float32),
    "pre_logits": ("B/8", {**TINY, "representation_size": 8}, (16, 16), {"normalization": IMAGENET}, ml_dtypes.bfloat16),
    "mean of tokens": ("B/8", {**TINY, "classifier": "gap"}, (16, 24), {"image_size": [16, 24]}, np.float32),
    "features": ("B/8", {**TINY, "num_classes": 0}, (16, 16), None, np.float32),
    "hybrid": ("R26+S/32", {**TINY, "resnet": (1, 2), "resnet_width": 32}, (16, 24), {"image_size": [16, 24]}, np.float32),
    "hybrid in bfloat16": ("R26+S/32", {**TINY, "resnet": (1,), "resnet_width": 32}, (16, 16), None, ml_dtypes.bfloat16),
    "bare root": ("R+Ti/16", {**TINY, "patch_size": 2, "resnet_width": 32}, (16, 16), None, np.float32),
}


@pytest.fixture
def made(random_params):
    """A function from a name in MODELS to a model, parameters, description, dtype and seven images."""

    def make(name):
        variant, fields, size, meta, dtype = MODELS[name]
        model = build(variant, **fields)
        images_u8 = np.random.default_rng(1).integers(0, 256, (7, *size, 3), np.uint8)
        return model, random_params(model, size), meta, dtype, images_u8

    return make


def expected(model, params, meta, dtype, images_u8):
    """The outputs of evaluation, with the parameters as they are stored."""
    statistics = (meta or {}).get("normalization")
    prepare = for_evaluation(images_u8.shape[1:3], statistics and (statistics["mean"], statistics["std"]))
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), params)
    outputs = jax.jit(lambda params, images_u8: model.apply({"params": params}, prepare(images_u8)))(params, images_u8)
    return np.asarray(jax.nn.softmax(outputs) if model.num_classes else outputs)


def agrees(session, images_u8, outputs, tolerance):
    for batch in (1, 7):
        [found] = session.run(None, {"images": images_u8[:batch]})
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, outputs[:batch], atol=tolerance)
    assert np.ptp(outputs, axis=0).max() > 1e-3  # the images have an effect


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_gives_the_model_outputs(name, made, tmp_path, capfd):
    model, params, meta, dtype, images_u8 = made(name)
    save_onnx(tmp_path / "x.onnx", model, params, meta, dtype)
    onnx.checker.check_model(tmp_path / "x.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    [images], [outputs] = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["B", *images_u8.shape[1:]])
    assert outputs.name == ("probabilities" if model.num_classes else "features")
    assert outputs.shape == ["B", model.num_classes or model.hidden_size]
    agrees(session, images_u8, expected(model, params, meta, dtype, images_u8), 2e-6)
    assert capfd.readouterr() == ("", "")  # the converter and a session print nothing


def test_fine_tuned_model_on_real_images(tmp_path):
    """A model like the demo's: the embedded checkpoint at 64 px, a head for the ten classes of the embedded images."""
    model, params = load("mini_8", num_classes=10, image_size=64)
    params["head"]["kernel"] = np.random.default_rng(0).normal(size=(192, 10)).astype(np.float32)
    names = list(TASKS["cifar100_excerpt"].excerpt.classes)
    images, _ = open_split(TASKS["cifar100_excerpt"], "test[:7]").take(np.arange(7))
    images_u8 = np.asarray(resize(images, 64)).round().astype(np.uint8)
    meta = {"image_size": 64, "class_names": names, "source": "mini_8.npz", "step": 80}
    save_onnx(tmp_path / "x.onnx", model, params, meta)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    agrees(session, images_u8, expected(model, params, meta, np.float32, images_u8), 1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == names and json.loads(about["image_size"]) == 64
    assert json.loads(about["normalization"]) == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert about["source"] == "mini_8.npz" and "no antialiasing" in about["resize"] and about["step"] == "80"


@pytest.mark.parametrize("name", ["plain", "hybrid"])
def test_bfloat16_is_the_type_of_every_weight(name, made, tmp_path):
    model, params, meta, _, _ = made(name)
    save_onnx(tmp_path / "x.onnx", model, params, meta, ml_dtypes.bfloat16)
    stored = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.BFLOAT16: 0}
    for tensor in onnx.load(tmp_path / "x.onnx").graph.initializer:
        if tensor.data_type in stored:
            stored[tensor.data_type] += int(np.prod(tensor.dims))
    assert stored[onnx.TensorProto.BFLOAT16] >= sum(leaf.size for leaf in jax.tree.leaves(params))
    assert (
        stored[onnx.TensorProto.FLOAT] < 0.05 * stored[onnx.TensorProto.BFLOAT16]
    )  # constants of the program, such as epsilons


def test_converter_does_not_change_flax(made, tmp_path):
    model, params, meta, dtype, images_u8 = made("plain")
    before = expected(model, params, meta, dtype, images_u8)
    save_onnx(tmp_path / "x.onnx", model, params, meta, dtype)
    jax.clear_caches()
    assert np.array_equal(expected(model, params, meta, dtype, images_u8), before)


@pytest.mark.parametrize("mistake", ["other numbers", "no model", "an error", "a full disk"])
def test_failed_export_keeps_the_earlier_file(mistake, made, tmp_path, monkeypatch):
    import jax2onnx

    model, params, meta, dtype, _ = made("plain")
    (tmp_path / "x.onnx").write_bytes(b"before")
    convert = jax2onnx.to_onnx

    def wrong(function, *args, **kwargs):
        if mistake == "an error":
            raise NotImplementedError("No plugins registered for\nprimitive 'x'")
        proto = convert(lambda images: function(images) * (1.01 if mistake == "other numbers" else 1), *args, **kwargs)
        if mistake == "no model":
            del proto.graph.node[3]
        return proto

    def fails(fd):
        raise OSError(28, "No space left on device")

    expected_error = {
        "other numbers": "differ by 1.0e-02 of the largest output",
        "no model": "x.onnx is not written because jax2onnx failed",
        "an error": "NotImplementedError: No plugins registered for primitive 'x'",
        "a full disk": "No space left on device",
    }
    monkeypatch.setattr(jax2onnx, "to_onnx", wrong)
    if mistake == "a full disk":
        monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError if mistake == "a full disk" else CheckpointError, match=expected_error[mistake]) as error:
        save_onnx(tmp_path / "x.onnx", model, params, meta, dtype)
    assert "\n" not in str(error.value)
    assert (tmp_path / "x.onnx").read_bytes() == b"before" and len([*tmp_path.iterdir()]) == 1
