"""Small models of every kind, with random parameters and images."""

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.load import load
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import TASKS
from vit_jax.models.variants import build, shapes
from vit_jax.transforms.geometry import resize

TINY = dict(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, num_classes=5)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# name → variant, fields, image size, description, dtype of the stored weights
MODELS = {
    "pre_logits": ("B/8", {**TINY, "representation_size": 8}, (16, 16), {"normalization": IMAGENET}, ml_dtypes.bfloat16),
    "mean of tokens": ("B/8", {**TINY, "classifier": "gap"}, (16, 24), {"image_size": [16, 24]}, np.float32),
    "hybrid": ("R26+S/32", {**TINY, "resnet": (1,), "resnet_width": 32}, (16, 16), None, np.float32),
    "features": ("B/8", {**TINY, "num_classes": 0}, (16, 16), None, np.float32),
}


@pytest.fixture(scope="session")
def made():
    """A function from a name in MODELS or "demo" to a model, parameters, description, dtype and seven images of its size."""
    return _made


def _made(name):
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
