"""The sections of a page: figures get the arrays that the run's files contain."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reports.pages import edit
from vit_jax.checkpoints.load import load
from vit_jax.config_files import from_json
from vit_jax.data import batches
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import TASKS
from vit_jax.models.intermediates import attention_maps, attention_rollout
from vit_jax.reports import attention, figures, sections
from vit_jax.reports.runs import read_run
from vit_jax.training.step import Batch, loss_of
from vit_jax.transforms import geometry
from vit_jax.transforms.keys import stream
from vit_jax.transforms.preprocess import for_training


@pytest.fixture
def arguments(monkeypatch):
    """The arguments that each function of `figures` was called with, by its name."""
    found = {}

    def recorded(name, real):
        return lambda *of: (found.setdefault(name, []).append(of), real(*of))[1]

    for name in ("heads", "rollout", "attention_distance", "per_class", "mistakes", "filters", "positions"):
        monkeypatch.setattr(figures, name, recorded(name, getattr(figures, name)))
    return found


def test_attention_figures_use_the_images_weights_and_scaling_of_the_run(run, arguments):
    edit(run, data__normalization="dataset")
    source, row = open_split(TASKS["cifar100_excerpt"], "test[:100]"), TASKS["cifar100_excerpt"]
    pixels, labels = source.take(np.arange(100))
    # In each class, the first image is wrong with the highest confidence; of the correct images, the third has the highest.
    logits = np.zeros((100, 10), np.float32)
    logits[np.arange(100), labels] = 2
    of_class = [np.flatnonzero(labels == number) for number in range(10)]
    for number, index in enumerate(of_class):
        logits[index[0]] = 9 * np.eye(10)[(number + 1) % 10]
        logits[index[2], number] = 4
    np.savez(run / "predictions.npz", logits=logits, labels=labels)
    list(sections.attention_figures(read_run(run), sections.AttentionOptions(4, layers=(1, 2), heads=(2,))))

    chosen = [of_class[number][2] for number in (0, 3, 6, 9)]
    images = (pixels[chosen] / 255 - np.array(row.mean)) / np.array(row.std)
    start = json.loads((run / "config.json").read_text())["model"]["checkpoint"]
    computed = jax.jit(attention_maps, static_argnums=0)
    maps = {
        name: np.asarray(computed(*load(path, num_classes=0, image_size=32), images.astype(np.float32)))
        for name, path in (("before", start), ("fine-tuned", run / "final.npz"))
    }
    [(shown, masks, names)] = arguments["rollout"]
    np.testing.assert_allclose(shown, pixels[chosen] / 255, atol=1e-6)
    assert names == [f"{source.class_names[number]}, image {index}" for number, index in zip((0, 3, 6, 9), chosen, strict=True)]
    [(distances,)] = arguments["attention_distance"]
    assert list(masks) == list(distances) == list(maps)
    for name, of_model in maps.items():
        np.testing.assert_allclose(masks[name], attention_rollout(of_model), atol=1e-5)
        np.testing.assert_allclose(distances[name], attention.distances(of_model, 8), rtol=1e-5)
    assert len(arguments["heads"]) == 4
    for number, (image, single) in enumerate(arguments["heads"]):
        np.testing.assert_allclose(image, pixels[chosen[number]] / 255, atol=1e-6)
        assert list(single) == ["layer 1, head 2", "layer 2, head 2"]
        for layer, found in enumerate(single.values()):
            expected = maps["fine-tuned"][layer, number, 1, 0, 1:].reshape(4, 4)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_prediction_and_weight_figures_equal_the_files(run, arguments):
    source = open_split(TASKS["cifar100_excerpt"], "test[:100]")
    pixels, labels = source.take(np.arange(100))
    logits = np.random.default_rng(0).normal(size=(100, 10)).astype(np.float32)
    np.savez(run / "predictions.npz", logits=logits, labels=labels)
    list(sections.prediction_figures(read_run(run)))
    list(sections.weight_figures(read_run(run)))

    wrong = []
    for index, row in enumerate(logits.astype(np.float64)):
        if row.argmax() != labels[index]:
            wrong.append((np.exp(row).max() / np.exp(row).sum(), index, row.argmax()))
    worst = sorted(wrong, reverse=True)[:12]
    [(shown, texts)] = arguments["mistakes"]
    np.testing.assert_array_equal(shown, pixels[[index for _, index, _ in worst]])
    name = source.class_names
    assert texts == [f"{name[labels[index]]}\n→ {100 * share:.0f} % {name[predicted]}" for share, index, predicted in worst]
    [(accuracies, _, counts)] = arguments["per_class"]
    assert counts == {name[c]: (labels == c).sum() for c in range(10)}
    assert accuracies == {name[c]: np.mean(logits[labels == c].argmax(axis=1) == c) for c in range(10)}

    start = json.loads((run / "config.json").read_text())["model"]["checkpoint"]
    with np.load(start) as before, np.load(run / "final.npz") as after:
        [(embeddings, grid)], [(kernels,)] = arguments["positions"], arguments["filters"]
        for found, leaf, rows in [
            (embeddings, "Transformer/posembed_input/pos_embedding", np.s_[0, 1:]),
            (kernels, "embedding/kernel", np.s_[:]),
        ]:
            assert list(found) == ["before", "fine-tuned"] and grid == (4, 4)
            np.testing.assert_array_equal(found["before"], before[leaf][rows])
            np.testing.assert_array_equal(found["fine-tuned"], after[leaf][rows])


def test_training_images_equal_the_inputs_of_the_model(run, monkeypatch):
    config = from_json((run / "config.json").read_text(), "")
    source = open_split(TASKS["cifar100_excerpt"], config.data.train_split)
    seen = []

    class Model:
        def apply(self, params, images, **_):
            jax.debug.callback(seen.append, images)
            return jnp.zeros((len(images), 10))

    index = batches.train_batch(len(source), config.training.batch_size, config.seed, 0)
    images, labels = source.take(index)
    forward = loss_of(Model(), for_training(config.augment, config.data.image_size), config.seed)
    batch = Batch(jnp.arange(len(index), dtype=jnp.int32), None, jnp.asarray(images), jnp.asarray(labels))
    jax.jit(forward)({}, batch, None, 0, stream(0, 0))
    jax.effects_barrier()

    shown = []
    real = figures.training_images
    monkeypatch.setattr(figures, "training_images", lambda *of: (shown.append(of), real(*of))[1])
    list(sections.training_figures(read_run(run)))
    originals, pixels, names = shown[0]
    assert (originals == images[:12]).all() and names == [source.class_names[label] for label in labels[:12]]
    np.testing.assert_allclose(pixels, (np.asarray(seen[0])[:12] + 1) / 2, atol=1e-6)


def test_training_images_show_what_is_mixed(run, monkeypatch):
    shown, real = [], figures.training_images
    monkeypatch.setattr(figures, "training_images", lambda *of: (shown.append(of), real(*of))[1])
    list(sections.training_figures(read_run(run)))
    edit(run, augment__mixup=1.0)
    [found] = sections.training_figures(read_run(run))
    assert "augment.mixup = 1 mixes each image with its neighbour in the batch" in found.caption
    (_, plain, names), (_, mixed, same) = shown
    assert names == same and np.abs(mixed - plain).max() > 0.1
    for i in range(0, len(plain), 2):  # what an image loses, its neighbour gets
        np.testing.assert_allclose(mixed[i] + mixed[i + 1], plain[i] + plain[i + 1], atol=1e-5)


def test_attention_figures_show_the_evaluation_crop(run, arguments):
    edit(run, augment__eval_crop="center")
    list(sections.attention_figures(read_run(run), sections.AttentionOptions(images=(17, 3))))
    pixels, _ = read_run(run).test.take(np.array([17, 3]))
    np.testing.assert_allclose(arguments["rollout"][0][0], geometry.center_crop(pixels, 32) / 255, atol=1e-6)


def test_images_can_be_chosen_by_number(run, arguments):
    list(sections.attention_figures(read_run(run), sections.AttentionOptions(images=(17, 3))))
    [(shown, _, names)] = arguments["rollout"]
    source = read_run(run).test
    pixels, labels = source.take(np.array([17, 3]))
    np.testing.assert_allclose(shown, pixels / 255, atol=1e-6)
    assert names == [f"{source.class_names[label]}, image {index}" for label, index in zip(labels, (17, 3), strict=True)]
