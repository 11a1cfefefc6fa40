"""The layers: the precision of products, and Linen's own, whose parameters, draws and numbers they have."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import make
from vit_jax.models import layers

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)


@pytest.mark.parametrize(
    ("shape", "features", "axes"), [((2, 5, 12), (7,), 1), ((2, 5, 12), (3, 4), 1), ((2, 5, 3, 4), (6,), 2)]
)
def test_dense_is_that_of_linen(shape, features, axes):
    x, key = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32), jax.random.key(0)
    init = dict(kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.normal())
    linen = nn.DenseGeneral(features, axis=tuple(range(-axes, 0)), **init)
    ours = layers.Dense(features, jnp.float32, axes, nn.initializers.normal())
    params = linen.init(key, x)
    jax.tree.map(np.testing.assert_array_equal, params, ours.init(key, x))
    np.testing.assert_allclose(ours.apply(params, x), linen.apply(params, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_is_that_of_linen(dropout):
    """Also the weights that it returns and those that it drops."""
    common = dict(broadcast_dropout=False, deterministic=not dropout, kernel_init=nn.initializers.xavier_uniform())
    linen = nn.MultiHeadDotProductAttention(4, dropout_rate=dropout, force_fp32_for_softmax=True, name="attention", **common)
    fields = layers.BlockFields(4, 64, 0.0, dropout, 0.0, jnp.float32, "linen", X.shape[1])
    ours = layers.SelfAttention(fields, name="attention")
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = {"params": linen.init(keys, X)["params"]}
    jax.tree.map(np.testing.assert_array_equal, params["params"], ours.init(keys, X)["params"])
    apply = dict(rngs={"dropout": jax.random.key(2)}, mutable=["intermediates"])
    expected, found = linen.apply(params, X, sow_weights=True, **apply), ours.apply(params, X, **apply)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    if not dropout:
        xla = layers.SelfAttention(dataclasses.replace(fields, attention="xla"), name="attention")
        np.testing.assert_allclose(xla.apply(params, X), expected[0], rtol=1e-5, atol=1e-6)


def test_recomputed_gelu_has_the_gradient_of_linen():
    """In float32, where rounding hides nothing; also under vmap and in a block that is computed again."""
    expected = jax.value_and_grad(lambda x: nn.gelu(x, approximate=True).sum())(X)
    ours = layers._recomputed_gelu
    for function in (ours, jax.vmap(ours), jax.checkpoint(ours), jax.jit(ours)):
        found = jax.value_and_grad(lambda x, function=function: function(x).sum())(X)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, expected)


def test_gelu_keeps_only_its_input_in_bfloat16():
    def kept(dtype) -> int:
        back = jax.eval_shape(lambda x: jax.vjp(layers.gelu, x)[1], jax.ShapeDtypeStruct(X.shape, dtype))
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    assert kept(jnp.bfloat16) == X.size < kept(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_the_softmax_of_products(dtype):
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.normal(size=(2, 5, 3, 8)), dtype) for _ in range(3))
    found = layers.dot_product_attention(query, key, value, implementation="xla", precision=jax.lax.Precision.HIGHEST)
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
