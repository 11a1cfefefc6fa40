"""Dense products and attention in the form that each backend computes fastest; no other file of the models knows backends."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """The precision of products of a type: float32 is really computed in float32, where a GPU would default to TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT


def _flat_product(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """lax.dot_general of x [..., *inner] with kernel [*inner, *outer] as one product of two matrices.

    On the CPU, XLA computes its gradients without the copies that it makes for products of more axes.
    """
    axes = len(dimensions[0][1])
    inner, outer = kernel.shape[:axes], kernel.shape[axes:]
    y = lax.dot(x.reshape(-1, math.prod(inner)), kernel.reshape(math.prod(inner), -1), precision=precision)
    return y.reshape(*x.shape[:-axes], *outer)


def dense(features: int, dtype: jax.typing.DTypeLike, name: str) -> nn.Dense:
    """A dense layer of the MLP; [..., C] → [..., features]."""
    return nn.Dense(
        features,
        dtype=dtype,
        precision=precision_of(dtype),
        dot_general=_flat_product,
        kernel_init=nn.initializers.xavier_uniform(),
        bias_init=nn.initializers.normal(1e-6),
        name=name,
    )


def dot_product_attention(query, key, value, *, implementation: str, precision: lax.Precision) -> jax.Array:
    """Attention of [B, T, heads, K] computed by "xla" or "cudnn", softmax in float32; it has no dropout of weights."""
    query = query / math.sqrt(query.shape[-1])
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")
    # Heads before tokens: on the CPU, jax.nn's "xla" adds a tenth to a small model's inference time.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    logits = jnp.matmul(query, key.swapaxes(2, 3), precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.matmul(weights, value, precision=precision).swapaxes(1, 2)


def self_attention(num_heads: int, dtype: Any, implementation: str, dropout: float, with_weights: bool, name: str) -> nn.Module:
    """Multi-head self-attention; [B, T, D] → [B, T, D]. Weights are dropped or returned only by Linen's own function."""
    precision = precision_of(dtype)
    fused = functools.partial(dot_product_attention, implementation=implementation, precision=precision)
    return nn.MultiHeadDotProductAttention(
        num_heads,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.initializers.xavier_uniform(),
        dropout_rate=dropout,
        broadcast_dropout=False,
        deterministic=not dropout,
        force_fp32_for_softmax=True,
        attention_fn=nn.dot_product_attention if with_weights or dropout else fused,
        qkv_dot_general=_flat_product,
        out_dot_general=_flat_product,
        name=name,
    )
