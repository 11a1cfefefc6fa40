"""The sections of a run's page: from a run to figures with captions.

There is one generator for each section. If it raises Missing, DataError or CheckpointError, the figures that it has yielded
stay on the page, and the message is shown in place of the others.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vit_jax.config_rules import mixing_fields
from vit_jax.data import batches
from vit_jax.errors import ReportError, printable
from vit_jax.models.intermediates import attention_maps, attention_rollout
from vit_jax.models.vit import GOOGLE_NORMALIZATION, VisionTransformer
from vit_jax.reports import attention, curves, figures
from vit_jax.reports.analysis import softmax
from vit_jax.reports.runs import BEFORE, Missing, Run
from vit_jax.transforms.keys import AUGMENT, example_keys, stream
from vit_jax.transforms.preprocess import for_evaluation, for_training

_GRID = 12  # images in a grid
_MATRIX = 100  # the confusion matrix is drawn for up to this many classes

_maps = jax.jit(attention_maps, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class CaptionedFigure:
    """A figure with its text.

    Attributes:
      name: of its file, without suffix.
      title: above it.
      figure: the figure.
      caption: below it, plain text.
      wide: whether it takes the whole width of the page.
    """

    name: str
    title: str
    figure: Figure
    caption: str
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Which images, layers and heads the attention figures show.

    Attributes:
      num_images: number of classes of which an image is shown, if `images` is empty.
      layers: layers shown separately, counted from 1.
      heads: heads shown separately, counted from 1.
      images: numbers of test images, counted from 0.
    """

    num_images: int = 6
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    images: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Examples:
    """Test images uint8 [N, H, W, 3], labels [N], sizes as of `Source.read`, numbers in the split [N], how they were chosen."""

    images: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray | None
    index: np.ndarray
    choice: str


def learning_figures(run: Run) -> Iterator[CaptionedFigure]:
    """Yields the learning curves."""
    if not run.metrics:
        raise Missing("There are no metrics yet: the run writes one line per step.")
    caption = (
        f"Steps 1 to {run.step} of {run.config.training.steps}. Pale: the training loss of each step; the line over it is its "
        f"running mean. Each evaluation uses all images of {run.chosen_name}."
    )
    figure = curves.learning_curves({run.name: run.metrics}, run.accuracy_label, run.chosen_metric.split("/")[0])
    yield CaptionedFigure("curves", "Learning curves", figure, caption)


def training_figures(run: Run) -> Iterator[CaptionedFigure]:
    """Yields the first images of the first batch, as stored and as the run's own transforms give them to the model."""
    config, source = run.config, run.train
    index = batches.train_batch(len(source), config.training.batch_size, config.seed, 0)[:_GRID]
    originals, labels, sizes = source.read(index)
    keys = example_keys(stream(config.seed, AUGMENT), 0, jnp.arange(len(index), dtype=jnp.int32))
    transform = jax.jit(for_training(config.augment, config.data.image_size, _statistics(run), source.num_classes))
    images, _ = transform(keys, originals, labels, None if sizes is None else jnp.asarray(sizes))
    names = [printable(source.class_names[label]) for label in labels]
    caption = (
        "The first images of the first batch. In each pair, the left image is as stored; the right image is exactly what the "
        "model gets: cropped, resized and augmented. For display, the scaling of its values is undone."
    )
    if mixing := mixing_fields(config.augment):
        caption += f" {mixing} mixes each image with its neighbour in the batch; the name is that of the image itself."
    figure = figures.training_images(originals, _displayable(images, run), names)
    yield CaptionedFigure("training_images", "Training images", figure, caption)


def weight_figures(run: Run) -> Iterator[CaptionedFigure]:
    """Yields embedding filters and position embeddings, of the trained model and of the model that it started from."""
    models, remarks = run.models
    model = next(iter(models.values()))[0]
    part = ("embedding", "filters of the patch embedding") if model.resnet is None else ("conv_root", "filters of the root")
    kernels = {name: np.asarray(params[part[0]]["kernel"]) for name, (_, params) in models.items()}
    caption = f"The first principal components of the {part[1]}, each scaled to the full range of colours.{remarks}"
    yield CaptionedFigure("filters", "Embedding filters", figures.filters(kernels), caption)

    side, first = run.config.data.image_size // model.stride, int(model.classifier == "token")
    embeddings = {name: params["Transformer"]["posembed_input"]["pos_embedding"] for name, (_, params) in models.items()}
    figure = figures.positions({name: np.asarray(rows)[0, first:] for name, rows in embeddings.items()}, (side, side))
    resized = " Those from before training are resized to this grid if their file has another grid." if BEFORE in models else ""
    caption = (
        f"Cosine similarity of the position embeddings: one tile for each of the {side}×{side} patches, which compares it with "
        f"all patches.{resized}{remarks}"
    )
    yield CaptionedFigure("positions", "Position embeddings", figure, caption)


