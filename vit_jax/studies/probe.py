"""Probes of a checkpoint: nearest neighbours and linear heads on its features, without fine-tuning.

    python -m vit_jax.studies.probe --checkpoint ViT-B_16 --task cifar100

The features of all training and test images are computed once and kept. The number of neighbours, and the rate and the decay of
the head, are chosen on held-out training images; then all training images are used, and the test images are classified once.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import cli
from vit_jax.studies import options

if TYPE_CHECKING:
    import numpy as np

KS = (1, 5, 10, 20)
RATES, DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), (0.0, 0.0001, 0.001, 0.01)
_BATCH = 256  # rows of an update of the linear heads


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.studies.probe") -> int:
    """Runs the probe; returns the exit status."""
    summary = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog=program, description=f"{summary[0]} {' '.join(summary[2].split())}")
    parser.add_argument("--checkpoint", required=True, help="published name, file, or a run's folder; its head is not used")
    parser.add_argument("--task", required=True, help="name of `vit_jax data list`, or own images: folder:PATH or csv:FILE")
    parser.add_argument("--image_size", type=int, default=0, help="pixels; default: of the checkpoint")
    parser.add_argument(
        "--held_out",
        default="",
        metavar="SPLIT",
        help="training images to choose on, as in 'train[80%%:]'; default: the last 10 %%",
    )
    parser.add_argument("--ks", type=options.numbers(int), default=KS, help="numbers of neighbours; default: 1,5,10,20")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="weigh neighbours by exp(similarity / T), DINO's T is 0.07; default: equally",
    )
    parser.add_argument("--lrs", type=options.numbers(float), default=RATES, help="learning rates; default: 0.001 to 0.3")
    parser.add_argument(
        "--decays", type=options.numbers(float, zero=True), default=DECAYS, help="weight decays; default: 0,0.0001,0.001,0.01"
    )
    parser.add_argument("--epochs", type=float, default=20.0, help="passes of the linear head over the features; default: 20")
    parser.add_argument(
        "--batch_size", type=int, default=256, help="images of which features are computed at once; default: 256"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the features; default: 0")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps prepared data; default: $TFDS_DATA_DIR")
    parser.add_argument("--output", type=Path, help="folder of features and results; default: runs/probe-<checkpoint>-<task>")
    args = parser.parse_args(argv)
    return cli.call(
        lambda: _run(args), "lower --batch_size, or give fewer --lrs and --decays; the features of all images must fit"
    )


def _run(args: argparse.Namespace) -> int:
    from vit_jax import runtime
    from vit_jax.errors import ConfigError
    from vit_jax.studies import tables

    limits = {"batch_size": (1, 2**17), "image_size": (0, 4096), "seed": (0, 2**32 - 1), "epochs": (1e-6, 1e6)}
    for name, (least, most) in {**limits, "temperature": (0, 1e6)}.items():
        if not least <= getattr(args, name) <= most:
            raise ConfigError(f"--{name} must be from {least:,} to {most:,}, got {getattr(args, name)}")
    runtime.prepare()
    folder = args.output or Path("runs", f"probe-{_word(args.checkpoint)}-{_word(args.task)}")
    (features, labels), tested, about = collect(args, folder)
    classes = about["classes"]
    first, last = options.held_out_range(args.held_out, about["train_split"], len(labels))
    found = probe(args, (features, labels), tested, classes, range(first, last))
    record = about | {"held_out": args.held_out or "the last 10 %", "held_out_images": last - first} | found
    rows = table(record)
    chosen_on = f"{last - first:,} of {len(labels):,} training images ({record['held_out']})"
    text = (
        f"Accuracy on {about['test_split']} of {args.task} ({len(tested[1]):,} images), with the features of {args.checkpoint} "
        f"at {about['image_size']} px; chosen on {chosen_on}, then all are used and the test images are classified once.\n\n"
        f"{tables.markdown(rows)}"
    )
    grid = [["learning rate", "weight decay", "held-out accuracy, %"]]
    grid += [[f"{point['learning_rate']:g}", f"{point['weight_decay']:g}", f"{100 * point['held_out_accuracy']:.2f}"]
             for point in record["linear"]["grid"]]  # fmt: skip
    tables.write_text(folder / "probe.json", json.dumps(record, indent=2) + "\n")
    tables.write_text(folder / "table.md", f"{text}\nEvery linear head:\n\n{tables.markdown(grid)}")
    print(text, end="")
    print(f"Features: {folder / 'features'}; results: {folder / 'probe.json'}, {folder / 'table.md'}")
    return 0


def _word(name: str) -> str:
    """A checkpoint or a task as a part of a folder's name: of paths the last name, "B/16" as "B_16"."""
    from vit_jax.files import expand_user

    kind, _, location = name.rpartition(":")
    path = expand_user(location, kind or "--checkpoint")
    word = path.absolute().name if kind in ("folder", "csv") or path.exists() else name
    return re.sub(r"[^\w.+@,-]+", "_", word)


