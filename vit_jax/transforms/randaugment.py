"""RandAugment (arXiv:1909.13719) in the variant that the models of AugReg were trained with.

Operations, magnitudes and fill are those of big_vision's `pp/autoaugment.py`, which comes from the TensorFlow code of
EfficientNet: each layer draws one of 16 operations with equal probability, and all have the same magnitude. That is the setting
of "How to train your ViT?" (arXiv:2106.10270), where "light2" is 2 layers of magnitude 10, "medium" 15 and "strong" 20. As
there, it acts on images that are cropped, flipped and resized, and rounded to whole numbers.

What differs from big_vision:
- Magnitude 0 leaves images as they are. There, it is "actually not nothing": posterizing to 0 bits gives a black image.
- Translations and cut-outs, which it has in pixels of 224, grow with the size of the image.
- Contrast blends with the mean grey value. There, a mistake makes it the number of pixels divided by 256.
- Rounding is that of Pillow (see colour.py).

What differs from torchvision's `RandAugment`, which has 14 operations: that has the identity, but no inversion, cut-out or
addition below a threshold; the effect of its posterizing and solarizing grows with the magnitude, where here it shrinks (at 10
posterizing keeps 4 bits and solarizing changes nothing); its colours change in both directions, where here they follow the
magnitude (0.1 to 1.9 times at 10, 1 time at 5); it fills with black, where here the fill is 128.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.transforms import colour
from vit_jax.transforms.erasing import inside
from vit_jax.transforms.geometry import below
from vit_jax.transforms.keys import fold

OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "cutout",
    "solarize_add",
)
FILL = 128  # of pixels that come from outside the image, and of cut-outs
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}


def randaugment(keys: jax.Array, images: jax.Array, layers: int, magnitude: float) -> jax.Array:
    """Applies randomly drawn operations to each image.

    Args:
      keys: typed keys [B], one an image.
      images: real [B, H, W, 3] in [0, 255]; rounded first.
      layers: the number of operations, one after the other.
      magnitude: of each, from 0, with which no image changes, to 30.

    Returns:
      float32 [B, H, W, 3], whole numbers in [0, 255] unless the magnitude is 0.
    """
    if not layers or not magnitude:
        return images
    # What lies between two numbers becomes the larger one, also if another layout's rounding errors make it a little smaller.
    images = jnp.floor(images + (0.5 + 2**-10)).astype(jnp.int32)
    for layer in range(layers):
        u = jax.vmap(lambda key: jax.random.uniform(key, (4,)))(fold(keys, layer))
        images = apply(images, below(u[:, 0], len(OPERATIONS)), u[:, 1] < 0.5, u[:, 2:], magnitude)
    return images.astype(jnp.float32)


def apply(images: jax.Array, operation: jax.Array, negative: jax.Array, place: jax.Array, magnitude: float) -> jax.Array:
    """Applies one operation to each image.

    All are computed for all images and one is taken, in as few passes as there are kinds: a table for each channel, a blend
    with an image, one affine map, one mask. An operation of another kind is the identity in each of these.

    Args:
      images: int32 [B, H, W, 3] in [0, 255].
      operation: int32 [B], positions in `OPERATIONS`.
      negative: bool [B], whether a rotation, shear or translation goes into the other direction.
      place: float32 [B, 2] in [0, 1), row and column of the centre of a cut-out.
      magnitude: above 0.

    Returns:
      int32 [B, H, W, 3] in [0, 255].
    """
    _, height, width, _ = images.shape
    factor = 1.8 * magnitude / 10 + 0.1

    def choose(name: str, chosen: jax.Array, others: jax.Array) -> jax.Array:
        own = operation == _NUMBER[name]
        return jnp.where(own.reshape(-1, *[1] * (others.ndim - 1)), chosen, others)

    counts = colour.histograms(images)
    tables = jnp.asarray(_tables(magnitude))[operation][:, None].repeat(3, axis=1)
    tables = choose("autocontrast", colour.autocontrast(counts), tables)
    tables = choose("equalize", colour.equalize(counts), tables)
    tables = choose("contrast", colour.contrast(images, factor), tables)
    changed = colour.lookup(images, tables)
    degenerate = choose("color", colour.grey(images)[..., None], colour.smooth(images))
    blended = colour.blend(degenerate, images, factor)
    changed = choose("sharpness", blended, choose("color", blended, changed))
    matrices = jnp.asarray(_matrices(magnitude, height, width))[operation, negative.astype(jnp.int32)]
    changed = warp(changed, matrices)
    half = np.array([[int(4 * magnitude * length / 224) for length in (height, width)]])
    centre = below(place, jnp.array([[height, width]]))
    hole = inside(jnp.concatenate([centre - half, jnp.broadcast_to(2 * half, centre.shape)], axis=1), height, width)
    return choose("cutout", jnp.where(hole[..., None], FILL, changed), changed)


def warp(images: jax.Array, matrices: jax.Array) -> jax.Array:
    """Takes each pixel from the nearest to where an affine map sends it, or fills it if that lies outside the image.

    Args:
      images: int32 [B, H, W, 3].
      matrices: int32 [B, 2, 3], in units of 2⁻¹⁶, so that no rounding error moves a pixel: what is in column x and row y of the
        result comes from column and row M · (x, y, 1).

    Returns:
      int32 [B, H, W, 3].
    """
    _, height, width, _ = images.shape
    x, y = jnp.arange(width)[None, None], jnp.arange(height)[None, :, None]

    def nearest(row: int) -> jax.Array:
        a, b, c = (matrices[:, row, i, None, None] for i in range(3))
        return (a * x + b * y + c + 2**15) >> 16

    column, row = nearest(0), nearest(1)
    known = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    found = jax.vmap(lambda image, row, column: image[row, column])(
        images, jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
    )
    return jnp.where(known[..., None], found, FILL)


@functools.cache
def _tables(magnitude: float) -> np.ndarray:
    """The table of each operation that does not depend on the image, else the identity: int32 [operations, 256]."""
    tables = np.tile(np.arange(256, dtype=np.int32), (len(OPERATIONS), 1))
    tables[_NUMBER["invert"]] = colour.invert()
    tables[_NUMBER["posterize"]] = colour.posterize(int(magnitude / 10 * 4))
    tables[_NUMBER["solarize"]] = colour.solarize(int(magnitude / 10 * 256))
    tables[_NUMBER["solarize_add"]] = colour.solarize_add(int(magnitude / 10 * 110))
    tables[_NUMBER["brightness"]] = colour.brightness(1.8 * magnitude / 10 + 0.1)
    return tables


@functools.cache
def _matrices(magnitude: float, height: int, width: int) -> np.ndarray:
    """The affine map of each operation and of its opposite, for `warp`: int32 [operations, 2, 2, 3].

    Rotations are about the image's centre, shears about its first pixel.
    """
    matrices = np.tile(np.eye(2, 3), (len(OPERATIONS), 2, 1, 1))
    for negative, sign in enumerate((1, -1)):
        angle, shear = sign * math.radians(3 * magnitude), sign * 0.03 * magnitude
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        centre = np.array([width - 1, height - 1]) / 2
        matrices[_NUMBER["rotate"], negative] = np.column_stack([turn, centre - turn @ centre])
        matrices[_NUMBER["shear_x"], negative, 0, 1] = shear
        matrices[_NUMBER["shear_y"], negative, 1, 0] = shear
        matrices[_NUMBER["translate_x"], negative, 0, 2] = sign * 10 * magnitude * width / 224
        matrices[_NUMBER["translate_y"], negative, 1, 2] = sign * 10 * magnitude * height / 224
    return np.rint(matrices * 2**16).astype(np.int32)
