"""A function a figure: arrays in, a matplotlib Figure out. Nothing here reads a file or knows a run."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from vit_jax.reports.canvas import (
    COLOURS,
    DASHES,
    INK,
    LINE,
    NARROW,
    WIDTH,
    image_grid,
    mosaic,
    overlaid,
    panels,
    row,
    short,
    styled,
)
from vit_jax.reports.canvas import DPI as DPI

_THIN: Any = {"linewidth": 0.8, "alpha": 0.6}  # training losses of several runs


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 [N, classes] of logits [N, classes]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def principal_components(kernel: np.ndarray, count: int, like: np.ndarray | None = None) -> np.ndarray:
    """The first principal components of filters [h, w, C, filters]: float [count, h, w, C] of unit length.

    A component's sign means nothing: it is such that the largest entry is positive or, with `like`, the components of another
    kernel, that the two look alike.
    """
    filters = kernel.reshape(-1, kernel.shape[-1]).T.astype(np.float64)
    count = min(count, *filters.shape)
    found = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)[2][:count]
    towards = (np.abs(found) == np.abs(found).max(axis=1, keepdims=True)).astype(np.float64)
    if like is not None and len(like) == count and like[0].size == found.shape[1]:
        towards = like.reshape(count, -1)
    found = found * np.where((found * towards).sum(axis=1, keepdims=True) < 0, -1, 1)
    return found.reshape(count, *kernel.shape[:3])


def similarity(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Cosine similarity of every patch's position embedding with all: [h, w, h, w] in [-1, 1] of embeddings [h · w, D]."""
    unit = positions / np.maximum(np.linalg.norm(positions, axis=1, keepdims=True), 1e-12)
    return (unit @ unit.T).reshape(*grid, *grid)


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Guo et al., "On Calibration of Modern Neural Networks" (2017), equation 3: bins of equal width by the confidence.

    Returns (mean confidence [bins], accuracy [bins], images [bins], expected calibration error); NaN where a bin is empty.
    """
    probabilities = softmax(logits)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        accuracy = np.bincount(place, right, bins) / count
    return mean, accuracy, count, float(np.nansum(count * np.abs(mean - accuracy)) / len(labels))


def wilson(accuracy: ArrayLike, count: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval, (lower, upper) in [0, 1], of accuracies in [0, 1] that were measured on `count` images each."""
    share, count, z = np.asarray(accuracy, np.float64), np.asarray(count, np.float64), 1.959964
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return np.clip(centre - half, 0, share), np.clip(centre + half, share, 1)  # exactly 0 and 1 where those were measured


