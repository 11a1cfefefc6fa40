"""The classifier: the numbers of evaluation, whatever form the images come in, and few of them in memory at a time."""

import importlib.resources
import io
import logging
import lzma
import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax.config import Augment, Config, Data, Model, Optimizer, Run, Training
from vit_jax.data.sources import open_split
from vit_jax.data.tasks import task
from vit_jax.errors import CheckpointError, ImageError
from vit_jax.formats.google import save_npz
from vit_jax.models.intermediates import attention_maps, attention_rollout
from vit_jax.predict import Classifier, names
from vit_jax.predict.classifier import _THREADS
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
    """Holds the classifier against a run's predictions, given PNG files of the same images."""
    logits = logits.astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.ptp(expected, axis=0).max() > 0.1  # or there is nothing to compare
    source = open_split(task("cifar100_excerpt"), "test[:100]")
    paths = [tmp_path / f"{number}.png" for number in range(100)]
    for path, pixels in zip(paths, source.take(np.arange(100))[0], strict=True):
        Image.fromarray(pixels).save(path)
    classify = Classifier(run)
    np.testing.assert_allclose(classify.probabilities(paths), expected, atol=1e-6, rtol=0)
    assert [found[0][0] for found in classify(paths)] == [source.class_names[best] for best in expected.argmax(axis=1)]


def test_the_probabilities_of_an_evaluation(config, tmp_path):
    """What a run does at its end, without the training before."""
    layout = devices.start(config.run)
    config.model.keep_head = "true"
    parts = assemble(config, layout)
    logits, _ = predictions(parts.program.predict, layout.put(parts.params), parts.test_feed, config.run.eval_batch_size)
    save_npz(tmp_path / "final.npz", parts.params, parts.meta)
    compare(tmp_path, logits, tmp_path)


@pytest.mark.slow
def test_the_probabilities_of_a_run(config, tmp_path):
    vit_jax.train(config, tmp_path / "run")
    with np.load(tmp_path / "run" / "predictions.npz") as found:
        compare(tmp_path / "run", found["logits"], tmp_path)


def test_an_image_in_every_form(classify, noise, tmp_path):
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


def test_probabilities_and_names(classify, noise):
    found = classify.probabilities([noise(), noise()])
    assert found.dtype == np.float32 and found.shape == (2, 7)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    everything = classify(noise(), top=100)[0]
    assert sorted(name for name, _ in everything) == NAMES
    assert classify(np.zeros((8, 8, 3), np.uint8), top=2)[0] == classify(np.zeros((8, 8, 3), np.uint8), top=7)[0][:2]
    for top in (0, "3", 2.5):
        with pytest.raises(ValueError, match=f"top must be a whole number from 1 on, got {top!r}"):
            classify(noise(), top=top)
    assert classify(noise(), top=np.int64(2))
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1 on, got 0"):
        Classifier("nowhere", batch_size=0)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_change_the_numbers(run, classify, noise, batch_size):
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


def test_a_bad_image_is_raised_or_told(classify, noise, tmp_path):
    images = [noise(), tmp_path / "none.png", noise()]
    for method in (classify, classify.probabilities, classify.attention):
        with pytest.raises(ImageError, match=r"there is no file .*none\.png"):
            method(images)
    with pytest.raises(ImageError, match=r"^images\[1\] has pixels of type float32"):
        classify([noise(), np.zeros((2, 2, 3), np.float32)])
    with pytest.raises(ImageError, match="an image is a path, a PIL image or a uint8 array, got int"):
        classify([7])
    told = list(classify.stream([("a", images[0]), ("b", images[1]), ("c", images[2])]))
    assert [name for name, _ in told] == ["a", "b", "c"]
    assert isinstance(told[1][1], ImageError)
    assert [told[0][1], told[2][1]] == classify([images[0], images[2]])


def test_few_images_are_on_their_way(run, noise):
    """However many there are: what is read ahead, a batch that fills and two that are computed."""
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
    assert 3 * 4 <= most <= max(2 * 4, _THREADS) + 3 * 4


def test_reading_and_computing_overlap(run, noise):
    """When the device has computed one batch, the next has been given to it and images of the one after that are read."""
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
    assert reached.wait(10)  # although nobody asks for more
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_attention_is_the_rollout_of_the_maps(classify, noise):
    pixels = noise()
    images = (pixels[None].astype(np.float32) / 255 - np.array([[[[0.5, 0.4, 0.3]]]], np.float32)) / np.array(
        [[[[0.3, 0.2, 0.1]]]], np.float32
    )
    expected = attention_rollout(attention_maps(classify.model, classify.params, images))
    found = classify.attention([pixels, noise()])
    assert found.shape == (2, 4, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=0)
    assert classify.attention([]).shape == (0, 4, 4)


