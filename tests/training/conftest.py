"""A run small enough to be made many times: a tiny ViT on a part of the embedded images."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import Config
from vit_jax.models.variants import build, shapes


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The path of an npz: one block of width 16, patches of 8 pixels, trained at 16 px, random."""
    model = build("B/8", hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, num_classes=5)
    draw = np.random.default_rng(0)
    flat = {name: draw.normal(scale=0.2, size=leaf.shape) for name, leaf in flatten_dict(shapes(model, 16), sep="/").items()}
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.npz"
    np.savez(path, **{name: leaf.astype(np.float32) for name, leaf in flat.items()})
    return str(path)


@pytest.fixture
def config(tiny_checkpoint):
    """12 steps of 16 on 64 images of 10 classes; tests change what they are about."""
    config = Config(seed=3)
    config.model.checkpoint = tiny_checkpoint
    config.data.task = "cifar100_excerpt"
    config.data.train_split, config.data.test_split = "train[:64]", "test[:50]"
    config.data.image_size = 16
    config.optimizer.warmup_steps = 2
    config.training.steps, config.training.batch_size = 12, 16
    config.training.eval_every, config.run.eval_batch_size, config.training.save_every = 4, 16, 5
    return config


class Images:
    """A Source of arrays in memory."""

    resized = False

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels
        self.nbytes, self.image_shape = images.nbytes, images.shape[1:]
        self.num_classes = int(labels.max()) + 1
        self.class_names = [str(i) for i in range(self.num_classes)]

    def __len__(self):
        return len(self.images)

    def take(self, index):
        return self.images[index], self.labels[index]

    def read(self, index, parallel=True):
        return *self.take(index), None


@pytest.fixture(scope="session")
def source_of():
    """A function: n random images of 8×8 pixels with labels of 10 classes."""

    def make(n: int) -> Images:
        draw = np.random.default_rng(n)
        return Images(draw.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8), draw.integers(0, 10, n).astype(np.int32))

    return make


@pytest.fixture(scope="session")
def session_tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def uninterrupted(config, session_tmp):
    """A run of 12 steps, made once, and its result."""
    workdir = session_tmp / "uninterrupted"
    from vit_jax.training import loop

    return workdir, loop.train(config, workdir)
