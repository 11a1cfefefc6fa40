"""The input of a model: scaling, and that training transforms depend only on keys and pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.config import Augment
from vit_jax.models.variants import build
from vit_jax.transforms import geometry, keys, preprocess
from vit_jax.transforms.erasing import erase
from vit_jax.transforms.mixing import mix
from vit_jax.transforms.randaugment import randaugment

STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def pixels(batch: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def example_keys(batch: int, seed=0, step=0) -> jax.Array:
    return keys.example_keys(keys.stream(seed, keys.AUGMENT), step, jnp.arange(batch))


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_preprocess_scales_as_google_does(as_array):
    images = pixels(2)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    ready = preprocess.preprocess(as_array(images), 16)
    assert ready.dtype == jnp.float32
    assert ready.min() == -1
    assert ready.max() == 1
    np.testing.assert_allclose(ready, (images.astype(np.float32) - 127.5) / 127.5, atol=1e-7)
    assert preprocess.preprocess(images, 40).shape == (2, 40, 40, 3)
    assert preprocess.preprocess(images, (24, 40)).shape == (2, 24, 40, 3)


def test_evaluation_resizes_straight_and_scales():
    images = pixels(3, 12, 20)
    mean, deviation = (np.reshape(s, (1, 1, 1, 3)) for s in STATISTICS)
    expected = (np.asarray(geometry.resize(images, 24), np.float64) / 255 - mean) / deviation
    np.testing.assert_allclose(jax.jit(preprocess.for_evaluation(24, STATISTICS))(images), expected, atol=2e-6)
    np.testing.assert_array_equal(preprocess.for_evaluation(24)(images), preprocess.preprocess(images, 24))


def test_evaluation_can_crop_the_centre():
    images, sizes = pixels(3, 12, 20), jnp.array([[12, 40], [60, 20], [9, 9]], jnp.int32)
    transform = jax.jit(preprocess.for_evaluation(16, STATISTICS, "center"))
    for of in (None, sizes):
        expected = preprocess.scale(geometry.center_crop(images, 16, of), STATISTICS)
        np.testing.assert_allclose(transform(images, of), expected, atol=1e-4)
    # evaluation without a crop needs no sizes
    np.testing.assert_array_equal(preprocess.for_evaluation(16)(images, sizes), preprocess.preprocess(images, 16))


def test_preprocess_crops_as_the_weights_expect():
    images, model = pixels(2, 12, 20), build("Ti/16", num_classes=2, eval_crop="center")
    expected = geometry.center_crop(images, 16) / 127.5 - 1
    np.testing.assert_allclose(preprocess.preprocess(images, 16, model), expected, atol=1e-5)
    assert np.abs(preprocess.preprocess(images, 16, model.clone(eval_crop="none")) - expected).max() > 0.1


@pytest.mark.parametrize(
    "images",
    [pixels(2).astype(np.float32), pixels(2)[0], pixels(2)[..., :1], pixels(2).astype(np.int64)],
    ids=["float", "one image", "grey", "int64"],
)
def test_preprocess_refuses_other_arrays(images):
    with pytest.raises(ValueError, match=r"must be uint8 of shape \[batch, height, width, 3\], got "):
        preprocess.preprocess(images, 16)
    with pytest.raises(ValueError, match="must be uint8"):
        preprocess.for_training(Augment(), 16)(example_keys(2), images, jnp.zeros(2))


@pytest.mark.parametrize("crop", ["tensorflow", "none"])
def test_training_transform_crops_then_flips_then_scales(crop):
    images, own, labels = pixels(32, 16, 24), example_keys(32), jnp.arange(32)
    flip = geometry.flips(keys.fold(own, keys.FLIP))
    assert set(flip.tolist()) == {True, False}
    straight, same_labels = jax.jit(preprocess.for_training(Augment(crop, (0.3, 0.6), False), 12))(own, images, labels)
    np.testing.assert_array_equal(same_labels, labels)
    if crop == "none":
        expected = geometry.resize(images, 12)
    else:
        draw = jax.jit(lambda own: geometry.random_boxes(own, 16, 24, distribution=crop, area=(0.3, 0.6)))
        expected = geometry.crop_resize(images, draw(keys.fold(own, keys.CROP)), 12)
    np.testing.assert_allclose(straight, expected / 127.5 - 1, atol=2e-6)
    # the flip's draw leaves the crop's as it was
    flipped, _ = jax.jit(preprocess.for_training(Augment(crop, (0.3, 0.6), True), 12))(own, images, labels)
    expected = np.where(flip[:, None, None, None], straight[:, :, ::-1], straight)
    np.testing.assert_allclose(flipped, expected, atol=2e-6)


def test_training_transform_does_not_depend_on_the_batch():
    images, own, labels = pixels(32), example_keys(32), jnp.arange(32)
    transform = jax.jit(preprocess.for_training(Augment(), 24, STATISTICS))
    expected, _ = transform(own, images, labels)
    order = np.random.default_rng(1).permutation(32)
    shuffled, _ = transform(own[order], images[order], labels[order])
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-5)
    folded = [x.reshape(8, 4, *x.shape[1:]) for x in (own, images, labels)]
    parallel, parallel_labels = jax.pmap(transform)(*folded)
    np.testing.assert_allclose(parallel.reshape(expected.shape), expected, atol=1e-5)
    np.testing.assert_array_equal(parallel_labels.reshape(32), labels)
    other, _ = transform(example_keys(32, step=1), images, labels)
    assert (np.abs(other - expected).max(axis=(1, 2, 3)) > 0.1).all()


EVERYTHING = Augment(crop="pad", randaugment_layers=2, erasing=0.7, mixup=0.4, cutmix=1.0)


def test_operations_act_in_their_order_with_their_own_draws():
    images, own, labels = pixels(32, 16, 24), example_keys(32), jnp.arange(32) % 5
    found, soft = jax.jit(preprocess.for_training(EVERYTHING, 12, STATISTICS, 5))(own, images, labels)

    @jax.jit
    def expected(own, images, labels):
        part, flip = (keys.fold(own, kind) for kind in (keys.CROP, keys.FLIP))
        images = geometry.random_crops(part, images, 12, "pad", (0.05, 1.0), geometry.flips(flip), padding=4)
        images = preprocess.scale(randaugment(keys.fold(own, keys.RANDAUGMENT), images, 2, 10.0), STATISTICS)
        return mix(keys.fold(own, keys.MIX), erase(keys.fold(own, keys.ERASE), images, 0.7), labels, 5, 0.4, 1.0)

    theirs, their_labels = expected(own, images, labels)
    # Rounding before RandAugment may differ in a pixel between two programs.
    assert np.mean(np.abs(found - theirs) < 1e-4) > 0.999
    np.testing.assert_allclose(soft, their_labels, atol=1e-6)


def test_augmented_image_depends_on_its_pair_only():
    images, own, labels = pixels(32), example_keys(32), jnp.arange(32) % 5
    transform = preprocess.for_training(EVERYTHING, 16, None, 5)
    expected, soft = jax.jit(transform)(own, images, labels)
    parallel = jax.pmap(transform)(*(x.reshape(8, 4, *x.shape[1:]) for x in (own, images, labels)))
    np.testing.assert_allclose(parallel[0].reshape(expected.shape), expected, atol=1e-5)
    np.testing.assert_allclose(parallel[1].reshape(soft.shape), soft, atol=1e-6)


def test_mixing_without_the_number_of_classes_is_an_error():
    with pytest.raises(ValueError, match="need the number of classes, got num_classes = 0"):
        preprocess.for_training(Augment(cutmix=1.0), 16)
