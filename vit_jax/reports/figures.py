"""A function a figure: arrays in, a matplotlib Figure out. Nothing here reads a file or knows a run.

Figures are five inches wide, so that their text can still be read on a phone, in colours that colour-blind people tell apart:
Okabe and Ito's, and viridis. Pictures are composed into one array, because axes are what costs time.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

DPI = 160  # of a saved figure
_WIDTH = 5.0  # inches
_PIXELS = int(_WIDTH * DPI)
_LINE = 0.17  # inches of height for a line of text
_GAP = 4  # pixels between pictures of a group; four times that between groups
# https://jfly.uni-koeln.de/color/, but for the yellow, which is lost on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _PALE = "#222222", "#e4e4e4"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _PALE,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a dollar sign
}
_styled = matplotlib.rc_context(_STYLE)  # as a decorator, it holds while a figure is made


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

    Returns (mean confidence [bins], accuracy [bins], pictures [bins], expected calibration error); NaN where a bin is empty.
    """
    probabilities = softmax(logits)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        accuracy = np.bincount(place, right, bins) / count
    return mean, accuracy, count, float(np.nansum(count * np.abs(mean - accuracy)) / len(labels))


@_styled
def curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss, accuracy and learning rate by step, of one run or of several over each other.

    `runs` is name → the lines of metrics.jsonl. A colour a run; the training loss is a running mean over a twentieth of it,
    dashed where there are several runs; of a single one each step's loss is there too, pale, and the accuracy among the first
    five.
    """
    alone = len(runs) == 1
    labels = ["\n".join(textwrap.wrap(name, 58)) for name in runs]
    figure = Figure((_WIDTH, 5 + _LINE * (not alone) * sum(label.count("\n") + 1 for label in labels)), layout="constrained")
    loss, accuracy, rate = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1.6))
    colours: Any = _COLOURS
    if len(runs) > len(_COLOURS):  # no two alike; the yellow end is lost on white
        # No scale, because runs have no order.
        many: Any = matplotlib.colormaps["tab20"]
        colours = itertools.cycle(_COLOURS if len(runs) <= len(_COLOURS) else many.colors)
    for training, label_of_run, lines in zip(colours, labels, runs.values(), strict=False):
        test = _COLOURS[1] if alone else training
        x, y = _series(lines, "train/loss")
        if alone:
            loss.plot(x, y, color=training, alpha=0.3, linewidth=0.8)
        if window := max(1, len(y) // 20) if len(y) else 0:
            y = np.convolve(y, np.ones(window) / window, "valid")
            x = x[window // 2 :][: len(y)]
        loss.plot(x, y, "-" if alone else "--", color=training, linewidth=1.3, label="training")
        mark = {"marker": "o", "markersize": 3} if len(_series(lines, "test/accuracy")[0]) < 60 else {}
        loss.plot(*_series(lines, "test/loss"), color=test, linewidth=1.3, label="test", **mark)
        for metric, style, label in (("accuracy", "-", "first"), ("accuracy_top5", ":", "among the first five"))[: 1 + alone]:
            x, y = _series(lines, f"test/{metric}")
            accuracy.plot(x, 100 * y, style, color=test, linewidth=1.3, label=label, **mark)
        rate.plot(*_series(lines, "train/learning_rate"), color=training, linewidth=1.3, label=label_of_run)
    loss.set_title("loss")
    if alone:
        loss.legend(handles=loss.get_lines()[-2:])
    else:
        shown: Any = [("--", "training"), ("-", "test")]
        loss.legend(handles=[Line2D([], [], color="#666666", linestyle=style, label=label) for style, label in shown])
        highest = [max(_series(lines, "test/loss")[1], default=0) for lines in runs.values()]
        most = [value for value in highest if value <= 3 * np.median(highest)]
        if 0 < len(most) < len(highest):  # a run that diverged does not flatten the others
            loss.set_ylim(0, 1.3 * max(most))
    accuracy.set_title("test accuracy, %")
    rate.set(title="learning rate", xlabel="step", ylim=(0, None))
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    if alone:
        accuracy.legend()
    else:
        figure.legend(handles=rate.get_lines(), loc="outside lower left")
    return figure


def training_pictures(originals: np.ndarray, seen: np.ndarray, labels: Sequence[str]) -> Figure:
    """Pairs of pictures: as stored, uint8 [N, H, W, 3], and as the model got them, [N, h, w, 3] in [0, 1]."""
    return _pictures([(original / 255, picture) for original, picture in zip(originals, seen, strict=True)], labels, 3)


@_styled
def filters(kernels: Mapping[str, np.ndarray], count: int = 28) -> Figure:
    """The first principal components of filters [h, w, 3, filters], each scaled to [0, 1]: figure 7, left, of the ViT paper.

    `kernels` is name → filters; the components of those that follow take the first one's signs.
    """
    panels: dict[str, np.ndarray] = {}
    first = None
    for name, kernel in kernels.items():
        found = principal_components(kernel, count, first)
        first = found if first is None else first
        low, high = found.min(axis=(1, 2, 3), keepdims=True), found.max(axis=(1, 2, 3), keepdims=True)
        scaled = (found - low) / np.maximum(high - low, 1e-12)
        tiles = np.pad(scaled, ((0, -len(scaled) % 4), (0, 0), (0, 0), (0, 0)), constant_values=1)
        panels[name] = _mosaic(tiles.reshape(-1, 4, *tiles.shape[1:]))
    return _panels(panels)


@_styled
def positions(embeddings: Mapping[str, np.ndarray], grid: tuple[int, int]) -> Figure:
    """Cosine similarity of position embeddings [h · w, D], a tile for each patch: figure 7, centre, of the ViT paper."""
    panels = {name: _mosaic(similarity(rows, grid), np.nan) for name, rows in embeddings.items()}
    return _panels(panels, cmap="viridis", vmin=-1, vmax=1)


@_styled
def attention_distance(found: Mapping[str, np.ndarray]) -> Figure:
    """Mean attention distances [layers, heads] in pixels, a dot a head: figure 7, right, of the ViT paper."""
    figure = Figure((_WIDTH, 2.6), layout="constrained")
    for axis, (name, heads) in zip(_row(figure, len(found), sharey=True), found.items(), strict=True):
        layers = np.repeat(np.arange(1, len(heads) + 1), heads.shape[1])
        axis.scatter(layers, heads.ravel(), s=18, color=_COLOURS[0], alpha=0.6, linewidths=0)
        axis.plot(np.arange(1, len(heads) + 1), heads.mean(axis=1), color=_COLOURS[1], linewidth=1.2)
        axis.set(title=name, xlabel="layer", ylim=(0, 1.08 * max(float(each.max()) for each in found.values())))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("distance, pixels")
    return figure


def rollout(pictures: np.ndarray, masks: Mapping[str, np.ndarray], labels: Sequence[str]) -> Figure:
    """Pictures [N, h, w, 3] in [0, 1], and masks [N, gh, gw] laid over each in colours; `masks` is name → masks.

    A mask's colours go from its own smallest value to its own largest.
    """
    groups = [(picture, *(_overlaid(picture, of[at]) for of in masks.values())) for at, picture in enumerate(pictures)]
    return _pictures(groups, labels, 1 if len(groups) == 1 else 2, headings=("picture", *masks), scale=True)


def heads(picture: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """One picture [h, w, 3] in [0, 1], and the class token's attention [gh, gw] laid over it; `maps` is name → map."""
    shown = [_overlaid(picture, found) for found in maps.values()]
    return _pictures([(one,) for one in (picture, *shown)], ("picture", *maps), 4, scale=True)


