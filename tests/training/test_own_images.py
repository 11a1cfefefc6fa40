"""A run on a folder of 2,000 images of all kinds: trained, resumed, evaluated, drawn, and used to predict."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax.config import Augment, Run
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import task
from vit_jax.predict import Classifier
from vit_jax.reports.page import write
from vit_jax.training import devices, loop
from vit_jax.training.feed import Feed
from vit_jax.training.step import fetch
from vit_jax.transforms.keys import AUGMENT, example_keys, stream
from vit_jax.transforms.preprocess import for_training

COLOURS = {"amber": (230, 160, 20), "blue": (20, 40, 200), "cyan": (10, 200, 210), "dark": (15, 15, 15)}
MODES = ("RGB", "P", "RGBA", "CMYK")
SUFFIX = {"CMYK": ".jpg", "RGB": ".webp"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """500 images of each of four colours with noise, of mixed sizes, modes and formats, every eighth turned by its EXIF tag."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(500):
            width, height = draw.integers(12, 60, 2)
            pixels = np.clip(np.array(colour) + draw.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
            mode = MODES[number % len(MODES)]
            options = {"exif": turned} if number % 8 == 7 else {}
            Image.fromarray(pixels).convert(mode).save(root / name / f"{number}{SUFFIX.get(mode, '.png')}", **options)
    return root


@pytest.fixture
def own(config, photos):
    config = dataclasses.replace(config)
    config.data.task, config.data.train_split, config.data.test_split = f"folder:{photos}", "", ""
    config.training.batch_size, config.run.eval_batch_size = 64, 64
    config.optimizer.name, config.optimizer.learning_rate, config.training.steps = "adamw", 0.01, 60
    config.training.eval_every = config.training.save_every = 25
    return config


def parameters(result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result.params)]


@pytest.mark.slow
def test_run_on_own_images_learns_resumes_and_predicts_their_classes(own, photos, tmp_path):
    whole = loop.train(own, tmp_path / "whole")
    assert whole.metrics["test/accuracy"] > 0.9
    # A second run with the same states, of which the newest is removed, ends with the same parameters.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "60")
    resumed = loop.train(own, tmp_path / "again")
    for a, b in zip(parameters(whole), parameters(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    page = write(tmp_path / "whole")
    assert "100.00" in page.read_text() and list((page.parent / "figures").glob("training_images*"))
    classify = Classifier(tmp_path / "whole")
    assert classify.class_names == list(COLOURS)
    files = [next(photos.glob(f"{name}/*7.*")) for name in COLOURS]
    assert [result[0][0] for result in classify(files, top=1)] == list(COLOURS)


def test_resident_and_streamed_images_are_the_same(photos):
    source, layout = open_split(task(f"folder:{photos}"), "train", image_size=16), devices.start(Run())
    resident, streamed = Feed(source, layout, source.nbytes), Feed(source, layout, 0)
    assert resident.data is not None and streamed.data is None
    for _, a, b in zip(range(3), resident.train(64, 2, 5, 24), streamed.train(64, 2, 5, 24), strict=False):
        one, other = (jax.tree.map(lambda leaf: leaf[1], batch) for batch in (a, b))
        for x, y in zip(fetch(one, resident.data), fetch(other, None), strict=True):
            np.testing.assert_array_equal(x, y)


def test_crop_of_a_resized_image_is_that_of_the_original(photos):
    """A ramp is linear, so resizing and cropping change only its slope: the boxes are those of the original's geometry."""
    height, width, stored = 60, 90, 45
    ramp = np.broadcast_to(np.arange(width) * 2.0, (height, width))
    resized = (np.arange(stored) + 0.5) * (width / stored) - 0.5  # at the centres of the stored pixels
    keys = example_keys(stream(0, AUGMENT), 3, np.arange(64))
    transform = jax.jit(for_training(Augment(crop_area=(0.2, 0.6), flip=True), 8))

    def channels(rows):
        return np.repeat(np.rint(rows).astype(np.uint8)[None, ..., None], 64, 0).repeat(3, -1)

    original, _ = transform(keys, channels(ramp), ())
    small = channels(np.broadcast_to(resized * 2.0, (stored, stored)))
    sizes = np.tile(np.array([[height, width]], np.int32), (64, 1))
    found, _ = transform(keys, small, (), jax.numpy.asarray(sizes))
    inner = np.abs(np.asarray(found - original))[:, :, 1:-1]  # the first and the last pixel repeat the edge of the box
    assert inner.max() < 1e-4 < 0.1 < np.abs(np.asarray(found) - np.roll(original, 1, axis=0)).max()
