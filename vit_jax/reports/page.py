"""A page about one run or several: a single HTML file that needs no other file and no network."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.config import fields
from vit_jax.errors import CheckpointError, DataError, ReportError
from vit_jax.files import whole_file
from vit_jax.reports import markup, sections
from vit_jax.reports.analysis import wilson
from vit_jax.reports.comparison import comparison
from vit_jax.reports.events import wall_time
from vit_jax.reports.markup import escape, figure_html, format_duration, format_metric, format_speed, notice, table_html
from vit_jax.reports.runs import Missing, Run, read_run
from vit_jax.reports.sections import AttentionOptions, CaptionedFigure

_log = logging.getLogger("vit_jax")
_START = ("command", "started")  # of environment.json; the rest are versions and devices
_TABLE_METRICS = tuple(f"{split}/{name}" for split in ("test", "validation") for name in ("accuracy", "accuracy_top5", "loss"))


def write(
    *runs: str | os.PathLike,
    output: str | os.PathLike | None = None,
    num_images: int = 6,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
    images: Sequence[int] = (),
) -> Path:
    """Writes the page about a run, or a page that compares several runs.

    What a run does not have (yet) is left out, and the page says so. Attention maps are the only thing that a model computes.

    Args:
      runs: folders of runs; a run may still be training. HTML files are left out with a warning, so that `runs/*` can be given.
      output: the page; None: `report.html` in the run's folder, or `comparison.html` next to the first of several runs.
        For a single run, the figures are also written as files, into the folder `figures` next to the page.
      num_images: number of classes of which a test image is shown with the model's attention.
      layers: layers whose attention is shown separately, counted from 1; with all their heads unless `heads` is given.
      heads: heads whose attention is shown separately, counted from 1; of the last layer unless `layers` is given.
      images: numbers of the test images to show instead of `num_images`, counted from 0 in the order of the test split.

    Returns:
      The path of the page.

    Raises:
      ReportError: if a folder is not a run or is given twice, if its configuration cannot be read, or if a layer, head or
        image does not exist.
      OSError: if the page cannot be written.
    """
    if num_images < 1:
        raise ReportError(f"num_images={num_images}: must be at least 1")
    folders = _folders([Path(run) for run in runs])
    found = [read_run(folder) for folder in folders]
    default = folders[0] / "report.html" if len(found) == 1 else folders[0].resolve().parent / "comparison.html"
    path = Path(output) if output else default
    if not path.name:
        raise ReportError(f"output={str(output)!r}: not a file name; give one such as page.html")
    if len(found) == 1:
        options = AttentionOptions(num_images, tuple(layers), tuple(heads), tuple(images))
        content = markup.page_html(found[0].name, _report(found[0], path.parent / "figures", options))
    else:
        content = markup.page_html("Runs compared", comparison(found))
    with whole_file(path) as file:
        file.write(content)
    return path


def _folders(paths: list[Path]) -> list[Path]:
    """Returns the paths without pages; ReportError if none is left or two are the same."""
    folders: dict[str, Path] = {}
    for path in paths:
        if path.suffix == ".html" and path.is_file():
            _log.warning("%s is left out: it is a page and not the folder of a run", path)
        elif (same := folders.setdefault(os.path.realpath(path), path)) is not path:
            raise ReportError(f"{same} and {path} are the same run; give it once")
    if not folders:
        raise ReportError("runs: no folder of a run is given; give one such as runs/demo")
    return list(folders.values())


def _report(run: Run, folder: Path, options: AttentionOptions) -> Iterator[str]:
    parts: dict[str, Iterator[CaptionedFigure]] = {
        "Learning": sections.learning_figures(run),
        "Predictions": sections.prediction_figures(run),
        "Attention": sections.attention_figures(run, options),
        "Training images": sections.training_figures(run),
        "Weights": sections.weight_figures(run),
    }
    settings = {name: value for name, (value, _) in fields(run.config).items() if name != "run.expected"}
    tables: dict[str, tuple[str, dict[str, Any]]] = {
        "What was run": ("", _facts(run)),
        "Configuration": ("settings", settings),
        "Versions and devices": ("", _versions(run)),
    }
    yield f"<h1>{escape(run.name)}</h1>"
    yield from _summary(run)
    links = (f'<a href="#{_anchor(title)}">{title}</a>' for title in (*parts, *tables))
    yield f"<nav>{' '.join(links)}</nav>"
    for title, part in parts.items():
        yield f'<section id="{_anchor(title)}">\n<h2>{title}</h2>\n<div class="figures">'
        missing = ""
        try:
            for captioned in part:
                yield figure_html(captioned, folder)
        except (Missing, DataError, CheckpointError) as error:
            missing = notice(error)
        yield f"</div>\n{missing}\n</section>"
    for title, (kind, rows) in tables.items():
        yield f'<section id="{_anchor(title)}" class="{kind}">\n<h2>{title}</h2>\n{table_html(list(rows.items()))}\n</section>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _summary(run: Run) -> Iterator[str]:
    """Yields the headline, the run's warnings, and its results next to the expected ones."""
    last, best = run.evaluations[-1] if run.evaluations else {}, run.best or {}
    expected = run.config.run.expected
    yield _headline(run, last, best)
    if run.diverged:
        yield notice(run.diverged, "note warning")
    if skipped := [f"{line['step']:.0f}" for line in run.metrics if line.get("train/skipped_batches")]:
        steps = f"step{'s' * (len(skipped) > 1)} {', '.join(skipped)}"
        yield notice(
            f"Batches whose loss was not finite were skipped before {steps} (training.on_nan=rollback)", "note warning"
        )
    for text in run.warnings:
        yield notice(f"Warning: {text}", "note warning")
    rows: list[Sequence[Any]] = [("", "final" if run.finished else "latest", "best", "expected", "difference")]
    for name in (name for name in _TABLE_METRICS if name in last or name in expected):
        value, wanted = last.get(name), expected.get(name)
        gap = value - wanted if value is not None and wanted is not None else None
        cells = (format_metric(name, x) for x in (value, best.get(name), wanted))
        rows.append((_metric_title(run, name), *cells, format_metric(name, gap, "+").replace("\u00a0%", " points")))
    if len(rows) > 1:
        yield table_html(rows, "numbers")
    others = {markup.metric_label(name): format_metric(name, x) for name, x in expected.items() if name not in _TABLE_METRICS}
    if others:
        yield f"<p>Also expected: {escape(', '.join(f'{label} {value}' for label, value in others.items()))}.</p>"


