"""Tables of studies as Markdown and CSV, and the plot of differences."""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vit_jax.errors import printable
from vit_jax.files import whole_file
from vit_jax.reports.canvas import COLOURS, GREY, WIDTH, shorten, with_style
from vit_jax.studies.paired import Summary


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its heading; "|" in a cell is escaped."""
    lines = [[printable(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Writes rows as CSV atomically."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    write_text(path, lines.getvalue())


@with_style
def differences(rows: Mapping[str, Summary], title: str) -> Figure:
    """Draws the mean difference to the base of each change with its interval, and the difference of each seed as a small dot.

    Args:
      rows: the base first, which is the line at 0; changes without a difference have only their name. Of fields
        that change together, at most three are named.
      title: of the figure.
    """
    (_, base), *changes = rows.items()
    names = ["\n".join(shorten(word, 2.6, 7.5) for word in printable(name).split(" ")[:3]) for name, _ in changes]
    edges = [0.0, *itertools.accumulate(0.45 + 0.55 * len(name.splitlines()) for name in names)]
    centers = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    figure = Figure((WIDTH, 0.9 + 0.26 * max(edges[-1], 2)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color=GREY, linewidth=0.8)
    for y, (_, row) in zip(centers, changes, strict=True):
        each = [row.scores[seed] - base.scores[seed] for seed in row.scores if seed in base.scores]
        axis.plot(each, [y] * len(each), "o", color=COLOURS[5], markersize=3, alpha=0.8, linewidth=0)
        if row.difference is not None:
            axis.errorbar(row.difference, y, xerr=row.margin, fmt="o", color=COLOURS[0], markersize=4.5, capsize=2.5)
    axis.set_yticks(centers, names, fontsize=7.5)
    axis.set_ylim(max(edges[-1], 1), 0)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=9)
    axis.grid(axis="y", visible=False)
    return figure


def write_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as SVG atomically; equal figures give equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name}), whole_file(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
