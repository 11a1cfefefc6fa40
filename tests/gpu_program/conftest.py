"""Programs that are compiled for cards that are only described; skipped without JAX's plug-in for CUDA."""

import contextlib
import dataclasses
import functools
import threading

import pytest

from configs import cifar100_b16
from vit_jax import Config
from vit_jax.errors import ConfigError
from vit_jax.training import target
from vit_jax.training.cards import CARDS


def configured(
    model: str = "B/16",
    size: int = 224,
    batch: int = 64,
    dropout: float = 0.1,
    remat: bool = False,
    attention: str = "auto",
    mesh: str = "",
) -> Config:
    """configs/cifar100_b16.py with random weights and other values of these fields."""
    config = cifar100_b16.get_config()
    config.model = dataclasses.replace(config.model, checkpoint="", variant=model, dropout=dropout, attention=attention)
    config.data.image_size, config.training.batch_size, config.run.remat = size, batch, remat
    config.run.mesh = mesh
    return config


@pytest.fixture(scope="session")
def train_step():
    """A function: the target.Plan of the training step of `configured(**fields)` for `devices` cards; usable in threads."""
    try:
        target.check_plugin()
    except ConfigError as error:
        pytest.skip(str(error))

    with contextlib.ExitStack() as stack:  # each description changes settings of JAX until the last test
        described = functools.cache(lambda card, count: stack.enter_context(target.described(CARDS[card], count)))
        lock = threading.Lock()

        def compiled(card: str, devices: int = 1, **fields) -> target.Plan:
            with lock:
                found = described(card, devices)
            return target.Target(configured(**fields), found).train_step()

        yield compiled
