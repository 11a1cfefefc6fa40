"""The page that compares several runs. Runs of different tasks or splits are never in one table or figure."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.config import difference, fields
from vit_jax.errors import printable
from vit_jax.reports.curves import learning_curves
from vit_jax.reports.markup import escape, figure_html, format_metric, format_speed, notice, table_html
from vit_jax.reports.runs import Run
from vit_jax.reports.sections import CaptionedFigure

_CURVES = (
    "Each run has its own colour, or colour and dashes. Loss: the thin line is the running mean of the training loss, the "
    "thick line is the loss of the evaluations."
)


def comparison(runs: Sequence[Run]) -> Iterator[str]:
    """Yields the body of the page in parts."""
    names = [run.name for run in runs]
    label_of = {id(run): run.name if names.count(run.name) == 1 else str(run.path) for run in runs}
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.config.data.task, run.splits.validation, run.splits.test), []).append(run)
    yield "<h1>Runs compared</h1>"
    if len(groups) > 1:
        yield notice("These runs are tested on different data: do not compare numbers of different tables.")
    for (task, validation, _), group in groups.items():
        accuracy_label = (
            f"{group[0].test_label}, validation {group[0].accuracy_label}" if validation else group[0].accuracy_label
        )
        figures = ("final test", "best validation") if group[0].splits.validation else ("final", "best")
        rows: list[Sequence[Any]] = [("", *figures, "top-5", "loss", "steps", "images/s")]
        rows += [(label_of[id(run)], *_results(run)) for run in group]
        yield f"<p>{escape(task)}: {escape(accuracy_label)}.</p>\n{table_html(rows, 'numbers runs')}"
    for group in repetitions([run for run in runs if run.finished]):
        finals = [100 * run.evaluations[-1]["test/accuracy"] for run in group]
        mean, deviation = statistics.mean(finals), statistics.stdev(finals)
        which = escape(", ".join(label_of[id(run)] for run in group))
        yield (
            f'<p class="headline"><strong>{mean:.2f} ± {deviation:.2f}\u00a0%</strong> after the last step: mean ± sample '
            f"standard deviation of {len(group)} runs that differ only in the seed ({which}).</p>"
        )
    yield '<h2>Learning</h2>\n<div class="figures">'
    for number, ((task, *_), group) in enumerate(groups.items()):
        accuracy_label = group[0].accuracy_label
        figure = learning_curves(
            {printable(label_of[id(run)]): run.metrics for run in group}, accuracy_label, group[0].chosen_metric.split("/")[0]
        )
        title = "Learning curves" if len(groups) == 1 else f"{task}: {accuracy_label}"
        yield figure_html(CaptionedFigure(f"curves_{number}", title, figure, _CURVES))
    yield "</div>\n<h2>Settings that differ</h2>"
    yield _differing_settings(runs, label_of)


def _results(run: Run) -> Iterator[str]:
    """Yields a run's cells of the table: final and best accuracy, top-5, loss, steps, images per second."""
    last, best, steps = run.evaluations[-1] if run.evaluations else {}, run.best or {}, run.config.training.steps
    yield format_metric("accuracy", last.get("test/accuracy") if run.finished else None)
    yield format_metric("accuracy", best.get(run.chosen_metric))
    for name in ("test/accuracy_top5", "test/loss"):
        yield format_metric(name, last.get(name))
    yield (f"{run.step}" if run.finished else f"{run.step}/{steps}") + " diverged" * bool(run.diverged)
    yield format_speed(run.speed())


def _differing_settings(runs: Sequence[Run], label_of: dict[int, str]) -> str:
    differing = {name for run in runs for name in difference(runs[0].config, run.config)}
    if not differing:
        return notice("No setting that changes the numbers differs.")
    rows = [("setting", "value", "runs")]  # not one column per run, because many would not fit
    for name in (name for name in fields(runs[0].config) if name in differing):
        with_value: dict[str, list[str]] = {}
        for run in runs:
            with_value.setdefault(str(fields(run.config)[name][0]), []).append(label_of[id(run)])
        rows += [(name if not index else "", value, ", ".join(of)) for index, (value, of) in enumerate(with_value.items())]
    return table_html(rows, "differing")


def repetitions(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups runs that differ only in the seed; groups have at least two runs, and the first run of each seed counts."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if set(difference(group[0].config, run.config)) <= {"seed"}), None)
        if group is None:
            groups.append([run])
        elif run.config.seed not in (other.config.seed for other in group):
            group.append(run)
    return [group for group in groups if len(group) > 1]
