"""Changes of colours that RandAugment draws from, on images of whole numbers in [0, 255].

Most of them map each value of a channel on its own: they are tables of 256 values, and an image is looked up once. Rounding
is that of Pillow: grey values and averages to the nearest number, blends and stretched contrasts down. All is computed in whole
numbers, because the rounding errors of floating-point numbers differ between layouts, and a number may be rounded either way.
"""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_VALUES = np.arange(256, dtype=np.int32)


def lookup(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Replaces each value of images int32 [B, H, W, 3] by its entry in the tables int32 [B, 3, 256] of its channel."""
    return jax.vmap(lambda image, table: table[jnp.arange(3), image])(images, tables)


def histograms(images: jax.Array) -> jax.Array:
    """How often each value occurs in each channel of images int32 [B, H, W, 3]: int32 [B, 3, 256]."""
    channels = jnp.moveaxis(images, 3, 1).reshape(len(images), 3, -1)
    return jax.vmap(jax.vmap(lambda values: jnp.zeros(256, jnp.int32).at[values].add(1)))(channels)


def autocontrast(counts: jax.Array) -> jax.Array:
    """Tables [B, 3, 256] that stretch the values of histograms [B, 3, 256] linearly to 0 and 255; one value stays."""
    low = jnp.argmax(counts > 0, axis=-1, keepdims=True)
    high = 255 - jnp.argmax(counts[..., ::-1] > 0, axis=-1, keepdims=True)
    stretched = (_VALUES[None, None] - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), _VALUES[None, None]).astype(jnp.int32)


def equalize(counts: jax.Array) -> jax.Array:
    """Tables [B, 3, 256] that make the values of histograms [B, 3, 256] about equally frequent, as `ImageOps.equalize` does."""
    high = 255 - jnp.argmax(counts[..., ::-1] > 0, axis=-1, keepdims=True)
    sums = jnp.cumsum(counts, axis=-1)
    step = (sums[..., -1:] - jnp.take_along_axis(counts, high, axis=-1)) // 255  # without the last value that occurs
    spread = (sums - counts + step // 2) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.clip(spread, 0, 255), _VALUES[None, None]).astype(jnp.int32)


def invert() -> np.ndarray:
    """The table of the negative."""
    return 255 - _VALUES


def posterize(bits: int) -> np.ndarray:
    """The table that keeps the highest `bits` of 8; with 0 all values become 0."""
    shift = 8 - min(max(bits, 0), 8)
    return _VALUES >> shift << shift


def solarize(threshold: int) -> np.ndarray:
    """The table of the negative from a threshold on; the values below it stay."""
    return np.where(threshold > _VALUES, _VALUES, 255 - _VALUES)


def solarize_add(addition: int) -> np.ndarray:
    """The table that adds a number to the values below 128."""
    return np.where(_VALUES < 128, np.minimum(_VALUES + addition, 255), _VALUES)


def blend(degenerate: Any, images: Any, factor: float) -> Any:
    """degenerate + factor · (images - degenerate), rounded down and clipped to [0, 255]: with factor 1 the images.

    Both are int32 arrays, of JAX or NumPy, as is the result; `factor` is below 100.
    """
    whole = Fraction(factor).limit_denominator(1000)
    return (degenerate + whole.numerator * (images - degenerate) // whole.denominator).clip(0, 255)


def brightness(factor: float) -> np.ndarray:
    """The table of a blend with black."""
    return blend(np.zeros_like(_VALUES), _VALUES, factor)


def contrast(images: jax.Array, factor: float) -> jax.Array:
    """Tables [B, 1, 256] of a blend with the mean grey value of each image [B, H, W, 3]."""
    _, height, width, _ = images.shape
    total = grey(images).astype(jnp.uint32).sum(axis=(1, 2))  # of 4,096 × 4,096 pixels, it is below 2³²
    mean = ((total + height * width // 2) // (height * width)).astype(jnp.int32)
    return blend(mean[:, None, None], _VALUES[None, None], factor)


def grey(images: jax.Array) -> jax.Array:
    """Grey values of images int32 [B, H, W, 3], int32 [B, H, W]: ITU-R 601's weights in 16 bits, as Pillow has them."""
    red, green, blue = (images[..., channel] for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16


def smooth(images: jax.Array) -> jax.Array:
    """Each pixel of images int32 [B, H, W, 3] with weight 5/13 and its 8 neighbours with 1/13; the outermost pixels stay."""
    _, height, width, _ = images.shape
    if min(height, width) < 3:
        return images
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * images[:, 1:-1, 1:-1]
    return images.at[:, 1:-1, 1:-1].set((2 * sums + 13) // 26)
