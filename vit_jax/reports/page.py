"""A page about a run, or about several beside each other: one HTML file that needs no other and no network."""

import base64
import html
import io
import os
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.config import difference, fields
from vit_jax.errors import CheckpointError, DataError, ReportError, printable
from vit_jax.files import whole_file
from vit_jax.reports import drawings, figures
from vit_jax.reports.drawings import Drawing, Look
from vit_jax.reports.runs import Missing, Run, read, repeated

_NONE = "–"
_OF_A_DIVERGED_STEP = {"train/learning_rate": "learning rate", "train/gradient_norm": "gradient norm", "train/loss": "loss"}
_MEASURED = ("test/accuracy", "test/accuracy_top5", "test/loss")
_STYLE = """
:root { font: 100%/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1b1b1b }
body { max-width: 70rem; margin: 0 auto; padding: 1rem; background: #fff; overflow-wrap: anywhere }
h1 { margin: .5rem 0; font-size: 1.7rem }
h2 { margin: 2.2rem 0 .8rem; padding-bottom: .2rem; font-size: 1.2rem; border-bottom: 2px solid #0072b2; break-after: avoid }
h3 { margin: 0 0 .4rem; font-size: 1rem }
.headline { font-size: 1.1rem }
.headline strong { font-size: 1.5em }
.note { padding: .6rem .8rem; background: #fdf3e4; border-left: 4px solid #e69f00 }
table { border-collapse: collapse; max-width: 100%; font-size: .92rem }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4 }
tr > :last-child { padding-right: 0 }
th { font-weight: normal; color: #555 }
.numbers { overflow-x: auto }
.numbers td, .numbers th + th { overflow-wrap: normal; font-variant-numeric: tabular-nums }
.numbers th:first-child { min-width: 5rem }
.differing table { table-layout: fixed; width: 100% }
.differing th { width: 25% }
.differing th:last-child { width: 50% }
.figures, .settings table { display: block; columns: 2 24rem; column-gap: 2.5rem }
figure { margin: 0 0 1.8rem; break-inside: avoid }
img { display: block; max-width: 100%; height: auto }
figcaption { max-width: 500px; margin-top: .3rem; color: #444; font-size: .86rem }
tr { break-inside: avoid }
@media (max-width: 30rem) {
  th, td { padding-right: .6rem; font-size: .82rem }
  .runs th, .runs td { padding-right: .3rem; font-size: .68rem }
}
@media print { body { padding: 0; font-size: 10pt } .figures, .settings table { columns: 2 16rem } th, td { font-size: 8pt } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
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


def write(
    *runs: str | os.PathLike,
    output: str | os.PathLike | None = None,
    pictures: int = 6,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
) -> Path:
    """Writes the page about a run, or one that compares several; returns its path.

    Args:
      runs: folders that main.py has trained in; a run may still go on.
      output: the page; None: `report.html` in the run's folder, or `comparison.html` beside the first of several. A single
        run's figures are also written as files, into the folder `figures` beside the page.
      pictures: of how many classes a test picture is shown with the model's attention, of all where there are fewer. Nothing
        else is computed by a model.
      layers, heads: those whose attention is shown apart, counted from 1. Heads alone are the last layer's, layers alone are
        shown with all their heads.

    Raises ReportError for a folder that is no run or is given twice, a configuration that cannot be read, and a layer or head
    that the model does not have; OSError where the page cannot be written. What else is not there is said on the page.
    """
    if not runs or pictures < 1:
        raise ReportError("a report takes a run's folder and shows at least one picture")
    folders: dict[str, Path] = {}
    pages = [path for path in map(Path, runs) if path.suffix == ".html" and path.is_file()]  # of runs/*, this command's own
    for folder in (path for path in map(Path, runs) if path not in pages):
        if (same := folders.setdefault(os.path.realpath(folder), folder)) is not folder:
            raise ReportError(f"{same} and {folder} are the same run; name it once")
    if not folders:
        raise ReportError(f"{', '.join(map(str, pages))}: a page is no run's folder; name one such as runs/demo")
    found = [read(folder) for folder in folders.values()]
    if len(found) == 1:
        path = Path(output) if output else found[0].path / "report.html"
        title, body = found[0].name, _report(found[0], path.parent / "figures", Look(pictures, tuple(layers), tuple(heads)))
    else:
        path = Path(output) if output else found[0].path.resolve().parent / "comparison.html"
        title, body = "Runs compared", _comparison(found)
    if not path.name:
        raise ReportError(f"{output} is no name of a page; give one such as page.html")
    text = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))
    with whole_file(path) as file:
        file.write(text.encode(errors="replace"))
    return path


def _report(run: Run, folder: Path, look: Look) -> Iterator[str]:
    yield f"<h1>{html.escape(run.name)}</h1>"
    yield from _summary(run)
    parts: dict[str, tuple[Iterator[Drawing], ...]] = {
        "Training": (drawings.learning(run), drawings.training_pictures(run)),
        "Attention": (drawings.looks(run, look),),
        "Predictions": (drawings.predicted(run),),
        "Weights": (drawings.weights(run),),
    }
    for title, several in parts.items():
        yield f'<section>\n<h2>{title}</h2>\n<div class="figures">'
        notes = []
        for some in several:
            try:
                for drawing in some:
                    yield _drawn(drawing, folder)
            except (Missing, DataError, CheckpointError) as error:
                notes.append(f'<p class="note">{html.escape(str(error))}</p>')
        yield "\n".join(["</div>", *notes, "</section>"])
    values = {name: value for name, (value, _) in fields(run.config).items() if name != "run.expected"}
    yield f'<section class="settings">\n<h2>Configuration</h2>\n{_table(list(values.items()))}\n</section>'


def _summary(run: Run) -> Iterator[str]:
    """The headline, the figures beside what was expected, and what was run."""
    last, best, speed = run.evaluations[-1] if run.evaluations else {}, run.best or {}, run.speed()
    steps, expected = run.config.training.steps, run.config.run.expected
    measured, split = run.measured.capitalize(), "the test split" if run.splits[1] == "test" else run.splits[1]
    measured, split = html.escape(measured), html.escape(split)
    if run.finished:
        final, highest = (_number("accuracy", line["test/accuracy"]) for line in (last, best))
        yield (
            f'<p class="headline">{measured} <strong>{final}</strong> after {steps} steps. '
            f"Best {highest} after {best['step']:.0f} steps, chosen on {split}.</p>"
        )
    else:
        where = f"step {run.step} of {steps}" if run.metrics else "there are no metrics yet"
        so_far = "no evaluation yet"
        if last:
            so_far = (
                f"{measured[0].lower()}{measured[1:]} {_number('accuracy', last['test/accuracy'])} at step {last['step']:.0f}"
            )
        yield f'<p class="headline"><strong>{"Diverged" if run.diverged else "Not finished"}</strong>: {where}; {so_far}.</p>'
        if run.diverged:
            line = run.metrics[-1]
            there = [f"{name} {line[key]:.3g}" for key, name in _OF_A_DIVERGED_STEP.items() if key in line]
            yield _note(". ".join([run.diverged, *([f"At that step: {', '.join(there)}"] if there else [])]))
    for text in run.warnings:
        yield _note(text)
    rows: list[Sequence[Any]] = [("", "final" if run.finished else "latest", "best", "expected", "off by")]
    for name in (name for name in _MEASURED if name in last or name in expected):
        value, wanted = last.get(name), expected.get(name)
        gap = value - wanted if value is not None and wanted is not None else None
        values = (_number(name, x) for x in (value, best.get(name), wanted))
        rows.append((_words(name), *values, _number(name, gap, "+").replace("\u00a0%", " points")))
    if len(rows) > 1:
        yield _table(rows, "numbers")
    if besides := [f"{_words(name)} {_number(name, value)}" for name, value in expected.items() if name not in _MEASURED]:
        yield f"<p>Also expected: {html.escape(', '.join(besides))}.</p>"
    start = run.config.model.checkpoint or f"random weights, {run.config.model.variant}"
    if digest := run.meta.get("source_sha256"):
        start += f", SHA-256 {digest}"
    took = f"{_duration(speed[0])}, without compiling, evaluating and saving" if speed else "not known yet"
    facts = {
        "task": run.config.data.task,
        "trained on, tested on": ", ".join(run.splits),
        "started from": start,
        "picture size": f"{run.config.data.image_size} px",
        "length": f"{steps} steps of {run.config.training.batch_size} pictures",
        "seed": run.config.seed,
        "time in training steps": took,
        "pictures/s": f"{_rate(speed)}, the median of the steps" if speed else "not known yet",
        **(run.environment or {"versions, device": "not recorded by this run"}),
    }
    yield f"<section>\n<h2>What was run</h2>\n{_table(list(facts.items()))}\n</section>"


def _comparison(runs: Sequence[Run]) -> Iterator[str]:
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]
    label_of = {id(run): label for run, label in zip(runs, labels, strict=True)}
    yield "<h1>Runs compared</h1>"
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.config.data.task, run.measured), []).append(run)
    if len(groups) > 1:
        yield _note("These runs differ in what they are tested on: figures of different tables do not compare.")
    for (task, measured), group in groups.items():
        rows: list[Sequence[Any]] = [("", "final", "best", "top-5", "loss", "steps", "img/s")]
        for run in group:
            last = run.evaluations[-1] if run.evaluations else {}
            final, best = (
                _number("accuracy", of.get("test/accuracy")) for of in (last if run.finished else {}, run.best or {})
            )
            state = f"{run.step}/{run.config.training.steps}" if not run.finished else str(run.config.training.steps)
            state += " diverged" if run.diverged else ""
            top5, loss = (_number(name, last.get(name)) for name in ("test/accuracy_top5", "test/loss"))
            rows.append((label_of[id(run)], final, best, top5, loss, state, _rate(run.speed())))
        yield f"<p>{html.escape(task)}: {html.escape(measured)}.</p>\n{_table(rows, 'numbers runs')}"
    for group in repeated([run for run in runs if run.finished]):
        finals = [100 * run.evaluations[-1]["test/accuracy"] for run in group]
        mean, deviation = statistics.mean(finals), statistics.stdev(finals)
        which = html.escape(", ".join(label_of[id(run)] for run in group))
        yield (
            f'<p class="headline"><strong>{mean:.2f} ± {deviation:.2f}\u00a0%</strong> after the last step: mean ± sample '
            f"deviation of {len(group)} runs that differ in the seed alone ({which}).</p>"
        )
    yield "<h2>Settings that differ</h2>"
    differing = {name for run in runs for name in difference(runs[0].config, run.config)}
    rows = [("setting", "value", "runs")]  # no column a run: many would not fit
    for name in (name for name in fields(runs[0].config) if name in differing):
        with_value: dict[str, list[str]] = {}
        for run, label in zip(runs, labels, strict=True):
            with_value.setdefault(str(fields(run.config)[name][0]), []).append(label)
        rows += [(name if not at else "", value, ", ".join(of)) for at, (value, of) in enumerate(with_value.items())]
    yield _table(rows, "differing") if differing else '<p class="note">None that changes the numbers.</p>'
    figure = figures.curves({label: run.metrics for label, run in zip(labels, runs, strict=True)})
    caption = "A colour a run: loss in training as a running mean (dashed) and on the test split, test accuracy, learning rate."
    yield f'<h2>Learning</h2>\n<div class="figures">{_drawn(Drawing("curves", "Learning curves", figure, caption))}</div>'


def _drawn(drawing: Drawing, folder: Path | None = None) -> str:
    """The figure as HTML, also written into a folder."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for a letter that the font does not have
        drawing.figure.savefig(buffer, format="png", dpi=figures.DPI)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{drawing.name}.png").write_bytes(buffer.getvalue())
    width, height = (round(100 * inches) for inches in drawing.figure.get_size_inches())
    title, caption = html.escape(drawing.title), html.escape(drawing.caption)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure>\n<h3>{title}</h3>\n<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{title}: {caption}">\n<figcaption>{caption}</figcaption>\n</figure>'
    )


def _table(rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """An HTML table whose first column holds headings; one of a kind, "numbers" or "differing", whose first row does too."""
    lines = []
    for number, row in enumerate(rows):
        kinds = ["th"] * len(row) if kind and not number else ["th", *["td"] * (len(row) - 1)]
        cells = (f"<{kind}>{html.escape(printable(cell, 10_000))}</{kind}>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = "<table>\n" + "\n".join(lines) + "\n</table>"
    return f'<div class="{kind}">\n{table}\n</div>' if kind else table


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(printable(text))}</p>'


def _words(name: str) -> str:
    return name.replace("/", " ").replace("_", " ")


def _number(name: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return _NONE
    return f"{100 * value:{sign}.2f}\u00a0%" if "accuracy" in name else f"{value:{sign}.3g}"


def _rate(speed: tuple[float, float] | None) -> str:
    return _NONE if speed is None else f"{speed[1]:,.0f}" if speed[1] >= 10 else f"{speed[1]:.1f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
