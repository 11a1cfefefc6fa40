"""What the folders for timm and transformers contain, and the models that they do not have."""

import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import CheckpointError
from vit_jax.formats.torch_files import read_config
from vit_jax.interop import torch_models
from vit_jax.interop.torch_models import save_huggingface, save_timm, to_huggingface, to_timm
from vit_jax.models.variants import build, shapes

TINY = dict(hidden_size=24, num_layers=2, num_heads=3, mlp_dim=40, num_classes=5)
MODELS = {
    "plain": TINY,
    "features": TINY | {"num_classes": 0},
    "mean of tokens": TINY | {"classifier": "gap"},
    "hybrid": TINY | {"resnet": (2, 2, 2, 2), "patch_size": 1},
    "pre_logits": TINY | {"representation_size": 7, "num_classes": 0},
}


@pytest.fixture(scope="module")
def trees():
    """Name in MODELS → parameter tree for images of 32 pixels."""
    found = {}
    for name, fields in MODELS.items():
        flat = flatten_dict(shapes(build("B/8", **fields), 32), sep="/")
        found[name] = unflatten_dict({path: np.ones(leaf.shape, np.float32) for path, leaf in flat.items()}, sep="/")
    return found


def test_model_that_timm_does_not_have_is_refused(trees):
    with pytest.raises(CheckpointError, match=r"timm's Vision Transformer has no pre_logits .*load\(SOURCE, num_classes=0\)"):
        to_timm(trees["pre_logits"])
    odd = flatten_dict(shapes(build("B/8", **TINY | {"resnet": (1,), "patch_size": 1}), 32), sep="/")
    odd = unflatten_dict({name: np.zeros(leaf.shape) for name, leaf in odd.items()}, sep="/")
    with pytest.raises(CheckpointError, match=r"no hybrid whose ResNet has stages of \[1\] units and 64 channels"):
        to_timm(odd)
    with pytest.raises(CheckpointError, match="'adapter/kernel' is not part of a Vision Transformer"):
        to_timm({**trees["plain"], "adapter": {"kernel": np.zeros(3)}})


def test_model_that_transformers_does_not_have_is_refused(trees, caplog):
    with pytest.raises(CheckpointError, match="transformers 5 has no hybrid Vision Transformer"):
        to_huggingface(trees["hybrid"])
    with pytest.raises(CheckpointError, match="this model from the mean of all tokens"):
        to_huggingface(trees["mean of tokens"])
    published = {**trees["pre_logits"], "head": {"kernel": np.zeros((7, 5)), "bias": np.zeros(5)}}
    with pytest.raises(CheckpointError, match="ViTForImageClassification has no pooler for pre_logits"):
        to_huggingface(published, classifier=True)
    with pytest.raises(CheckpointError, match="the model has no head"):
        to_huggingface(trees["features"], classifier=True)
    assert not caplog.records
    tensors, texts = to_huggingface(published)
    assert "the head of 5 classes is left out" in caplog.text
    assert "pooler.dense.weight" in tensors and not any("classifier" in name for name in tensors)
    assert texts["config.json"]["architectures"] == ["ViTModel"]
    assert to_huggingface(trees["plain"], classifier=False)[1]["config.json"]["architectures"] == ["ViTModel"]


META = {
    "normalization": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    "image_size": [16, 64],
    "class_names": ["a", "b", "c", "d", "é"],
}


