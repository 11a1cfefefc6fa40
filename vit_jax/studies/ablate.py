"""Ablations: a base and changes of its configuration, each trained with the same seeds, and their paired differences.

    python -m vit_jax.studies.ablate configs/demo.py --vary optimizer.weight_decay=0.0001 --vary augment.flip=false --seeds 3

The base is the configuration as given; without --vary only its mean and deviation are measured. Each value of a --vary is
one change of it; with --product, every combination of the values of all --vary is one. Killed and started again, it goes on;
processes with the same --output share the runs.
"""

import argparse
import copy
import dataclasses
import hashlib
import itertools
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax import cli
from vit_jax.studies import options

if TYPE_CHECKING:
    from vit_jax.config import Config
    from vit_jax.studies.ablation import Study
    from vit_jax.studies.grid import Cell

_METRICS = ("accuracy", "accuracy_top5", "loss", "raw_accuracy", "raw_loss")
_TABLE_SECONDS = 10.0  # seconds between tables that are written while runs go on
_SAME_IMAGES = "figures of different images cannot be compared; set it for all runs with --config"
_REFUSED = {  # fields that do not vary
    "seed": "each change is trained with --seeds seeds, from the seed of the configuration on; set that with --config",
    "data.task": _SAME_IMAGES,
    "data.test_split": _SAME_IMAGES,
    "data.validation_split": _SAME_IMAGES,
}
_HELD_OUT = dict.fromkeys(("data.train_split", "data.test_split", "data.validation_split"), "--held_out sets it")


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.studies.ablate") -> int:
    """Runs the study; returns the exit status: 1 if a run failed."""
    summary = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog=program, description=f"{summary[0]} {' '.join(summary[2].split())}")
    parser.add_argument("source", metavar="CONFIG", help="a configuration's file or name, as of `vit_jax train --config`")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=VALUE,…",
        help="values of a field to try, with commas between them; several fields with spaces between them change together: "
        "'optimizer.name=adamw optimizer.learning_rate=0.001,0.003' is two changes. A text with a comma or space needs quotes",
    )
    parser.add_argument("--product", action="store_true", help="every combination of the values, not one change at a time")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each change; default: 3")
    parser.add_argument(
        "--held_out",
        default="",
        metavar="SPLIT",
        help="training images to measure on instead of the test images, as in 'train[90%%:]'; the others are trained on",
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FIELD=VALUE", help="set a field of every run, the base included"
    )
    parser.add_argument(
        "--metric",
        default="accuracy",
        help="what is compared, as metrics.jsonl names it after the split; of several with commas, the first that a run has",
    )
    parser.add_argument("--output", type=Path, help="folder of the runs and the table; default: runs/ablate-<name of CONFIG>")
    parser.add_argument("--dry_run", action="store_true", help="print the runs and their cost")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    return cli.call(lambda: _run(args, shlex.join([*program.split(), *arguments])))


def _run(args: argparse.Namespace, command: str) -> int:
    from vit_jax import runtime
    from vit_jax.studies import grid
    from vit_jax.studies.ablation import describe, model_of, write

    study = plan(args, command)
    if args.dry_run:
        for line in describe(study):
            print(line)
        return 0
    for cell in study.in_order():  # errors before anything runs: the folder holds other runs, a model is unknown
        grid.result(cell, study.folder)
        model_of(cell.config)
    runtime.prepare()
    failed, written = [], time.monotonic()
    try:
        for cell, found in grid.run(study.in_order(), study.folder):
            if not isinstance(found, dict):
                failed.append(cell.name)
            if time.monotonic() - written > _TABLE_SECONDS:
                write(study)
                written = time.monotonic()
    except grid.Stopped as stopped:
        write(study)
        print("stopped and saved; run the same command again to continue", file=sys.stderr)
        return 128 + stopped.number
    print(write(study), end="")
    print(f"Table: {study.folder / 'table.md'}, {study.folder / 'table.csv'}; plot: {study.folder / 'differences.svg'}")
    if failed:
        print(f"{len(failed)} runs failed; run the same command again to try them again", file=sys.stderr)
    return int(bool(failed))


