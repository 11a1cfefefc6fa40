"""A page about a run, or about several next to each other: one HTML file that needs no other and no network."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.config import fields
from vit_jax.errors import CheckpointError, DataError, ReportError
from vit_jax.files import whole_file
from vit_jax.reports import drawings, figures, markup
from vit_jax.reports.comparison import comparison
from vit_jax.reports.drawings import Drawing, Look
from vit_jax.reports.events import wall_time
from vit_jax.reports.markup import drawn, duration, escaped, note, number, rate, table, words
from vit_jax.reports.runs import Missing, Run, read

_OF_A_DIVERGED_STEP = {"train/learning_rate": "learning rate", "train/gradient_norm": "gradient norm", "train/loss": "loss"}
_OF_A_START = ("command", "started")  # of environment.json; the rest are versions and the device
_MEASURED = ("test/accuracy", "test/accuracy_top5", "test/loss")


def write(
    *runs: str | os.PathLike,
    output: str | os.PathLike | None = None,
    num_images: int = 6,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
    images: Sequence[int] = (),
) -> Path:
    """Writes the page about a run, or one that compares several; returns its path.

    Args:
      runs: folders that main.py has trained in; a run may still go on.
      output: the page; None: `report.html` in the run's folder, or `comparison.html` next to the first of several. A single
        run's figures are also written as files, into the folder `figures` next to the page.
      num_images: of how many classes a test image is shown with the model's attention, of all where there are fewer. Nothing
        else is computed by a model.
      images: numbers of the test images that are shown instead, counted from 0 in the order of the test split.
      layers, heads: those whose attention is shown apart, counted from 1. Heads alone are the last layer's, layers alone are
        shown with all their heads.

    Raises ReportError for a folder that is no run or is given twice, a configuration that cannot be read, and a layer,
    head or image that does not exist; OSError where the page cannot be written. What else is not there is said on the page.
    """
    if not runs or num_images < 1:
        raise ReportError("a report takes a run's folder and shows at least one image")
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
        title, body = (
            found[0].name,
            _report(found[0], path.parent / "figures", Look(num_images, tuple(layers), tuple(heads), tuple(images))),
        )
    else:
        path = Path(output) if output else found[0].path.resolve().parent / "comparison.html"
        title, body = "Runs compared", comparison(found)
    if not path.name:
        raise ReportError(f"{output} is no name of a page; give one such as page.html")
    content = markup.page(title, body)
    with whole_file(path) as file:
        file.write(content)
    return path


def _report(run: Run, folder: Path, look: Look) -> Iterator[str]:
    parts: dict[str, tuple[Iterator[Drawing], ...]] = {
        "Learning": (drawings.learning(run),),
        "Predictions": (drawings.predicted(run),),
        "Attention": (drawings.looks(run, look),),
        "Training images": (drawings.training_images(run),),
        "Weights": (drawings.weights(run),),
    }
    tables: dict[str, tuple[str, dict[str, Any]]] = {
        "What was run": ("", _facts(run)),
        "Configuration": (
            "settings",
            {name: value for name, (value, _) in fields(run.config).items() if name != "run.expected"},
        ),
        "Versions and device": ("", _versions(run)),
    }
    yield f"<h1>{escaped(run.name)}</h1>"
    yield from _summary(run)
    links = (f'<a href="#{_anchor(title)}">{title}</a>' for title in (*parts, *tables))
    yield f"<nav>{' '.join(links)}</nav>"
    for title, several in parts.items():
        yield f'<section id="{_anchor(title)}">\n<h2>{title}</h2>\n<div class="figures">'
        notes = []
        for some in several:
            try:
                for drawing in some:
                    yield drawn(drawing, folder)
            except (Missing, DataError, CheckpointError) as error:
                notes.append(note(error))
        yield "\n".join(["</div>", *notes, "</section>"])
    for title, (kind, rows) in tables.items():
        yield f'<section id="{_anchor(title)}" class="{kind}">\n<h2>{title}</h2>\n{table(list(rows.items()))}\n</section>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _summary(run: Run) -> Iterator[str]:
    """The headline, what the run warned about, and its figures next to those expected."""
    last, best = run.evaluations[-1] if run.evaluations else {}, run.best or {}
    expected = run.config.run.expected
    yield _headline(run, last, best)
    if run.diverged:
        line = run.metrics[-1]
        there = [f"{name} {line[key]:.3g}" for key, name in _OF_A_DIVERGED_STEP.items() if key in line]
        yield note(". ".join([run.diverged, *([f"At that step: {', '.join(there)}"] if there else [])]), "note warning")
    for text in run.warnings:
        yield note(f"Warning: {text}", "note warning")
    rows: list[Sequence[Any]] = [("", "final" if run.finished else "latest", "best", "expected", "difference")]
    for name in (name for name in _MEASURED if name in last or name in expected):
        value, wanted = last.get(name), expected.get(name)
        gap = value - wanted if value is not None and wanted is not None else None
        values = (number(name, x) for x in (value, best.get(name), wanted))
        rows.append((_title(run, name), *values, number(name, gap, "+").replace("\u00a0%", " points")))
    if len(rows) > 1:
        yield table(rows, "numbers")
    if besides := [f"{words(name)} {number(name, value)}" for name, value in expected.items() if name not in _MEASURED]:
        yield f"<p>Also expected: {escaped(', '.join(besides))}.</p>"


def _headline(run: Run, last: dict[str, float], best: dict[str, float]) -> str:
    steps, measured = run.config.training.steps, run.measured
    so_far = f"{number('accuracy', last['test/accuracy'])}" if last else ""
    if not run.finished:
        state = "Diverged" if run.diverged else "Not finished"
        where = f"step {run.step} of {steps}" if run.metrics else "there are no metrics yet"
        so_far = f"{measured} {so_far} at step {last['step']:.0f}" if last else "no evaluation yet"
        return f'<p class="headline"><strong>{state}</strong>: {escaped(where)}; {escaped(so_far)}{_interval(run, last)}.</p>'
    split = "the test split" if run.splits[1] == "test" else run.splits[1]
    return (
        f'<p class="headline">{escaped(measured[0].upper() + measured[1:])} <strong>{so_far}</strong> after {steps} '
        f"steps{_interval(run, last)}. Best {number('accuracy', best['test/accuracy'])} after {best['step']:.0f} steps, chosen "
        f"on {escaped(split)}.</p>"
    )


def _interval(run: Run, line: dict[str, float]) -> str:
    """The 95 % interval of an evaluation's accuracy, in words that follow it."""
    count = run.evaluated if line else 0
    if not count or not 0 <= line["test/accuracy"] <= 1:
        return ""
    low, high = figures.wilson(line["test/accuracy"], count)
    return f" (95\u00a0% interval {100 * low:.1f} to {100 * high:.1f}\u00a0%: {count:,} images)"


