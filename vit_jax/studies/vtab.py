"""The table of the AugReg paper: models by tasks, each cell chosen on validation images, then trained on all and tested.

    python -m vit_jax.studies.vtab --models B/16,R+Ti/16 --tasks all

The grid of steps and rates is that of "How to train your ViT?" (Steiner et al. 2021). The pair with the highest final accuracy
on the task's validation split is chosen; the model is then trained with it on the training and validation images and tested.
"""

import argparse
import csv
import itertools
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax import cli
from vit_jax.studies import options

if TYPE_CHECKING:
    from vit_jax.config import Config
    from vit_jax.studies.grid import Cell

STEPS, RATES = (500, 2500), (0.001, 0.003, 0.01, 0.03)  # the paper's grid
_SET_BY_SWEEP = {"model.checkpoint", "data.task", "data.validation_split", "training.steps", "training.epochs"}
_SET_BY_SWEEP |= {"training.patience", "optimizer.learning_rate"}  # a search is evaluated once, at its end
GROUPS = ("natural", "specialized", "structured")
PAPER = Path(__file__).parents[1] / "assets" / "augreg_vtab.csv"
PRETRAINING = "ImageNet-21k (300ep)"  # of the files that the names of models mean


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.studies.vtab") -> int:
    """Runs the sweep; returns the exit status: 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", required=True, help="published names or files, with commas between them")
    parser.add_argument(
        "--tasks", default="all", help="all, natural, specialized, structured, or names of `vit_jax data list`, with commas"
    )
    parser.add_argument("--steps", type=options.numbers(int), default=STEPS, help="numbers of steps to try; default: 500,2500")
    parser.add_argument(
        "--lrs", type=options.numbers(float), default=RATES, help="rates to try; default: 0.001,0.003,0.01,0.03"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/vtab"), help="folder of the runs and the table; default: runs/vtab"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the runs and their cost")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set a field of every run, as in training.batch_size=64",
    )
    args = parser.parse_args(argv)
    return cli.call(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from vit_jax import runtime
    from vit_jax.studies import grid

    models, names = args.models.split(","), tasks(args.tasks)
    searches = {
        (model, name): [
            cell(model, name, steps, rate, args.config, search=True) for steps, rate in itertools.product(args.steps, args.lrs)
        ]
        for model, name in itertools.product(models, names)
    }
    if args.dry_run:
        print("\n".join(describe(searches, args.output)))
        return 0
    runtime.prepare()
    failed = 0
    try:
        found = {one.name: value for one, value in grid.run(list(itertools.chain(*searches.values())), args.output)}
        finals = {}
        for key, cells in searches.items():
            scores = [value.get("validation/accuracy", -1.0) for one in cells if isinstance(value := found[one.name], dict)]
            failed += len(cells) - len(scores)
            # With a missing one, the choice could be another. One that diverged is the worst.
            if scores and max(scores) < 0:
                print(f"every run of {' on '.join(key)} diverged", file=sys.stderr)
            elif len(scores) == len(cells):
                best = cells[scores.index(max(scores))].config
                finals[key] = cell(*key, best.training.steps, best.optimizer.learning_rate, args.config, search=False)
        results = {one.name: value for one, value in grid.run(list(finals.values()), args.output)}
    except grid.Stopped as stopped:
        print("stopped and saved; run the same command again to continue", file=sys.stderr)
        return 128 + stopped.number
    accuracies = {}
    for key, one in finals.items():
        value = results[one.name]
        if isinstance(value, dict) and "test/accuracy" in value:
            accuracies[key] = 100 * value["test/accuracy"]
        else:
            failed += 1
    write(args.output, models, names, accuracies, {key: one.config for key, one in finals.items()})
    print((args.output / "table.md").read_text(), end="")
    print(f"Table: {args.output / 'table.md'}, {args.output / 'table.csv'}; page: {args.output / 'index.html'}")
    if failed:
        print(f"{failed} runs failed; run the same command again to try them again", file=sys.stderr)
    return int(failed > 0)


def tasks(text: str) -> list[str]:
    """The names of tasks that a command line means. Raises DataError for one that does not exist."""
    from vit_jax.data.tasks import TASKS, task

    names: list[str] = []
    for word in re.findall(r"(?:hub:[^,]*@[^,]*,[^,]*|[^,]+)", text):  # the columns of a data set of the hub have a comma too
        group = [name for name, row in TASKS.items() if row.group and word in ("all", row.group)]
        names += group or [task(word).name]
    return sorted(
        set(names), key=lambda name: (GROUPS.index(TASKS[name].group) if name in TASKS and TASKS[name].group else 9, name)
    )


def cell(model: str, name: str, steps: int, rate: float, overrides: Sequence[str], search: bool) -> "Cell":
    """The run of a model on a task: for the search with the task's validation split, else on all training images."""
    from vit_jax import config_files
    from vit_jax.config_rules import check
    from vit_jax.studies.grid import Cell

    config = config_files.read(f"augreg:{model},{name}")
    config.optimizer.learning_rate, config.training.steps = rate, steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 5)  # as configured, or a fifth of a short run
    config.data.validation_split = "own" if search else ""
    refused = {name: f"the sweep sets {name} itself; see --models, --tasks, --steps and --lrs" for name in _SET_BY_SWEEP}
    for override in overrides:
        options.set_field(config, override, refused=refused)
    config.training.eval_every = config.training.steps  # only the last evaluation counts
    check(config)
    place = f"{model}-{name}-{steps}-{rate:g}".replace("/", "_").replace(":", "_")
    return Cell(f"{'search' if search else 'final'}/{place}", config)


