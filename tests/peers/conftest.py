"""Packages that the tests against timm and transformers need (tests are skipped without them), and random weights.

`make test-interop` runs these tests; they need the CPU build of PyTorch and no network.
"""

import importlib
import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.interop import peers
from vit_jax.models.intermediates import stages
from vit_jax.models.variants import shapes


def _import(name):
    for needed in ("torch", name, "safetensors"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}: make test-interop installs it")
    peers.import_torchvision()
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def torch():
    return _import("torch")


@pytest.fixture(scope="session")
def timm(torch):
    return _import("timm")


@pytest.fixture(scope="session")
def transformers(torch):
    return _import("transformers")


@pytest.fixture(scope="session")
def random_params():
    """A function from a model and an image size to parameters that all have an effect on the output."""

    def draw(model, image_size, seed=0):
        normal = np.random.default_rng(seed).standard_normal
        flat = {}
        for name, leaf in flatten_dict(shapes(model, image_size), sep="/").items():
            scale = np.prod(leaf.shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.1
            mean = 0.3 if name.endswith("gn3/scale") else float(name.endswith("scale"))  # a residual branch has less weight
            flat[name] = (normal(leaf.shape) * scale + mean).astype(np.float32)
        return unflatten_dict(flat, sep="/")

    return draw


@pytest.fixture(scope="session")
def random_images():
    """A function from an image size to two images as a model receives them."""

    def draw(height, width=None, count=2):
        return np.random.default_rng(1).uniform(-1, 1, (count, height, width or height, 3)).astype(np.float32)

    return draw


@pytest.fixture(scope="session")
def our_stages():
    """A function from a model, parameters and images to the stages, compiled because eager calls are far slower."""

    def run(model, params, images):
        return jax.jit(lambda params, images: stages(model, params, images))(params, images)

    return run


@pytest.fixture(scope="session")
def original() -> Path:
    """A checkout of google-research/vision_transformer."""
    path = os.environ.get("VIT_JAX_ORIGINAL")
    if not path:
        pytest.skip("needs a checkout of github.com/google-research/vision_transformer: set VIT_JAX_ORIGINAL to its path")
    return Path(path)
