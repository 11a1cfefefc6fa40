"""The classifier: probabilities equal to those of evaluation for images in any form, and few images in memory at a time."""

import io
import logging
import os
import threading

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax.config import Augment, Config, Data, Model, Optimizer, Run, Training
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import task
from vit_jax.errors import CheckpointError, ImageError
from vit_jax.formats.google import save_npz
from vit_jax.images import THREADS
from vit_jax.models.intermediates import attention_maps, attention_rollout
from vit_jax.predict import Classifier
from vit_jax.resampling import center_crop
from vit_jax.training import devices
from vit_jax.training.assemble import assemble
from vit_jax.training.evaluate import predictions

from .conftest import META, NAMES, save


@pytest.fixture
def config(tmp_path):
    save(tmp_path / "start.npz", num_layers=1, num_classes=10)
    return Config(
        model=Model(checkpoint=str(tmp_path / "start.npz")),
        data=Data(task="cifar100_excerpt", test_split="test[:100]", image_size=48, normalization="dataset"),
        augment=Augment(crop="none", flip=False),
        optimizer=Optimizer(learning_rate=4.0),
        training=Training(steps=1, batch_size=8),
        run=Run(eval_batch_size=40),
    )


def compare(run, logits, tmp_path):
    """Asserts that the classifier, given PNG files of the test images, agrees with a run's logits."""
    logits = logits.astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.ptp(expected, axis=0).max() > 0.1  # else the comparison would show nothing
    source = open_split(task("cifar100_excerpt"), "test[:100]")
    paths = [tmp_path / f"{number}.png" for number in range(100)]
    for path, pixels in zip(paths, source.take(np.arange(100))[0], strict=True):
        Image.fromarray(pixels).save(path)
    classify = Classifier(run)
    np.testing.assert_allclose(classify.probabilities(paths), expected, atol=1e-6, rtol=0)
    assert [found[0][0] for found in classify(paths)] == [source.class_names[best] for best in expected.argmax(axis=1)]


def test_probabilities_equal_those_of_an_evaluation(config, tmp_path):
    """As a run evaluates at its end, but without a training."""
    layout = devices.start(config.run)
    config.model.keep_head = "true"
    parts = assemble(config, layout)
    logits, _ = predictions(parts.program.predict, layout.put(parts.params), parts.test_feed, config.run.eval_batch_size)
    save_npz(tmp_path / "final.npz", parts.params, parts.meta)
    compare(tmp_path, logits, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["none", "center"])
def test_probabilities_equal_those_of_a_run(config, crop, tmp_path):
    config.augment.eval_crop = crop
    vit_jax.train(config, tmp_path / "run")
    with np.load(tmp_path / "run" / "predictions.npz") as found:
        compare(tmp_path / "run", found["logits"], tmp_path)


def test_evaluation_crop_in_the_json_is_followed_or_refused(classify, noise, tmp_path):
    image = noise(40, 56)
    cropped = Classifier(save(tmp_path / "center.npz", META | {"eval_crop": "center"}))
    part = np.asarray(center_crop(Image.fromarray(image), (32, 32)))
    np.testing.assert_allclose(
        cropped.probabilities(image), jax.device_get(cropped._probabilities(cropped.params, part[None])), atol=1e-6
    )
    assert np.abs(cropped.probabilities(image) - classify.probabilities(image)).max() > 0.01
    path = save(tmp_path / "left.npz", META | {"eval_crop": "left"})
    with pytest.raises(CheckpointError, match=r"left.npz: eval_crop in the JSON .* is 'left'; it should be one of"):
        Classifier(path)