def table(record: dict[str, Any]) -> list[list[str]]:
    """The rows of the table of a probe, with a heading."""
    knn, linear = record["knn"], record["linear"]
    rows = [["classifier", "held-out accuracy, %", "test accuracy, %"]]
    for k, accuracy in knn["held_out_accuracy"].items():
        tested = f"{100 * knn['test_accuracy']:.2f}" if int(k) == knn["k"] else ""
        rows.append([f"{k} nearest neighbours", f"{100 * accuracy:.2f}", tested])
    name = f"linear head, rate {linear['learning_rate']:g}, decay {linear['weight_decay']:g}"
    best = max(point["held_out_accuracy"] for point in linear["grid"])
    rows.append([f"{name} (of {len(linear['grid'])})", f"{100 * best:.2f}", f"{100 * linear['test_accuracy']:.2f}"])
    return rows


def _bar(what: str, total: int, unit: str) -> Callable[[int], None]:
    """A progress bar that is told how far the work is, and closes at its end."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc=what, unit=unit, file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10)

    def update(done: int) -> None:
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return update


def collect(args: argparse.Namespace, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(features, labels) of the training and of the test images, computed or from the folder, and what they are of.

    Raises:
      CheckpointError, DataError, ConfigError: if the weights, the images or the size cannot be used.
    """
    import jax.numpy as jnp

    from vit_jax import runtime
    from vit_jax.checkpoints.download import find
    from vit_jax.checkpoints.load import architecture, as_checkpoint_error, load
    from vit_jax.config import Data, Model, Run
    from vit_jax.data import splits
    from vit_jax.data.tasks import task
    from vit_jax.errors import CheckpointError, ConfigError
    from vit_jax.files import sha256
    from vit_jax.studies import features
    from vit_jax.training import devices
    from vit_jax.training.feed import Feed
    from vit_jax.training.step import logits_of
    from vit_jax.transforms.preprocess import for_evaluation

    row, size = task(args.task), args.image_size or architecture(args.checkpoint)[1]
    data = Data(task=args.task, image_size=size)
    sources = splits.open_splits(row, data, args.data_dir)
    if args.held_out:
        options.held_out_range(args.held_out, row.train_split, len(sources.train))  # fails before the features are computed
    try:
        model, params = load(args.checkpoint, num_classes=0, image_size=size)
    except CheckpointError:
        raise
    except ValueError as error:
        raise ConfigError(f"--image_size {size}: {error}") from None
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    settings = runtime.resolve_auto(Model(), model, tokens)
    model = model.clone(dtype=jnp.dtype(settings.dtype), attention=settings.attention)
    layout = devices.start(Run())
    apply = layout.evaluate(logits_of(model, for_evaluation(size, model.normalization, model.eval_crop)))
    placed, batch = layout.put(params), layout.round_up(args.batch_size)
    with as_checkpoint_error(args.checkpoint):
        digest = sha256(find(args.checkpoint))
    key = dict(weights=digest, task=row.name, builder=row.builder, image_size=size, normalization=model.normalization)
    key |= dict(eval_crop=model.eval_crop, dtype=settings.dtype, attention=settings.attention, batch=batch)
    found = []
    for split, source in ((row.train_split, sources.train), (row.test_split, sources.test)):
        name = features.folder_name(split, images=source.digest, parts=source.ranges, count=len(source), **key)
        feed = Feed(source, layout, budget=0, workers=0 if source.nbytes < 2**30 else -1)  # streamed: few batches in memory
        found.append(
            features.compute(apply, placed, feed, batch, folder / "features" / name, _bar(split, len(source), " images"))
        )
    about = {
        "checkpoint": args.checkpoint, "weights_sha256": digest, "task": args.task, "image_size": size,
        "train_split": row.train_split, "test_split": row.test_split, "classes": sources.train.num_classes,
    }  # fmt: skip
    return found[0], found[1], about