def _headline(run: Run, last: dict[str, float], best: dict[str, float]) -> str:
    steps, label = run.config.training.steps, run.accuracy_label if not run.finished else run.test_label
    accuracy = format_metric("accuracy", last["test/accuracy" if run.finished else run.chosen_metric]) if last else ""
    if not run.finished:
        state = "Diverged" if run.diverged else "Not finished"
        step = f"step {run.step} of {steps}" if run.metrics else "there are no metrics yet"
        result = f"{label} {accuracy} at step {last['step']:.0f}" if last else "no evaluation yet"
        return f'<p class="headline"><strong>{state}</strong>: {escape(step)}; {escape(result)}{_interval(run, last)}.</p>'
    return (
        f'<p class="headline">{escape(label[0].upper() + label[1:])} <strong>{accuracy}</strong> after {last["step"]:.0f} '
        f"steps{_interval(run, last)}. Best {format_metric('accuracy', best[run.chosen_metric])} after {best['step']:.0f} "
        f"steps, chosen on {escape(run.chosen_name)}{_best_tested(run)}.</p>"
    )


def _best_tested(run: Run) -> str:
    """The test accuracy of the state that the validation split chose."""
    line = next((line for line in run.metrics if "best/test_accuracy" in line), None)
    return f", where the {escape(run.test_label)} is {format_metric('accuracy', line['best/test_accuracy'])}" if line else ""


def _interval(run: Run, line: dict[str, float]) -> str:
    """Returns the 95 % interval of an evaluation's accuracy as text; empty if the number of images is not known."""
    count = run.num_evaluated if line else 0
    if not count or not 0 <= line.get("test/accuracy", -1) <= 1:
        return ""
    low, high = wilson(line["test/accuracy"], count)
    return f" (95\u00a0% interval {100 * low:.1f} to {100 * high:.1f}\u00a0%: {count:,} images)"


def _metric_title(run: Run, name: str) -> str:
    label, split = markup.metric_label(name), run.splits.validation if name.startswith("validation/") else run.splits.test
    return label if split == "test" else f"{label.removeprefix('test ').removeprefix('validation ')} on {split}"


def _facts(run: Run) -> dict[str, Any]:
    """Returns what was run, when, from which weights, and how long it took."""
    config, speed, took = run.config, run.speed(), wall_time(run.path / "tensorboard")
    start = config.model.checkpoint or f"random weights, {config.model.variant}"
    if digest := run.meta.get("source_sha256"):
        start += f", SHA-256 {digest}"
    unknown = "not known yet"
    return {
        "task": config.data.task,
        "training split": run.splits.train,
        **({"validation split": run.splits.validation} if run.splits.validation else {}),
        "test split": run.splits.test,
        "started from": start,
        **({"parameters": f"{run.num_parameters:,}"} if run.num_parameters else {}),
        "image size": f"{config.data.image_size} px",
        "length": _length(run),
        "seed": config.seed,
        **{name: run.environment[name] for name in _START if name in run.environment},
        **({"wall time": f"{format_duration(took)}, with compiling, evaluating and saving"} if took is not None else {}),
        "time in training steps": f"{format_duration(speed[0])}, without compiling, evaluating and saving"
        if speed
        else unknown,
        "images/s": f"{format_speed(speed)}, the median of the steps" if speed else unknown,
    }


def _length(run: Run) -> str:
    settings = run.config.training
    epochs = f", {settings.epochs:g} epochs" if settings.epochs else ""
    early = f"; ended by training.patience after {run.step}" if run.finished and run.step < settings.steps else ""
    return f"{settings.steps} steps of {settings.batch_size} images{epochs}{early}"


def _versions(run: Run) -> dict[str, str]:
    found = {name: value for name, value in run.environment.items() if name not in _START}
    return found or {"versions, devices": "not recorded by this run"}