def _title(run: Run, name: str) -> str:
    return words(name) if run.splits[1] == "test" else f"{words(name).removeprefix('test ')} on {run.splits[1]}"


def _facts(run: Run) -> dict[str, Any]:
    """What was run, from what, how long it took and when."""
    config, speed, took = run.config, run.speed(), wall_time(run.path / "tensorboard")
    start = config.model.checkpoint or f"random weights, {config.model.variant}"
    if digest := run.meta.get("source_sha256"):
        start += f", SHA-256 {digest}"
    length = f"{config.training.steps} steps of {config.training.batch_size} images"
    seconds = f"{duration(speed[0])}, without compiling, evaluating and saving" if speed else "not known yet"
    recorded = {name: run.environment[name] for name in _OF_A_START if name in run.environment}
    return {
        "task": config.data.task,
        "trained on, tested on": ", ".join(run.splits),
        "started from": start,
        **({"parameters": f"{run.parameters:,}"} if run.parameters else {}),
        "image size": f"{config.data.image_size} px",
        "length": length,
        "seed": config.seed,
        **recorded,
        **({"wall time": f"{duration(took)}, with compiling, evaluating and saving"} if took is not None else {}),
        "time in training steps": seconds,
        "images/s": f"{rate(speed)}, the median of the steps" if speed else "not known yet",
    }


def _versions(run: Run) -> dict[str, str]:
    found = {name: value for name, value in run.environment.items() if name not in _OF_A_START}
    return found or {"versions, device": "not recorded by this run"}
