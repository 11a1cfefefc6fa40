"""Crop boxes against the real libraries' draws, resampling against a slow computation written out pixel by pixel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from vit_jax.transforms import geometry

random_boxes = jax.jit(geometry.random_boxes, static_argnums=(1, 2), static_argnames=("distribution", "area"))
crop_resize = jax.jit(geometry.crop_resize, static_argnums=2)
flips = jax.jit(geometry.flips)
resize = jax.jit(geometry.resize, static_argnums=1)
center_crop = jax.jit(geometry.center_crop, static_argnums=1)

DISTRIBUTIONS = ("torchvision", "tensorflow")
# Of 255: float32 positions in an image are good to a millionth of its width.
TOLERANCE = 1e-3
# (top, left, height, width) in an image of 20 × 24: all of it, inside, one pixel, one row, a corner, an edge
BOXES = np.array([[0, 0, 20, 24], [3, 5, 9, 13], [7, 8, 1, 1], [19, 2, 1, 20], [12, 15, 8, 9], [0, 4, 20, 3]], np.int32)


def keys(number: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed, impl="threefry2x32"), number)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def slow_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """TensorFlow's resize_bilinear with half-pixel centres, one pixel at a time, in float64."""

    def neighbours(i: int, length: int, out: int) -> tuple[int, int, float]:
        position = (i + 0.5) * length / out - 0.5
        low = int(np.floor(position))
        return max(low, 0), min(low + 1, length - 1), position - low

    image = image.astype(np.float64)
    result = np.empty((height, width, image.shape[-1]))
    for i in range(height):
        top, bottom, down = neighbours(i, image.shape[0], height)
        for j in range(width):
            left, right, across = neighbours(j, image.shape[1], width)
            upper = image[top, left] * (1 - across) + image[top, right] * across
            lower = image[bottom, left] * (1 - across) + image[bottom, right] * across
            result[i, j] = upper * (1 - down) + lower * down
    return result