def test_description_is_in_the_configuration(trees, tmp_path):
    save_timm(tmp_path / "t", trees["plain"], META)
    timm = json.loads((tmp_path / "t" / "config.json").read_text(encoding="utf-8"))
    assert timm["label_names"] == META["class_names"] and timm["pretrained_cfg"]["input_size"] == [3, 16, 64]
    assert (timm["pretrained_cfg"]["mean"], timm["pretrained_cfg"]["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    save_huggingface(tmp_path / "h", trees["plain"], META)
    config, preprocessor = (
        json.loads((tmp_path / "h" / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "preprocessor_config")
    )
    assert config["image_size"] == [16, 64] and config["id2label"]["4"] == "é" and config["label2id"]["b"] == 1
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert preprocessor["size"] == {"height": 16, "width": 64} and preprocessor["resample"] == 2


def test_evaluation_crop_is_in_the_configuration(trees, tmp_path, caplog):
    for crop, expected in (("center", (0.875, "center")), ("none", (1.0, "squash"))):
        config = to_timm(trees["plain"], META | {"eval_crop": crop})[1]
        assert (config["pretrained_cfg"]["crop_pct"], config["pretrained_cfg"]["crop_mode"]) == expected
    assert not caplog.records
    for save in (save_timm, save_huggingface):
        for crop in ("none", "center"):
            folder = tmp_path / f"{save.__name__}_{crop}"
            save(folder, trees["plain"], META | {"eval_crop": crop})
            assert read_config(folder / "model.safetensors").get("eval_crop", "none") == crop
    assert "preprocessor_config.json resizes straight, but the weights were evaluated with eval_crop = 'center'" in caplog.text


def test_missing_description_means_google_scaling_and_no_names(trees):
    config, text = to_timm(trees["plain"])[1], to_huggingface(trees["plain"])[1]
    assert "label_names" not in config and config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert "id2label" not in text["config.json"] and text["config.json"]["num_labels"] == 5
    assert text["preprocessor_config.json"]["image_std"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"class_names": ["a"]}, "the head has 5 classes, but the JSON next to the weights names 1"),
        ({"image_size": 224}, "image_size is 224 in .*, but their 16 positions are for 32×32 pixels"),
        ({"eval_crop": 0.875}, "eval_crop in .* is 0.875; it should be one of"),
        ({"class_names": "abcde"}, "class_names .*should be a list"),
        ({"normalization": {"mean": [1, 2]}}, "should hold a mean and a std of three numbers"),
        ({"normalization": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "should hold a mean and a std of three numbers"),
    ],
)
def test_description_that_contradicts_the_weights_is_refused(meta, expected, trees, tmp_path):
    for save in (save_timm, save_huggingface):
        with pytest.raises(CheckpointError, match=expected):
            save(tmp_path / "x", trees["plain"], meta)
    assert not list(tmp_path.iterdir())


def test_positions_without_a_square_need_an_image_size(trees):
    flat = flatten_dict(trees["plain"], sep="/")
    flat["Transformer/posembed_input/pos_embedding"] = np.zeros((1, 13, 24), np.float32)
    tree = unflatten_dict(flat, sep="/")
    with pytest.raises(CheckpointError, match="12 positions do not form a square; .* should give image_size as"):
        to_timm(tree)
    assert to_timm(tree, {"image_size": [24, 32]})[1]["model_args"]["img_size"] == [24, 32]


@pytest.mark.parametrize(("mlp_dim", "hidden_size"), [(100, 48), (41, 24), (250, 96), (4304, 1152), (5, 24)])
def test_mlp_ratio_gives_the_exact_width(mlp_dim, hidden_size):
    model = build("B/16", hidden_size=hidden_size, num_layers=1, num_heads=3, mlp_dim=mlp_dim)
    tree = {name: np.zeros(leaf.shape) for name, leaf in flatten_dict(shapes(model, 16), sep="/").items()}
    ratio = to_timm(unflatten_dict(tree, sep="/"))[1]["model_args"]["mlp_ratio"]
    assert int(hidden_size * ratio) == mlp_dim


def test_architecture_has_the_name_in_timm():
    for variant, name in torch_models._ARCHITECTURES.items():
        model = build(variant)
        if model.hidden_size < 400:  # larger trees would be copied
            flat = flatten_dict(shapes(model), sep="/")
            tree = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in flat.items()}
            assert to_timm(unflatten_dict(tree, sep="/"))[1]["architecture"] == name
