"""Changes of colours against Pillow, which has each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit_jax.transforms import colour


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Random images, dark ones, one of few values, one of a single colour, and one that uses the full range already."""
    draw = np.random.default_rng(0)
    made = draw.integers(0, 256, (6, 24, 20, 3))
    made[1] = made[1] // 3 + 20
    made[2] = made[2] // 64 * 50 + 7
    made[3] = (10, 200, 77)
    made[4, 0, 0], made[4, 0, 1] = 0, 255
    made[5, :22] = draw.integers(100, 104, (22, 20, 3))  # most pixels have few values, some have many
    return made.astype(np.int32)


def by_pillow(images: np.ndarray, change) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(image.astype(np.uint8)))) for image in images]).astype(np.int32)


def looked_up(images, tables) -> np.ndarray:
    return np.asarray(jax.jit(colour.lookup)(images, jnp.broadcast_to(tables, (len(images), 3, 256))))


def test_histograms_count_each_channel(images):
    counts = np.asarray(jax.jit(colour.histograms)(images))
    for found, image in zip(counts, images, strict=True):
        for channel in range(3):
            np.testing.assert_array_equal(found[channel], np.bincount(image[..., channel].ravel(), minlength=256))


def test_equalize_is_that_of_pillow(images):
    found = looked_up(images, jax.jit(colour.equalize)(colour.histograms(images)))
    np.testing.assert_array_equal(found, by_pillow(images, ImageOps.equalize))
    assert (found[0] != images[0]).any() and (found[3] == images[3]).all()


def test_autocontrast_is_that_of_pillow(images):
    found = looked_up(images, jax.jit(colour.autocontrast)(colour.histograms(images)))
    theirs = by_pillow(images, ImageOps.autocontrast)
    # Pillow multiplies by 255 / (high - low), which may be a little less than the whole number that is exact.
    assert (found >= theirs).all() and (found - theirs).max() <= 1 and (found == theirs).mean() > 0.9
    low, high = images[1].min(axis=(0, 1)), images[1].max(axis=(0, 1))
    np.testing.assert_array_equal(found[1], (images[1] - low) * 255 // (high - low))
    np.testing.assert_array_equal(found[4], images[4])


@pytest.mark.parametrize(
    ("table", "theirs"),
    [
        (colour.invert(), ImageOps.invert),
        *((colour.posterize(bits), lambda image, bits=bits: ImageOps.posterize(image, bits)) for bits in (1, 4, 8)),
        *((colour.solarize(level), lambda image, level=level: ImageOps.solarize(image, level)) for level in (0, 90, 256)),
        *((colour.brightness(f), lambda image, f=f: ImageEnhance.Brightness(image).enhance(f)) for f in (0.1, 1.0, 1.9)),
    ],
)
def test_tables_are_those_of_pillow(images, table, theirs):
    np.testing.assert_array_equal(looked_up(images, table), by_pillow(images, theirs))


def test_solarize_add_adds_below_the_middle(images):
    expected = np.where(images < 128, np.clip(images + 110, 0, 255), images)
    np.testing.assert_array_equal(looked_up(images, colour.solarize_add(110)), expected)


def test_posterize_beyond_8_bits_and_at_0():
    np.testing.assert_array_equal(colour.posterize(12), np.arange(256))
    assert not colour.posterize(0).any()


@pytest.mark.parametrize("factor", [0.1, 0.55, 1.0, 1.9, 3.0])
def test_blends_are_those_of_pillow(images, factor):
    grey, smooth = jax.jit(colour.grey)(images)[..., None], jax.jit(colour.smooth)(images)
    blend = jax.jit(colour.blend, static_argnums=2)
    for found, enhance in (
        (blend(grey, images, factor), ImageEnhance.Color),
        (blend(smooth, images, factor), ImageEnhance.Sharpness),
        (looked_up(images, jax.jit(colour.contrast, static_argnums=1)(images, factor)), ImageEnhance.Contrast),
    ):
        theirs = by_pillow(images, lambda image, enhance=enhance: enhance(image).enhance(factor))
        # A product that is whole but for float32's rounding may be rounded down to the next number.
        assert np.abs(found - theirs).max() <= 1 and (found == theirs).mean() > 0.995
        assert factor != 1 or (found == images).all()


def test_grey_and_smooth_are_those_of_pillow(images):
    np.testing.assert_array_equal(jax.jit(colour.grey)(images), by_pillow(images, lambda image: image.convert("L")))
    np.testing.assert_array_equal(
        jax.jit(colour.smooth)(images), by_pillow(images, lambda image: image.filter(ImageFilter.SMOOTH))
    )
    narrow = images[:, :2]
    np.testing.assert_array_equal(colour.smooth(narrow), narrow)  # it has no inner pixels
