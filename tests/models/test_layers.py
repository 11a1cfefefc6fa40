"""Attention and the precision of products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import make
from vit_jax.models.layers import dot_product_attention


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_the_softmax_of_products(dtype):
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.normal(size=(2, 5, 3, 8)), dtype) for _ in range(3))
    found = dot_product_attention(query, key, value, implementation="xla", precision=jax.lax.Precision.HIGHEST)
    assert found.dtype == dtype and found.shape == (2, 5, 3, 8)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=1e-6 if dtype == jnp.float32 else 0.02)


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
@pytest.mark.parametrize("variant", ["B/16", "R+Ti/16"])
def test_precision_of_products_is_explicit(variant, dtype, precision):
    model, params, images = make(variant, 32, dtype=dtype)
    text = jax.jit(lambda p, x: model.apply({"params": p}, x)).lower(params, images).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot" in line or "stablehlo.convolution" in line]
    assert len(products) > 10
    if precision == "HIGHEST":
        assert all("[HIGHEST, HIGHEST]" in line or line.count("HIGHEST") == 2 for line in products)
    else:
        assert not any("HIGHEST" in line for line in products)
