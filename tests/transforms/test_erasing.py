"""Random erasing: its rectangles against torchvision's algorithm in NumPy, and what it does to an image."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.transforms import erasing


def keys(number: int) -> jax.Array:
    return jax.random.split(jax.random.key(0, impl="threefry2x32"), number)


def slow_rectangle(draw: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's RandomErasing.get_params."""
    for _ in range(10):
        area = height * width * draw.uniform(0.02, 0.33)
        ratio = math.exp(draw.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            return int(draw.integers(0, height - h + 1)), int(draw.integers(0, width - w + 1)), h, w
    return 0, 0, 0, 0


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_rectangles_have_the_distribution_of_torchvision(height, width):
    draw, number = np.random.default_rng(0), 20_000
    theirs = np.array([slow_rectangle(draw, height, width) for _ in range(number)], float)
    found = jax.jit(erasing.random_rectangles, static_argnums=(1, 2))(keys(number), height, width)
    ours = np.asarray(found, float)
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    for column in range(4):  # largest distance of the distribution functions; 0.0195 has a probability of 0.001
        values = np.unique(np.concatenate([ours[:, column], theirs[:, column]]))
        below = [np.searchsorted(np.sort(x[:, column]), values, side="right") / number for x in (ours, theirs)]
        assert np.abs(below[0] - below[1]).max() < 0.0195
    areas = [(x[:, 2] * x[:, 3]).mean() for x in (ours, theirs)]
    assert areas[0] == pytest.approx(areas[1], rel=0.02)


def test_erased_rectangle_is_zero_and_the_rest_stays():
    images = np.random.default_rng(0).normal(size=(64, 12, 10, 3)).astype(np.float32)
    found = np.asarray(jax.jit(erasing.erase, static_argnums=2)(keys(64), images, 1.0))
    for image, changed, (top, left, height, width) in zip(
        images,
        found,
        np.asarray(erasing.random_rectangles(jax.vmap(jax.random.fold_in, (0, None))(keys(64), 1), 12, 10)),
        strict=True,
    ):
        expected = image.copy()
        expected[top : top + height, left : left + width] = 0
        np.testing.assert_array_equal(changed, expected)
    assert (found != images).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_probability_is_the_part_of_images_that_change(probability):
    found = np.asarray(jax.jit(erasing.erase, static_argnums=2)(keys(4000), jnp.ones((4000, 8, 8, 1)), probability))
    assert np.mean((found == 0).any(axis=(1, 2, 3))) == pytest.approx(probability, abs=0.03)


def test_inside_is_the_slice_of_the_box():
    boxes = np.array([[0, 0, 5, 7], [1, 2, 3, 4], [-2, -1, 4, 3], [4, 6, 9, 9], [2, 2, 0, 3]], np.int32)
    expected = np.zeros((5, 5, 7), bool)
    for mask, (top, left, height, width) in zip(expected, boxes, strict=True):
        mask[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = True
    np.testing.assert_array_equal(erasing.inside(jnp.asarray(boxes), 5, 7), expected)