def attention_figures(run: Run, options: AttentionOptions) -> Iterator[CaptionedFigure]:
    """Yields the attention of the model on a few test images: rollout, distances, and single layers and heads if asked for.

    Raises:
      ReportError: if the model does not have a layer or a head, or the split does not have an image.
    """
    models, remarks = run.models
    model = next(iter(models.values()))[0]
    layers, heads = _layers_and_heads(model, options)
    examples = _numbered(run, options.images) if options.images else _examples(run, options.num_images)
    transform = for_evaluation(run.config.data.image_size, _statistics(run), run.config.augment.eval_crop)
    images = jax.jit(transform)(examples.images, examples.sizes)
    shown, class_names = _displayable(images, run), run.test.class_names
    names = [f"{printable(class_names[x])}, image {i}" for x, i in zip(examples.labels, examples.index, strict=True)]
    grid = (images.shape[1] // model.stride, images.shape[2] // model.stride)
    masks: dict[str, list[np.ndarray]] = {}
    distances: dict[str, list[np.ndarray]] = {}
    single: list[dict[str, np.ndarray]] = []
    for name, (_, params) in models.items():
        for image in images:  # one at a time, because the maps of all images would fill the memory with a large model
            maps = np.asarray(_maps(model, params, image[None]))
            distances.setdefault(name, []).append(attention.distances(maps, model.stride, grid))
            if model.classifier == "token":
                masks.setdefault(name, []).append(attention_rollout(maps, grid)[0])
                if name != BEFORE and (options.layers or options.heads):
                    row = maps[:, 0, :, 0, 1:].reshape(*maps.shape[:1], -1, *grid)
                    single.append({f"layer {i}, head {j}": row[i - 1, j - 1] for i in layers for j in heads})
    if masks:
        figure = figures.rollout(shown, {name: np.stack(found) for name, found in masks.items()}, names)
        caption = (
            "The colours show how much of each patch reaches the class token through all layers (attention rollout), from the "
            f"least to the most in that image. {examples.choice} Images are numbered from 0 in the order of "
            f"{run.test_name}.{remarks}"
        )
        yield CaptionedFigure("rollout", "Where the model looks", figure, caption)
    figure = figures.attention_distance({name: np.mean(found, axis=0) for name, found in distances.items()})
    caption = (
        f"Mean distance between a patch and the patches it attends to, over {len(shown)} images of "
        f"{run.config.data.image_size} pixels. One dot per head, line: mean.{remarks}"
    )
    yield CaptionedFigure("attention_distance", "How far the heads attend", figure, caption)
    if not masks:
        raise Missing("The model averages its patches and has no class token, so there is no attention rollout.")
    for number, maps_of in enumerate(single):
        caption = (
            f"{names[number]} of {run.test_name}. The colours show the class token's attention in single layers and heads, "
            "from the least to the most in each."
        )
        figure = figures.heads(shown[number], maps_of)
        yield CaptionedFigure(f"heads_{number + 1}", f"Layers and heads: {names[number]}", figure, caption)


def prediction_figures(run: Run) -> Iterator[CaptionedFigure]:
    """Yields what predictions.npz shows: accuracy per class, confusions, calibration, mistakes and superclasses."""
    logits, labels = run.predictions
    names = run.class_names
    if len(names) != logits.shape[1]:
        raise Missing(f"predictions.npz has {logits.shape[1]} classes, but {run.config.data.task} has {len(names)}.")
    correct, total = logits.argmax(axis=1) == labels, np.bincount(labels, minlength=len(names))
    accuracy = {name: correct[labels == label].mean() for label, name in enumerate(names) if total[label]}
    counts = {name: int(total[label]) for label, name in enumerate(names) if total[label]}
    fewest, most = min(counts.values()), max(counts.values())
    caption = (
        f"Accuracy of each true class, the highest first, on the {len(labels):,} images of {run.test_name}. Thin lines: 95 % "
        f"intervals (Wilson), from {fewest if fewest == most else f'{fewest} to {most}'} images per class."
    )
    yield CaptionedFigure("classes", "Accuracy per class", figures.per_class(accuracy, None, counts), caption)
    darker = "A darker cell has a larger share of its row."
    if len(names) <= _MATRIX:
        figure, caption = figures.confusion_matrix(logits, labels, names), f"Images by true class and predicted class. {darker}"
        yield CaptionedFigure("confusion", "Confusion matrix", figure, caption, wide=len(names) > 20)
    if len(names) > 20:
        figure = figures.confusion(logits, labels, names)
        caption = f"Numbers of images of the classes with the lowest accuracy, by predicted class. {darker}"
        yield CaptionedFigure("worst_classes", "Classes with the lowest accuracy", figure, caption)
    caption = (
        "Accuracy of images with similar confidence, in 15 bins, and the number of images in each bin. A bar below the line "
        "means that the model is overconfident. The expected calibration error is the mean distance between bar and line, "
        "weighted by the number of images."
    )
    yield CaptionedFigure("reliability", "Reliability", figures.reliability(logits, labels), caption)
    yield from _mistakes(run, logits, labels, names)
    yield from _superclass_accuracy(run, logits, labels)


def _mistakes(run: Run, logits: np.ndarray, labels: np.ndarray, names: Any) -> Iterator[CaptionedFigure]:
    if len(run.test) != len(labels):
        raise Missing(f"predictions.npz has {len(labels)} images, but the test split on this machine has {len(run.test)}.")
    predicted = logits.argmax(axis=1)
    confidence = np.where(predicted == labels, -1, softmax(logits).max(axis=1))
    worst = np.argsort(-confidence, kind="stable")[: min(_GRID, int((predicted != labels).sum()))]
    if not len(worst):
        return
    images, found = run.test.take(worst)
    if (found != labels[worst]).any():
        raise Missing("The test split on this machine is not the one that the run was tested on: the labels differ.")
    text = [f"{names[labels[i]]}\n→ {100 * confidence[i]:.0f} % {names[predicted[i]]}" for i in worst]
    caption = (
        "The wrong predictions with the highest confidence: the true class, then the predicted class with its probability."
    )
    yield CaptionedFigure("mistakes", "Most confident mistakes", figures.mistakes(images, text), caption)


def _superclass_accuracy(run: Run, logits: np.ndarray, labels: np.ndarray) -> Iterator[CaptionedFigure]:
    if not (found := run.superclasses()):
        return
    names, superclass_of = found
    true, predicted = (
        np.array([superclass_of.get(int(label), -1) for label in many]) for many in (labels, logits.argmax(axis=1))
    )
    shown = [(number, name) for number, name in enumerate(names) if number in true]
    correct = logits.argmax(axis=1) == labels
    exact, near = ({name: ok[true == i].mean() for i, name in shown} for ok in (correct, true == predicted))
    counts = {name: int((true == i).sum()) for i, name in shown}
    caption = (
        f"The same for the {len(names)} superclasses of the data set. Pale: the predicted class is in the correct superclass."
    )
    yield CaptionedFigure("superclasses", "Accuracy per superclass", figures.per_class(exact, near, counts), caption)


def _statistics(run: Run) -> tuple[Any, Any]:
    """Returns the channel means and deviations that the run scales images with, of values in [0, 1]."""
    return (run.task.mean, run.task.std) if run.config.data.normalization == "dataset" else GOOGLE_NORMALIZATION


def _displayable(images: Any, run: Run) -> np.ndarray:
    """Returns a model's inputs [N, h, w, 3] as images in [0, 1]."""
    mean, deviation = (np.reshape(s, (1, 1, 1, 3)) for s in _statistics(run))
    return np.clip(np.asarray(images) * deviation + mean, 0, 1)


def _layers_and_heads(model: VisionTransformer, options: AttentionOptions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for kind, chosen, most in (("layer", options.layers, model.num_layers), ("head", options.heads, model.num_heads)):
        if wrong := [number for number in chosen if not 1 <= number <= most]:
            raise ReportError(f"{kind}s: there is no {kind} {wrong[0]}; the model has {kind}s 1 to {most}")
    return options.layers or (model.num_layers,), options.heads or tuple(range(1, model.num_heads + 1))


def _numbered(run: Run, images: tuple[int, ...]) -> _Examples:
    """Returns the images of these numbers."""
    if wrong := [number for number in images if not 0 <= number < len(run.test)]:
        raise ReportError(f"images: there is no image {wrong[0]}; {run.test_name} has images 0 to {len(run.test) - 1}")
    return _Examples(*run.test.read(np.array(images)), np.array(images), "The images were chosen by number.")


def _examples(run: Run, count: int) -> _Examples:
    """Returns one image of each of `count` classes, which are evenly spaced in the order of the classes.

    It is the correctly classified image with the highest confidence, or the first image if none is correct or there are no
    predictions yet.
    """
    source = run.test
    try:
        logits, labels = run.predictions
        if len(labels) != len(source):
            raise Missing("")
        choice = "For each class, the correctly classified image with the highest confidence, or the first if none is correct."
        rank = np.where(logits.argmax(axis=1) == labels, softmax(logits).max(axis=1), 0)
    except Missing:
        _, labels = source.take(np.arange(min(len(source), 2000)))
        choice, rank = "The first image of each class.", np.zeros(len(labels))
    order = np.argsort(-rank, kind="stable")
    present, first = np.unique(labels[order], return_index=True)
    chosen = np.unique(np.linspace(0, len(present) - 1, min(count, len(present))).round().astype(int))
    index = order[first[chosen]]
    return _Examples(*source.read(index), index, choice)