def test_every_form_of_an_image_gives_the_same_classes(classify, noise, tmp_path):
    pixels = noise(40, 50)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    lazy = Image.open(path)  # decoded by the classifier, and given twice
    expected = classify(pixels)
    assert len(expected) == 1 and [len(expected[0]), expected[0]] == [5, sorted(expected[0], key=lambda found: -found[1])]
    for form in (path, str(path), path.read_bytes(), Image.fromarray(pixels), jax.numpy.asarray(pixels), [pixels], (path,)):
        assert classify(form) == expected
    batch = np.stack([pixels, noise(40, 50)])
    several = [path, batch, [lazy, lazy], Image.new("L", (3, 900))]
    found = classify.probabilities(several)
    assert found.shape == (6, 7)
    for same in (1, 3, 4):
        np.testing.assert_allclose(found[same], found[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(classify.probabilities(batch), found[1:3], atol=1e-6, rtol=0)
    assert classify([]) == [] and classify.probabilities([]).shape == (0, 7)


def test_probabilities_sum_to_1_and_belong_to_names(classify, noise):
    found = classify.probabilities([noise(), noise()])
    assert found.dtype == np.float32 and found.shape == (2, 7)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    everything = classify(noise(), top=100)[0]
    assert sorted(name for name, _ in everything) == NAMES
    assert classify(np.zeros((8, 8, 3), np.uint8), top=2)[0] == classify(np.zeros((8, 8, 3), np.uint8), top=7)[0][:2]
    for top in (0, "3", 2.5):
        with pytest.raises(ValueError, match=f"top must be a whole number of at least 1, got {top!r}"):
            classify(noise(), top=top)
    assert classify(noise(), top=np.int64(2))
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        Classifier("nowhere", batch_size=0)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_does_not_change_probabilities(run, classify, noise, batch_size):
    images = [noise(20 + number, 30) for number in range(7)]
    found = Classifier(run, batch_size).probabilities(images)
    np.testing.assert_allclose(found, classify.probabilities(images), atol=1e-6, rtol=0)


def test_images_of_all_sizes_compile_one_program(run, noise):
    classify = Classifier(run, batch_size=4)
    classify([noise() for _ in range(4)])
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(logging.Logger, "warning", lambda self, *args, **_: compiled.append(args))
        classify([noise(20 + 3 * number, 50 - number) for number in range(20)])
    assert compiled == []


def test_bad_image_is_raised_or_yielded(classify, noise, tmp_path):
    images = [noise(), tmp_path / "none.png", noise()]
    for method in (classify, classify.probabilities, classify.attention):
        with pytest.raises(ImageError, match=r"none\.png does not exist"):
            method(images)
    with pytest.raises(ImageError, match=r"^images\[1\] has pixels of type float32"):
        classify([noise(), np.zeros((2, 2, 3), np.float32)])
    with pytest.raises(ImageError, match="an image must be a path, a PIL image or a uint8 array, got int"):
        classify([7])
    yielded = list(classify.stream([("a", images[0]), ("b", images[1]), ("c", images[2])]))
    assert [name for name, _ in yielded] == ["a", "b", "c"]
    assert isinstance(yielded[1][1], ImageError)
    assert [yielded[0][1], yielded[2][1]] == classify([images[0], images[2]])


def test_stream_holds_few_images_in_memory(run, noise):
    """Those read ahead, a batch that fills and two that are computed, however many images there are."""
    classify, given, most = Classifier(run, batch_size=4), 0, 0
    image = noise()

    def images():
        nonlocal given
        for number in range(500):
            given += 1
            yield str(number), image

    for done, (name, _) in enumerate(classify.stream(images())):
        assert name == str(done)
        most = max(most, given - done)
    assert done == 499
    assert 3 * 4 <= most <= max(2 * 4, THREADS) + 3 * 4


def test_images_are_read_while_the_device_computes(run, noise):
    """When one batch is computed, the device already has the next, and images of the third are read."""
    classify, events = Classifier(run, batch_size=4), []
    compute, reached = classify._probabilities, threading.Event()
    file = io.BytesIO()
    Image.fromarray(noise()).save(file, "PNG")

    def computing(params, images):
        events.append("computes")
        return compute(params, images)

    def last_of_the_third_batch():
        reached.set()
        return file.getvalue()

    classify._probabilities = computing
    sources = (last_of_the_third_batch if number == 11 else file.getvalue() for number in range(100))
    stream = classify.stream(("it", source) for source in sources)
    next(stream)
    assert events == ["computes", "computes"]
    assert reached.wait(10)  # although the caller has asked for one image only
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_attention_equals_the_rollout_of_the_maps(classify, noise):
    pixels = noise()
    images = (pixels[None].astype(np.float32) / 255 - np.array([[[[0.5, 0.4, 0.3]]]], np.float32)) / np.array(
        [[[[0.3, 0.2, 0.1]]]], np.float32
    )
    expected = attention_rollout(attention_maps(classify.model, classify.params, images))
    found = classify.attention([pixels, noise()])
    assert found.shape == (2, 4, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=0)
    assert classify.attention([]).shape == (0, 4, 4)


def test_model_without_head_or_class_token_is_an_error(tmp_path, noise):
    with pytest.raises(CheckpointError, match="has no head, so it cannot classify; use vit_jax.features"):
        Classifier(save(tmp_path / "headless.npz", {"image_size": 32}, num_classes=0))
    gap = Classifier(save(tmp_path / "gap.npz", classifier="gap"))
    assert len(gap(noise())[0]) == 5
    with pytest.raises(CheckpointError, match="has no class token"):
        gap.attention(noise())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (5, "weights must be a path or a published name, got 5"),
        ("~no-such-user/x", "checkpoint='~no-such-user/x': the user '~no-such-user' does not exist"),
        ("/proc/self/mem", "/proc/self/mem is empty"),
        ("loop", "there is no file loop"),
    ],
)
def test_path_without_weights_is_an_error(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=said) as caught:
        Classifier(source)
    assert "\n" not in str(caught.value)


