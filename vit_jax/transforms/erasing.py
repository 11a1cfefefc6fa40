"""Random erasing (arXiv:1708.04896): a random rectangle of an image is replaced by a constant."""

import jax
import jax.numpy as jnp

from vit_jax.transforms.geometry import attempts, below
from vit_jax.transforms.keys import fold

# Of torchvision's RandomErasing; the paper's rectangles have at most 0.4 of the area and a ratio of at most 1 / 0.3.
AREA = (0.02, 0.33)
RATIO = (0.3, 3.3)


def erase(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Sets a random rectangle of some images to 0.

    It acts on scaled images, in which 0 is the mean colour of the statistics they are scaled by (grey 127.5 with Google's): so
    do torchvision and timm by default, and the paper's variant RE-M. The paper's default, random values, is not built.

    Args:
      keys: typed keys [B], one an image.
      images: float32 [B, H, W, C].
      probability: that an image is changed.

    Returns:
      float32 [B, H, W, C].
    """
    _, height, width, _ = images.shape
    erased = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(fold(keys, 0))
    hole = inside(random_rectangles(fold(keys, 1), height, width), height, width) & erased[:, None, None]
    return jnp.where(hole[..., None], 0, images)


def random_rectangles(keys: jax.Array, height: int, width: int) -> jax.Array:
    """Draws a rectangle for each key as `RandomErasing.get_params` does (torchvision/transforms/transforms.py).

    Area uniform, ratio of height to width log-uniform, both lengths shorter than the image's, at a uniform place. Ten attempts
    are drawn at once and the first that fits is taken; if none does, the rectangle is empty.

    Returns:
      int32 [B, 4], (top, left, height, width).
    """

    def draw(key: jax.Array) -> jax.Array:
        u, place = attempts(key, 10)
        pixels = height * width * (AREA[0] + u[0] * (AREA[1] - AREA[0]))
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** u[1]
        h = jnp.rint(jnp.sqrt(pixels * ratio)).astype(jnp.int32)
        w = jnp.rint(jnp.sqrt(pixels / ratio)).astype(jnp.int32)
        fits = (h < height) & (w < width)
        first = jnp.argmax(fits)
        shape = jnp.where(fits[first], jnp.stack([h[first], w[first]]), 0)
        return jnp.concatenate([below(place, jnp.array([height, width]) - shape + 1), shape])

    return jax.vmap(draw)(keys)


def inside(boxes: jax.Array, height: int, width: int) -> jax.Array:
    """Which pixels of images lie in their box: bool [B, height, width] of boxes int32 [B, 4] (top, left, height, width)."""
    starts, extents = boxes[:, :2], boxes[:, 2:]

    def line(axis: int, length: int) -> jax.Array:
        pixel = jnp.arange(length)[None] - starts[:, axis, None]
        return (pixel >= 0) & (pixel < extents[:, axis, None])

    return line(0, height)[:, :, None] & line(1, width)[:, None, :]
