"""Training in bfloat16 reaches the accuracy of training in float32."""

import os

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax.config_files import read

SEEDS = int(os.environ.get("VIT_JAX_SEEDS", "1"))  # `make test-full`: 5


@pytest.mark.slow
def test_bfloat16_accuracy_is_that_of_float32_within_noise_of_seeds(tmp_path, monkeypatch):
    one_device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one_device)  # compiles faster
    config = read("configs/demo.py")
    config.data.image_size = 32  # for speed
    config.training.steps = config.training.eval_every = config.training.save_every = 30
    config.training.batch_size = 32

    def accuracy(dtype: str, seed: int) -> float:
        config.model.dtype, config.seed = dtype, seed
        return vit_jax.train(config, tmp_path / f"{dtype}-{seed}").metrics["test/accuracy"]

    full, half = (np.array([accuracy(dtype, seed) for seed in range(SEEDS)]) for dtype in ("float32", "bfloat16"))
    assert full.mean() > 0.6  # of ten classes: they have learned
    assert abs(half - full).max() < 0.02
    if SEEDS > 2:  # one run says nothing about the noise of seeds
        assert abs(half.mean() - full.mean()) < full.std(ddof=1)
