"""Small models with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.variants import build, shapes

TINY = dict(hidden_size=32, num_layers=2, num_heads=2, mlp_dim=64)


def make(variant: str = "B/16", size: int = 32, **fields):
    model = build(variant, **{**TINY, "num_classes": 3, **fields})
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(scale=0.2, size=leaf.shape), leaf.dtype), shapes(model, size))
    return model, params, jnp.asarray(draw.normal(size=(2, size, size, 3)), jnp.float32)
