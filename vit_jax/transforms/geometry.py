"""Crop boxes and bilinear resampling, as products with small matrices of weights.

Bilinear resampling of a box is linear in the image and separable, so a batch of different boxes is two batched
products: rows [B, h, H] and columns [B, w, W]. That needs no gather, runs on a GPU's matrix units, and makes it easy to
see that no pixel from outside a box can take part: its weight is zero.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.resampling import CENTER

# The aspect ratios (width / height) that each source draws from.
_TORCHVISION_ASPECT = (3 / 4, 4 / 3)
_TENSORFLOW_ASPECT = (0.75, 1.33)


def resize(images: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Resizes as `tf.image.resize` of TF 2 does by default: bilinear, half-pixel centres, no antialiasing, no rounding.

    Args:
      images: [B, H, W, C], any real type; images are uint8.
      size: of the result, in pixels: one number for a square, or (height, width). The aspect ratio is not kept.

    Returns:
      float32 [B, height, width, C] in the range of the input.
    """
    out_height, out_width = _pair(size)
    _, height, width, _ = images.shape
    return _resample(images, _weights(0, height, height, out_height), _weights(0, width, width, out_width))


def center_crop(images: jax.Array, size: int | tuple[int, int], sizes: jax.Array | None = None) -> jax.Array:
    """Cuts the central part out of each image and resizes it: bilinear, half-pixel centres, with antialiasing, no rounding.

    For a square result the part is the square of 7/8 of the shorter side. That is what remains of an image whose shorter
    side is resized to 8/7 of `size`, such as 256 for 224, and which is then cropped to `size`, without rounding of either
    length. For another result it is 7/8 of the largest part with the result's aspect ratio.

    Args:
      images: [B, H, W, C], any real type; images are uint8.
      size: of the result, in pixels: one number for a square, or (height, width).
      sizes: int32 [B, 2], the original heights and widths, as for `crop_resize`; the part is central and square in these.

    Returns:
      float32 [B, height, width, C] in the range of the input.
    """
    stored, out = (np.array([edges]) for edges in (images.shape[1:3], _pair(size)))
    scale = (stored if sizes is None else sizes) / out  # pixels of the original for a pixel of the whole image, resized
    extents = CENTER * stored * (scale.min(axis=1, keepdims=True) / scale)  # in stored pixels
    lines = zip(extents.T, images.shape[1:3], _pair(size), strict=True)
    weights = (_central_weights(*line) for line in lines)
    return _resample(images, *(one[0] if sizes is None else one for one in weights))


def crop_resize(
    images: jax.Array,
    boxes: jax.Array,
    size: int | tuple[int, int],
    flip: jax.Array | None = None,
    sizes: jax.Array | None = None,
) -> jax.Array:
    """Cuts a box out of each image, resizes it as `resize` does, and mirrors it left to right where asked.

    The result is that of cropping first: no pixel from outside a box has any weight, also at its edges, where
    `jax.image.scale_and_translate` lets neighbours bleed in.

    Args:
      images: [B, H, W, C], any real type; images are uint8.
      boxes: int32 [B, 4], (top, left, height, width) in pixels, not empty. Beyond the image lie zeros.
      size: of the result, in pixels: one number for a square, or (height, width).
      flip: bool [B], which images to mirror; None: none of them.
      sizes: int32 [B, 2], the heights and widths in pixels that the boxes are meant for, if the images have been resized
        from these to [H, W]; None: they have not been.

    Returns:
      float32 [B, height, width, C] in the range of the input.
    """
    out_height, out_width = _pair(size)
    batch, height, width, _ = images.shape
    if boxes.shape != (batch, 4):
        raise ValueError(f"boxes has shape {boxes.shape}; {batch} images need ({batch}, 4): top, left, height, width")
    if sizes is not None:
        boxes = boxes * jnp.tile(jnp.array([[height, width]]) / sizes, (1, 2))
    top, left, box_height, box_width = boxes.T
    rows = jax.vmap(lambda start, extent: _weights(start, extent, height, out_height))(top, box_height)
    columns = jax.vmap(lambda start, extent: _weights(start, extent, width, out_width))(left, box_width)
    return _resample(images, rows, _mirrored(columns, flip))


