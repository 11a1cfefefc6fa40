"""The studies behind docs/recipes.md, each a command of `vit_jax ablate`: `python -m benchmarks.recipes NAME [OPTION …]`.

Options are those of `vit_jax ablate`, such as `--dry_run` and `--config run.data_dir=FOLDER`. A study that was ended goes on
where it was. `--list` prints the commands. `--plot FOLDER` draws FOLDER/batch_sizes.svg from the table of the study `batches`.
"""

import csv
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax import cli
from vit_jax.studies import ablate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The report's run from the embedded checkpoint, so that a CPU can repeat it: 32 px are 16 patches of 8.
_SMALL = "configs/cifar100_b16.py --config model.checkpoint=mini_8 --config data.image_size=32"
# One change each, with published values; docs/recipes.md has their sources.
_CHANGES = (
    "augment.flip=true",
    "augment.crop_area=(0.3,1.0)",
    "augment.crop=pad",
    "model.dropout=0.0",
    "data.normalization=google",
    "optimizer.learning_rate=0.01,0.1",
    "optimizer.name=adamw optimizer.learning_rate=0.0003,0.001",
    "optimizer.name=muon optimizer.learning_rate=0.001",
    "optimizer.ema=0.95",
    "optimizer.layer_decay=0.75",
    "optimizer.sam_rho=0.05",
    "augment.mixup=0.2",
    "augment.cutmix=1.0",
    "augment.randaugment_layers=2",
    "augment.erasing=0.25",
    "training.label_smoothing=0.1",
    "model.stochastic_depth=0.1",
    "model.tune=head,attention,lora,ssf",
)
# What gained more than a point there, each with those before it, then a higher rate again.
_TOGETHER = (
    "optimizer.learning_rate=0.1",
    "model.dropout=0.0",
    "data.normalization=google",
    "augment.crop_area=(0.3,1.0)",
)
_COMBINATIONS = (
    *(" ".join(_TOGETHER[:count]) for count in (2, 3, 4)),
    " ".join(("optimizer.learning_rate=0.3", *_TOGETHER[1:])),
)
BEST = _COMBINATIONS[2]  # the fields of configs/cifar100_best.py


def _changes(steps: int, seeds: int, changes: Sequence[str] = _CHANGES, held_out: str = "--held_out 'train[90%:]'") -> str:
    length = (
        f"--config training.steps={steps} --config optimizer.warmup_steps={steps // 10} --config training.save_every={steps}"
    )
    return f"{_SMALL} {length} {held_out} --seeds {seeds} {_vary(changes)}"


def _vary(changes: Iterable[str]) -> str:
    return " ".join(f"--vary {shlex.quote(change)}" for change in changes)


_BATCH = 64  # the report's
_SIZES = [_BATCH * 2**power for power in range(1, 6)]
_RULES = {  # the label in the figure → what is added to a change; the longest first, since a row is known by its ending
    "times its root": f" optimizer.base_batch_size={_BATCH} optimizer.rate_scaling=sqrt",
    "times the factor": f" optimizer.base_batch_size={_BATCH}",
    f"the rate of {_BATCH}": "",
}


