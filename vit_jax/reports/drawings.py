"""Which figures a run gets, each with its caption: from the run's files, its data set's and its checkpoint's to Drawings.

A generator a part of the page. Where it raises Missing, DataError or CheckpointError, what it has drawn before stands, and
the error's sentence stands for the rest.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vit_jax.data import batches
from vit_jax.errors import ReportError, printable
from vit_jax.models.intermediates import attention_maps, attention_rollout
from vit_jax.models.vit import GOOGLE_NORMALIZATION, VisionTransformer
from vit_jax.reports import attention, figures
from vit_jax.reports.runs import BEFORE, Missing, Run, superclasses
from vit_jax.transforms.keys import AUGMENT, example_keys, stream
from vit_jax.transforms.preprocess import for_evaluation, for_training

_GRID = 12  # images of a grid
_MATRIX = 100  # classes at most that a confusion matrix is drawn of

_maps = jax.jit(attention_maps, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure, the name of its file, its title and what there is to see, in plain text.

    `wide` is true for a figure that takes the whole width of the page.
    """

    name: str
    title: str
    figure: Figure
    caption: str
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Look:
    """What of the attention is shown: an image of each of so many classes or else the images of these numbers, and which layers
    and heads apart, counted from 1.
    """

    num_images: int = 6
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    images: tuple[int, ...] = ()


def learning(run: Run) -> Iterator[Drawing]:
    """The learning curves."""
    if not run.metrics:
        raise Missing("There are no metrics yet: the run writes a line a step.")
    caption = (
        f"Up to step {run.step} of {run.config.training.steps}. Pale: the training loss of each step; the line through it is a "
        f"running mean. Each evaluation is of all images of the split {run.splits[1]}."
    )
    yield Drawing("curves", "Learning curves", figures.curves({run.name: run.metrics}, run.measured), caption)


def training_images(run: Run) -> Iterator[Drawing]:
    """The first images of the first batch beside what the run's own transforms make of them at its first step."""
    config, source = run.config, run.train
    index = next(batches.train(len(source), config.training.batch_size, config.seed))[:_GRID]
    originals, labels = source.take(index)
    transform = jax.jit(for_training(config.augment, config.data.image_size, _statistics(run)))
    images, _ = transform(
        example_keys(stream(config.seed, AUGMENT), 0, jnp.arange(len(index), dtype=jnp.int32)), originals, labels
    )
    names = [printable(source.class_names[label]) for label in labels]
    caption = (
        "The first images of the first batch. Of each pair the left one is as stored, the right one exactly as the model got "
        "it: cropped, flipped and resized, its scaling undone."
    )
    figure = figures.training_images(originals, _visible(images, run), names)
    yield Drawing("training_images", "Training images", figure, caption)


def weights(run: Run) -> Iterator[Drawing]:
    """Embedding filters and position embeddings, of the trained model and of what it started from."""
    models, said = run.models
    model = next(iter(models.values()))[0]
    part = ("embedding", "filters of the patch embedding") if model.resnet is None else ("conv_root", "root's filters")
    kernels = {name: np.asarray(params[part[0]]["kernel"]) for name, (_, params) in models.items()}
    caption = f"The first principal components of the {part[1]}, each scaled to the full range of colours.{said}"
    yield Drawing("filters", "Embedding filters", figures.filters(kernels), caption)

    side, first = run.config.data.image_size // model.stride, int(model.classifier == "token")
    embeddings = {name: params["Transformer"]["posembed_input"]["pos_embedding"] for name, (_, params) in models.items()}
    figure = figures.positions({name: np.asarray(rows)[0, first:] for name, rows in embeddings.items()}, (side, side))
    resized = " Those from before are resized to this grid, where their file holds another." if BEFORE in models else ""
    caption = (
        f"Cosine similarity of position embeddings: a tile for each of the {side}×{side} patches, against all patches."
        f"{resized}{said}"
    )
    yield Drawing("positions", "Position embeddings", figure, caption)


