"""What the figures share: sizes, colours, and images composed into one array, because axes are what costs time.

Figures are five inches wide, so that their text can be read on a phone, in colours that colour-blind people can distinguish:
Okabe and Ito's, and viridis.
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
NARROW = 3.6  # of figures with many names, which are then larger at the same width on a page
PIXELS = int(WIDTH * DPI)
LINE = 0.17  # inches of height for a line of text
GAP = 4  # pixels between images of a group; four times that between groups
# https://jfly.uni-koeln.de/color/, but for the yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Of runs beyond the number of colours.
DASHES: Any = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 3)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
INK, PALE = "#222222", "#e4e4e4"
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
    "text.parse_math": False,  # a name may hold a dollar sign
}
styled = matplotlib.rc_context(STYLE)  # as a decorator, it holds while a figure is made


def row(figure: Figure, count: int, **options: Any) -> list[Axes]:
    """Axes next to each other."""
    return list(figure.subplots(1, count, squeeze=False, **options)[0])


def short(text: str, inches: float, size: float = 8) -> str:
    """The text, cut to about so many inches at a size in points."""
    most = int(inches * 72 / (0.58 * size))
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def mosaic(tiles: np.ndarray, gap: float = 1.0) -> np.ndarray:
    """Tiles [rows, columns, h, w] or [rows, columns, h, w, 3] in one array, a pixel of `gap` between them."""
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, 1), (0, 1), *((0, 0),) * (tiles.ndim - 4)), constant_values=gap)
    rows, columns, height, width = padded.shape[:4]
    return np.swapaxes(padded, 1, 2).reshape(rows * height, columns * width, *tiles.shape[4:])[:-1, :-1]


def panels(images: Mapping[str, np.ndarray], **options: Any) -> Figure:
    """Images side by side, a title above each, and below them one scale of colours where `options` name a colour map."""
    rows, columns = next(iter(images.values())).shape[:2]
    gap, count = 0.12, max(2, len(images))
    width = (WIDTH - gap * (count - 1)) / count
    bottom, tall = 0.4 * bool(options), width * rows / columns
    figure = Figure((WIDTH, bottom + tall + 0.25))
    full = figure.get_figheight()
    for at, (name, image) in enumerate(images.items()):
        left = at * (width + gap) / WIDTH
        axis = figure.add_axes((left, bottom / full, width / WIDTH, tall / full))
        shown = axis.imshow(image, interpolation="nearest", aspect="auto", **options)
        axis.set_title(name)
        axis.set_axis_off()
    if options:
        across = (len(images) * (width + gap) - gap) / WIDTH
        scale = figure.add_axes((0.03, 0.25 / full, across - 0.06, 0.1 / full))
        figure.colorbar(shown, cax=scale, orientation="horizontal", ticks=[options["vmin"], 0, options["vmax"]])
    return figure


def overlaid(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image in grey, blended evenly with the mask's colours: darkening instead would hide what is dark already."""
    height, width = image.shape[:2]
    share = (mask - mask.min()) / max(float(mask.max() - mask.min()), 1e-12)
    smooth = Image.fromarray(share.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    grey = image @ np.array((0.299, 0.587, 0.114))
    return 0.5 * grey[..., None] + 0.5 * matplotlib.colormaps["viridis"](np.asarray(smooth))[..., :3]


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """An image in [0, 1] as uint8 in a white square, enlarged without smoothing: pixels are what a model gets."""
    scale = size / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    image = Image.fromarray(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8))
    image = image.resize((width, height), Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)
    square = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    return square


@styled
def image_grid(
    groups: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    columns: int,
    headings: Sequence[str] = (),
    scale: bool = False,
) -> Figure:
    """Groups of images [h, w, 3] in [0, 1], a label above each; `headings` name a group's images, above the first row.

    `scale` puts the colours of `overlaid` below them.
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
    for at, (group, label) in enumerate(zip(groups, labels, strict=True)):
        x, y = at % columns * step[0], head + at // columns * step[1] + above
        for number, image in enumerate(group):
            left = x + number * (size + GAP)
            canvas[y : y + size, left : left + size] = fit(image, size)
            if headings and at < columns:
                axis.text(left, head - 4, short(headings[number], size / DPI, 7.5), fontsize=7.5, color="#666666")
        text = "\n".join(short(part, (step[0] - 4 * GAP) / DPI) for part in label.split("\n"))
        axis.text(x, y - 9, text, fontsize=8, color=INK, linespacing=1.15)
    axis.imshow(canvas, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    if scale:
        bar = figure.add_axes((0.35, 0.5 * line / len(canvas), 0.3, 0.5 * line / len(canvas)))
        figure.colorbar(ScalarMappable(cmap="viridis"), cax=bar, orientation="horizontal", ticks=()).outline.set_visible(False)
        for place, end, side in ((-0.03, "least", "right"), (1.03, "most", "left")):
            bar.text(place, 0.5, end, fontsize=7.5, color="#666666", ha=side, va="center_baseline", transform=bar.transAxes)
    return figure
