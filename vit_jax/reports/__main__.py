"""The command line of the reports: `python -m vit_jax.reports RUN [RUN …]`."""

import argparse
import os

from vit_jax import cli


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.reports") -> int:
    """Writes one page.

    Args:
      argv: the arguments; None: those of the process.
      program: the name of the command in messages.

    Returns:
      The exit status: 0, or 1 after an error.

    Raises:
      SystemExit: with status 2, if the command line is wrong.
    """
    return cli.call(lambda: _run(argv, program))


def _run(argv: list[str] | None, program: str) -> int:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Writes a page about a run, also while the run is training; for several runs, a page that compares them.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/demo")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page; default: report.html in the folder of the run, or comparison.html next to the first of several",
    )
    parser.add_argument(
        "--num_images",
        type=int,
        default=6,
        metavar="N",
        help="show the attention on one test image of each of N classes, or of all classes if there are fewer; default: 6",
    )
    parser.add_argument(
        "--images", type=_numbers, default=[], metavar="N,…", help="show these test images instead, counted from 0"
    )
    parser.add_argument(
        "--layers", type=_numbers, default=[], metavar="N,…", help="also show the attention of these layers, counted from 1"
    )
    parser.add_argument(
        "--heads",
        type=_numbers,
        default=[],
        metavar="N,…",
        help="also show the attention of these heads, counted from 1, in --layers or else in the last layer",
    )
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and (args.images or args.layers or args.heads or args.num_images != parser.get_default("num_images")):
        parser.error("--num_images, --images, --layers and --heads need a single run")
    # A report must not take the accelerator from the run that it is about.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Imported here, because it takes a second or two, and Ctrl-C must end the process meanwhile.
    from vit_jax.reports.page import write

    options = {name: getattr(args, name) for name in ("output", "num_images", "images", "layers", "heads")}
    print(write(*args.runs, **options))
    return 0


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2, got {text!r}")
    return [int(part) for part in dict.fromkeys(text.split(","))]


if __name__ == "__main__":
    cli.run(main)
