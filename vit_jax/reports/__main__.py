"""The command line of the reports: `python -m vit_jax.reports RUN [RUN …] --help`."""

import argparse
import os

from vit_jax import cli


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.reports") -> int:
    """Writes one page; returns the exit status: 0, or 1 if something could not be used.

    SystemExit of 2 for a wrong command line.
    """
    return cli.call(lambda: _run(argv, program))


def _run(argv: list[str] | None, program: str) -> int:
    parser = argparse.ArgumentParser(
        prog=program,
        description="A page about a run, at any time, also while it goes on; of several runs one that compares them.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/demo")
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in the run's folder, comparison.html beside the first of several"
    )
    parser.add_argument(
        "--num_images",
        type=int,
        default=6,
        metavar="N",
        help="show the attention on a test image of each of N classes, of all where there are fewer; default 6",
    )
    parser.add_argument(
        "--images",
        type=_numbers,
        default=[],
        metavar="N,…",
        help="show these test images instead, by their numbers, counted from 0",
    )
    parser.add_argument(
        "--layers", type=_numbers, default=[], metavar="N,…", help="show these layers' attention apart, counted from 1"
    )
    parser.add_argument(
        "--heads", type=_numbers, default=[], metavar="N,…", help="these heads' alone, in the last layer or in --layers"
    )
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and (args.images or args.layers or args.heads or args.num_images != parser.get_default("num_images")):
        parser.error("--num_images, --images, --layers and --heads are for the page of a single run")
    # A report never takes the accelerator from the run that it is about.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Imported here, because it takes a second or two, and Ctrl-C has to end the process meanwhile.
    from vit_jax.reports.page import write

    options = {name: getattr(args, name) for name in ("output", "num_images", "images", "layers", "heads")}
    print(write(*args.runs, **options))
    return 0


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers, as in 1,2, got {text!r}")
    return [int(part) for part in dict.fromkeys(text.split(","))]


if __name__ == "__main__":
    cli.run(main)
