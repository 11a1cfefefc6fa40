"""The HTML of a page: frame, style, tables, notices and figures; and how numbers are written."""

import base64
import html
import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vit_jax.errors import printable
from vit_jax.reports.sections import CaptionedFigure

NONE = "–"
_PIXELS = 800  # width of a saved figure; a wide figure has twice that
_STYLE = """
:root { color-scheme: light dark }
:root { --ink: #1b1b1b; --page: #fff; --soft: #555; --line: #e4e4e4; --note: #fdf3e4; --link: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --page: #16181b; --soft: #a9adb3; --line: #363a40; --note: #3a2f1c; --link: #6cb6ee }
  img { padding: .4rem; border-radius: .4rem; background: #fff; box-sizing: border-box }
}
:root { font: 100%/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink) }
body { max-width: 70rem; margin: 0 auto; padding: 1rem; background: var(--page); overflow-wrap: anywhere }
h1 { margin: .5rem 0; font-size: 1.7rem }
h2 { margin: 2.2rem 0 .8rem; padding-bottom: .2rem; font-size: 1.2rem; border-bottom: 2px solid var(--link) }
h2 { break-after: avoid }
h3 { margin: 0 0 .4rem; font-size: 1rem }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 1rem 0 }
a { color: var(--link) }
.headline { font-size: 1.1rem }
.headline strong { font-size: 1.5em }
.note { padding: .6rem .8rem; background: var(--note); border-left: 4px solid #e69f00 }
.warning { border-left-color: #d55e00; font-weight: bold }
table { border-collapse: collapse; max-width: 100%; font-size: .92rem }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
tr > :last-child { padding-right: 0 }
th { font-weight: normal; color: var(--soft) }
.numbers { overflow-x: auto }
.numbers td, .numbers th + th { overflow-wrap: normal; font-variant-numeric: tabular-nums }
.numbers th:first-child { min-width: 5rem }
.differing table { table-layout: fixed; width: 100% }
.differing th { width: 25% }
.differing th:last-child { width: 50% }
.figures, .settings table { display: block; columns: 2 24rem; column-gap: 2.5rem }
figure { margin: 0 0 1.8rem; break-inside: avoid }
.wide { column-span: all }
img { display: block; max-width: 100%; height: auto }
figcaption { max-width: 500px; margin-top: .3rem; color: var(--soft); font-size: .86rem }
tr { break-inside: avoid }
@media (max-width: 40rem) {
  th, td { padding-right: .6rem; font-size: .82rem }
  .numbers th, .numbers td { padding-right: .4rem; font-size: .78rem }
  .numbers th:first-child { min-width: 4rem }
  .runs table, .runs tbody { display: block }
  .runs tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: 0 .6rem }
  .runs tr { padding: .4rem 0; border-bottom: 1px solid var(--line) }
  .runs tr:first-child { display: none }
  .runs th { grid-column: 1 / -1; color: var(--ink) }
  .runs th, .runs td { padding: 0; border: 0 }
  .runs td::before { content: attr(data-name); display: block; color: var(--soft); font-size: .7rem }
}
@media print { body { padding: 0; font-size: 10pt } .figures, .settings table { columns: 2 16rem } th, td { font-size: 8pt } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="vit_jax.reports">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page_html(title: str, body: Iterable[str]) -> bytes:
    """Returns the whole HTML file."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body)).encode(errors="replace")


def escape(content: object, limit: int = 10_000) -> str:
    """Returns text from a file as HTML text: without tags, control characters and marks that reorder what follows."""
    return html.escape(printable(content, limit))


def notice(content: object, kind: str = "note") -> str:
    """Returns a highlighted paragraph; `kind` is "note" or "note warning"."""
    return f'<p class="{kind}">{escape(content)}</p>'


def table_html(rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """Returns an HTML table whose first column holds headings.

    Args:
      rows: the cells.
      kind: "numbers", "numbers runs" or "differing"; if given, the first row holds headings too.
    """
    lines = []
    for number, row in enumerate(rows):
        tags = ["th"] * len(row) if kind and not number else ["th", *["td"] * (len(row) - 1)]
        # On a phone, the numbers of a run are below its name, each with its heading.
        names = [f' data-name="{escape(name)}"' if "runs" in kind and number else "" for name in (rows[0] if kind else row)]
        cells = (f"<{tag}{name}>{escape(cell)}</{tag}>" for tag, name, cell in zip(tags, names, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    text = "<table>\n" + "\n".join(lines) + "\n</table>"
    return f'<div class="{kind}">\n{text}\n</div>' if kind else text


def figure_html(captioned: CaptionedFigure, folder: Path | None = None) -> str:
    """Returns the figure with title and caption as HTML; also writes it as a PNG file into `folder`, if that is given."""
    buffer, inches = io.BytesIO(), captioned.figure.get_size_inches()
    scale = 1 + captioned.wide
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter that the font does not have is drawn as a box
        captioned.figure.savefig(buffer, format="png", dpi=scale * _PIXELS / inches[0])
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{captioned.name}.png").write_bytes(buffer.getvalue())
    width = 500 * scale
    height = round(width * inches[1] / inches[0])
    title, caption = escape(captioned.title), escape(captioned.caption)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure{" class=wide" * captioned.wide}>\n<h3>{title}</h3>\n<img src="data:image/png;base64,{data}" width="{width}" '
        f'height="{height}" alt="{title}: {caption}">\n<figcaption>{caption}</figcaption>\n</figure>'
    )


def metric_label(name: str) -> str:
    """Returns the name of a metric as text."""
    return name.replace("test/accuracy_top5", "test top-5 accuracy").replace("/", " ").replace("_", " ")


def format_metric(name: str, value: float | None, sign: str = "") -> str:
    """Returns the value of a metric as text: accuracies in per cent, others with three significant digits.

    Args:
      name: the metric; accuracies are recognised by it.
      value: None gives a dash.
      sign: "+" to write the sign of positive values too.
    """
    if value is None:
        return NONE
    return f"{100 * value:{sign}.2f}\u00a0%" if "accuracy" in name else f"{value:{sign}.3g}"


def format_speed(speed: tuple[float, float] | None) -> str:
    """Returns images per second as text, from `Run.speed`."""
    return NONE if speed is None else f"{speed[1]:,.0f}" if speed[1] >= 10 else f"{speed[1]:.1f}"


def format_duration(seconds: float) -> str:
    """Returns a time as hours and minutes, minutes and seconds, or seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
