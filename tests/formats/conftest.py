"""Small models with random parameters, and functions that tests of safetensors share."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.models.variants import build, shapes

TINY = dict(hidden_size=24, num_layers=2, num_heads=3, mlp_dim=40, num_classes=5)  # 24 is no width of VARIANTS
R26 = dict(resnet=(2, 2, 2, 2), patch_size=1)
MODELS = {
    "plain": (TINY, 32),
    "features": (TINY | {"num_classes": 0}, 32),
    "mean of tokens": (TINY | {"classifier": "gap"}, 32),
    "root": (TINY | {"resnet": (), "patch_size": 8}, 32),
    "hybrid": (TINY | R26, 32),
    "pre_logits": (TINY | {"representation_size": 7, "num_classes": 0}, 32),
}


def _random_tree(name):
    fields, size = MODELS[name]
    draw = np.random.default_rng(0)
    flat = flatten_dict(shapes(build("B/8", **fields), size), sep="/")
    return unflatten_dict({path: draw.normal(size=leaf.shape).astype(np.float32) for path, leaf in flat.items()}, sep="/")


@pytest.fixture(scope="session")
def trees():
    """Name in MODELS → parameter tree."""
    return {name: _random_tree(name) for name in MODELS}


@pytest.fixture(scope="session")
def assert_same():
    """A function that asserts that two trees of float32 arrays are equal, bit for bit."""

    def check(found, expected):
        found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            assert leaf.dtype == np.float32 and leaf.shape == expected[name].shape and leaf.flags.c_contiguous, name
            assert leaf.tobytes() == expected[name].tobytes(), name

    return check


@pytest.fixture(scope="session")
def since_five():
    """A function that renames Hugging Face's tensors to the names that transformers 5 uses in memory, and writes on request."""

    def rename(tensors):
        renamed = {
            "encoder.layer.": "layers.",
            "attention.attention.query": "attention.q_proj",
            "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj",
            "attention.output.dense": "attention.o_proj",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        }
        result = {}
        for name, array in tensors.items():
            for old, new in renamed.items():
                name = name.replace(old, new)
            result[name] = array
        return result

    return rename


@pytest.fixture(scope="module")
def tree():
    """A small hybrid with pre_logits, every leaf random, under the published names."""
    model = build(
        "R26+S/32", hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32, resnet=(1,), resnet_width=32,
        num_classes=3, representation_size=8,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    flat = flatten_dict(shapes(model, 16), sep="/")
    return {name: draw.normal(size=leaf.shape).astype(np.float32) for name, leaf in flat.items()}


def rename(name: str) -> str:
    for published, linen in (
        ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        ("LayerNorm_2", "LayerNorm_1"),
        ("MlpBlock_3", "MlpBlock_0"),
    ):
        name = name.replace(published, linen)
    return name


def published(tree):
    return {name: leaf.reshape(1, 1, 1, -1) if "/gn" in f"/{name}" else leaf for name, leaf in tree.items()}


def linen(tree):
    return {rename(name): leaf for name, leaf in tree.items()}
