"""The command line of the data: `python -m vit_jax.data {list,prepare,show} --help`."""

import argparse
from pathlib import Path
from typing import Any

from vit_jax import cli
from vit_jax.data.places import find_prepared
from vit_jax.data.tasks import OTHERS, TASKS, task
from vit_jax.errors import DataError, printable

_GRID = (10, 10)  # the most rows (classes) and columns (images of a class) that `show` draws
_CELL = 96  # pixels of an image in the grid
_LABEL = 160  # pixels for the name of a class


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.data") -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog=program, description="The data sets to train on.")
    commands = parser.add_subparsers(dest="command", required=True)
    directory = argparse.ArgumentParser(add_help=False)
    directory.add_argument(
        "--data_dir",
        default="",
        metavar="DIR",
        help="directory of TFDS with the prepared data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets",
    )
    commands.add_parser("list", parents=[directory], help="print every task, and the folder of its data if they are prepared")
    preparing = commands.add_parser("prepare", parents=[directory], help="make the TFDS data of a task, without TensorFlow")
    preparing.add_argument("name", help="name of the task")
    preparing.add_argument(
        "--archive", metavar="FILE", help="tar file of the data set, in any compression; default: download it"
    )
    preparing.add_argument(
        "--source",
        choices=("archive", "hub"),
        default="archive",
        help="the official archive, or its copy on the Hugging Face hub",
    )
    showing = commands.add_parser(
        "show", parents=[directory], help="print splits, counts and classes of a prepared task; draw its images"
    )
    showing.add_argument("name", help="name of the task, or own images: folder:PATH or csv:FILE")
    showing.add_argument(
        "--on_error", choices=("raise", "skip"), default="raise", help="own images that cannot be read: an error, or left out"
    )
    showing.add_argument(
        "--output", type=Path, metavar="FILE.png", help="write a grid of training images, a row for each class"
    )
    args = parser.parse_args(argv)
    return cli.call(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.command == "list":
        _list(args.data_dir)
    elif args.command == "prepare":
        from vit_jax.data.prepare import prepare

        row = task(args.name)
        if row.kind != "tfds":
            raise DataError(
                f"{row.name} needs no preparation; train on it, or look at it: python -m vit_jax.data show {row.name}"
            )
        if args.archive and args.source == "hub":
            raise DataError("--archive and --source hub exclude each other")
        print(prepare(row, args.archive, args.data_dir, args.source == "hub"))
    else:
        _show(args.name, args.data_dir, args.output, args.on_error)
    return 0


def _list(data_dir: str) -> None:
    for row in TASKS.values():
        print(f"{row.name:22}{row.num_classes:5} classes   {find_prepared(row, data_dir) or 'not prepared'}")
    print("Others:", *OTHERS.values(), sep="\n  ")


def _show(name: str, data_dir: str, output: Path | None, on_error: str) -> None:
    """Prints the sizes of the splits and the number of images of each class; writes a grid of training images to `output`."""
    from vit_jax.data.splits import open_split

    if output is not None and output.suffix != ".png":
        raise DataError(f"--output {output}: expected a name that ends in .png")
    row = task(name)
    splits = {split: open_split(row, split, data_dir, on_error=on_error) for split in (row.train_split, row.test_split)}
    print(find_prepared(row, data_dir) if row.kind == "tfds" else Path(row.builder).resolve())
    for split, source in splits.items():
        height, width, _ = source.image_shape
        sizes = f"images of {height} x {width}" if not source.resized else f"images, resized to {height} x {width}"
        print(f"{split:8}{len(source):8,} {sizes}, {source.nbytes / 1e6:.1f} MB as uint8")
    for skipped in splits[row.train_split].skipped:
        print(f"left out: {skipped}")
    if ignored := splits[row.train_split].ignored:
        print(f"not used: {ignored}")
    names = splits[row.train_split].class_names
    counts, examples = zip(*(_count(source) for source in splits.values()), strict=True)
    print(f"{f'{len(names)} classes':26}" + "".join(f"{split:>10}" for split in splits))
    for label, class_name in enumerate(names):
        print(f"  {printable(class_name):24}" + "".join(f"{count[label]:10,}" for count in counts))
    if output is not None:
        _draw(examples[0], names, output)
        print(output)


def _count(source: Any) -> tuple[list[int], list[list[Any]]]:
    """Counts the images of each class of a split; returns the counts and the first images of each class, for the grid."""
    import numpy as np

    counts = [0] * source.num_classes
    examples: list[list[Any]] = [[] for _ in counts]
    for first in range(0, len(source), 1024):
        images, labels = source.take(np.arange(first, min(first + 1024, len(source))))
        for image, label in zip(images, labels, strict=True):
            counts[label] += 1
            if len(examples[label]) < _GRID[1]:
                examples[label].append(image.copy())
    return counts, examples


def _draw(examples: list[list[Any]], names: list[str], output: Path) -> None:
    """Writes a PNG with a row for each class, its name and first images; of many classes, evenly spaced ones."""
    from PIL import Image, ImageDraw

    from vit_jax.files import whole_file

    rows, columns = min(_GRID[0], len(names)), _GRID[1]
    page = Image.new("RGB", (_LABEL + columns * _CELL, rows * _CELL), "white")
    draw = ImageDraw.Draw(page)
    for row in range(rows):
        label = round(row * (len(names) - 1) / max(1, rows - 1))
        draw.text((8, row * _CELL + _CELL // 2), printable(names[label], 24), fill="black", anchor="lm", font_size=13)
        for column, pixels in enumerate(examples[label]):
            image = Image.fromarray(pixels)
            image.thumbnail((_CELL - 4, _CELL - 4))
            scale = (_CELL - 4) // max(image.size)
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)  # keeps pixels sharp
            page.paste(image, (_LABEL + column * _CELL + 2, row * _CELL + 2))
    with whole_file(output) as file:
        page.save(file, "PNG")


if __name__ == "__main__":
    cli.run(main)
