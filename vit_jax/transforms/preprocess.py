"""From uint8 images to the input of a model: the transforms of training and of evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vit_jax.config import Augment
from vit_jax.models.vit import GOOGLE_NORMALIZATION, VisionTransformer
from vit_jax.transforms import geometry
from vit_jax.transforms.erasing import erase
from vit_jax.transforms.keys import CROP, ERASE, FLIP, MIX, RANDAUGMENT, fold
from vit_jax.transforms.mixing import mix
from vit_jax.transforms.randaugment import randaugment

# Channel means and standard deviations, of values in [0, 1].
Statistics = tuple[Sequence[float], Sequence[float]]


def preprocess(
    images: jax.Array | np.ndarray, size: int | tuple[int, int], model: VisionTransformer | None = None
) -> jax.Array:
    """Resizes images to a model's size, straight or after a central crop, and scales them as the model's weights expect.

    Args:
      images: uint8 [B, H, W, 3], JAX or NumPy.
      size: the model's input in pixels: one number for a square, or (height, width).
      model: from `vit_jax.load`, which knows the statistics and the crop of its weights; None: to [-1, 1], without a crop.

    Returns:
      float32 [B, height, width, 3], in [-1, 1] unless the model has other statistics.

    Raises:
      ValueError: the images are not uint8, or not of this shape.
    """
    return (for_evaluation(size, model.normalization, model.eval_crop) if model else for_evaluation(size))(images)


def for_training(
    augment: Augment, size: int | tuple[int, int], statistics: Statistics | None = None, num_classes: int = 0
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Builds the transform of a training batch: random crop, flip, resize, RandAugment, scaling, erasing, mixing.

    RandAugment is before the scaling, because it acts on values in [0, 255]; erasing after it, because it sets pixels to 0, the
    mean colour; mixing last, because it mixes what the model would see.

    Args:
      augment: the configuration's section; see `geometry.random_crops`.
      size: of the result, in pixels: one number for a square, or (height, width).
      statistics: channel means [3] and standard deviations [3] of values in [0, 1]; None: Google's, to [-1, 1].
      num_classes: of the labels; only mixup and CutMix need it.

    Returns:
      A function, called inside the jitted step, of keys [B] (see `keys.example_keys`), images uint8 [B, H, W, 3], labels and,
      if the images have been resized, their original heights and widths, int32 [B, 2], in which crops are drawn. It returns
      images float32 [B, height, width, 3] and the labels: as they came or, with mixup or CutMix, float32 [B, num_classes].

    Raises:
      ValueError: images are mixed, and the number of classes is not given.
    """
    mixes = bool(augment.mixup or augment.cutmix)
    if mixes and num_classes < 1:
        raise ValueError(f"mixup and CutMix need the number of classes, got num_classes = {num_classes}")

    def transform(keys: jax.Array, images: jax.Array, labels: Any, sizes: jax.Array | None = None) -> tuple[jax.Array, Any]:
        _check(images)
        flip = geometry.flips(fold(keys, FLIP)) if augment.flip else None
        images = geometry.random_crops(
            fold(keys, CROP), images, size, augment.crop, augment.crop_area, flip, sizes, augment.padding
        )
        if augment.randaugment_layers:
            images = randaugment(fold(keys, RANDAUGMENT), images, augment.randaugment_layers, augment.randaugment_magnitude)
        images = scale(images, statistics)
        if augment.erasing:
            images = erase(fold(keys, ERASE), images, augment.erasing)
        if mixes:
            images, labels = mix(fold(keys, MIX), images, labels, num_classes, augment.mixup, augment.cutmix)
        return images, labels

    return transform


def for_evaluation(
    size: int | tuple[int, int], statistics: Statistics | None = None, crop: str = "none"
) -> Callable[..., jax.Array]:
    """Builds the transform of evaluation: images uint8 [B, H, W, 3] → float32 [B, height, width, 3], resized and scaled.

    Arguments and original sizes as of `for_training`; `crop`: "none", or "center" for `geometry.center_crop`.
    """

    def transform(images: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        _check(images)
        part = geometry.center_crop(images, size, sizes) if crop == "center" else geometry.resize(images, size)
        return scale(part, statistics)

    return transform


def scale(images: jax.Array, statistics: Statistics | None) -> jax.Array:
    """Images [B, H, W, 3] of values in [0, 255], minus the channel means and divided by the deviations; float32."""
    mean, deviation = (255 * np.reshape(s, (1, 1, 1, 3)) for s in statistics or GOOGLE_NORMALIZATION)
    return (images - mean.astype(np.float32)) / deviation.astype(np.float32)


def _check(images: jax.Array | np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 of shape [batch, height, width, 3], got {images.dtype} {list(images.shape)}")