def probe(
    args: argparse.Namespace,
    trained: tuple["np.ndarray", "np.ndarray"],
    tested: tuple["np.ndarray", "np.ndarray"],
    classes: int,
    held_out: range,
) -> dict[str, Any]:
    """Chooses on the held-out rows of the training features, then uses all of them and tests once.

    Args:
      args: ks, temperature, lrs, decays, epochs and seed.
      trained, tested: features float32 [N, D] and labels int32 [N].
      classes: number of classes.
      held_out: positions of the rows to choose on.

    Returns:
      The content of probe.json that is about the classifiers.
    """
    import math

    import numpy as np

    from vit_jax.errors import ConfigError
    from vit_jax.studies import heads

    features, labels = trained
    chosen_on = np.arange(held_out.start, held_out.stop)
    rest = np.setdiff1d(np.arange(len(labels)), chosen_on)
    ks = sorted({k for k in args.ks if k <= len(rest)})
    if not ks:
        raise ConfigError(f"--ks {','.join(map(str, args.ks))}: there are only {len(rest):,} neighbours")
    votes = heads.nearest(features[rest], labels[rest], features[chosen_on], ks, classes, args.temperature)
    knn = {k: float((votes[k] == labels[chosen_on]).mean()) for k in ks}
    k = max(ks, key=lambda k: knn[k])
    predicted = heads.nearest(features, labels, tested[0], [k], classes, args.temperature)[k]

    grid = list(itertools.product(args.lrs, args.decays))
    seeds = dict(classes=classes, batch_size=_BATCH, seed=args.seed)
    scaled, steps = heads.standardise(features[rest]), math.ceil(args.epochs * len(rest) / _BATCH)
    bar = _bar(f"{len(grid)} linear heads", steps, " steps")
    trial = heads.train(scaled(features[rest]), labels[rest], grid=grid, steps=steps, progress=bar, **seeds)
    accuracies = heads.accuracies(trial, scaled(features[chosen_on]), labels[chosen_on])
    rate, decay = grid[int(accuracies.argmax())]
    scaled, steps = heads.standardise(features), math.ceil(args.epochs * len(labels) / _BATCH)
    bar = _bar("the chosen head", steps, " steps")
    final = heads.train(scaled(features), labels, grid=[(rate, decay)], steps=steps, progress=bar, **seeds)
    points = [
        {"learning_rate": rate, "weight_decay": decay, "held_out_accuracy": float(accuracy)}
        for (rate, decay), accuracy in zip(grid, accuracies, strict=True)
    ]
    return {
        "knn": {
            "temperature": args.temperature, "held_out_accuracy": {str(k): value for k, value in knn.items()}, "k": k,
            "test_accuracy": float((predicted == tested[1]).mean()),
        },
        "linear": {
            "epochs": args.epochs, "seed": args.seed, "grid": points, "learning_rate": rate, "weight_decay": decay,
            "test_accuracy": float(heads.accuracies(final, scaled(tested[0]), tested[1])[0]),
        },
    }  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