@styled
def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], measured: str = "test accuracy") -> Figure:
    """Loss, accuracy, learning rate and gradient norm by step, of one run or of several over each other.

    Of one run the training loss of each step is pale, with its running mean over a twentieth of the run. Of several runs each
    has its own colour and, from the eighth on, its own dashes; their training losses are thin.

    Args:
      runs: name -> the lines of metrics.jsonl. The gradient norm is left out if no line has it.
      measured: what the accuracy is called.
    """
    alone = len(runs) == 1
    labels = ["\n".join(textwrap.wrap(name, 58)) for name in runs]
    norms = any("train/gradient_norm" in line for lines in runs.values() for line in lines)
    below = LINE * (not alone) * sum(label.count("\n") + 1 for label in labels)
    figure = Figure((WIDTH, 5 + norms + below), layout="constrained")
    loss, accuracy, rate, *norm = figure.subplots(3 + norms, sharex=True, height_ratios=(3, 3, 1.6, 1.6)[: 3 + norms])
    for at, (label, lines) in enumerate(zip(labels, runs.values(), strict=True)):
        colour, dashes = COLOURS[at % len(COLOURS)], DASHES[at // len(COLOURS) % len(DASHES)]
        style: Any = {"color": colour, "linestyle": dashes, "linewidth": 1.3}
        test = style | {"color": COLOURS[1]} if alone else style | {"linewidth": 1.6}
        x, y = _series(lines, "train/loss")
        if alone:
            loss.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        if window := max(1, len(y) // 20) if len(y) else 0:
            y = np.convolve(y, np.ones(window) / window, "valid")
            x = x[window // 2 :][: len(y)]
        loss.plot(x, y, **(style if alone else style | _THIN), label="training, running mean")
        mark: Any = {"marker": "o", "markersize": 3} if len(_series(lines, "test/accuracy")[0]) < 60 else {}
        loss.plot(*_series(lines, "test/loss"), **test, **mark, label="evaluation")
        x, y = _series(lines, "test/accuracy")
        accuracy.plot(x, 100 * y, **test, **mark, label="top-1")
        if alone:
            x, y = _series(lines, "test/accuracy_top5")
            accuracy.plot(x, 100 * y, **test | {"linestyle": ":"}, **mark, label="top-5")
        rate.plot(*_series(lines, "train/learning_rate"), **style, label=label)
        for axis in norm:
            axis.plot(*_series(lines, "train/gradient_norm"), **style | {"linewidth": 0.9})
    for axis, title in [(loss, "loss"), *((axis, "gradient norm") for axis in norm)]:
        axis.set_title(title + _scale(axis, len(runs)))
    accuracy.set_title(f"{measured}, %")
    rate.set(title="learning rate", ylim=(0, None))
    figure.axes[-1].set_xlabel("step")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    if alone:
        loss.legend(handles=loss.get_lines()[-2:])
        accuracy.legend()
    else:
        grey: Any = [("training, running mean", _THIN), ("evaluation", {"linewidth": 1.6})]
        loss.legend(handles=[Line2D([], [], color="#666666", label=label, **style) for label, style in grey])
        figure.legend(handles=rate.get_lines(), loc="outside lower left", handlelength=3)
    return figure


def _scale(axis: Axes, runs: int) -> str:
    """Keeps a run that diverged from flattening what else an axis shows; returns what its title has to say about that.

    A single run gets a logarithmic axis. Of several, each with as many lines, the axis ends above those of usual height.
    """
    lines = [np.asarray(line.get_ydata(), np.float64) for line in axis.get_lines()]
    each = len(lines) // max(runs, 1)
    values = [of for at in range(runs) if (of := np.concatenate(lines[at * each : (at + 1) * each])).size]
    if not values:
        return ""
    if runs == 1:
        if values[0].min() <= 0 or values[0].max() <= 20 * np.median(values[0]):
            return ""
        axis.set_yscale("log")
        return ", logarithmic"
    highest = sorted(float(of.max()) for of in values)
    usual = [value for value in highest if value <= 5 * highest[(len(highest) - 1) // 2]]
    if len(usual) in (0, len(highest)) or usual[-1] <= 0:
        return ""
    axis.set_ylim(min(0, *(float(of.min()) for of in values)), 1.1 * usual[-1])
    return f", shown up to {1.1 * usual[-1]:.3g}"


def training_images(originals: np.ndarray, seen: np.ndarray, labels: Sequence[str]) -> Figure:
    """Pairs of images: as stored, uint8 [N, H, W, 3], and as the model got them, [N, h, w, 3] in [0, 1]."""
    return image_grid([(original / 255, image) for original, image in zip(originals, seen, strict=True)], labels, 3)


@styled
def filters(kernels: Mapping[str, np.ndarray], count: int = 28) -> Figure:
    """The first principal components of filters [h, w, 3, filters], each scaled to [0, 1]: figure 7, left, of the ViT paper.

    `kernels` is name → filters; the components of those that follow take the first one's signs.
    """
    shown: dict[str, np.ndarray] = {}
    first = None
    for name, kernel in kernels.items():
        found = principal_components(kernel, count, first)
        first = found if first is None else first
        low, high = found.min(axis=(1, 2, 3), keepdims=True), found.max(axis=(1, 2, 3), keepdims=True)
        scaled = (found - low) / np.maximum(high - low, 1e-12)
        tiles = np.pad(scaled, ((0, -len(scaled) % 4), (0, 0), (0, 0), (0, 0)), constant_values=1)
        shown[name] = mosaic(tiles.reshape(-1, 4, *tiles.shape[1:]))
    return panels(shown)


@styled
def positions(embeddings: Mapping[str, np.ndarray], grid: tuple[int, int]) -> Figure:
    """Cosine similarity of position embeddings [h · w, D], a tile for each patch: figure 7, centre, of the ViT paper."""
    shown = {name: mosaic(similarity(rows, grid), np.nan) for name, rows in embeddings.items()}
    return panels(shown, cmap="viridis", vmin=-1, vmax=1)


@styled
def attention_distance(found: Mapping[str, np.ndarray]) -> Figure:
    """Mean attention distances [layers, heads] in pixels, a dot a head: figure 7, right, of the ViT paper."""
    figure = Figure((WIDTH, 2.6), layout="constrained")
    for axis, (name, heads) in zip(row(figure, len(found), sharey=True), found.items(), strict=True):
        layers = np.repeat(np.arange(1, len(heads) + 1), heads.shape[1])
        axis.scatter(layers, heads.ravel(), s=18, color=COLOURS[0], alpha=0.6, linewidths=0)
        axis.plot(np.arange(1, len(heads) + 1), heads.mean(axis=1), color=COLOURS[1], linewidth=1.2)
        axis.set(title=name, xlabel="layer", ylim=(0, 1.08 * max(float(each.max()) for each in found.values())))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("distance, pixels")
    return figure


def rollout(images: np.ndarray, masks: Mapping[str, np.ndarray], labels: Sequence[str]) -> Figure:
    """Images [N, h, w, 3] in [0, 1], and masks [N, gh, gw] laid over each in colours; `masks` is name → masks.

    A mask's colours go from its own smallest value to its own largest.
    """
    groups = [(image, *(overlaid(image, of[at]) for of in masks.values())) for at, image in enumerate(images)]
    return image_grid(groups, labels, 1 if len(groups) == 1 else 2, headings=("image", *masks), scale=True)


def heads(image: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """One image [h, w, 3] in [0, 1], and the class token's attention [gh, gw] laid over it; `maps` is name → map."""
    shown = [overlaid(image, found) for found in maps.values()]
    return image_grid([(one,) for one in (image, *shown)], ("image", *maps), 4, scale=True)


def _counts(logits: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each true class (row) was taken for each class: counts, and shares of the row."""
    counts = np.bincount(labels * classes + logits.argmax(axis=1), minlength=classes**2).reshape(classes, classes)
    return counts, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


@styled
def confusion(logits: np.ndarray, labels: np.ndarray, names: Sequence[str], worst: int = 10) -> Figure:
    """What the `worst` classes were taken for, in images: those classes, what each is most often mistaken for, all others."""
    classes = len(names)
    counts, share = _counts(logits, labels, classes)
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


@styled
def confusion_matrix(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """All classes by all classes: numbers of images for up to 20, colours alone for more; twice as wide for more than 20."""
    counts, shares = _counts(logits, labels, len(names))
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
    for (y, x), count in np.ndenumerate(table):
        if count:
            dark = shares[y, x] > 0.5
            axis.text(
                x, y, str(count), ha="center", va="center", fontsize=min(7, 90 / len(columns)), color="w" if dark else INK
            )
    axis.set_xticks(range(len(columns)), [short(name, 1.0, size) for name in columns], rotation=90, fontsize=size)
    axis.set_yticks(range(len(rows)), [short(name, 1.0, size) for name in rows], fontsize=size)
    axis.set(xlabel="predicted", ylabel="true")
    axis.grid(False)


def mistakes(images: np.ndarray, labels: Sequence[str]) -> Figure:
    """Images uint8 [N, H, W, 3] with labels of two lines."""
    return image_grid([(image / 255,) for image in images], labels, 4)


@styled
def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> Figure:
    """Accuracy by confidence, and how many images have it, with the expected calibration error; see `calibration`."""
    mean, accuracy, count, error = calibration(logits, labels, bins)
    figure = Figure((WIDTH, 3.8), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    place = 100 * (np.arange(bins) + 0.5) / bins
    filled = count > 0
    above.bar(place[filled], 100 * accuracy[filled], 92 / bins, color=COLOURS[0], label="accuracy")
    above.plot(100 * mean[filled], 100 * mean[filled], "o-", color=COLOURS[1], markersize=4, label="confidence")
    above.set(title=f"accuracy, %; expected calibration error {100 * error:.2f} %", xlim=(0, 100), ylim=(0, 100))
    above.legend(loc="upper left", fontsize=8)
    below.bar(place, count, 92 / bins, color=COLOURS[5])
    below.set(title="images", xlabel="confidence, %")
    return figure


@styled
def per_class(
    accuracies: Mapping[str, float], at_least: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None
) -> Figure:
    """Accuracies in [0, 1] as bars, the highest first; of many classes in as many columns as keep them readable.

    `at_least` are accuracies in a wider sense, which are drawn pale behind them. `counts` are numbers of images, from which
    each accuracy gets its 95 % interval as a thin line.
    """
    ordered = sorted(accuracies.items(), key=lambda item: -item[1])
    columns = 1 if len(ordered) <= 40 else 2 if len(ordered) <= 100 else 3
    rows = math.ceil(len(ordered) / columns)
    # Beyond some hundred classes only the bars are left, because a page has its limits.
    width = NARROW if columns < 3 else WIDTH
    figure = Figure((width, 0.6 + min(0.155 * max(rows, 4), 12)), layout="constrained")
    for at, axis in enumerate(row(figure, columns)):
        part = ordered[at * rows : (at + 1) * rows]
        for of, colour in ((at_least or {}, COLOURS[5]), (accuracies, COLOURS[0])):
            axis.barh(range(len(part)), [100 * of.get(name, 0) for name, _ in part], 0.72, color=colour)
        if counts and rows <= 80:
            ends = wilson([value for _, value in part], [counts[name] for name, _ in part])
            axis.hlines(range(len(part)), 100 * ends[0], 100 * ends[1], color=INK, linewidth=0.8)
        size = 8 if columns == 1 else 7
        names = [short(name, 1.4 if columns == 1 else 0.8, size) for name, _ in part]
        axis.set_yticks(range(len(part)) if rows <= 80 else (), names if rows <= 80 else (), fontsize=size)
        axis.set(xlim=(0, 100), ylim=(rows - 0.4, -0.6), xlabel="accuracy, %")
        axis.grid(axis="y", visible=False)
    return figure


def _series(lines: Iterable[Mapping[str, float]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    x, y = np.array(found, np.float64).reshape(-1, 2).T
    return x, y