def describe(searches: dict[tuple[str, str], list["Cell"]], folder: Path) -> Iterator[str]:
    """The cells of a sweep that are not finished in its folder, and what they cost, as lines."""
    from vit_jax.checkpoints.load import architecture
    from vit_jax.data.tasks import task
    from vit_jax.studies.grid import result
    from vit_jax.training.preview import training_flops

    total, number = 0.0, 0
    for (model, name), every in searches.items():
        cells = [one for one in every if result(one, folder) is None]
        number += len(cells) + 1
        known = architecture(model)[0].clone(num_classes=task(name).num_classes or 1, representation_size=0)
        largest = max(one.config.training.steps for one in every)
        images = sum(one.config.training.steps * one.config.training.batch_size for one in cells)
        images += largest * every[0].config.training.batch_size  # of the last training, at most
        cost = images * training_flops(every[0].config, known)
        total += cost
        finished = f" ({len(every) - len(cells)} finished)" if cells != every else ""
        runs = f"{len(cells)} + 1 runs{finished}, at most {images:,} training images, {cost / 1e15:,.1f} PFLOP"
        yield f"{model:12} {name:22} {runs}"
    hours = total / 1e14 / 3600
    yield f"{number} runs, at most {total / 1e15:,.1f} PFLOP; at 100 TFLOP/s {hours:,.1f} hours, without evaluation"


def means(values: dict[str, float]) -> dict[str, float]:
    """The mean of each group of tasks of which all are there, as in the paper."""
    from vit_jax.data.tasks import TASKS

    found = {}
    for group in GROUPS:
        names = [name for name, row in TASKS.items() if row.group == group]
        if all(name in values for name in names):
            found[f"{group}_mean"] = statistics.mean(values[name] for name in names)
    return found


def paper() -> dict[tuple[str, str], dict[str, float]]:
    """The published table: (pre-training, model) → task or mean of a group → accuracy in %."""
    with open(PAPER, newline="", encoding="utf-8") as file:
        return {
            (row.pop("pretraining"), row.pop("model")): {name: float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        }


def write(
    folder: Path,
    models: Sequence[str],
    names: Sequence[str],
    found: dict[tuple[str, str], float],
    chosen: dict[tuple[str, str], "Config"],
) -> None:
    """Writes table.md, table.csv and index.html: accuracies in %, the paper's, and the differences.

    Args:
      folder: of the sweep.
      models: in the order of the rows.
      names: of the tasks, in the order of the columns.
      found: (model, task) → test accuracy in %.
      chosen: (model, task) → the configuration that was chosen.
    """
    from vit_jax.reports.markup import page_html, table_html
    from vit_jax.studies import tables

    published = paper()
    rows: list[list[str]] = []
    columns = list(names)
    for model in models:
        ours = {name: found[model, name] for name in names if (model, name) in found}
        ours |= means(ours)
        columns += [name for name in ours if name not in columns]
        theirs = published.get((PRETRAINING, model), {})
        rows.append([model, "vit_jax", *(f"{ours[name]:.1f}" if name in ours else "–" for name in columns)])
        if theirs:
            rows.append(
                [model, f"paper, {PRETRAINING}", *(f"{theirs[name]:.1f}" if name in theirs else "–" for name in columns)]
            )
            difference = [f"{ours[name] - theirs[name]:+.1f}" if name in ours and name in theirs else "–" for name in columns]
            rows.append([model, "difference", *difference])
        picked = [chosen.get((model, name)) for name in columns]
        rows.append(
            [model, "steps, rate", *(f"{c.training.steps}, {c.optimizer.learning_rate:g}" if c else "–" for c in picked)]
        )
    header = ["model", "", *columns]
    rows = [row + ["–"] * (len(header) - len(row)) for row in rows]
    source = "Test accuracy, %. Paper: Steiner et al. 2021, “How to train your ViT?”, table of VTAB results."
    body = ["<h1>Models by tasks</h1>", f"<p>{source}</p>", table_html([header, *rows], "numbers")]
    tables.write_text(folder / "table.md", tables.markdown([header, *rows]))
    tables.write_text(folder / "index.html", page_html("Models by tasks", body).decode())
    tables.write_csv(folder / "table.csv", [header, *rows])


if __name__ == "__main__":
    cli.run(main)