@_styled
def confusion(logits: np.ndarray, labels: np.ndarray, names: Sequence[str], worst: int = 10) -> Figure:
    """What the `worst` classes were taken for, in pictures: those classes, what each is most often mistaken for, all others."""
    classes, said = len(names), logits.argmax(axis=1)
    counts = np.bincount(labels * classes + said, minlength=classes**2).reshape(classes, classes)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    present = np.flatnonzero(counts.sum(axis=1))
    rows = present[np.argsort(np.diag(share)[present], kind="stable")][:worst]
    wrong = np.where(np.eye(classes, dtype=bool), -1, counts)[rows].argmax(axis=1)
    columns = list(dict.fromkeys([*rows, *wrong]))
    table, shares = counts[np.ix_(rows, columns)], share[np.ix_(rows, columns)]
    heading = [names[c] for c in columns]
    if len(columns) < classes:
        table = np.hstack([table, counts[rows].sum(axis=1, keepdims=True) - table.sum(axis=1, keepdims=True)])
        shares, heading = np.hstack([shares, 1 - shares.sum(axis=1, keepdims=True)]), [*heading, "all others"]
    figure = Figure((_WIDTH, 1.5 + 0.24 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), count in np.ndenumerate(table):
        if count:
            axis.text(x, y, str(count), ha="center", va="center", fontsize=7, color="white" if shares[y, x] > 0.5 else _INK)
    axis.set_xticks(range(len(heading)), [_short(name, 1.1) for name in heading], rotation=90, fontsize=8)
    axis.set_yticks(range(len(rows)), [_short(names[c], 1.2) for c in rows], fontsize=8)
    axis.set(xlabel="said", ylabel="is")
    axis.grid(False)
    return figure


def mistakes(pictures: np.ndarray, labels: Sequence[str]) -> Figure:
    """Pictures uint8 [N, H, W, 3] with labels of two lines."""
    return _pictures([(picture / 255,) for picture in pictures], labels, 4)


@_styled
def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> Figure:
    """Accuracy by confidence, and how many pictures have it, with the expected calibration error; see `calibration`."""
    mean, accuracy, count, error = calibration(logits, labels, bins)
    figure = Figure((_WIDTH, 3.8), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    place = 100 * (np.arange(bins) + 0.5) / bins
    filled = count > 0
    above.bar(place[filled], 100 * accuracy[filled], 92 / bins, color=_COLOURS[0], label="accuracy")
    above.plot(100 * mean[filled], 100 * mean[filled], "o-", color=_COLOURS[1], markersize=4, label="confidence")
    above.set(title=f"accuracy, %; expected calibration error {100 * error:.2f} %", xlim=(0, 100), ylim=(0, 100))
    above.legend(loc="upper left", fontsize=8)
    below.bar(place, count, 92 / bins, color=_COLOURS[5])
    below.set(title="pictures", xlabel="confidence, %")
    return figure


@_styled
def per_class(accuracies: Mapping[str, float], at_least: Mapping[str, float] | None = None) -> Figure:
    """Accuracies in [0, 1] as bars, the highest first; of many classes in as many columns as keep them readable.

    `at_least` are accuracies in a wider sense, which are drawn pale behind them.
    """
    ordered = sorted(accuracies.items(), key=lambda item: -item[1])
    columns = 1 if len(ordered) <= 40 else min(3, math.ceil(len(ordered) / 50))
    rows = math.ceil(len(ordered) / columns)
    # Beyond some hundred classes the bars alone are left, for a page has its limits.
    figure = Figure((_WIDTH, 0.6 + min(0.155 * max(rows, 4), 12)), layout="constrained")
    for at, axis in enumerate(_row(figure, columns)):
        part = ordered[at * rows : (at + 1) * rows]
        for of, colour in ((at_least or {}, _COLOURS[5]), (accuracies, _COLOURS[0])):
            axis.barh(range(len(part)), [100 * of.get(name, 0) for name, _ in part], 0.72, color=colour)
        names = [_short(name, 0.95 if columns > 1 else 1.9) for name, _ in part]
        axis.set_yticks(range(len(part)) if rows <= 80 else (), names if rows <= 80 else (), fontsize=7.5)
        axis.set(xlim=(0, 100), ylim=(rows - 0.4, -0.6), xlabel="accuracy, %")
        axis.grid(axis="y", visible=False)
    return figure


def _series(lines: Iterable[Mapping[str, float]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    x, y = np.array(found, np.float64).reshape(-1, 2).T
    return x, y


def _row(figure: Figure, count: int, **options: Any) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, **options)[0])


def _short(text: str, inches: float, size: float = 8) -> str:
    """The text, cut to about so many inches at a size in points."""
    most = int(inches * 72 / (0.58 * size))
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def _mosaic(tiles: np.ndarray, gap: float = 1.0) -> np.ndarray:
    """Tiles [rows, columns, h, w] or [rows, columns, h, w, 3] in one array, a pixel of `gap` between them."""
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, 1), (0, 1), *((0, 0),) * (tiles.ndim - 4)), constant_values=gap)
    rows, columns, height, width = padded.shape[:4]
    return np.swapaxes(padded, 1, 2).reshape(rows * height, columns * width, *tiles.shape[4:])[:-1, :-1]