def _batches(images: int) -> str:
    """Batches of 128 to 2,048 next to 64, at a constant number of images, each with a tenth of its steps as warm-up."""
    steps = [images // size for size in _SIZES]
    fields = {
        "training.batch_size": _SIZES,
        "training.steps": steps,
        "optimizer.warmup_steps": [max(1, count // 10) for count in steps],
    }
    change = " ".join(f"{name}={','.join(map(str, values))}" for name, values in fields.items())
    start = f"--config training.steps={images // _BATCH} --config optimizer.warmup_steps={images // _BATCH // 10}"
    varied = _vary(change + scaled for scaled in reversed(_RULES.values()))
    return f"configs/demo.py --config data.image_size=32 {start} --seeds 2 {varied}"


# What the optimizer of configs/cifar100_scratch.py was chosen from: RandAugment as AugReg's "medium", the rest as DeiT has it.
_STRONG = ("augment.randaugment_magnitude=15.0", "augment.erasing=0.25", "augment.mixup=0.8")
_OPTIMIZERS = (
    "optimizer.learning_rate=0.001,0.004",
    "optimizer.name=adamw optimizer.momentum=0.9 optimizer.learning_rate=0.001,0.002",
)


def _scratch(steps: int, changes: Sequence[str]) -> str:
    length = ("training.epochs=0", f"training.steps={steps}", "optimizer.warmup_steps=300")
    fixed = " ".join(f"--config {field}" for field in (*length, *_STRONG))
    return f"configs/cifar100_scratch.py {fixed} --held_out 'train[90%:]' --seeds 1 {_vary(changes)}"


STUDIES = {  # name → the arguments of `vit_jax ablate`; those whose names end in -gpu want a GPU
    "changes": _changes(200, seeds=2),
    "combinations": _changes(200, seeds=2, changes=_COMBINATIONS),
    "best": _changes(1000, seeds=2, changes=[BEST], held_out=""),  # the report's steps, on the test images
    "changes-gpu": _changes(2000, seeds=3),
    "scratch-optimizers-gpu": _scratch(1231, _OPTIMIZERS),
    "scratch-gpu": "configs/cifar100_scratch.py --seeds 3",
    "batches": _batches(20_480),
}


def arguments(name: str) -> list[str]:
    """The arguments of `vit_jax ablate` for a study, which runs in runs/recipes/NAME."""
    return [*shlex.split(STUDIES[name]), "--output", f"runs/recipes/{name}"]


def batch_sizes(folder: Path) -> "Figure":
    """Draws the accuracy by batch size and rule of scaling, the mean and each seed, from the table of the study `batches`.

    Raises:
      FileNotFoundError: there is no table.csv in the folder.
    """
    from matplotlib.figure import Figure

    from vit_jax.reports.canvas import COLOURS, WIDTH

    with open(folder / "table.csv", newline="") as file:
        base, *rows = csv.DictReader(file)
    lines = {label: [(_BATCH, base)] for label in reversed(_RULES)}
    for row in rows:
        size = int(re.search(r"batch_size=(\d+)", row["change"])[1])  # type: ignore[index]
        lines[next(label for label, added in _RULES.items() if row["change"].endswith(added))].append((size, row))
    figure = Figure((WIDTH, 2.8), layout="constrained")
    axis = figure.subplots()
    for (label, line), colour, marker in zip(lines.items(), COLOURS[:3], "osD", strict=True):
        for seed in [name for name in base if name.startswith("seed ")]:
            found = [(size, float(row[seed])) for size, row in line if row[seed]]
            axis.plot(*_columns(found), ".", color=colour, markersize=3, alpha=0.6)
        found = [(size, float(row["mean"])) for size, row in line if row["mean"]]
        axis.plot(*_columns(found), color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks([_BATCH, *_SIZES], [f"{size:,}" for size in (_BATCH, *_SIZES)])
    axis.set_xlabel("batch size")
    axis.set_ylabel("test accuracy, %")
    axis.legend(title="learning rate", loc="lower left")
    return figure


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [size for size, _ in points], [score for _, score in points]


def main(argv: list[str]) -> int:
    """Runs a study; returns the exit status."""
    if argv[:1] == ["--plot"] and len(argv) == 2:
        from vit_jax.reports.canvas import with_style
        from vit_jax.studies import tables

        tables.write_figure(Path(argv[1]) / "batch_sizes.svg", with_style(batch_sizes)(Path(argv[1])))
        return 0
    if argv == ["--list"]:
        print("\n".join(f"{name}: vit_jax ablate {shlex.join(arguments(name))}" for name in STUDIES))
        return 0
    if not argv or argv[0] not in STUDIES:
        print(f"{(__doc__ or '').strip()}\n\nNAME is one of: {', '.join(STUDIES)}", file=sys.stderr)
        return 0 if argv in (["--help"], ["-h"]) else 2
    return ablate.main([*arguments(argv[0]), *argv[1:]], "vit_jax ablate")


if __name__ == "__main__":
    sys.exit(cli.call(lambda: main(sys.argv[1:])))