@pytest.mark.parametrize(("height", "width"), [(32, 32), (480, 640)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_boxes_have_the_distribution_of_the_library(shared, distribution, height, width):
    with np.load(shared / "oracles" / "crops" / "boxes.npz") as file:
        theirs = file[f"{distribution}_{height}x{width}"].astype(np.float64)
    ours = np.asarray(random_boxes(keys(len(theirs)), height, width, distribution=distribution), np.float64)

    def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
        """The Kolmogorov–Smirnov distance, taken where either sample has a value, so that ties count once."""
        at = np.union1d(ours, theirs)
        return np.abs(np.subtract(*(np.searchsorted(np.sort(s), at, "right") / len(s) for s in (ours, theirs)))).max()

    (top, left, h, w), (their_top, their_left, their_h, their_w) = ours.T, theirs.T
    distances = {
        "area": distance(h * w, their_h * their_w),
        "aspect ratio": distance(w / h, their_w / their_h),
        "left": distance(left, their_left),
        "top": distance(top, their_top),
    }
    print(distribution, height, width, {name: round(float(value), 5) for name, value in distances.items()})
    assert max(distances.values()) < 0.01, distances


@pytest.mark.parametrize(("height", "width", "area"), [(7, 50, (0.3, 1.0)), (1, 1, (0.05, 1.0)), (480, 640, (0.001, 0.01))])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_boxes_lie_inside_the_image(distribution, height, width, area):
    boxes = random_boxes(keys(500), height, width, distribution=distribution, area=area)
    top, left, h, w = np.asarray(boxes).T
    assert boxes.shape == (500, 4)
    assert boxes.dtype == jnp.int32
    assert (top >= 0).all() and (h >= 1).all() and (top + h <= height).all()
    assert (left >= 0).all() and (w >= 1).all() and (left + w <= width).all()


@pytest.mark.parametrize(
    ("distribution", "height", "width", "box"),
    [
        ("torchvision", 10, 100, [0, 43, 10, 13]),
        ("torchvision", 100, 10, [43, 0, 13, 10]),
        ("tensorflow", 10, 100, [0, 0, 10, 100]),
    ],
)
def test_boxes_fallback_is_that_of_the_library(distribution, height, width, box):
    """No box with the area of the whole strip has an allowed aspect ratio."""
    assert random_boxes(keys(1), height, width, distribution=distribution, area=(1.0, 1.0)).tolist() == [box]


def test_boxes_refuse_bad_arguments():
    with pytest.raises(ValueError, match="'inception' is unknown; choose one of torchvision, tensorflow"):
        geometry.random_boxes(keys(1), 8, 8, distribution="inception")
    for area in ((0.0, 1.0), (0.5, 0.2), (0.5, 1.5)):
        with pytest.raises(ValueError, match="0 < least <= largest <= 1"):
            geometry.random_boxes(keys(1), 8, 8, distribution="torchvision", area=area)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_do_not_depend_on_the_layout(distribution):
    def draw(keys):
        boxes = geometry.random_boxes(keys, 480, 640, distribution=distribution)
        return jnp.concatenate([boxes, geometry.flips(keys)[:, None].astype(jnp.int32)], axis=1)

    jitted, all_keys = jax.jit(draw), keys(4096)
    expected = jitted(all_keys)
    np.testing.assert_array_equal(jitted(all_keys[-1:]), expected[-1:])
    np.testing.assert_array_equal(jax.pmap(draw)(all_keys.reshape(8, 512)).reshape(4096, 5), expected)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(all_keys, NamedSharding(mesh, PartitionSpec("batch")))
    np.testing.assert_array_equal(jitted(sharded), expected)


def test_flips_are_fair_and_repeatable():
    drawn = flips(keys(10000))
    assert drawn.dtype == bool
    assert abs(drawn.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(drawn, flips(keys(10000)))
    assert (drawn != flips(keys(10000, seed=1))).any()


@pytest.mark.parametrize("size", [(48, 48), (9, 7), (33, 5), (1, 1)])
def test_resize_is_half_pixel_bilinear(size):
    images = pixels(2, 20, 24, 3)
    resized = resize(images, size)
    assert resized.dtype == jnp.float32
    expected = np.stack([slow_resize(image, *size) for image in images])
    np.testing.assert_allclose(resized, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width", "size"), [(375, 500, 224), (500, 333, 384), (32, 32, 224), (3000, 4000, 224)])
def test_resize_is_exact(height, width, size):
    """Within 1e-5 of the range of values, 0 to 255, of products with float64 weights: 2e-5 in a model's input of -1 to 1."""
    image = pixels(1, height, width, 3)

    def exact(length: int) -> np.ndarray:
        position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.minimum(np.floor(position).astype(int), max(length - 2, 0))
        weights = np.zeros((size, length))
        weights[np.arange(size), low] += 1 - (position - low)
        weights[np.arange(size), low + 1] += position - low
        return weights

    expected = np.einsum("ih,hwc,jw->ijc", exact(height), image[0].astype(np.float64), exact(width), optimize=True)
    for function in (resize, geometry.resize):  # compiled and not
        assert np.abs(np.asarray(function(image, size)[0], np.float64) - expected).max() <= 1e-5 * 255


def test_weights_of_a_static_size_cost_the_program_nothing():
    lowered = resize.lower(jax.ShapeDtypeStruct((2, 37, 50, 3), jnp.uint8), 24).as_text()
    operations = {line.split("stablehlo.")[1].split()[0].split("(")[0] for line in lowered.splitlines() if "stablehlo." in line}
    assert operations <= {"constant", "convert", "dot_general", "transpose"}


def test_resize_to_the_same_size_changes_nothing():
    images = pixels(2, 20, 20, 3)
    np.testing.assert_array_equal(resize(images, 20), images)


def pillow(image: np.ndarray, height: int, width: int, box: tuple[float, ...] | None = None) -> np.ndarray:
    """Pillow's bilinear resizing with antialiasing, of a (left, top, right, bottom) or the whole, without rounding."""
    bands = [Image.fromarray(image[..., band].astype(np.float32)) for band in range(3)]
    return np.stack([np.asarray(band.resize((width, height), Image.Resampling.BILINEAR, box)) for band in bands], axis=-1)


@pytest.mark.parametrize(
    ("height", "width", "size", "box"),
    [
        (64, 96, 20, (20, 4, 76, 60)),
        (96, 64, 20, (4, 20, 60, 76)),
        (375, 500, 224, (500 / 2 - 375 * 7 / 16, 375 / 16, 500 / 2 + 375 * 7 / 16, 375 * 15 / 16)),
        (32, 32, 32, (2, 2, 30, 30)),  # the model's own size
        (24, 16, 56, (1, 5, 15, 19)),
        (64, 160, (32, 16), (66, 4, 94, 60)),
    ],
)
def test_center_crop_is_that_of_pillow(height, width, size, box):
    images = pixels(2, height, width, 3)
    out = (size, size) if isinstance(size, int) else size
    expected = np.stack([pillow(image, *out, box) for image in images])
    found = center_crop(images, size)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    sizes = jnp.tile(jnp.array([[height, width]], jnp.int32), (2, 1))
    np.testing.assert_allclose(center_crop(images, size, sizes), expected, rtol=0, atol=10 * TOLERANCE)  # positions in float32


def test_center_crop_is_a_crop_of_the_resized_image():
    """The usual procedure: the shorter side to 256 of 224 pixels, then the central 224."""
    images = pixels(1, 512, 640, 3)
    whole = pillow(images[0], 256, 320)
    np.testing.assert_allclose(center_crop(images, 224)[0], whole[16:240, 48:272], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(150, 240), (240, 150), (100, 100)])
def test_center_crop_of_a_resized_image_is_that_of_the_original(height, width):
    """A stored image is a square of twice the result's side; the two resizings only blur a little more than one."""
    noise = pixels(1, height // 10, width // 10, 3)[0]
    original = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    stored = np.asarray(Image.fromarray(original).resize((64, 64), Image.Resampling.BILINEAR))
    expected = np.asarray(center_crop(original[None], 32)[0])
    found = center_crop(stored[None], 32, jnp.array([[height, width]], jnp.int32))[0]
    errors = np.abs(np.asarray(found) - expected)
    assert errors.mean() < 3 and errors.max() < 25
    if height != width:  # a square of the stored image is another part
        assert np.abs(np.asarray(center_crop(stored[None], 32)[0]) - expected).mean() > 15


@pytest.mark.parametrize("size", [17, (30, 41)])
def test_crop_resize_equals_crop_then_resize(size):
    images = pixels(len(BOXES), 20, 24, 3)
    height, width = (size, size) if isinstance(size, int) else size
    boxes = zip(images, BOXES, strict=True)
    expected = np.stack([slow_resize(image[t : t + h, x : x + w], height, width) for image, (t, x, h, w) in boxes])
    np.testing.assert_allclose(crop_resize(images, jnp.asarray(BOXES), size), expected, rtol=0, atol=TOLERANCE)
    flip = np.arange(len(BOXES)) % 2 == 0
    expected[flip] = expected[flip, :, ::-1]
    mirrored = crop_resize(images, jnp.asarray(BOXES), size, jnp.asarray(flip))
    np.testing.assert_allclose(mirrored, expected, rtol=0, atol=TOLERANCE)


def test_crop_resize_uses_no_pixel_outside_the_box():
    random = random_boxes(keys(200), 20, 24, distribution="torchvision")
    boxes = jnp.concatenate([jnp.asarray(BOXES), random])
    images = pixels(len(boxes), 20, 24, 3)
    inside = np.zeros(images.shape, bool)
    for mask, (top, left, height, width) in zip(inside, np.asarray(boxes), strict=True):
        mask[top : top + height, left : left + width] = True
    flip = flips(keys(len(boxes)))
    for size in (8, 32):
        clean = crop_resize(images, boxes, size, flip)
        for poison in (0, 255):
            poisoned = np.where(inside, images, np.uint8(poison))
            np.testing.assert_array_equal(crop_resize(poisoned, boxes, size, flip), clean)


def test_crop_resize_refuses_boxes_of_another_batch():
    with pytest.raises(ValueError, match=r"boxes has shape \(6, 4\); 2 images need \(2, 4\)"):
        geometry.crop_resize(pixels(2, 20, 24, 3), jnp.asarray(BOXES), 8)


def test_resize_crop_is_a_part_of_the_resized_image():
    """At a place that is uniform in both directions, also for images that were resized before."""
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 20, 31, 3), np.uint8))
    keys = jax.random.split(jax.random.key(0), 64)
    sizes = jnp.full((64, 2), 50)
    found = np.asarray(geometry.random_crops(keys, images, (24, 12), "resize_crop", (0.05, 1.0), sizes=sizes))
    whole = np.asarray(geometry.resize(images, (28, 14)))
    places = []
    for image, part in zip(whole, found, strict=True):
        places += [
            (top, left)
            for top, left in itertools.product(range(5), range(3))
            if np.allclose(image[top : top + 24, left : left + 12], part, atol=1e-3)
        ]
    assert len(places) == 64 and {top for top, _ in places} == set(range(5)) and {left for _, left in places} == set(range(3))


@pytest.mark.parametrize(("size", "padding"), [((20, 24), 4), ((20, 24), 0), ((15, 40), 3)])
def test_pad_crop_is_that_of_a_padded_image(size, padding):
    images, own, flip = pixels(64, 20, 24, 3), keys(64), flips(keys(64, 1))
    crop = jax.jit(lambda own, x, flip: geometry.random_crops(own, x, size, "pad", (0.05, 1.0), flip, padding=padding))
    found = np.asarray(crop(own, images, flip))
    padded = np.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    offsets = [np.floor(np.asarray(jax.random.uniform(key, (2,))) * (2 * padding + 1)).astype(int) for key in own]
    for image, mirrored, (top, left), ours in zip(padded, flip, offsets, found, strict=True):
        part = image[top : top + 20, left : left + 24]
        expected = part if size == (20, 24) else slow_resize(part, *size)
        np.testing.assert_allclose(ours, expected[:, ::-1] if mirrored else expected, atol=TOLERANCE)
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(2 * padding + 1))
