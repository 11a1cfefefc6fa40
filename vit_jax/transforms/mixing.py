"""mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899): two images become two mixtures, and their labels, too.

Image i of a batch is mixed with image i xor 1, its neighbour. The order of the images is random, so that these pairs are
random, too. Neighbours are always in the same microbatch on the same device: no layout changes a pair or moves an image.
Both images of a pair share one draw, as in timm's mode "pair": what one image loses, the other gets. So all images of a batch
count equally, as they do in the papers' code, in which the whole batch shares one draw.
"""

import jax
import jax.numpy as jnp

from vit_jax.transforms.erasing import inside
from vit_jax.transforms.geometry import below
from vit_jax.transforms.keys import fold


def mix(
    keys: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with its neighbour, and its label likewise.

    mixup: λ · own image + (1 - λ) · other image, with λ of Beta(mixup, mixup). CutMix: a rectangle of the other image replaces
    the same rectangle of the own image. Its sides are √(1 - λ) of the image's, with λ of Beta(cutmix, cutmix), and its centre
    is uniform; what lies beyond the edge is cut off, and λ becomes the part of the image that is left. In both, the label is
    λ · own label + (1 - λ) · other label. If both are above 0, each pair gets one of the two with equal probability.

    Args:
      keys: typed keys [B], one an image; those of even images draw.
      images: float32 [B, H, W, C], B even; both mixtures commute with scaling.
      labels: int32 [B].
      num_classes: the length of a label.
      mixup, cutmix: parameters of the beta distributions; 0: off. Not both are 0.

    Returns:
      The images and the labels float32 [B, num_classes], which sum to one.

    Raises:
      ValueError: the number of images is odd.
    """
    batch, height, width, _ = images.shape
    if batch % 2:
        raise ValueError(f"images are mixed in pairs, and there are {batch}: an even number of them is needed on each device")
    first = keys.reshape(-1, 2)[:, 0]
    kept = weight = None
    if mixup:
        weight = jax.vmap(lambda key: jax.random.beta(key, mixup, mixup))(fold(first, 0))
        kept = jnp.broadcast_to(weight[:, None, None], (batch // 2, height, width))
    if cutmix:
        drawn = jax.vmap(lambda key: jax.random.beta(key, cutmix, cutmix))(fold(first, 1))
        u = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(fold(first, 2))
        outside = 1.0 - inside(rectangles(drawn, u[:, :2], height, width), height, width)
        left = outside.mean(axis=(1, 2))
        cut = u[:, 2] < (0.5 if mixup else 1)
        kept = outside if kept is None else jnp.where(cut[:, None, None], outside, kept)
        weight = left if weight is None else jnp.where(cut, left, weight)
    assert kept is not None and weight is not None, "neither mixup nor cutmix is above 0"
    return _mixture(images, kept[..., None]), _mixture(jax.nn.one_hot(labels, num_classes), weight[:, None])


def rectangles(kept: jax.Array, place: jax.Array, height: int, width: int) -> jax.Array:
    """CutMix's rectangles, with the rounding of its published code (`rand_bbox` of clovaai/CutMix-PyTorch).

    Args:
      kept: float32 [N], the part of the image that is kept where nothing is cut off.
      place: float32 [N, 2] in [0, 1), row and column of the centre.
      height, width: of the image in pixels.

    Returns:
      int32 [N, 4], (top, left, height, width).
    """
    edges = jnp.array([[height, width]])
    half = jnp.floor(edges * jnp.sqrt(1 - kept)[:, None]).astype(jnp.int32) // 2
    centre = below(place, edges)
    start, end = jnp.clip(centre - half, 0, edges), jnp.clip(centre + half, 0, edges)
    return jnp.concatenate([start, end - start], axis=1)


def _mixture(rows: jax.Array, kept: jax.Array) -> jax.Array:
    """Rows [B, …], each with its neighbour in the weights [B / 2, …] of their pair."""
    pairs = rows.reshape(-1, 2, *rows.shape[1:])
    return (kept[:, None] * pairs + (1 - kept[:, None]) * pairs[:, ::-1]).reshape(rows.shape)
