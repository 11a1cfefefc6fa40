"""mixup and CutMix against their formulas in NumPy, on the draws that they make; and the distribution of these draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.transforms import mixing
from vit_jax.transforms.keys import fold

CLASSES = 7
mix = jax.jit(mixing.mix, static_argnums=(3, 4, 5))


def keys(number: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed, impl="threefry2x32"), number)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return draw.normal(size=(64, 11, 14, 3)).astype(np.float32), draw.integers(0, CLASSES, 64).astype(np.int32)


def weights(own, alpha: float, kind: int) -> np.ndarray:
    """λ of each pair, drawn one by one, in float64."""
    drawn = [jax.random.beta(key, alpha, alpha) for key in fold(own[::2], kind)]
    return np.array(drawn, np.float64)


def swapped(rows: np.ndarray) -> np.ndarray:
    """Row i xor 1 for each row i."""
    return rows[np.arange(len(rows)) ^ 1]


def one_hot(labels: np.ndarray) -> np.ndarray:
    return np.eye(CLASSES)[labels]


def test_mixup_is_its_formula(batch):
    images, labels = batch
    own = keys(64)
    lam = weights(own, 0.4, 0).repeat(2)
    found, soft = mix(own, images, labels, CLASSES, 0.4, 0.0)
    expected = lam[:, None, None, None] * images + (1 - lam[:, None, None, None]) * swapped(images)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(soft, lam[:, None] * one_hot(labels) + (1 - lam[:, None]) * swapped(one_hot(labels)), atol=1e-6)
    assert lam.min() < 0.2 and lam.max() > 0.8


def cut(images: np.ndarray, lam: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CutMix image by image, as its published code cuts, and the part of each image that is left."""
    mixed, left = images.copy(), np.ones(len(images))
    other, (height, width) = swapped(images), images.shape[1:3]
    for i in range(len(images)):
        side = np.sqrt(np.float32(1 - lam[i // 2]))
        h, w = int(height * side), int(width * side)
        row, column = int(place[i // 2, 0] * height), int(place[i // 2, 1] * width)
        y1, y2, x1, x2 = (
            int(np.clip(edge, 0, most))
            for edge, most in (
                (row - h // 2, height),
                (row + h // 2, height),
                (column - w // 2, width),
                (column + w // 2, width),
            )
        )
        mixed[i, y1:y2, x1:x2] = other[i, y1:y2, x1:x2]
        left[i] = 1 - (y2 - y1) * (x2 - x1) / (height * width)
    return mixed, left


def test_cutmix_is_its_formula(batch):
    images, labels = batch
    own = keys(64, 1)
    place = np.stack([jax.random.uniform(key, (3,)) for key in fold(own[::2], 2)])
    expected, left = cut(images, weights(own, 1.0, 1), place)
    found, soft = mix(own, images, labels, CLASSES, 0.0, 1.0)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        soft, left[:, None] * one_hot(labels) + (1 - left[:, None]) * swapped(one_hot(labels)), atol=1e-6
    )
    assert left.min() < 0.5 and left.max() > 0.9


def test_both_alternate_between_pairs(batch):
    images, labels = batch
    own = keys(64, 2)
    both, soft = mix(own, images, labels, CLASSES, 0.8, 1.0)
    only = [mix(own, images, labels, CLASSES, *alphas) for alphas in ((0.8, 0.0), (0.0, 1.0))]
    chosen = (np.stack([jax.random.uniform(key, (3,)) for key in fold(own[::2], 2)])[:, 2] < 0.5).repeat(2)
    assert 0.3 < chosen.mean() < 0.7
    for i, cutmix in enumerate(chosen.astype(int)):
        np.testing.assert_allclose(both[i], only[cutmix][0][i], atol=1e-6)
        np.testing.assert_allclose(soft[i], only[cutmix][1][i], atol=1e-6)


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.8, 1.0), (1e-3, 1e-3), (100.0, 100.0)])
def test_labels_sum_to_one_and_a_pair_keeps_its_labels(batch, alphas):
    images, labels = batch
    mixed, soft = mix(keys(64, 3), images, labels, CLASSES, *alphas)
    assert soft.dtype == jnp.float32 and soft.shape == (64, CLASSES) and (np.asarray(soft) >= 0).all()
    np.testing.assert_allclose(np.asarray(soft, np.float64).sum(axis=1), 1, atol=2e-7)
    np.testing.assert_allclose(soft + swapped(np.asarray(soft)), one_hot(labels) + swapped(one_hot(labels)), atol=1e-6)
    np.testing.assert_allclose(mixed + swapped(np.asarray(mixed)), images + swapped(images), atol=2e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_weights_have_the_moments_of_the_beta_distribution(alpha):
    images, labels = jnp.zeros((8192, 1, 1, 3)), jnp.tile(jnp.array([0, 1]), 4096)
    lam = np.asarray(mix(keys(8192), images, labels, 2, alpha, 0.0)[1])[::2, 0]
    assert lam.mean() == pytest.approx(0.5, abs=0.025)
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_odd_number_of_images_is_refused(batch):
    images, labels = batch
    with pytest.raises(ValueError, match="mixed in pairs, and there are 3: an even number of them is needed on each device"):
        mixing.mix(keys(3), images[:3], labels[:3], CLASSES, 0.2, 0.0)