def test_unreadable_weights_are_named_in_the_error(run, monkeypatch):
    original = os.open

    def refused(path, *args, **options):
        if str(path).endswith(".npz"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(CheckpointError, match=r"final\.npz cannot be read \(Permission denied\)$"):
        Classifier(run)


def test_assumptions_about_weights_are_logged(tmp_path, caplog):
    """But not for Google's weights, which test_names knows by their names."""
    scaling = "no JSON next to %s says how images are scaled: Google's [-1, 1] is assumed"
    naming = "no JSON next to %s names its 7 classes: they are called by their numbers"
    for name, meta, expected in (
        ("bare.npz", None, [naming, scaling]),
        ("names.npz", {"class_names": NAMES}, [scaling]),
        ("scaling.npz", {"normalization": META["normalization"]}, [naming]),
        ("copy.npz", {"copy_of": "ViT-B_16", "class_names": NAMES}, []),
        ("whole.npz", META, []),
    ):
        caplog.clear()
        path = save(tmp_path / name, meta)
        Classifier(path)
        assert caplog.messages == [message % path for message in expected]


def test_model_of_wide_images_is_supported(tmp_path, noise):
    path = save(tmp_path / "wide.npz", META | {"image_size": [16, 64]})
    classify = Classifier(path)
    assert classify.image_size == (16, 64) and classify.attention(noise()).shape == (1, 2, 8)


@pytest.mark.slow
def test_embedded_model_has_class_names_in_the_order_of_its_head():
    """The most frequent answer for classes that CIFAR-100 and Tiny-ImageNet share; another order of names gives others."""
    source = open_split(task("cifar100_excerpt"), "test")
    images, labels = source.take(np.arange(len(source)))
    classify = Classifier("mini_8", batch_size=64)
    assert len(set(classify.class_names)) == 200
    for name, expected in (("lion", "lion, king of beasts"), ("orange", "orange"), ("mountain", "alp"), ("dolphin", "dugong")):
        best = classify.probabilities(images[labels == source.class_names.index(name)]).argmax(axis=1)
        assert classify.class_names[np.bincount(best).argmax()].startswith(expected)