def test_models_that_cannot_answer(tmp_path, noise):
    with pytest.raises(CheckpointError, match="has no head and so names no classes: vit_jax.features"):
        Classifier(save(tmp_path / "headless.npz", {"image_size": 32}, num_classes=0))
    gap = Classifier(save(tmp_path / "gap.npz", classifier="gap"))
    assert len(gap(noise())[0]) == 5
    with pytest.raises(CheckpointError, match="has no class token"):
        gap.attention(noise())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (5, "weights are a path or a published name, got 5"),
        ("~nobody-of-that-name/x", "checkpoint='~nobody-of-that-name/x': the user '~nobody-of-that-name' does not exist"),
        ("/proc/self/mem", "/proc/self/mem is empty"),
        ("loop", "there is no file loop"),
    ],
)
def test_paths_that_are_no_weights(tmp_path, monkeypatch, source, said):
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


def test_what_is_assumed_of_weights_is_said(tmp_path, caplog):
    """Of those that may be of any origin; Google's are known by their names, as in the test of names."""
    scaling = "nothing beside %s says how images are scaled: Google's [-1, 1] is assumed"
    naming = "nothing beside %s names its 7 classes: they are called by their numbers"
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
        assert caplog.messages == [sentence % path for sentence in expected]


def test_an_image_need_not_be_seen_as_a_square(tmp_path, noise):
    path = save(tmp_path / "wide.npz", META | {"image_size": [16, 64]})
    classify = Classifier(path)
    assert classify.image_size == (16, 64) and classify.attention(noise()).shape == (1, 2, 8)


def test_the_names_of_published_heads(caplog):
    """Google's heads; the order of the 21,843 as in google-research/big_transfer, issue 18."""
    both = names.imagenet("1k"), names.imagenet("21k")
    assert [len(set(found)) for found in both] == [1000, 21843]
    assert (both[0][0], both[0][291], both[0][999]) == (
        "tench, Tinca tinca",
        "lion, king of beasts, Panthera leo",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    assert (both[1][9205], both[1][15027]) == ("image, image, icon, ikon", "bleacher")
    assert [both[0].index(f"crane ({synset})") for synset in ("n02012849", "n03126707")] == [134, 517]
    for name, classes, expected in (
        ("ViT-B_16.npz", 21843, both[1]),
        ("mine.npz", 21843, both[1]),
        ("ViT-B_16.npz", 1000, both[0]),
        ("B_16-i1k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0.npz", 1000, both[0]),
    ):
        assert names.class_names(Path(name), {}, classes) == expected
    assert names.class_names(Path("model.npz"), {"copy_of": "sam/ViT-B_16"}, 1000) == both[0]
    assert not caplog.messages
    assert names.class_names(Path("mine.npz"), {}, 1000)[17] == "class 17"
    assert caplog.messages == ["nothing beside mine.npz names its 1000 classes: they are called by their numbers"]


def test_embedded_model_names_its_classes_in_the_order_of_its_head():
    """Classes of CIFAR-100 that Tiny-ImageNet has too: their most frequent answer, which no other order of names gives."""
    source = open_split(task("cifar100_excerpt"), "test")
    images, labels = source.take(np.arange(len(source)))
    classify = Classifier("mini_8", batch_size=64)
    assert len(set(classify.class_names)) == 200
    for name, expected in (("lion", "lion, king of beasts"), ("orange", "orange"), ("mountain", "alp"), ("dolphin", "dugong")):
        best = classify.probabilities(images[labels == source.class_names.index(name)]).argmax(axis=1)
        assert classify.class_names[np.bincount(best).argmax()].startswith(expected)


def test_the_order_of_imagenet_is_that_of_tfds():
    order = importlib.resources.files("tensorflow_datasets") / "datasets" / "imagenet2012" / "labels.txt"
    rows = [line.split("\t") for line in lzma.decompress(names._FILE.read_bytes()).decode().splitlines()]
    assert [synset for synset, sets, _ in rows if "1k" in sets.split()] == order.read_text().split()
    assert [synset for synset, sets, _ in rows if "21k" not in sets.split()] == ["n04399382"]


def test_the_file_of_names_is_written_as_it_ships(tmp_path):
    rows = [line.split("\t") for line in lzma.decompress(names._FILE.read_bytes()).decode().splitlines()]
    for name, which in (("imagenet_synsets.txt", "1k"), ("imagenet21k_goog_synsets.txt", "21k")):
        (tmp_path / name).write_text("".join(f"{synset}\n" for synset, sets, _ in rows if which in sets.split()))
    (tmp_path / "imagenet_synset_to_lemma.txt").write_text("".join(f"{synset}\t{words}\n" for synset, _, words in rows))
    names.write(tmp_path, tmp_path / "out")
    assert lzma.decompress((tmp_path / "out").read_bytes()) == lzma.decompress(names._FILE.read_bytes())
