"""The page that compares several runs; runs of different tasks or splits are never in one table or figure."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.config import difference, fields
from vit_jax.errors import printable
from vit_jax.reports import figures
from vit_jax.reports.drawings import Drawing
from vit_jax.reports.markup import drawn, escaped, note, number, rate, table
from vit_jax.reports.runs import Run


def comparison(runs: Sequence[Run]) -> Iterator[str]:
    """The body of the page, in pieces."""
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]
    label_of = {id(run): label for run, label in zip(runs, labels, strict=True)}
    yield "<h1>Runs compared</h1>"
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.config.data.task, run.measured), []).append(run)
    if len(groups) > 1:
        yield note("These runs differ in what they are tested on: figures of different tables do not compare.")
    for (task, measured), group in groups.items():
        rows: list[Sequence[Any]] = [("", "final", "best", "top-5", "loss", "steps", "images/s")]
        rows += [(label_of[id(run)], *_figures(run)) for run in group]
        yield f"<p>{escaped(task)}: {escaped(measured)}.</p>\n{table(rows, 'numbers runs')}"
    for group in repeated([run for run in runs if run.finished]):
        finals = [100 * run.evaluations[-1]["test/accuracy"] for run in group]
        mean, deviation = statistics.mean(finals), statistics.stdev(finals)
        which = escaped(", ".join(label_of[id(run)] for run in group))
        yield (
            f'<p class="headline"><strong>{mean:.2f} ± {deviation:.2f}\u00a0%</strong> after the last step: mean ± sample '
            f"standard deviation of {len(group)} runs that differ only in the seed ({which}).</p>"
        )
    yield '<h2>Learning</h2>\n<div class="figures">'
    caption = (
        "A colour a run, or a colour and dashes. Loss: thin, running mean of the training loss; thick, of the evaluations."
    )
    for at, ((task, measured), group) in enumerate(groups.items()):
        figure = figures.curves({printable(label_of[id(run)]): run.metrics for run in group}, measured)
        title = "Learning curves" if len(groups) == 1 else f"{task}: {measured}"
        yield drawn(Drawing(f"curves_{at}", title, figure, caption))
    yield "</div>\n<h2>Settings that differ</h2>"
    differing = {name for run in runs for name in difference(runs[0].config, run.config)}
    rows = [("setting", "value", "runs")]  # no column a run: many would not fit
    for name in (name for name in fields(runs[0].config) if name in differing):
        with_value: dict[str, list[str]] = {}
        for run, label in zip(runs, labels, strict=True):
            with_value.setdefault(str(fields(run.config)[name][0]), []).append(label)
        rows += [(name if not at else "", value, ", ".join(of)) for at, (value, of) in enumerate(with_value.items())]
    yield table(rows, "differing") if differing else note("None that changes the numbers.")


def _figures(run: Run) -> Iterator[str]:
    """A run's cells of the table: final and best accuracy, top-5, loss, steps, images a second."""
    last, best, steps = run.evaluations[-1] if run.evaluations else {}, run.best or {}, run.config.training.steps
    for of in (last if run.finished else {}, best):
        yield number("accuracy", of.get("test/accuracy"))
    for name in ("test/accuracy_top5", "test/loss"):
        yield number(name, last.get(name))
    yield (str(steps) if run.finished else f"{run.step}/{steps}") + " diverged" * bool(run.diverged)
    yield rate(run.speed())


def repeated(runs: Sequence[Run]) -> list[list[Run]]:
    """The groups of two and more among the runs that differ in nothing but the seed; of each seed the first one."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if set(difference(group[0].config, run.config)) <= {"seed"}), None)
        if group is None:
            groups.append([run])
        elif run.config.seed not in (other.config.seed for other in group):
            group.append(run)
    return [group for group in groups if len(group) > 1]
