"""Dense products and attention in the form that each backend computes fastest; no other file of the models knows backends."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class BlockFields:
    """What the blocks of an encoder have in common, for one call; mostly as the fields of VisionTransformer."""

    num_heads: int
    mlp_dim: int
    dropout: float
    attention_dropout: float  # 0 in evaluation
    stochastic_depth: float  # of one block
    dtype: jax.typing.DTypeLike
    attention: str  # "xla", "cudnn", or "linen" if attention weights are dropped or returned
    tokens: int  # without padding


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """The precision of products of a type: float32 is really computed in float32, where a GPU would default to TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT


class Dense(nn.Module):
    """[..., *inner] → [..., *features] as Linen's DenseGeneral, but as one product of two matrices and a flat bias.

    On the CPU, XLA computes its gradients without the copies that it makes for products of more axes; on a GPU, cuBLASLt adds
    a flat bias within the product.
    """

    features: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    inner_axes: int = 1
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        batch, inner, init = x.shape[: -self.inner_axes], x.shape[-self.inner_axes :], nn.initializers.xavier_uniform()
        flat = math.prod(inner), math.prod(self.features)
        kernel = self.param("kernel", lambda key: init(key, flat, jnp.float32).reshape(*inner, *self.features))
        bias = self.param("bias", self.bias_init, self.features, jnp.float32)
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
        y = lax.dot(x.reshape(-1, flat[0]), kernel.reshape(flat), precision=precision_of(self.dtype)) + bias.reshape(1, -1)
        return y.reshape(*batch, *self.features)


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=True)


_recomputed_gelu = jax.custom_vjp(_tanh_gelu)
# Without the barrier the compiler would keep the tanh of the forward pass. It is on x only, so that the gradient of what
# follows, a dropout, is computed by the same kernel.
_recomputed_gelu.defvjp(lambda x: (_tanh_gelu(x), x), lambda x, g: jax.vjp(_tanh_gelu, lax.optimization_barrier(x))[1](g))


def gelu(x: jax.Array) -> jax.Array:
    """The tanh GELU. In bfloat16, the type of a GPU, its gradient computes it again, which is faster there than to keep it."""
    return _recomputed_gelu(x) if x.dtype == jnp.bfloat16 else _tanh_gelu(x)


def pad_tokens(x: jax.Array, implementation: str) -> jax.Array:
    """x [B, T, ...] with one more token, of zeros, if T is odd and "cudnn" computes attention: else x.

    JAX refuses the gradient of cuDNN's attention for an odd T. A test fails when it does so no longer, and this can go.
    """
    padded = implementation == "cudnn" and x.shape[1] % 2
    return jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1) if padded else x


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


class SelfAttention(nn.Module):
    """Multi-head self-attention; [B, T, D] → [B, T, D]. Only Linen's own function drops or returns weights."""

    fields: BlockFields

    @nn.compact
    def __call__(self, x):
        fields = self.fields
        heads = (fields.num_heads, x.shape[-1] // fields.num_heads)
        query, key, value = (Dense(heads, fields.dtype, name=name)(x) for name in ("query", "key", "value"))
        attention: Any = functools.partial(dot_product_attention, implementation=fields.attention, tokens=fields.tokens)
        if fields.attention == "linen":
            attention = functools.partial(
                nn.dot_product_attention,
                dropout_rate=fields.attention_dropout,
                dropout_rng=self.make_rng("dropout") if fields.attention_dropout else None,
                broadcast_dropout=False,
                module=self,
                force_fp32_for_softmax=True,
            )
        y = attention(query, key, value, precision=precision_of(fields.dtype))
        return Dense(x.shape[-1:], fields.dtype, inner_axes=2, name="out")(y)
