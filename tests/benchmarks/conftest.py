"""A model that compiles quickly."""

import jax
import pytest

from vit_jax.models.variants import VARIANTS
from vit_jax.training import devices


@pytest.fixture
def pico(monkeypatch):
    """Options of a command line that measures a tiny model on one device."""
    monkeypatch.setitem(VARIANTS, "Pico/8", dict(VARIANTS["Nano/8"], hidden_size=64, num_layers=2, num_heads=2, mlp_dim=256))
    layout = devices.Layout("mesh", jax.local_devices()[:1])  # XLA compiles sooner for one device than for eight
    monkeypatch.setattr(devices, "start", lambda run: layout)
    return ["--model", "Pico/8", "--size", "32", "--batch", "8", "--rounds", "3"]