def random_crops(
    keys: jax.Array,
    images: jax.Array,
    size: int | tuple[int, int],
    crop: str,
    area: tuple[float, float],
    flip: jax.Array | None = None,
    sizes: jax.Array | None = None,
    padding: int = 4,
) -> jax.Array:
    """Cuts a random part out of each image and resizes it.

    Args:
      keys: typed keys [B], one an image.
      images: uint8 [B, H, W, C].
      size: of the result, as for `resize`.
      crop: "torchvision" or "tensorflow", see `random_boxes`; "none": the whole image; "resize_crop": the image is resized
        to 7/6 of `size`, and a part of `size` is cut out at a uniform place. That is how the models of AugReg are fine-tuned
        in big_vision's configurations: to 448 px, of which 384. "pad": the image is padded with black on each side, and a
        part of its own size is cut out at a uniform place, as the ResNet paper trains on CIFAR (arXiv:1512.03385, section 4.2)
        and torchvision's `RandomCrop(32, padding=4)` does.
      area: of `random_boxes`.
      flip, sizes: as for `crop_resize`.
      padding: of "pad", in pixels of the images as they are given.

    Returns:
      float32 [B, height, width, C] in the range of the input.
    """
    batch, height, width, _ = images.shape
    if crop == "pad":  # a box reaches beyond the image by at most the padding; no pixel has any weight there, which is black
        offsets = below(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys), 2 * padding + 1) - padding
        boxes = jnp.concatenate([offsets, jnp.broadcast_to(jnp.array([[height, width]]), (batch, 2))], axis=1)
        return crop_resize(images, boxes, size, flip)
    if crop == "resize_crop":
        out = _pair(size)
        larger = round(out[0] * 7 / 6), round(out[1] * 7 / 6)
        spare = jnp.array([[a - b for a, b in zip(larger, out, strict=True)]])
        offsets = below(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys), spare + 1)

        def weights(offset, length, enlarged, out):  # of the resized image, rows `offset` to `offset` + out - 1
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(_weights(0, length, length, enlarged)), offset, out)

        rows = jax.vmap(lambda offset: weights(offset, height, larger[0], out[0]))(offsets[:, 0])
        columns = jax.vmap(lambda offset: weights(offset, width, larger[1], out[1]))(offsets[:, 1])
        return _resample(images, rows, _mirrored(columns, flip))
    edges = (height, width) if sizes is None else (sizes[:, 0], sizes[:, 1])
    if crop == "none":
        boxes = jnp.stack([jnp.broadcast_to(jnp.asarray(edge, jnp.int32), batch) for edge in (0, 0, *edges)], axis=1)
    else:
        boxes = random_boxes(keys, *edges, distribution=crop, area=area)
    return crop_resize(images, boxes, size, flip, sizes)


def random_boxes(
    keys: jax.Array,
    height: int | jax.Array,
    width: int | jax.Array,
    *,
    distribution: str,
    area: tuple[float, float] = (0.05, 1.0),
) -> jax.Array:
    """Draws a crop box for each key from one of the two published distributions.

    "torchvision" is `RandomResizedCrop.get_params` (torchvision/transforms/transforms.py): area uniform, aspect ratio
    log-uniform in 3/4 to 4/3, the central crop after 10 misses. "tensorflow" is `sample_distorted_bounding_box`
    (tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc) as google-research/vision_transformer calls it:
    aspect ratio uniform in 0.75 to 1.33, height uniform among those the area allows, the whole image after 100 misses;
    small crops are more frequent. All attempts are drawn at once and the first that fits is taken.

    Args:
      keys: typed keys [B], one an image, so that a box does not depend on which others share its batch.
      height: of the images, in pixels; of each image, int32 [B], if they differ.
      width: likewise.
      distribution: "torchvision" or "tensorflow".
      area: least and largest fraction of the image's area, 0 < least <= largest <= 1.

    Returns:
      int32 [B, 4], (top, left, height, width): whole pixels inside the image.

    Raises:
      ValueError: an unknown distribution, or an area out of range.
    """
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} is unknown; choose one of {', '.join(_DISTRIBUTIONS)}.")
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"area={area!r} must be (least, largest) with 0 < least <= largest <= 1.")
    draw = functools.partial(_DISTRIBUTIONS[distribution], area=area)
    if isinstance(height, jax.Array):
        return jax.vmap(lambda key, h, w: draw(key, height=h, width=w))(keys, height, width)
    return jax.vmap(functools.partial(draw, height=height, width=width))(keys)


def flips(keys: jax.Array) -> jax.Array:
    """Decides by a fair coin for each of the typed keys [B] whether its image is mirrored: bool [B]."""
    return jax.vmap(jax.random.bernoulli)(keys)


def _mirrored(columns: Any, flip: jax.Array | None) -> jax.Array:
    """The columns [B, w, W] of images of which those with `flip` are mirrored: their columns are read from the right."""
    return columns if flip is None else jnp.where(flip[:, None, None], columns[:, ::-1], columns)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int | np.integer) else size


def _weights(start, extent, length: int, out: int) -> jax.Array | np.ndarray:
    """The weights float32 [out, length] that resample pixels start … start + extent - 1 of a line to `out` pixels.

    If `extent` is a Python number, they are computed on the host in float64: positions in float32 are good to a millionth of
    `extent`.
    """
    xp, dtype = (np, np.float64) if isinstance(extent, int) else (jnp, jnp.float32)
    position = (xp.arange(out, dtype=dtype) + 0.5) * (extent / out) - 0.5  # half-pixel centres, counted from start
    position = xp.clip(position, 0, xp.maximum(extent - 1, 0))  # the edge pixel goes on: what lies beyond it gets no weight
    pixel = xp.arange(length) - start
    return xp.maximum(0, 1 - xp.abs(position[:, None] - pixel[None, :])).astype(np.float32)