def changes(texts: Sequence[str], product: bool = False) -> list[tuple[str, ...]]:
    """The changes that the values of --vary mean, each as texts "FIELD=VALUE".

    Raises:
      ConfigError: if a text has another form.
    """
    from vit_jax.errors import ConfigError

    axes = []
    for text in texts:
        try:
            words = [word.partition("=") for word in options.split_outside(text.strip(), " ") if word]
            values = [options.split_outside(value, ",") for _, _, value in words]
        except ValueError as error:
            raise ConfigError(f"--vary {text}: {error}") from None
        most = max(map(len, values), default=0)
        if not most or any(len(each) not in (1, most) for each in values):
            raise ConfigError(
                f"--vary {text}: expected FIELD=VALUE,VALUE,…; fields that change together have one value or equally many"
            )
        columns = [
            [f"{name}={value}" for value in each * (most // len(each))]
            for (name, _, _), each in zip(words, values, strict=True)
        ]
        axes.append(list(zip(*columns, strict=True)))
    if product:
        return [tuple(itertools.chain(*combination)) for combination in itertools.product(*axes)]
    return [change for axis in axes for change in axis]


def plan(args: argparse.Namespace, command: str) -> "Study":
    """The study that a command line means; every configuration of it has passed the rules.

    Raises:
      ConfigError: for anything that is wrong with the command line, before anything runs.
    """
    from vit_jax import config_files
    from vit_jax.errors import ConfigError, UserError
    from vit_jax.studies.ablation import BASE, Study
    from vit_jax.training.command import workdir_of

    if not 1 <= args.seeds <= 10_000:
        raise ConfigError(f"--seeds must be from 1 to 10,000, got {args.seeds}")
    base = config_files.read(args.source)
    base.run.expected = {}
    fixed = {
        options.set_field(base, text, refused=(_HELD_OUT if args.held_out else {}) | {"run.expected": "it has no use here"})
        for text in args.config
    }
    if args.held_out:
        options.hold_out(base, args.held_out)
    refused = _REFUSED | (_HELD_OUT if args.held_out else {})
    configs: dict[str, Config] = {}
    for change in [(), *changes(args.vary, args.product)]:
        name = " ".join(change) or BASE
        try:
            config = _changed(base, change, refused, evaluates_at_end="training.eval_every" not in fixed)
        except UserError as error:
            message = str(error)
            raise ConfigError(message if message.startswith("--vary") else f"{name}: {message}") from None
        if config not in configs.values():
            configs[name] = config
    if args.vary and len(configs) == 1:
        raise ConfigError("every value of --vary is the base's own: there is nothing to compare")
    folder = args.output or Path("runs", f"ablate-{workdir_of(args.source).absolute().name}")
    cells = {name: _cells(name, config, args.seeds) for name, config in configs.items()}
    if unknown := sorted(set(args.metric.split(",")) - set(_METRICS)):
        raise ConfigError(f"--metric {unknown[0]}: expected {', '.join(_METRICS)}, or several with commas between them")
    split, title, measured = _measured(base, args.metric, bool(args.held_out))
    metrics = tuple(f"{split}/{name}" for name in args.metric.split(","))
    return Study(folder, cells, metrics, title, measured, command)


def _changed(base: "Config", change: Sequence[str], refused: Mapping[str, str], evaluates_at_end: bool) -> "Config":
    """The configuration of a change, checked."""
    from vit_jax.config_rules import check
    from vit_jax.errors import ConfigError

    config = copy.deepcopy(base)
    if {"training.steps", "training.epochs"} <= {text.partition("=")[0] for text in change}:
        raise ConfigError("--vary: training.steps and training.epochs set the same, so a change has only one of them")
    for text in change:
        name = options.set_field(config, text, "--vary", refused)
        if name.startswith("run."):
            raise ConfigError(f"--vary {text}: fields of run do not change the numbers; set them with --config")
        evaluates_at_end &= name != "training.eval_every"
    settings = config.training
    if evaluates_at_end and not (settings.patience or settings.epochs):
        settings.eval_every = settings.steps
    check(config)
    return config


def _cells(name: str, config: "Config", seeds: int) -> dict[int, "Cell"]:
    """The runs of a change, in folders whose names depend on nothing but the change."""
    from vit_jax.config_rules import check
    from vit_jax.studies.grid import Cell

    folder = re.sub(r"[^\w.,=+-]+", "_", name)
    if folder != name or len(folder) > 100 or folder.startswith("."):  # two changes must not share it
        folder = f"{folder[:100].lstrip('.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    cells = {}
    for seed in range(config.seed, config.seed + seeds):
        one = dataclasses.replace(config, seed=seed)
        check(one)
        cells[seed] = Cell(f"{folder}/seed{seed}", one)
    return cells


def _measured(base: "Config", metric: str, held_out: bool) -> tuple[str, str, str]:
    """The name of the split in metrics.jsonl; what is measured as a short text, and with what that means."""
    from vit_jax.data.splits import names
    from vit_jax.data.tasks import task

    chosen = names(task(base.data.task), base.data)
    split = "validation" if chosen.validation else "test"
    place = chosen.validation or chosen.test
    title = about = f"{metric.replace(',', ' or ')} on {place} of {base.data.task}"
    if held_out:
        about += f", training images that were held out; trained on {chosen.train}, no test image is read"
    elif not chosen.validation:
        about += ", the test images: choose on --held_out, and use these figures only to report"
    return split, title, about


if __name__ == "__main__":
    cli.run(main)
