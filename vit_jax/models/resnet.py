"""The convolutional root and stages in front of the hybrid Vision Transformers (R+Ti/16, R26+S/32, R50+B/16, …).

A ResNet v1 with weight standardisation and group normalisation, as in BiT (Kolesnikov et al. 2020) and in the original's
vit_jax/models_resnet.py. Every value that parity hangs on is written out: SAME padding, 32 groups, both epsilons.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vit_jax.models.layers import precision_of

GroupNorm = partial(nn.GroupNorm, num_groups=32, epsilon=1e-6)


class StdConv(nn.Module):
    """A convolution without bias whose kernel is standardised over its inputs: (w - mean) / (std + 1e-5).

    Called with [B, H, W, C], returns [B, ceil(H / stride), ceil(W / stride), features].
    """

    features: int
    kernel_size: int
    stride: int = 1
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        kernel = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        kernel = kernel / (jnp.std(kernel, axis=(0, 1, 2), keepdims=True) + 1e-5)
        return lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision_of(self.dtype),
        )


class ResidualUnit(nn.Module):
    """A bottleneck of 1×1, 3×3 and 1×1 convolutions; [B, H, W, C] → [B, H/stride, W/stride, 4 · features]."""

    features: int
    stride: int = 1
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv, norm = partial(StdConv, dtype=self.dtype), partial(GroupNorm, dtype=self.dtype)
        residual = x
        if x.shape[-1] != 4 * self.features or self.stride != 1:
            residual = conv(4 * self.features, 1, self.stride, name="conv_proj")(x)
            residual = norm(name="gn_proj")(residual)
        y = nn.relu(norm(name="gn1")(conv(self.features, 1, name="conv1")(x)))
        y = nn.relu(norm(name="gn2")(conv(self.features, 3, self.stride, name="conv2")(y)))
        y = norm(name="gn3", scale_init=nn.initializers.zeros)(conv(4 * self.features, 1, name="conv3")(y))
        return nn.relu(residual + y)


class Stage(nn.Module):
    """Residual units in a row; the first one strides."""

    units: int
    features: int
    stride: int
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(self.units):
            stride = self.stride if i == 0 else 1
            x = ResidualUnit(self.features, stride, dtype=self.dtype, name=f"unit{i + 1}")(x)
        return x


class ResNet(nn.Module):
    """Root and stages; [B, H, W, 3] → [B, H/d, W/d, C] with d = 4 · 2^(stages - 1), or 4 for the bare root.

    `blocks` holds the units of each stage; `width` the channels of the root, doubled at every later stage.
    """

    blocks: Sequence[int]
    width: int = 64
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images):
        x = StdConv(self.width, 7, 2, dtype=self.dtype, name="conv_root")(images)
        x = nn.relu(GroupNorm(dtype=self.dtype, name="gn_root")(x))
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="SAME")  # by keyword, as jax2onnx wants it
        for i, units in enumerate(self.blocks):
            stride = 1 if i == 0 else 2
            x = Stage(units, self.width * 2**i, stride, dtype=self.dtype, name=f"block{i + 1}")(x)
        return x
