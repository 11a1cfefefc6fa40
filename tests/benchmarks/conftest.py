"""A row of the table of variants that compiles in no time."""

import jax
import pytest

from vit_jax.models.variants import VARIANTS
from vit_jax.training import devices


@pytest.fixture
def pico(monkeypatch):
    monkeypatch.setitem(VARIANTS, "Pico/8", dict(VARIANTS["Nano/8"], hidden_size=64, num_layers=2, num_heads=2, mlp_dim=256))
    alone = devices.Layout("mesh", jax.local_devices()[:1])  # one device, for which XLA compiles sooner than for eight
    monkeypatch.setattr(devices, "start", lambda run: alone)
    return ["--model", "Pico/8", "--size", "32", "--batch", "8", "--classes", "5", "--rounds", "3"]
