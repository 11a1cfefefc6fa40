"""Resampling on the host, image by image: images have all sizes, and a device would need a program for each of them."""

import numpy as np
from PIL import Image

CENTER = 7 / 8  # of the shorter side: what a central crop keeps


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes one image as `transforms.geometry.resize` does, up to rounding: uint8 [H, W, 3] → float32 [height, width, 3]."""
    (top, top_weight), (bottom, bottom_weight) = _neighbours(pixels.shape[0], size[0])
    rows = pixels[top] * top_weight[:, None, None] + pixels[bottom] * bottom_weight[:, None, None]
    (left, left_weight), (right, right_weight) = _neighbours(pixels.shape[1], size[1])
    return rows[:, left] * left_weight[None, :, None] + rows[:, right] * right_weight[None, :, None]


def _neighbours(length: int, out: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The two pixels of `length`, and their float32 weights, that each of `out` pixels is the sum of.

    Positions are float64, as those of `transforms.geometry` on the host.
    """
    position = np.clip((np.arange(out) + 0.5) * (length / out) - 0.5, 0, length - 1)
    first = np.floor(position)
    index, weight = first.astype(np.int64), position - first
    return (index, (1 - weight).astype(np.float32)), (np.minimum(index + 1, length - 1), weight.astype(np.float32))


def central_box(image: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The (left, top, right, bottom) of the part of an image that `transforms.geometry.center_crop` resizes to `size`."""
    scale = CENTER * min(image.height / size[0], image.width / size[1])
    left, top = (image.width - scale * size[1]) / 2, (image.height - scale * size[0]) / 2
    return left, top, image.width - left, image.height - top


def center_crop(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Does what `transforms.geometry.center_crop` does, up to rounding: an RGB image → float32 [height, width, 3]."""
    # One channel at a time, because Pillow rounds RGB to whole numbers, twice.
    box = central_box(image, size)
    bands = (band.convert("F").resize(size[::-1], Image.Resampling.BILINEAR, box) for band in image.split())
    return np.stack([np.asarray(band) for band in bands], axis=-1)
