"""The way that the input is compared with must compute the same."""

import jax
import numpy as np

from benchmarks.parts import by_gathers
from vit_jax.transforms import geometry


def test_gathers_compute_what_products_compute():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (16, 13, 9, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), 16)
    boxes = geometry.random_boxes(keys, 13, 9, distribution="torchvision")
    flip = geometry.flips(keys)
    assert 0 < flip.sum() < 16
    found, expected = by_gathers(images, boxes, 20, flip), geometry.crop_resize(images, boxes, 20, flip)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # of 255