def _panels(images: Mapping[str, np.ndarray], **options: Any) -> Figure:
    """Images side by side, a title above each, and below them one scale of colours where `options` name a colour map."""
    rows, columns = next(iter(images.values())).shape[:2]
    gap, count = 0.12, max(2, len(images))
    width = (_WIDTH - gap * (count - 1)) / count
    bottom, tall = 0.4 * bool(options), width * rows / columns
    figure = Figure((_WIDTH, bottom + tall + 0.25))
    full = figure.get_figheight()
    for at, (name, image) in enumerate(images.items()):
        left = at * (width + gap) / _WIDTH
        axis = figure.add_axes((left, bottom / full, width / _WIDTH, tall / full))
        shown = axis.imshow(image, interpolation="nearest", aspect="auto", **options)
        axis.set_title(name)
        axis.set_axis_off()
    if options:
        across = (len(images) * (width + gap) - gap) / _WIDTH
        scale = figure.add_axes((0.03, 0.25 / full, across - 0.06, 0.1 / full))
        figure.colorbar(shown, cax=scale, orientation="horizontal", ticks=[options["vmin"], 0, options["vmax"]])
    return figure


def _overlaid(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture in grey, blended evenly with the mask's colours: darkening instead would hide what is dark already."""
    height, width = picture.shape[:2]
    share = (mask - mask.min()) / max(float(mask.max() - mask.min()), 1e-12)
    smooth = Image.fromarray(share.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    grey = picture @ np.array((0.299, 0.587, 0.114))
    return 0.5 * grey[..., None] + 0.5 * matplotlib.colormaps["viridis"](np.asarray(smooth))[..., :3]


def _fit(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture in [0, 1] as uint8 in a white square, enlarged without smoothing: pixels are what a model gets."""
    scale = size / max(picture.shape[:2])
    height, width = (max(1, round(length * scale)) for length in picture.shape[:2])
    image = Image.fromarray(np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8))
    image = image.resize((width, height), Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)
    square = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    return square


@_styled
def _pictures(
    groups: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    columns: int,
    headings: Sequence[str] = (),
    scale: bool = False,
) -> Figure:
    """Groups of pictures [h, w, 3] in [0, 1], a label above each; `headings` name a group's pictures, above the first row.

    `scale` puts the colours of `_overlaid` below them.
    """
    columns = min(columns, len(groups)) if headings else columns
    each, rows = len(groups[0]), math.ceil(len(groups) / columns)
    size = (_PIXELS - 4 * _GAP * (columns - 1) - _GAP * columns * (each - 1)) // (columns * each)
    line = round(_LINE * DPI)
    above, head = line * max(label.count("\n") + 1 for label in labels) + 6, line * bool(headings)
    step = (each * size + (each - 1) * _GAP + 4 * _GAP, above + size + 10)
    canvas = np.full((head + rows * step[1] + 3 * line // 2 * scale, _PIXELS, 3), 255, np.uint8)
    figure = Figure((_WIDTH, len(canvas) / DPI))
    axis = figure.add_axes((0, 0, 1, 1))
    for at, (group, label) in enumerate(zip(groups, labels, strict=True)):
        x, y = at % columns * step[0], head + at // columns * step[1] + above
        for number, picture in enumerate(group):
            left = x + number * (size + _GAP)
            canvas[y : y + size, left : left + size] = _fit(picture, size)
            if headings and at < columns:
                axis.text(left, head - 4, _short(headings[number], size / DPI, 7.5), fontsize=7.5, color="#666666")
        text = "\n".join(_short(part, (step[0] - 4 * _GAP) / DPI) for part in label.split("\n"))
        axis.text(x, y - 9, text, fontsize=8, color=_INK, linespacing=1.15)
    axis.imshow(canvas, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    if scale:
        bar = figure.add_axes((0.35, 0.5 * line / len(canvas), 0.3, 0.5 * line / len(canvas)))
        figure.colorbar(ScalarMappable(cmap="viridis"), cax=bar, orientation="horizontal", ticks=()).outline.set_visible(False)
        for place, end, side in ((-0.03, "least", "right"), (1.03, "most", "left")):
            bar.text(place, 0.5, end, fontsize=7.5, color="#666666", ha=side, va="center_baseline", transform=bar.transAxes)
    return figure
