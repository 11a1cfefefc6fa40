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


def pad_tokens(x: jax.Array, implementation: str) -> jax.Array:
    """x [B, T, ...] with one more token, of zeros, if T is odd and "cudnn" computes attention: else x.

    JAX refuses the gradient of cuDNN's attention for an odd T. A test fails when it does so no longer, and this can go.
    """
    missing = x.shape[1] % 2 if implementation == "cudnn" else 0
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) if missing else x


def dot_product_attention(
    query, key, value, *, implementation: str, precision: lax.Precision, tokens: int | None = None
) -> jax.Array:
    """Attention of [B, T, heads, K] computed by "xla" or "cudnn", softmax in float32; it has no dropout of weights.

    No token attends to those after the first `tokens`, which are padding; None: there is no padding.
    """
    if implementation == "cudnn":
        lengths = None if tokens in (None, key.shape[1]) else jnp.full(len(key), tokens, jnp.int32)
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")
    # Heads before tokens: on the CPU, jax.nn's "xla" adds a tenth to a small model's inference time.
    query, key, value = (x.swapaxes(1, 2) for x in (query / math.sqrt(query.shape[-1]), key[:, :tokens], value[:, :tokens]))
    logits = jnp.matmul(query, key.swapaxes(2, 3), precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.matmul(weights, value, precision=precision).swapaxes(1, 2)


def self_attention(num_heads: int, dtype: Any, implementation: str, dropout: float, tokens: int, name: str) -> nn.Module:
    """Multi-head self-attention; [B, T, D] → [B, T, D], of which the first `tokens` of T are no padding.

    `implementation` is "xla", "cudnn" or "linen", Linen's own function, the only one that can drop or return weights.
    """
    precision = precision_of(dtype)
    fused = functools.partial(dot_product_attention, implementation=implementation, precision=precision, tokens=tokens)
    return nn.MultiHeadDotProductAttention(
        num_heads,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.initializers.xavier_uniform(),
        dropout_rate=dropout,
        broadcast_dropout=False,
        deterministic=not dropout,
        force_fp32_for_softmax=True,
        attention_fn=nn.dot_product_attention if implementation == "linen" else fused,
        qkv_dot_general=_flat_product,
        out_dot_general=_flat_product,
        name=name,
    )
