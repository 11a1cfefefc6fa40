"""The command line of the reports: `python -m vit_jax.reports RUN [RUN …] --help`."""

import argparse
import os
import signal
import sys
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Writes one page; returns the exit status: 0, 1 where something could not be used, 130 where somebody interrupted.

    SystemExit of 2 for a wrong command line.
    """
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.reports",
        description="A page about a run, at any time, also while it goes on; of several runs one that compares them.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/demo")
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in the run's folder, comparison.html beside the first of several"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=6,
        metavar="N",
        help="show the attention on a test picture of each of N classes, of all where there are fewer; default 6",
    )
    parser.add_argument(
        "--layers", type=_numbers, default=[], metavar="N,…", help="show these layers' attention apart, counted from 1"
    )
    parser.add_argument(
        "--heads", type=_numbers, default=[], metavar="N,…", help="these heads' alone, in the last layer or in --layers"
    )
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and (args.layers or args.heads or args.pictures != parser.get_default("pictures")):
        parser.error("--pictures, --layers and --heads are for the page of a single run")
    # A report never takes the accelerator from the run that it is about.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Imported here, for it takes a second or two, and Ctrl-C is waited for.
    from vit_jax.errors import ReportError
    from vit_jax.reports.page import write

    try:
        print(write(*args.runs, output=args.output, pictures=args.pictures, layers=args.layers, heads=args.heads))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # the machine's: no permission, a full disk, something in the way
        print(f"error: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on, as in 1,2, got {text!r}")
    return [int(part) for part in dict.fromkeys(text.split(","))]


def _end(*_: Any) -> None:
    """Answers Ctrl-C: libraries that are being imported, and JAX at times, lose a KeyboardInterrupt or abort in their C++."""
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    sys.exit(main())
