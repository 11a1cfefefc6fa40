"""One function a figure: arrays in, a matplotlib Figure out. Nothing here reads a file or knows a run."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_jax.reports.analysis import calibration, confusion_counts, principal_components, similarity, wilson
from vit_jax.reports.canvas import (
    COLOURS,
    INK,
    NARROW,
    WIDTH,
    axes_row,
    image_grid,
    overlay,
    shorten,
    side_by_side,
    tile,
    with_style,
)
from vit_jax.reports.canvas import DPI as DPI


def training_images(originals: np.ndarray, inputs: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draws pairs of images: as stored, uint8 [N, H, W, 3], and as the model gets them, [N, h, w, 3] in [0, 1]."""
    return image_grid([(original / 255, image) for original, image in zip(originals, inputs, strict=True)], labels, 3)


@with_style
def filters(kernels: Mapping[str, np.ndarray], count: int = 28) -> Figure:
    """Draws the first principal components of filters, each scaled to [0, 1]: figure 7, left, of the ViT paper.

    Args:
      kernels: name → filters [h, w, 3, filters]. The signs of the components follow the first kernel's.
      count: number of components.
    """
    shown: dict[str, np.ndarray] = {}
    first = None
    for name, kernel in kernels.items():
        found = principal_components(kernel, count, first)
        first = found if first is None else first
        low, high = found.min(axis=(1, 2, 3), keepdims=True), found.max(axis=(1, 2, 3), keepdims=True)
        scaled = (found - low) / np.maximum(high - low, 1e-12)
        tiles = np.pad(scaled, ((0, -len(scaled) % 4), (0, 0), (0, 0), (0, 0)), constant_values=1)
        shown[name] = tile(tiles.reshape(-1, 4, *tiles.shape[1:]))
    return side_by_side(shown)


@with_style
def positions(embeddings: Mapping[str, np.ndarray], grid: tuple[int, int]) -> Figure:
    """Draws the cosine similarity of position embeddings, a tile for each patch: figure 7, centre, of the ViT paper.

    Args:
      embeddings: name → embeddings [h · w, D].
      grid: (h, w).
    """
    shown = {name: tile(similarity(rows, grid), np.nan) for name, rows in embeddings.items()}
    return side_by_side(shown, cmap="viridis", vmin=-1, vmax=1)


@with_style
def attention_distance(distances: Mapping[str, np.ndarray]) -> Figure:
    """Draws mean attention distances, one dot per head, and their mean: figure 7, right, of the ViT paper.

    Args:
      distances: name → distances [layers, heads] in pixels.
    """
    figure = Figure((WIDTH, 2.6), layout="constrained")
    for axis, (name, heads) in zip(axes_row(figure, len(distances), sharey=True), distances.items(), strict=True):
        layers = np.repeat(np.arange(1, len(heads) + 1), heads.shape[1])
        axis.scatter(layers, heads.ravel(), s=18, color=COLOURS[0], alpha=0.6, linewidths=0)
        axis.plot(np.arange(1, len(heads) + 1), heads.mean(axis=1), color=COLOURS[1], linewidth=1.2)
        axis.set(title=name, xlabel="layer", ylim=(0, 1.08 * max(float(each.max()) for each in distances.values())))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("distance, pixels")
    return figure


def rollout(images: Sequence[np.ndarray] | np.ndarray, masks: Mapping[str, np.ndarray], labels: Sequence[str]) -> Figure:
    """Draws images and, next to each, the image with attention rollout in colours over it.

    Args:
      images: N images [h, w, 3] in [0, 1].
      masks: name → masks [N, gh, gw]. The colours of a mask range from its own smallest to its own largest value.
      labels: the text above each image.
    """
    groups = [(image, *(overlay(image, of[index]) for of in masks.values())) for index, image in enumerate(images)]
    return image_grid(groups, labels, 1 if len(groups) == 1 else 2, headings=("image", *masks), scale=True)


