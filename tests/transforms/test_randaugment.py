"""RandAugment: every operation on fixed draws against Pillow, which shares nothing with it, and the draws themselves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.transforms import randaugment
from vit_jax.transforms.randaugment import FILL, OPERATIONS

apply = jax.jit(randaugment.apply, static_argnums=4)
HEIGHT, WIDTH = 28, 36
COLOURS = ("autocontrast", "equalize", "invert", "posterize", "solarize", "color", "contrast", "brightness", "sharpness")
MAPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    made = np.random.default_rng(0).integers(0, 256, (4, HEIGHT, WIDTH, 3))
    made[1] = made[1] // 3 + 40
    return made.astype(np.int32)


def applied(images, name: str, magnitude: float, negative: bool = False, place=(0.5, 0.5)) -> np.ndarray:
    n = len(images)
    number = jnp.full(n, OPERATIONS.index(name))
    return np.asarray(apply(images, number, jnp.full(n, negative), jnp.tile(jnp.array([place]), (n, 1)), magnitude))


def keys(number: int) -> jax.Array:
    return jax.random.split(jax.random.key(0, impl="threefry2x32"), number)


def coloured(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """The operation by Pillow, with the published magnitudes."""
    match name:
        case "autocontrast" | "equalize" | "invert":
            return getattr(ImageOps, name)(image)
        case "posterize":
            return ImageOps.posterize(image, min(int(magnitude / 10 * 4), 8))
        case "solarize":
            return ImageOps.solarize(image, int(magnitude / 10 * 256))
    return getattr(ImageEnhance, name.title())(image).enhance(0.1 + 1.8 * magnitude / 10)


@pytest.mark.parametrize("magnitude", [5.0, 10.0, 17.0])
@pytest.mark.parametrize("name", COLOURS)
def test_colour_is_that_of_pillow(images, name, magnitude):
    found = applied(images, name, magnitude)
    theirs = np.stack([np.asarray(coloured(Image.fromarray(x.astype(np.uint8)), name, magnitude)) for x in images])
    assert np.abs(found - theirs.astype(int)).max() <= 1 and (found == theirs).mean() > 0.99
    unchanged = name in ("color", "contrast", "brightness", "sharpness") and magnitude == 5
    unchanged |= name == "solarize" and magnitude >= 10
    assert (found == images).all() == unchanged


@pytest.mark.parametrize("magnitude", [3.0, 7.0])
def test_solarize_add_and_cutout_are_their_formulas(images, magnitude):
    added = np.minimum(images + int(magnitude / 10 * 110), 255)
    np.testing.assert_array_equal(applied(images, "solarize_add", magnitude), np.where(images < 128, added, images))
    half = [int(magnitude / 10 * 40 * length / 224) for length in (HEIGHT, WIDTH)]
    for place in ((0.5, 0.5), (0.0, 0.99), (0.3, 0.05)):
        row, column = (int(u * length) for u, length in zip(place, (HEIGHT, WIDTH), strict=True))
        expected = images.copy()
        expected[:, max(0, row - half[0]) : row + half[0], max(0, column - half[1]) : column + half[1]] = FILL
        np.testing.assert_array_equal(applied(images, "cutout", magnitude, place=place), expected)


def published_map(name: str, magnitude: float, sign: int) -> tuple[float, ...]:
    """a, b, c, d, e, f of column = a·x + b·y + c and row = d·x + e·y + f, as TensorFlow Addons counts: pixels, not centres."""
    level = sign * magnitude / 10
    if name == "rotate":
        cos, sin = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
        right, bottom = WIDTH - 1, HEIGHT - 1
        return cos, -sin, (right - (cos * right - sin * bottom)) / 2, sin, cos, (bottom - (sin * right + cos * bottom)) / 2
    return {
        "shear_x": (1, 0.3 * level, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * level, 1, 0),
        "translate_x": (1, 0, 100 * WIDTH / 224 * level, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 100 * HEIGHT / 224 * level),
    }[name]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [4.3, 9.7, 21.0])
@pytest.mark.parametrize("name", MAPS)
def test_geometry_is_that_of_pillow(images, name, magnitude, sign):
    a, b, c, d, e, f = published_map(name, magnitude, sign)
    # Pillow maps the centres of pixels and takes the pixel that contains the result.
    matrix = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
    theirs = np.stack(
        [
            np.asarray(Image.fromarray(x.astype(np.uint8)).transform((WIDTH, HEIGHT), Image.Transform.AFFINE, matrix,
                                                                     Image.Resampling.NEAREST, fillcolor=(FILL,) * 3))
            for x in images
        ]
    )  # fmt: skip
    found = applied(images, name, magnitude, negative=sign < 0)
    assert (found == theirs).all(axis=-1).mean() > 0.995  # a position between two pixels may be rounded to either
    assert (found == FILL).all(axis=-1).mean() > 0.01 and (found != images).any()


def test_magnitude_0_and_no_layers_are_the_identity(images):
    real = images + 0.25  # not even rounded
    for layers, magnitude in ((2, 0.0), (0, 10.0)):
        found = jax.jit(lambda keys, x, n=layers, m=magnitude: randaugment.randaugment(keys, x, n, m))(keys(4), real)
        np.testing.assert_array_equal(found, real.astype(np.float32))


def test_rotation_keeps_the_centre_and_a_quarter_turn_is_exact():
    square = np.random.default_rng(1).integers(0, 256, (1, 9, 9, 3)).astype(np.int32)
    np.testing.assert_array_equal(applied(square, "rotate", 30.0)[0], np.rot90(square[0]))
    np.testing.assert_array_equal(applied(square, "rotate", 30.0, negative=True)[0], np.rot90(square[0], -1))


def test_draws_are_uniform_and_layers_differ(monkeypatch):
    seen = []
    monkeypatch.setattr(randaugment, "apply", lambda images, *draws: (seen.append(draws), images)[1])
    images = jnp.zeros((8192, 2, 2, 3))
    randaugment.randaugment(keys(8192), images, 2, 10.0)
    for operation, negative, place, magnitude in seen:
        counts = np.bincount(operation, minlength=16)
        assert counts.min() > 400 and counts.max() < 625 and len(counts) == 16  # 512 ± 5 deviations
        assert abs(np.mean(negative) - 0.5) < 0.03 and np.abs(np.mean(place, axis=0) - 0.5).max() < 0.02 and magnitude == 10
    assert np.mean(seen[0][0] == seen[1][0]) < 0.1


def test_image_does_not_depend_on_the_batch(images):
    own = keys(4)
    run = jax.jit(lambda keys, x: randaugment.randaugment(keys, x, 2, 9.0))
    whole = run(own, images)
    assert whole.dtype == jnp.float32 and (np.asarray(whole) == np.rint(whole)).all() and 0 <= whole.min() <= whole.max() <= 255
    for i in range(4):
        np.testing.assert_array_equal(run(own[i : i + 1], images[i : i + 1])[0], whole[i])
