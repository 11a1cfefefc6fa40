"""What the figures share: sizes, colours, and images composed into one array, because many axes take long to draw.

Figures are five inches wide, so that their text can be read on a phone. The colours (Okabe and Ito's, and viridis) can be
distinguished by colour-blind readers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image

DPI = 160  # of a saved figure
WIDTH = 5.0  # inches
NARROW = 3.6  # inches, for figures with many names, whose text is then larger at the same width on a page
PIXELS = int(WIDTH * DPI)
LINE = 0.17  # height of a line of text, inches
GAP = 4  # pixels between images of a group; four times that between groups
# https://jfly.uni-koeln.de/color/, without the yellow, which is not visible on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# For runs beyond the number of colours.
DASHES: Any = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 3)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
INK, GREY, PALE = "#222222", "#666666", "#e4e4e4"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may contain a dollar sign
}
with_style = matplotlib.rc_context(STYLE)  # a decorator: the style applies while a function makes its figure


def axes_row(figure: Figure, count: int, **options: Any) -> list[Axes]:
    """Returns `count` axes next to each other; `options` are those of `Figure.subplots`."""
    return list(figure.subplots(1, count, squeeze=False, **options)[0])


def shorten(text: str, inches: float, size: float = 8) -> str:
    """Cuts a text to about this many inches at a font size in points."""
    most = int(inches * 72 / (0.58 * size))
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def tile(tiles: np.ndarray, gap: float = 1.0) -> np.ndarray:
    """Joins tiles [rows, columns, h, w] or [rows, columns, h, w, 3] into one array, one pixel of value `gap` apart."""
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, 1), (0, 1), *((0, 0),) * (tiles.ndim - 4)), constant_values=gap)
    rows, columns, height, width = padded.shape[:4]
    return np.swapaxes(padded, 1, 2).reshape(rows * height, columns * width, *tiles.shape[4:])[:-1, :-1]


def side_by_side(images: Mapping[str, np.ndarray], **options: Any) -> Figure:
    """Draws images next to each other, a title above each.

    Args:
      images: title → image [h, w] or [h, w, 3], all of one shape.
      options: of `Axes.imshow`, with `vmin` and `vmax`; if given, a colour scale is drawn below the images.
    """
    rows, columns = next(iter(images.values())).shape[:2]
    gap, count = 0.12, max(2, len(images))
    width = (WIDTH - gap * (count - 1)) / count
    bottom, image_height = 0.4 * bool(options), width * rows / columns
    figure = Figure((WIDTH, bottom + image_height + 0.25))
    height = figure.get_figheight()
    for index, (name, image) in enumerate(images.items()):
        left = index * (width + gap) / WIDTH
        axis = figure.add_axes((left, bottom / height, width / WIDTH, image_height / height))
        shown = axis.imshow(image, interpolation="nearest", aspect="auto", **options)
        axis.set_title(name)
        axis.set_axis_off()
    if options:
        across = (len(images) * (width + gap) - gap) / WIDTH
        scale = figure.add_axes((0.03, 0.25 / height, across - 0.06, 0.1 / height))
        figure.colorbar(shown, cax=scale, orientation="horizontal", ticks=[options["vmin"], 0, options["vmax"]])
    return figure


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Blends the image in grey evenly with the colours of a mask.

    Darkening the image by the mask instead would hide which dark areas are dark in the image itself.

    Args:
      image: [h, w, 3] in [0, 1].
      mask: [gh, gw]; its colours range from its smallest to its largest value.

    Returns:
      [h, w, 3] in [0, 1].
    """
    height, width = image.shape[:2]
    share = (mask - mask.min()) / max(float(mask.max() - mask.min()), 1e-12)
    smooth = Image.fromarray(share.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    grey = image @ np.array((0.299, 0.587, 0.114))
    return 0.5 * grey[..., None] + 0.5 * matplotlib.colormaps["viridis"](np.asarray(smooth))[..., :3]


def fit_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Fits an image [h, w, 3] in [0, 1] into a white square, uint8 [size, size, 3]; enlarges it without smoothing."""
    scale = size / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    image = Image.fromarray(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8))
    image = image.resize((width, height), Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)
    square = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    return square


@with_style
def image_grid(
    groups: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    columns: int,
    headings: Sequence[str] = (),
    scale: bool = False,
) -> Figure:
    """Draws groups of images in a grid.

    Args:
      groups: of equally many images [h, w, 3] in [0, 1].
      labels: the text above each group; may have several lines.
      columns: groups in a row.
      headings: names of a group's images, written above the first row.
      scale: whether to draw the colour scale of `overlay` below the images.
    """
    columns = min(columns, len(groups)) if headings else columns
    each, rows = len(groups[0]), math.ceil(len(groups) / columns)
    size = (PIXELS - 4 * GAP * (columns - 1) - GAP * columns * (each - 1)) // (columns * each)
    line = round(LINE * DPI)
    above, head = line * max(label.count("\n") + 1 for label in labels) + 6, line * bool(headings)
    step = (each * size + (each - 1) * GAP + 4 * GAP, above + size + 10)
    canvas = np.full((head + rows * step[1] + 3 * line // 2 * scale, PIXELS, 3), 255, np.uint8)
    figure = Figure((WIDTH, len(canvas) / DPI))
    axis = figure.add_axes((0, 0, 1, 1))
    for index, (group, label) in enumerate(zip(groups, labels, strict=True)):
        x, y = index % columns * step[0], head + index // columns * step[1] + above
        for number, image in enumerate(group):
            left = x + number * (size + GAP)
            canvas[y : y + size, left : left + size] = fit_square(image, size)
            if headings and index < columns:
                axis.text(left, head - 4, shorten(headings[number], size / DPI, 7.5), fontsize=7.5, color=GREY)
        text = "\n".join(shorten(part, (step[0] - 4 * GAP) / DPI) for part in label.split("\n"))
        axis.text(x, y - 9, text, fontsize=8, color=INK, linespacing=1.15)
    axis.imshow(canvas, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    if scale:
        _colour_scale(figure, 0.5 * line / len(canvas))
    return figure


def _colour_scale(figure: Figure, height: float) -> None:
    """Draws the colour scale of `overlay` at the bottom; `height` is its share of the figure's."""
    bar = figure.add_axes((0.35, height, 0.3, height))
    figure.colorbar(ScalarMappable(cmap="viridis"), cax=bar, orientation="horizontal", ticks=()).outline.set_visible(False)
    for x, end, side in ((-0.03, "least", "right"), (1.03, "most", "left")):
        bar.text(x, 0.5, end, fontsize=7.5, color=GREY, ha=side, va="center_baseline", transform=bar.transAxes)