def heads(image: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """Draws one image [h, w, 3] in [0, 1], and the image with each map in colours over it.

    Args:
      image: the image.
      maps: name → the class token's attention [gh, gw].
    """
    shown = [overlay(image, found) for found in maps.values()]
    return image_grid([(one,) for one in (image, *shown)], ("image", *maps), 4, scale=True)


@with_style
def confusion(logits: np.ndarray, labels: np.ndarray, names: Sequence[str], worst: int = 10) -> Figure:
    """Draws what images of the `worst` classes were predicted as.

    Columns are those classes, the class that each is most often mistaken for, and all others.
    """
    classes = len(names)
    counts, share = confusion_counts(logits, labels, classes)
    present = np.flatnonzero(counts.sum(axis=1))
    rows = present[np.argsort(np.diag(share)[present], kind="stable")][:worst]
    wrong = np.where(np.eye(classes, dtype=bool), -1, counts)[rows].argmax(axis=1)
    columns = list(dict.fromkeys([*rows, *wrong]))
    table, shares = counts[np.ix_(rows, columns)], share[np.ix_(rows, columns)]
    heading = [names[c] for c in columns]
    if len(columns) < classes:
        table = np.hstack([table, counts[rows].sum(axis=1, keepdims=True) - table.sum(axis=1, keepdims=True)])
        shares, heading = np.hstack([shares, 1 - shares.sum(axis=1, keepdims=True)]), [*heading, "all others"]
    figure = Figure((NARROW, 1.5 + 0.22 * len(rows)), layout="constrained")
    _matrix(figure, table, shares, [names[c] for c in rows], heading, 7.5)
    return figure


@with_style
def confusion_matrix(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws all classes by all classes: with numbers of images for up to 20 classes; colours only, and wider, for more."""
    counts, shares = confusion_counts(logits, labels, len(names))
    wide = len(names) > 20
    side = 2 * WIDTH if wide else NARROW
    figure = Figure((side, side), layout="constrained")
    size = 7.5 if not wide else min(7.5, 0.8 * 72 * (side - 1.3) / len(names))
    _matrix(figure, np.zeros_like(counts) if wide else counts, shares, names, names, size)
    return figure


def _matrix(
    figure: Figure, table: np.ndarray, shares: np.ndarray, rows: Sequence[str], columns: Sequence[str], size: float
) -> None:
    """Draws the shares as colours, the counts above 0 as numbers, and the names at a size in points."""
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    number_size = min(7, 90 / len(columns))
    for (y, x), count in np.ndenumerate(table):
        if count:
            colour = "w" if shares[y, x] > 0.5 else INK
            axis.text(x, y, str(count), ha="center", va="center", fontsize=number_size, color=colour)
    axis.set_xticks(range(len(columns)), [shorten(name, 1.0, size) for name in columns], rotation=90, fontsize=size)
    axis.set_yticks(range(len(rows)), [shorten(name, 1.0, size) for name in rows], fontsize=size)
    axis.set(xlabel="predicted", ylabel="true")
    axis.grid(False)


def mistakes(images: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draws images uint8 [N, H, W, 3] with labels of two lines."""
    return image_grid([(image / 255,) for image in images], labels, 4)


@with_style
def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> Figure:
    """Draws accuracy by confidence, the number of images in each bin, and the expected calibration error."""
    mean, accuracy, count, error = calibration(logits, labels, bins)
    figure = Figure((WIDTH, 3.8), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    centre = 100 * (np.arange(bins) + 0.5) / bins
    filled = count > 0
    above.bar(centre[filled], 100 * accuracy[filled], 92 / bins, color=COLOURS[0], label="accuracy")
    above.plot(100 * mean[filled], 100 * mean[filled], "o-", color=COLOURS[1], markersize=4, label="confidence")
    above.set(title=f"accuracy, %; expected calibration error {100 * error:.2f} %", xlim=(0, 100), ylim=(0, 100))
    above.legend(loc="upper left", fontsize=8)
    below.bar(centre, count, 92 / bins, color=COLOURS[5])
    below.set(title="images", xlabel="confidence, %")
    return figure


@with_style
def per_class(
    accuracies: Mapping[str, float], at_least: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None
) -> Figure:
    """Draws accuracies as bars, the highest first, in up to three columns so that the names can be read.

    Args:
      accuracies: class name → accuracy in [0, 1].
      at_least: accuracies in a wider sense, drawn pale behind the others.
      counts: numbers of images, from which the 95 % interval of each accuracy is drawn as a thin line.
    """
    ordered = sorted(accuracies.items(), key=lambda item: -item[1])
    columns = 1 if len(ordered) <= 40 else 2 if len(ordered) <= 100 else 3
    rows = math.ceil(len(ordered) / columns)
    named = rows <= 80  # more names and intervals than this do not fit on a page
    figure = Figure((NARROW if columns < 3 else WIDTH, 0.6 + min(0.155 * max(rows, 4), 12)), layout="constrained")
    for column, axis in enumerate(axes_row(figure, columns)):
        part = ordered[column * rows : (column + 1) * rows]
        for of, colour in ((at_least or {}, COLOURS[5]), (accuracies, COLOURS[0])):
            axis.barh(range(len(part)), [100 * of.get(name, 0) for name, _ in part], 0.72, color=colour)
        if counts and named:
            ends = wilson([value for _, value in part], [counts[name] for name, _ in part])
            axis.hlines(range(len(part)), 100 * ends[0], 100 * ends[1], color=INK, linewidth=0.8)
        size = 8 if columns == 1 else 7
        names = [shorten(name, 1.4 if columns == 1 else 0.8, size) for name, _ in part]
        axis.set_yticks(range(len(part)) if named else (), names if named else (), fontsize=size)
        axis.set(xlim=(0, 100), ylim=(rows - 0.4, -0.6), xlabel="accuracy, %")
        axis.grid(axis="y", visible=False)
    return figure
