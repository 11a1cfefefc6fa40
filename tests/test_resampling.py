"""Resampling on the host: that of the device, which the tests of `transforms.geometry` compare with libraries."""

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax.resampling import center_crop, central_box, resize
from vit_jax.transforms import geometry

# Compiled as evaluation is: with optimisations, positions are rounded once, in one multiplication and addition.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.mark.parametrize(
    ("shape", "size"),
    [((32, 32), (64, 64)), ((32, 32), (224, 224)), ((333, 500), (224, 224)), ((223, 225), (224, 224)), ((1, 1), (32, 32)),
     ((895, 70), (224, 384)), ((7, 300), (16, 16))],
)  # fmt: skip
def test_resize_equals_that_of_evaluation(noise, shape, size):
    pixels = noise(*shape)
    expected = jax.jit(geometry.resize, static_argnums=1, compiler_options=OPTIMIZED)(pixels[None], size)[0]
    found = resize(pixels, size)
    assert found.dtype == np.float32 and found.shape == (*size, 3)
    np.testing.assert_allclose(found, expected, atol=255 * 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((32, 32), (64, 64)), ((224, 224), (224, 224)), ((333, 500), (224, 224)), ((500, 333), (224, 224)), ((1, 1), (32, 32)),
     ((895, 70), (224, 384)), ((40, 300), (16, 16))],
)  # fmt: skip
def test_center_crop_equals_that_of_evaluation(noise, shape, size):
    pixels = noise(*shape)
    expected = jax.jit(geometry.center_crop, static_argnums=1, compiler_options=OPTIMIZED)(pixels[None], size)[0]
    found = center_crop(Image.fromarray(pixels), size)
    assert found.dtype == np.float32 and found.shape == (*size, 3)
    np.testing.assert_allclose(found, expected, atol=255 * 1e-5, rtol=0)  # Pillow's positions are good to 1e-7 of a side


def test_central_box_is_seven_eighths_of_what_fits():
    assert central_box(Image.new("RGB", (320, 256)), (224, 224)) == (48, 16, 272, 240)
    assert central_box(Image.new("RGB", (64, 160)), (16, 32)) == (4, 66, 60, 94)
