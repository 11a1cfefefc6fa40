"""The runs of an ablation, what they cost, and the table of what they gave."""

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

from vit_jax.checkpoints.load import architecture
from vit_jax.config import Config
from vit_jax.config_rules import with_steps
from vit_jax.data import splits
from vit_jax.data.tasks import task
from vit_jax.models.variants import build
from vit_jax.models.vit import VisionTransformer
from vit_jax.reports.runs import read_run
from vit_jax.studies import paired, tables
from vit_jax.studies.grid import Cell, result
from vit_jax.training.preview import training_flops

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of runs.

    Attributes:
      folder: of the runs and the tables.
      cells: name of a change → seed → its run; the base first.
      metrics: names of metrics.jsonl, of which the first that a run has is its score.
      title: what the scores are, as a short text.
      measured: the same, with what that means.
      command: the command line.
    """

    folder: Path
    cells: dict[str, dict[int, Cell]]
    metrics: tuple[str, ...]
    title: str
    measured: str
    command: str

    def in_order(self) -> list[Cell]:
        """All runs, the first seed of every change first: an early table has every row."""
        return [row[seed] for seed in self.cells[BASE] for row in self.cells.values()]

    @property
    def in_points(self) -> bool:
        """Whether scores are accuracies, which are shown in %."""
        return "accuracy" in self.metrics[0]


def model_of(config: Config) -> VisionTransformer:
    """The architecture of a run with its head. Raises ValueError if the model is unknown or its file cannot be read."""
    classes = task(config.data.task).num_classes or 1
    if config.model.checkpoint:
        return architecture(config.model.checkpoint)[0].clone(num_classes=classes, representation_size=0)
    return build(config.model.variant, num_classes=classes)


def describe(study: Study) -> Iterator[str]:
    """The runs of a study that are not finished in its folder, and what they cost, as lines."""
    yield f"Measured: {study.measured}"
    total, number = 0.0, 0
    width = max(map(len, study.cells))
    for name, row in study.cells.items():
        left = [cell for cell in row.values() if result(cell, study.folder) is None]
        config, known = next(iter(row.values())).config, task(next(iter(row.values())).config.data.task)
        if config.training.epochs:
            config = with_steps(config, splits.count(known, config.data, config.run.data_dir))
        images = len(left) * config.training.steps * config.training.batch_size
        cost = images * training_flops(config, model_of(config))
        total, number = total + cost, number + len(left)
        finished = f" ({len(row) - len(left)} finished)" if len(left) < len(row) else ""
        yield f"{name:{width}}  {len(left)} runs{finished}, {images:,} training images, {cost / 1e15:,.3g} PFLOP"
    hours = total / 1e14 / 3600
    yield f"{number} runs, {total / 1e15:,.3g} PFLOP; at 100 TFLOP/s {hours:,.3g} hours, without evaluation"


def _scores(study: Study) -> tuple[dict[str, dict[int, float]], dict[str, str], dict[str, float | None]]:
    """From the files of the runs: change → seed → score (accuracies in %), → what is missing, → mean seconds in steps."""
    scores: dict[str, dict[int, float]] = {}
    missing: dict[str, str] = {}
    seconds: dict[str, float | None] = {}
    for name, row in study.cells.items():
        scores[name], diverged, times = {}, 0, []
        for seed, cell in row.items():
            found = result(cell, study.folder) or {}
            diverged += "diverged" in found
            value = next((found[key] for key in study.metrics if key in found), None)
            if "diverged" in found or value is None:
                continue
            scores[name][seed] = 100 * value if study.in_points else value
            if speed := read_run(study.folder / cell.name).speed():
                times.append(speed[0])
        absent = len(row) - len(scores[name]) - diverged
        notes = [f"{diverged} of {len(row)} diverged"] * bool(diverged) + [f"{absent} of {len(row)} missing"] * bool(absent)
        missing[name], seconds[name] = ", ".join(notes), statistics.fmean(times) if times else None
    return scores, missing, seconds


def write(study: Study) -> str:
    """Writes table.md, table.csv and differences.svg from the files of the runs; returns the table as text."""
    scores, missing, seconds = _scores(study)
    found = paired.compare(scores)
    seeds = list(study.cells[BASE])
    unit, points, digits = (", %", ", points", 2) if study.in_points else ("", "", 4)
    figures = ("mean", "deviation", "difference", "± 95 %", "s.e. of this row")
    table = [["change", "runs", f"mean{unit}", "deviation", f"difference{points}", *figures[3:], "training, s"]]
    names = ("mean", "deviation", "difference", "margin_95", "standard_error", "training_seconds", "missing")
    lines = [["change", *(f"seed {seed}" for seed in seeds), *names]]
    for name, row in found.rows.items():
        values = (row.mean, row.deviation, row.difference, row.margin, row.error)
        shown = [
            "–" if value is None else f"{value:{'+' * (figure == 'difference')}.{digits}f}"
            for figure, value in zip(figures, values, strict=True)
        ]
        duration = seconds[name]
        shown.append("–" if duration is None else f"{duration:.1f}")
        table.append([name, missing[name] or f"{len(row.scores)}", *shown])
        every = [*(row.scores.get(seed) for seed in seeds), *values, duration]
        lines.append([name, *("" if value is None else f"{value:.6g}" for value in every), missing[name]])
    text = f"{_heading(study, found)}\n\n{tables.markdown(table)}"
    tables.write_csv(study.folder / "table.csv", lines)
    title = f"difference to the base{points}: {study.title}"
    tables.write_figure(study.folder / "differences.svg", tables.differences(found.rows, title))
    plot = "\n![differences to the base](differences.svg)\n"
    tables.write_text(study.folder / "table.md", f"{text}{plot}\n    {study.command}\n")
    return text


def _heading(study: Study, found: paired.Comparison) -> str:
    """What the figures of the table are."""
    seeds = list(study.cells[BASE])
    over = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    text = (
        f"Measured: {study.measured}; after the last step, over {over}. Differences to the base are paired by seed, and "
        "deviations are over seeds, not over images."
    )
    if found.noise is None:
        return f"{text} There is no interval: it needs two rows with the same two seeds."
    degrees = f"{found.freedom} degree{'s' * (found.freedom > 1)} of freedom"
    return (
        f"{text} The 95 % interval is Student's t with {degrees}; its noise, {found.noise:.2g} for one run, is that of all "
        "rows with several seeds: score = change + seed + noise of one variance."
    )