def _central_weights(extents: Any, length: int, out: int) -> jax.Array | np.ndarray:
    """The weights float32 [n, out, length] that resample the central `extents` [n] of a line to `out` pixels each.

    A triangle of the width of two pixels of the result, or of the line if these are larger, as Pillow and
    `jax.image.resize` have it. Like theirs, it also covers pixels right outside a part of the line.
    """
    xp = np if isinstance(extents, np.ndarray) else jnp
    scale = extents[:, None, None] / out
    position = (length - extents[:, None, None]) / 2 + (np.arange(out)[None, :, None] + 0.5) * scale - 0.5
    weights = xp.maximum(0, 1 - xp.abs(np.arange(length)[None, None] - position) / xp.maximum(scale, 1))
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)


def _resample(images: jax.Array, rows: jax.Array | np.ndarray, columns: jax.Array | np.ndarray) -> jax.Array:
    """Applies rows [h, H] or [B, h, H] and columns [w, W] or [B, w, W] to images [B, H, W, C]."""
    row, column = ("bih", "bjw") if rows.ndim == 3 else ("ih", "jw")
    # Without HIGHEST a recent GPU multiplies in TF32, whose 10 bits are too few for the original's numbers.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    images = einsum(f"{row},bhwc->biwc", rows, jnp.asarray(images).astype(jnp.float32))
    return einsum(f"{column},biwc->bijc", columns, images)


def _torchvision(key: jax.Array, height: Any, width: Any, area: tuple[float, float]) -> jax.Array:
    """One box int32 [4] of torchvision's RandomResizedCrop."""
    u, place = attempts(key, 10)
    pixels = height * width * (area[0] + u[0] * (area[1] - area[0]))
    low, high = _TORCHVISION_ASPECT
    aspect = low * (high / low) ** u[1]
    h = jnp.rint(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    w = jnp.rint(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = jnp.argmax(fits)
    # The largest central box whose aspect ratio is allowed.
    central_h = jnp.minimum(height, jnp.rint(width / low).astype(jnp.int32))
    central_w = jnp.minimum(width, jnp.rint(height * high).astype(jnp.int32))
    central = jnp.array([(height - central_h) // 2, (width - central_w) // 2, central_h, central_w], jnp.int32)
    # Both ends included: a box may touch every edge.
    top, left = below(place, jnp.stack([height - h[first] + 1, width - w[first] + 1]))
    return jnp.where(fits[first], jnp.stack([top, left, h[first], w[first]]), central)


def _tensorflow(key: jax.Array, height: Any, width: Any, area: tuple[float, float]) -> jax.Array:
    """One box int32 [4] of TensorFlow's sample_distorted_bounding_box, float32 throughout as its kernel is."""
    u, place = attempts(key, 100)
    low, high = _TENSORFLOW_ASPECT
    aspect = low + u[0] * (high - low)
    least, most = area[0] * height * width, area[1] * height * width

    def whole(x):  # C's lrintf: half to even
        return jnp.rint(x).astype(jnp.int32)

    shortest, tallest = whole(jnp.sqrt(least / aspect)), whole(jnp.sqrt(most / aspect))
    # Where the tallest would be too wide, the tallest whose rounded width fits.
    fitting = jnp.floor((width + 0.5) / aspect).astype(jnp.int32)
    fitting -= whole(fitting * aspect) > width
    tallest = jnp.minimum(jnp.where(whole(tallest * aspect) > width, fitting, tallest), height)
    shortest = jnp.minimum(shortest, tallest)
    h = shortest + below(u[1], tallest - shortest + 1)
    # Rounding may have left the range of areas by a little: one row more, then one row less, then it is a miss.
    h += h * whole(h * aspect) < least
    h -= h * whole(h * aspect) > most
    w = whole(h * aspect)
    fits = (h * w >= least) & (h * w <= most) & (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = jnp.argmax(fits)
    # The kernel's Uniform(n) is below n, so a smaller box never touches the bottom or the right edge.
    top, left = below(place, jnp.stack([height - h[first], width - w[first]]))
    return jnp.where(fits[first], jnp.stack([top, left, h[first], w[first]]), jnp.array([0, 0, height, width], jnp.int32))


_DISTRIBUTIONS = {"torchvision": _torchvision, "tensorflow": _tensorflow}


def attempts(key: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Uniform draws in [0, 1): [2, number] for the attempts, and [2] for the position of the box that is chosen."""
    u = jax.random.uniform(key, (2 * number + 2,)).reshape(2, number + 1)  # one flat draw: XLA compiles it 3 times as fast
    return u[:, :-1], u[:, -1]


def below(u: jax.Array, n: int | jax.Array) -> jax.Array:
    """Whole numbers in [0, n), or 0 where n is 0, from u uniform in [0, 1): u is at most 1 - 2⁻²³, so u·n stays below n."""
    return jnp.floor(u * n).astype(jnp.int32)
