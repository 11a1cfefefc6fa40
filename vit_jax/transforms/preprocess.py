"""From uint8 images to what a model is fed: keys, training transforms, evaluation transforms."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import Augment
from vit_jax.models.vit import GOOGLE_NORMALIZATION, VisionTransformer
from vit_jax.transforms import geometry

# Channel means and standard deviations, of values in [0, 1].
Statistics = tuple[Sequence[float], Sequence[float]]

# What an image's key is folded with for each kind of draw. Numbers are never reused or changed, so that a new kind of
# augmentation leaves the draws of the others as they were.
_CROP, _FLIP = 0, 1


def preprocess(
    images: jax.Array | np.ndarray, size: int | tuple[int, int], model: VisionTransformer | None = None
) -> jax.Array:
    """Resizes images straight to a model's size and scales them as the model's weights expect.

    Args:
        images: uint8 [B, H, W, 3], JAX or NumPy.
        size: what the model was made for, in pixels: one number for a square, or (height, width).
        model: from `vit_jax.load`, which knows by what statistics its weights were trained; None: Google's scaling, to [-1, 1].

    Returns:
        float32 [B, height, width, 3], in [-1, 1] unless the model says otherwise.

    Raises:
        ValueError: the images are not uint8, or not of this shape.
    """
    return for_evaluation(size, model.normalization if model else None)(images)


def example_keys(seed: int | jax.Array, step: int | jax.Array, index: jax.Array) -> jax.Array:
    """Gives every image of a batch a key of its own, which depends on nothing but the three arguments.

    Threefry by name: its draws are equal under eager evaluation, jit, a mesh and pmap, those of `rbg` are not.

    Args:
        seed: of the run, or the typed key made from it.
        step: of the training, from 0.
        index: int32 [B], the images' places in the global order of examples.

    Returns:
        Typed keys [B].
    """
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    key = seed if is_key else jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def for_training(
    augment: Augment, size: int | tuple[int, int], statistics: Statistics | None = None
) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds what happens to a training batch: random crop, random flip, resize, scaling.

    Args:
        augment: the configuration's section: `crop` is "torchvision", "tensorflow" or "none", see `geometry.random_boxes`.
        size: of the result, in pixels: one number for a square, or (height, width).
        statistics: channel means [3] and standard deviations [3] of values in [0, 1]; None: Google's scaling to [-1, 1].

    Returns:
        A function of keys [B] (see `example_keys`), images uint8 [B, H, W, 3] and labels, to be called inside the jitted
        step. It returns images float32 [B, height, width, 3] and the labels.
    """

    def transform(keys: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        _check(images)
        batch, height, width, _ = images.shape
        if augment.crop == "none":
            boxes = jnp.tile(jnp.array([[0, 0, height, width]], jnp.int32), (batch, 1))
        else:
            boxes = geometry.random_boxes(_fold(keys, _CROP), height, width, distribution=augment.crop, area=augment.crop_area)
        flip = geometry.flips(_fold(keys, _FLIP)) if augment.flip else None
        return scale(geometry.crop_resize(images, boxes, size, flip), statistics), labels

    return transform


def for_evaluation(
    size: int | tuple[int, int], statistics: Statistics | None = None
) -> Callable[[jax.Array | np.ndarray], jax.Array]:
    """Builds what happens to images in evaluation: resized straight to the size, scaled; arguments as in `for_training`.

    Returns:
        A function of images uint8 [B, H, W, 3] to float32 [B, height, width, 3].
    """

    def transform(images: jax.Array | np.ndarray) -> jax.Array:
        _check(images)
        return scale(geometry.resize(jnp.asarray(images), size), statistics)

    return transform


def _check(images: jax.Array | np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"Images must be uint8 of shape [batch, height, width, 3]; got {images.dtype} {list(images.shape)}.")


def scale(images: jax.Array, statistics: Statistics | None) -> jax.Array:
    """Images [B, H, W, 3] of values in [0, 255], less the channels' means and over their deviations; float32."""
    mean, deviation = (255 * np.reshape(s, (1, 1, 1, 3)) for s in statistics or GOOGLE_NORMALIZATION)
    return (images - mean.astype(np.float32)) / deviation.astype(np.float32)


def _fold(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
