"""The benchmark's command line: `python -m benchmarks --help`."""

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks import page, suites
from benchmarks.measure import ContestantError, Skipped, say
from benchmarks.parts import PARTS
from benchmarks.processes import ROOT
from vit_jax.errors import ConfigError, DataError
from vit_jax.interop import peers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures this package, beside others where they are named. Progress goes to standard error.",
        epilog="\n".join(f"{name:12}{(act.__doc__ or '').strip()}" for name, act in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(PARTS)}; default: train inference")
    parser.add_argument("--model", default="B/16", help="a row of vit_jax.models.variants.VARIANTS (B/16)")
    parser.add_argument("--size", type=_positive, default=224, help="of the images, in pixels (224)")
    parser.add_argument("--batch", type=_positive, default=64, help="images (64)")
    parser.add_argument("--classes", type=_positive, default=100, help="(100)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation (float32)")
    parser.add_argument("--attention", default="auto", help="auto, xla or cudnn; several, separated by commas, are compared")
    parser.add_argument("--accumulation", type=_positive, default=1, help="slices that our batch is computed in (1)")
    parser.add_argument("--remat", action="store_true", help="rematerialise the blocks in the backward pass")
    parser.add_argument("--rounds", type=_positive, default=9, help="of which the median is taken (9)")
    parser.add_argument("--least", type=float, metavar="SECONDS", help="that a round lasts (0.5 beside a GPU, else one step)")
    parser.add_argument(
        "--peer",
        default="",
        help="timm, transformers, keras_hub, original; with options, as in timm+bf16+compile+channels_last; several by commas",
    )
    parser.add_argument("--peer-python", default="", metavar="PATH", help="the interpreter that has the peers, if not this one")
    parser.add_argument("--original", default="", metavar="CHECKOUT", help="of github.com/google-research/vision_transformer")
    parser.add_argument("--apart", action="store_true", help="one after the other, and back, instead of side by side")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="that one answer of a peer may take (600)")
    parser.add_argument("--images", type=_positive, default=10_000, help="of an evaluation pass (10,000)")
    parser.add_argument("--steps", type=_positive, default=3000, help="of the loop (3,000)")
    parser.add_argument("--check", action="store_true", help="memory: try the largest batch of --model at --size here")
    parser.add_argument("--data-dir", default="", metavar="DIR", help="run: where TFDS keeps CIFAR-100, if not where it does")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where the results go; those of other commands stay")
    parser.add_argument("--suite", choices=suites.SUITES, help="a table of these, each in a process of its own")
    parts = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in suites.SUITES.items())
    parser.add_argument("--only", metavar="PART,…", help=f"of a suite; {parts}")
    parser.add_argument("--page", action="store_true", help="make the tables of docs/performance.md from docs/benchmarks/")
    return parser


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a command line; exits with a sentence for what it gets wrong."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    options.overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in options.overrides]:
        parser.error(f"there is no option {unknown[0]}")
    options.what = options.what or ["train", "inference"]
    options.peer = [name for name in options.peer.split(",") if name]
    if options.overrides and options.what != ["run"]:
        parser.error(f"{options.overrides[0]} is for `run`, whose configuration it changes")
    if unknown := [name for name in options.what if name not in PARTS]:
        parser.error(f"there is nothing called {unknown[0]!r} to measure; there are {', '.join(PARTS)}")
    if unknown := [name for name in options.attention.split(",") if name not in ("auto", "xla", "cudnn")]:
        parser.error(f"--attention {unknown[0]}: there are auto, xla and cudnn")
    if "cudnn" in options.attention.split(",") and options.dtype == "float32":
        parser.error("--attention cudnn computes in bfloat16: add --dtype bfloat16")
    try:
        for name in options.peer:
            peers.variant(name)
    except ValueError as error:
        parser.error(str(error))
    if any(name.split("+")[0] == "original" for name in options.peer) and not options.original:
        parser.error("--peer original needs --original, a checkout of github.com/google-research/vision_transformer")
    parts = suites.SUITES.get(options.suite, {})
    options.only = options.only.split(",") if options.only else list(parts)
    if unknown := [name for name in options.only if name not in parts]:
        having = f"the suite {options.suite} has {', '.join(parts)}" if parts else "name its suite with --suite"
        parser.error(f"--only: there is no part {unknown[0]!r}; {having}")
    return options


def _portable(argv: list[str]) -> list[str]:
    """A command line without the paths of this machine."""
    paths = ("--output", "--peer-python", "--original", "--data-dir")
    return [
        argument
        for before, argument in zip(["", *argv], argv, strict=False)
        if before not in paths and argument.split("=")[0] not in paths
    ]


def measure(options: argparse.Namespace, command: str) -> tuple[list[dict[str, Any]], dict[str, str], bool]:
    """The results of a command, printed as they come, the versions of what it ran, and whether none failed."""
    results, fine, versions = list[dict[str, Any]](), True, dict[str, str]()
    for name in [name for name in PARTS if name in options.what]:
        try:
            found = PARTS[name](options)
        except Skipped as reason:
            say(f"{name} is skipped: {reason}")
            results.append({"what": name, "rows": [], "notes": [f"skipped: {reason}"]})
        except (ContestantError, DataError) as error:
            say(f"error: {name}: {error}")
            results.append({"what": name, "rows": [], "notes": [f"failed: {error}"]})
            fine = False
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            say(f"error: {name}: too little memory for --batch {options.batch}")
            results.append({"what": name, "rows": [], "notes": [f"failed: too little memory for a batch of {options.batch}"]})
            fine = False
        else:
            versions |= found.versions
            results.append({"what": found.what, "rows": found.rows, "notes": found.notes})
            print(page.text(results[-1]), flush=True)
    date = datetime.date.today().isoformat()
    return [{**result, "command": command, "date": date} for result in results], versions, fine


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.page:
        path = ROOT / "docs" / "performance.md"
        path.write_text(page.render(path.read_text(), ROOT / "docs" / "benchmarks"))
        return 0
    try:
        if options.suite:
            return suites.run(options)
        results, versions, fine = measure(options, " ".join(["python -m benchmarks", *_portable(argv)]))
        if options.output:
            where = page.machine()
            where["versions"] |= versions
            page.store(options.output, where, results)
        return 0 if fine else 1
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