def looks(run: Run, look: Look) -> Iterator[Drawing]:
    """Attention of the model on a few test images: rollout, distances, and single layers and heads where asked for.

    ReportError for a layer or a head that the model does not have, and for an image that the split does not have.
    """
    models, said = run.models
    model = next(iter(models.values()))[0]
    layers, heads = _wanted(model, look)
    pixels, labels, index, which = _chosen(run, look.images) if look.images else _examples(run, look.num_images)
    images = jax.jit(for_evaluation(run.config.data.image_size, _statistics(run)))(pixels)
    shown, of = _visible(images, run), run.test.class_names
    names = [f"{printable(of[label])}, image {at}" for label, at in zip(labels, index, strict=True)]
    grid = (images.shape[1] // model.stride, images.shape[2] // model.stride)
    masks: dict[str, list[np.ndarray]] = {}
    far: dict[str, list[np.ndarray]] = {}
    apart: list[dict[str, np.ndarray]] = []
    for name, (_, params) in models.items():
        for image in images:  # one at a time, for all maps of a large model at once would fill the memory
            maps = np.asarray(_maps(model, params, image[None]))
            far.setdefault(name, []).append(attention.distances(maps, model.stride, grid))
            if model.classifier == "token":
                masks.setdefault(name, []).append(attention_rollout(maps, grid)[0])
                if name != BEFORE and (look.layers or look.heads):
                    row = maps[:, 0, :, 0, 1:].reshape(*maps.shape[:1], -1, *grid)
                    apart.append({f"layer {i}, head {j}": row[i - 1, j - 1] for i in layers for j in heads})
    if masks:
        figure = figures.rollout(shown, {name: np.stack(found) for name, found in masks.items()}, names)
        caption = (
            "In colours over each image, how much of each patch reaches the class token through all layers (attention "
            f"rollout), from the least to the most in that image. {which} Images are numbered from 0 in the order of the "
            f"split {run.splits[1]}.{said}"
        )
        yield Drawing("rollout", "Where it looks", figure, caption)
    figure = figures.attention_distance({name: np.mean(found, axis=0) for name, found in far.items()})
    caption = (
        f"Mean distance between a patch and those it attends to, over {len(shown)} images of {run.config.data.image_size} "
        f"pixels. One dot per head; line: mean.{said}"
    )
    yield Drawing("attention_distance", "How far it looks", figure, caption)
    if not masks:
        raise Missing("The model averages its patches and has no class token: there is no attention rollout.")
    for number, maps_of in enumerate(apart):
        caption = (
            f"{names[number]} of the split {run.splits[1]}, and in colours over it the class token's attention in single "
            "layers and heads, from the least to the most in each."
        )
        figure = figures.heads(shown[number], maps_of)
        yield Drawing(f"heads_{number + 1}", f"Layers and heads: {names[number]}", figure, caption)


def predicted(run: Run) -> Iterator[Drawing]:
    """What predictions.npz tells: calibration, classes, superclasses, confusions and confident mistakes."""
    logits, labels = run.predictions
    names = run.class_names
    if len(names) != logits.shape[1]:
        raise Missing(f"predictions.npz speaks of {logits.shape[1]} classes, {run.config.data.task} has {len(names)}.")
    right, total = logits.argmax(axis=1) == labels, np.bincount(labels, minlength=len(names))
    accuracy = {name: right[labels == number].mean() for number, name in enumerate(names) if total[number]}
    counts = {name: int(total[number]) for number, name in enumerate(names) if total[number]}
    fewest, most = min(counts.values()), max(counts.values())
    caption = (
        f"Of the {len(labels):,} images of the split {run.splits[1]}, by true class, the best first. Thin lines: 95 % "
        f"intervals (Wilson) of an accuracy on {fewest if fewest == most else f'{fewest} to {most}'} images."
    )
    yield Drawing("classes", "Accuracy per class", figures.per_class(accuracy, None, counts), caption)
    if len(names) <= _MATRIX:
        caption = "Images of each true class (row) by predicted class (column). Darker is a larger share of the row."
        yield Drawing(
            "confusion", "Confusion matrix", figures.confusion_matrix(logits, labels, names), caption, wide=len(names) > 20
        )
    if len(names) > 20:
        caption = (
            "The classes of the lowest accuracy (rows) by predicted class (columns): numbers of images. Darker is a larger "
            "share of the row."
        )
        yield Drawing("worst_classes", "Worst classes", figures.confusion(logits, labels, names), caption)
    yield Drawing(
        "reliability",
        "Reliability",
        figures.reliability(logits, labels),
        "Accuracy of images of about equal confidence (15 bins), and the number of images in each bin. Bars below the line: "
        "the model is overconfident. The expected calibration error is the distance between both, averaged over images.",
    )
    if len(run.test) != len(labels):
        raise Missing(f"predictions.npz holds {len(labels)} images, the test split on this machine {len(run.test)}.")
    confidence = np.where(right, -1, figures.softmax(logits).max(axis=1))
    worst = np.argsort(-confidence, kind="stable")[: min(_GRID, int((~right).sum()))]
    if len(worst):
        images, found = run.test.take(worst)
        if (found != labels[worst]).any():
            raise Missing("The test split on this machine is not the one that the run was tested on: its labels are others.")
        said = logits[worst].argmax(axis=1)
        sure = [f"→ {100 * confidence[at]:.0f} % {names[says]}" for at, says in zip(worst, said, strict=True)]
        text = [f"{names[label]}\n{what}" for label, what in zip(found, sure, strict=True)]
        caption = (
            "The wrong predictions of the highest confidence: the true class, then the predicted one with its probability."
        )
        yield Drawing("mistakes", "Most confident mistakes", figures.mistakes(images, text), caption)
    if coarse := superclasses(run):
        above, of = coarse
        group, said = (np.array([of.get(int(label), -1) for label in many]) for many in (labels, logits.argmax(axis=1)))
        shown = [(number, name) for number, name in enumerate(above) if number in group]
        exact, near = ({name: ok[group == i].mean() for i, name in shown} for ok in (right, group == said))
        counts = {name: int((group == i).sum()) for i, name in shown}
        caption = f"The same by the data set's own {len(above)} superclasses; pale: at least the superclass is right."
        yield Drawing("superclasses", "Accuracy per superclass", figures.per_class(exact, near, counts), caption)


def _statistics(run: Run) -> tuple[Any, Any]:
    """Channel means and deviations that the run scales images with, of values in [0, 1]."""
    return (run.task.mean, run.task.std) if run.config.data.normalization == "dataset" else GOOGLE_NORMALIZATION


def _visible(images: Any, run: Run) -> np.ndarray:
    """What a model gets, [N, h, w, 3], as images in [0, 1]."""
    mean, deviation = (np.reshape(s, (1, 1, 1, 3)) for s in _statistics(run))
    return np.clip(np.asarray(images) * deviation + mean, 0, 1)


def _wanted(model: VisionTransformer, look: Look) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for kind, chosen, most in (("layer", look.layers, model.num_layers), ("head", look.heads, model.num_heads)):
        if wrong := [number for number in chosen if not 1 <= number <= most]:
            raise ReportError(f"there is no {kind} {wrong[0]}: the model has {most}, counted from 1")
    return look.layers or (model.num_layers,), look.heads or tuple(range(1, model.num_heads + 1))


def _chosen(run: Run, images: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """The images of these numbers, as `_examples`."""
    if wrong := [number for number in images if number >= len(run.test)]:
        raise ReportError(f"there is no image {wrong[0]}: {run.splits[1]} has {len(run.test)}, counted from 0")
    return *run.test.take(np.array(images)), np.array(images), "The images were chosen by number."


def _examples(run: Run, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """An image of each of `count` classes that lie evenly in their order.

    It is the correctly classified image with the highest confidence, or else the first one; before there are predictions, the
    first one.

    Returns:
      (images uint8, labels, their indices in the test split, which images those are in words).
    """
    source = run.test
    try:
        logits, labels = run.predictions
        if len(labels) != len(source):
            raise Missing("")
        which = (
            "For each class, the correctly classified image with the highest confidence, or the first one if none is correct."
        )
        rank = figures.softmax(logits)
        rank = np.where(logits.argmax(axis=1) == labels, rank.max(axis=1), 0)
    except Missing:
        _, labels = source.take(np.arange(min(len(source), 2000)))
        which, rank = "The first image of each class.", np.zeros(len(labels))
    order = np.argsort(-rank, kind="stable")
    present, first = np.unique(labels[order], return_index=True)
    chosen = np.unique(np.linspace(0, len(present) - 1, min(count, len(present))).round().astype(int))
    index = order[first[chosen]]
    return *source.take(index), index, which
