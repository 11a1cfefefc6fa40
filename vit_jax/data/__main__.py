"""The command line of the data: `python -m vit_jax.data {list,prepare,show} --help`."""

import argparse
import sys

from vit_jax.data.prepare import prepare
from vit_jax.data.sources import open_split
from vit_jax.data.tasks import TASKS, find_prepared, task
from vit_jax.errors import DataError


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.data", description="The data sets that can be learnt.")
    commands = parser.add_subparsers(dest="command", required=True)
    directory = argparse.ArgumentParser(add_help=False)
    directory.add_argument(
        "--data_dir",
        default="",
        metavar="DIR",
        help="where TFDS keeps prepared data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets",
    )
    commands.add_parser("list", parents=[directory], help="every task, and whether it is prepared here")
    preparing = commands.add_parser("prepare", parents=[directory], help="make TFDS data, without TensorFlow")
    preparing.add_argument("name", help="of the task")
    preparing.add_argument("--archive", metavar="FILE", help="its tar file, in any compression; default: downloaded")
    showing = commands.add_parser("show", parents=[directory], help="splits, counts and classes of a prepared task")
    showing.add_argument("name", help="of the task")
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            _list(args.data_dir)
        elif args.command == "prepare":
            print(prepare(task(args.name), args.archive, args.data_dir))
        else:
            _show(args.name, args.data_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _list(data_dir: str) -> None:
    for row in TASKS.values():
        print(f"{row.name:18}{row.num_classes:5} classes   {find_prepared(row, data_dir) or 'not prepared'}")


def _show(name: str, data_dir: str) -> None:
    row = task(name)
    splits = {split: open_split(row, split, data_dir) for split in (row.train_split, row.test_split)}
    print(find_prepared(row, data_dir))
    for split, source in splits.items():
        height, width, _ = source.picture_shape
        print(f"{split:8}{len(source):8,} pictures of {height} x {width}, {source.nbytes / 2**20:.1f} MiB as uint8")
    print(f"{source.num_classes} classes: {', '.join(source.class_names)}")


if __name__ == "__main__":
    sys.exit(main())
