"""A tiny model with random weights in the folder of a run, and images to classify."""

import jax
import numpy as np
import pytest

from vit_jax.formats.google import save_npz
from vit_jax.models.vit import VisionTransformer
from vit_jax.predict import Classifier

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
META = {"image_size": 32, "class_names": NAMES, "normalization": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}}


def save(path, meta=META, **fields):
    """Saves random weights of a tiny model, whose probabilities differ between images."""
    sizes = dict(patch_size=8, hidden_size=32, num_layers=2, num_heads=2, mlp_dim=64)
    model = VisionTransformer(**{"num_classes": 7, **sizes, **fields})
    params = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype(np.float32), params)
    save_npz(path, params, meta)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run's folder."""
    folder = tmp_path_factory.mktemp("run")
    save(folder / "final.npz")
    return folder


@pytest.fixture(scope="session")
def classify(run):
    return Classifier(run)
